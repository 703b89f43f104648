"""Settings from override files and flags, typed and checked.

    python train.py config/a.py config/b.py --batch_size=32 --compile=false

`override` applies them from left to right onto a dataclass whose fields are the settings. An
override file is Python: plain assignments, run with the rights of whoever runs it. Names that
start with an underscore, and modules that it imports, are its own affair; any other name must be a
setting.
"""

import difflib
import inspect
import io
import sys
import tokenize
from dataclasses import fields, replace
from types import ModuleType
from typing import get_args, get_type_hints

from console import UsageError


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
    types = get_type_hints(type(config))
    values = {}
    for arg in argv:
        if not arg.startswith('-'):
            for name, value in run_file(arg).items():
                values[name] = checked(name, value, types, where=arg)
            continue
        name, equals, text = arg.lstrip('-').partition('=')
        name = name.replace('-', '_')
        if name not in types:
            raise UsageError(unknown(f'--{name}', name, types))
        if not equals and bool not in kinds(types[name]):
            raise UsageError(f'{arg} needs a value: write {arg}=VALUE, with no space')
        values[name] = parsed(name, text if equals else 'true', types)
    return replace(config, **values)


def run_file(path):
    """Run an override file; return the settings that it assigns."""
    try:
        with open(path, encoding='utf-8') as file:
            source = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UsageError(
            f'cannot read the config file {path!r} ({reason}): '
            'arguments without -- are files of settings, flags look like --key=value'
        ) from None
    names = {'__file__': path}
    try:
        exec(compile(source, path, 'exec'), names)
    except Exception as error:
        raise UsageError(
            f'the config file {path} fails: {type(error).__name__}: {error}'
        ) from None
    return {
        name: value
        for name, value in names.items()
        if not name.startswith('_') and not isinstance(value, ModuleType)
    }


def kinds(hint):
    """The types that a field takes: (float, NoneType) for `float | None`, (int,) for `int`."""
    return get_args(hint) or (hint,)


def checked(name, value, types, where):
    """`value`, as an override file assigned it, if it is of the type that `name` wants."""
    if name not in types:
        raise UsageError(unknown(f'{name!r} in {where}', name, types))
    allowed = kinds(types[name])
    if bool in allowed and value in (0, 1):
        return bool(value)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise UsageError(f'{name} in {where} is {value!r}: it must be {wanted(allowed)}')
    return value


def parsed(name, text, types):
    """The value that `text`, from a flag, means for `name`."""
    allowed = kinds(types[name])
    words = {'true': True, '1': True, 'false': False, '0': False}
    if type(None) in allowed and text.lower() == 'none':
        return None
    if bool in allowed and text.lower() in words:
        return words[text.lower()]
    for kind in (int, float, str):
        if kind in allowed:
            try:
                return kind(text)
            except ValueError:
                pass
    raise UsageError(f'--{name}={text}: {text!r} is not {wanted(allowed)}')


def wanted(allowed):
    """What to write for a field of these types, in words."""
    words = {
        bool: 'true or false', int: 'a whole number', float: 'a number', str: 'a text',
        type(None): 'none',
    }
    return ' or '.join(words[kind] for kind in allowed)


def unknown(shown, name, types):
    """The complaint about a name that is no setting, with the nearest one that is."""
    near = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]!r}?' if near else '--help lists them all'
    return f'{shown} is not a setting: {hint}'


def describe(config):
    """Every setting with its value and the comment that stands behind it in the source."""
    reasons, name = {}, None
    source = inspect.getsource(type(config))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and not token.line[: token.start[1]].strip():
            name = token.string
        elif token.type == tokenize.COMMENT and name and token.line.strip()[0] != '#':
            reasons[name] = token.string.lstrip('# ')
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        flag = f'--{field.name}={value if str(value).isprintable() else repr(value)}'
        lines.append(f'  {flag:<38} {reasons.get(field.name, "")}'.rstrip())
    return '\n'.join(lines)
