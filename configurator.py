"""Settings from override files and flags, typed and checked.

    python train.py config/a.py config/b.py --batch_size=32 --compile=false

The fields of a dataclass are the settings; `override` applies files and flags from left to right.
A file is Python code, run with your rights. Every name that it assigns must be a setting, except
imported names and those that start with an underscore.
"""

import ast
import difflib
import inspect
import os
import re
import runpy
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from textwrap import shorten
from typing import get_args

from console import UsageError

WORDS = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'true or false',
         type(None): 'none'}


def override(config, argv, usage=''):
    """Return a copy of the dataclass `config` with the files and flags of `argv` applied.

    A flag is --key=value; a bare --flag means true. Dashes in its name count as underscores, and
    a value of \\n, once or more, as line breaks. A field's metadata may name others that it
    `resets` to None. --help prints `usage` and all settings, and exits. Raises UsageError.
    """
    if '--help' in argv or '-h' in argv:
        print(f'{(usage or "").strip()}\n\n{describe(config)}')  # python -OO has no docstrings
        sys.exit(0)
    known = {field.name: field for field in fields(config)}
    values = {}
    for arg in argv:
        is_flag = arg.startswith('-')
        flag, equals, text = arg.partition('=')
        assigned = {flag.lstrip('-').replace('-', '_'): text} if is_flag else run_file(arg, known)
        for name, value in assigned.items():
            if name not in known:
                raise UsageError(f'{arg}: {name!r} is not a setting: {suggestion(name, known)}'
                                 + '; a name of your own must begin with _' * (not is_flag))
            # The types that it takes: (float, NoneType) for `float | None`, (int,) for `int`.
            allowed = get_args(known[name].type) or (known[name].type,)
            if is_flag and not equals and bool not in allowed:
                raise UsageError(f'{flag} needs a value: write {flag}=VALUE, with no space')
            if is_flag and str not in allowed:
                value = parsed(text if equals else 'true')
            elif is_flag and not text.replace('\\n', ''):  # a shell passes \n as two characters
                value = text.replace('\\n', '\n')
            values |= dict.fromkeys(known[name].metadata.get('resets', ()))
            values[name] = checked(value, allowed, f'{arg}: {name}={shorten(repr(value), 80)}')
    return replace(config, **values)


def run_file(path, known):
    """The settings that an override file assigns, a dict.

    The file is looked for in the current folder, then beside this file.
    """
    found = path if os.path.exists(path) else os.path.join(os.path.dirname(__file__), path)
    if not os.path.isfile(found):
        raise UsageError(f'{path} is no config file: see config/; a flag looks like --key=value')
    try:
        names = runpy.run_path(found)
    except (Exception, SystemExit) as error:
        raise UsageError(f'config file {path} fails ({type(error).__name__}: {error}): correct '
                         'it; it may contain only assignments') from None
    imported = {(node.asname or node.name).split('.')[0]
                for node in ast.walk(ast.parse(Path(found).read_bytes()))
                if isinstance(node, ast.alias)}
    return {name: value for name, value in names.items()
            if name in known or not (name.startswith('_') or name in imported)}


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
    """`value`, if its type is in `allowed`; an int also as a float, 0 and 1 also as a bool."""
    with suppress(AttributeError, ValueError, RuntimeError):
        value = value.item()  # a single number of numpy's or torch's
    if type(value) is int and abs(value) >= 2**63:
        raise UsageError(f'{shown} is too large')
    if bool in allowed and type(value) is int and value in (0, 1):
        return bool(value)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        raise UsageError(f'{shown} must be {" or ".join(WORDS[kind] for kind in allowed)}')
    return value


def check(config, at_least_1='', below_1='', **choices):
    """Refuse settings that are negative or not among their `choices`. Raises UsageError."""
    for name, value in vars(config).items():
        if name in choices and value not in choices[name]:
            raise UsageError(f'{name}={value!r} must be one of {[*choices[name]]}')
        least = 1 if name in at_least_1.split() else 0
        if isinstance(value, (int, float)) and not value >= least:  # so NaN is refused as well
            raise UsageError(f'{name} is {value}: it must be at least {least}')
        if name in below_1.split() and value >= 1:
            raise UsageError(f'{name} is {value}: it must be below 1')


def describe(config):
    """All settings with their values and their comments in the source, under its headings."""
    lines, classes = [], type(config).__mro__[-2::-1]  # a base class first
    source = ''.join(map(inspect.getsource, classes))
    for name, reason in re.findall(r'^    (# .*|\w+)(?:: .*  # (.*))?', source, re.M):
        if name.startswith('#'):
            lines.append(f'\n{name}')
        elif hasattr(config, name):
            value = getattr(config, name)
            flag = f'--{name}={value if str(value).isprintable() else repr(value)}'
            lines.append(f'  {flag:<38} {reason}'.rstrip())
    return '\n'.join(lines).strip('\n')
