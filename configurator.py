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
import runpy
import sys
from contextlib import suppress
from dataclasses import fields, replace
from types import ModuleType
from typing import get_args

from console import UsageError

WORDS = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'true or false',
         type(None): 'none'}


def override(config, argv, usage=''):
    """Return a copy of the dataclass `config` with the files and flags of `argv` applied.

    A flag is --key=value; a bare --flag means true. Dashes in a flag's name count as underscores.
    `--help` prints `usage` and every setting with its default and reason, and exits. Raises
    UsageError, in one line, for a broken file, an unknown name or a value of the wrong type.
    """
    if '--help' in argv or '-h' in argv:
        print(usage.strip() + '\n\n' + describe(config))
        sys.exit(0)
    # The types that a setting takes: (float, NoneType) for `float | None`, (int,) for `int`.
    types = {field.name: get_args(field.type) or (field.type,) for field in fields(config)}
    values = {}
    for arg in argv:
        is_flag = arg.startswith('-')
        flag, equals, text = arg.partition('=')
        assigned = {flag.lstrip('-').replace('-', '_'): text} if is_flag else run_file(arg)
        for name, value in assigned.items():
            if name not in types:
                raise UsageError(f'{arg}: {name!r} is not a setting: {suggestion(name, types)}')
            allowed = types[name]
            if is_flag and not equals and bool not in allowed:
                raise UsageError(f'{flag} needs a value: write {flag}=VALUE, with no space')
            if is_flag and str not in allowed:
                value = parsed(text if equals else 'true')
            values[name] = checked(value, allowed, f'{arg}: {name}={value!r}')
    return replace(config, **values)


def run_file(path):
    """What an override file assigns; it is looked for here, then beside the scripts."""
    found = path if os.path.exists(path) else os.path.join(os.path.dirname(__file__), path)
    if not os.path.isfile(found):
        raise UsageError(f'{path} is no config file: see the folder config/; flags look like '
                         '--key=value')
    try:
        names = runpy.run_path(found)
    except (Exception, SystemExit) as error:
        raise UsageError(f'config file {path} fails ({type(error).__name__}: {error}): '
                         'mend it, it must be plain assignments') from None
    return {name: value for name, value in names.items()
            if not name.startswith('_') and not isinstance(value, ModuleType)}


def suggestion(name, known):
    """What to write instead of an unknown setting."""
    # Initials come first: lr means learning_rate, though min_lr looks more like it.
    near = [k for k in known if name == ''.join(word[0] for word in k.split('_'))]
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'did you mean {near[0]!r}?' if near else '--help lists them all'


def parsed(text):
    """The number, truth or None that a flag's text stands for; else the text."""
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return {'true': True, 'false': False, 'none': None}.get(text.lower(), text)


def checked(value, allowed, shown):
    """`value`, if it is of a type in `allowed`; an int also as a float, 0 and 1 also as a bool."""
    if bool in allowed and value in (0, 1):
        return bool(value)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) in allowed:
        return value
    raise UsageError(f'{shown} must be {" or ".join(WORDS[kind] for kind in allowed)}')


def describe(config):
    """Every setting with its value and the comment that stands behind it in the source."""
    reasons = dict(re.findall(r'^    (\w+): .*  # (.*)', inspect.getsource(type(config)), re.M))
    lines = []
    for name, value in vars(config).items():
        flag = f'--{name}={value if str(value).isprintable() else repr(value)}'
        lines.append(f'  {flag:<38} {reasons.get(name, "")}'.rstrip())
    return '\n'.join(lines)
