"""Settings from override files and flags, typed and checked.

    python train.py config/a.py config/b.py --batch_size=32 --compile=false

`override` applies them from left to right onto a dataclass whose fields are the settings. An
override file is Python code, run with your rights. Every name that it assigns must be a setting,
except modules that it imports and names that start with an underscore.
"""

import difflib
import inspect
import os
import re
import sys
from contextlib import suppress
from dataclasses import replace
from types import ModuleType
from typing import get_args, get_type_hints

from console import UsageError

WORDS = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'true or false',
         type(None): 'none'}


def override(config, argv, usage=''):
    """Return a copy of the dataclass `config` with the files and flags of `argv` applied.

    A flag is --key=value; a bare --flag means true. Dashes in a flag's name count as underscores.
    `--help` prints `usage` and every setting with its default and reason, and exits. Raises
    UsageError in one sentence for a file that is missing or broken, an unknown name, or a value
    of the wrong type.
    """
    if '--help' in argv or '-h' in argv:
        print(usage.strip() + '\n\n' + describe(config))
        sys.exit(0)
    # The types that a setting takes: (float, NoneType) for `float | None`, (int,) for `int`.
    types = {name: get_args(hint) or (hint,)
             for name, hint in get_type_hints(type(config)).items()}
    values = {}
    for arg in argv:
        if not arg.startswith('-'):
            for name, value in run_file(arg).items():
                allowed = types_of(name, types, f'{name!r} in {arg}')
                values[name] = checked(value, allowed, f'{name} in {arg} is {value!r}')
            continue
        flag, equals, text = arg.partition('=')
        name = flag.lstrip('-').replace('-', '_')
        allowed = types_of(name, types, flag)
        if not equals and bool not in allowed:
            raise UsageError(f'{flag} needs a value: write {flag}=VALUE, with no space')
        values[name] = checked(parsed(text if equals else 'true', allowed), allowed, arg)
    return replace(config, **values)


def run_file(path):
    """What an override file assigns; it is looked for here, then beside the scripts."""
    found = path if os.path.exists(path) else os.path.join(os.path.dirname(__file__), path)
    names = {'__file__': found}
    try:
        with open(found, 'rb') as file:
            source = file.read()
    except OSError as error:
        raise UsageError(f'cannot read the config file {path!r} ({error.strerror}): arguments '
                         'without -- are settings files, flags look like --key=value') from None
    try:
        exec(compile(source, found, 'exec'), names)  # decoded as Python files are
    except Exception as error:
        raise UsageError(f'config file {path} fails: {type(error).__name__}: {error}') from None
    return {name: value for name, value in names.items()
            if not name.startswith('_') and not isinstance(value, ModuleType)}


def types_of(name, types, shown):
    """The types that the setting `name` takes. Raises UsageError, with the name that was meant."""
    if name in types:
        return types[name]
    # Initials come first: lr means learning_rate, though min_lr looks more like it.
    near = [known for known in types if name == ''.join(word[0] for word in known.split('_'))]
    near += difflib.get_close_matches(name, types, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]!r}?' if near else '--help lists them all'
    raise UsageError(f'{shown} is not a setting: {hint}')


def parsed(text, allowed):
    """The value that a flag's text stands for, where `allowed` has its type; else the text."""
    value = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
    if type(value) in allowed:
        return value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def checked(value, allowed, shown):
    """`value`, if it is of a type in `allowed`; an int also as a float, 0 and 1 also as a bool."""
    if bool in allowed and value in (0, 1):
        return bool(value)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) in allowed:
        return value
    raise UsageError(f'{shown}: it must be {" or ".join(WORDS[kind] for kind in allowed)}')


def describe(config):
    """Every setting with its value and the comment that stands behind it in the source."""
    reasons = dict(re.findall(r'^    (\w+): .*  # (.*)', inspect.getsource(type(config)), re.M))
    lines = []
    for name, value in vars(config).items():
        flag = f'--{name}={value if str(value).isprintable() else repr(value)}'
        lines.append(f'  {flag:<38} {reasons.get(name, "")}'.rstrip())
    return '\n'.join(lines)
