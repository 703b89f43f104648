"""Prepare a text: write data/<name>/train.bin, val.bin, perhaps test.bin, and meta.json.

    python prepare_text.py my.txt --dataset=my_text                    # characters
    python prepare_text.py a.txt b.txt --dataset=ab --tokenizer=gpt2   # GPT-2's byte pairs
    python prepare_text.py folder --dataset=mine --test_fraction=0.1   # all its .txt files
    python prepare_text.py my.txt --dataset=my --tokenizer=FOLDER      # a Hugging Face folder's

Any UTF-8 text. Several files are joined in the order given, with the tokenizer's end-of-text token
between them, or else a line break. The text's end becomes the test split, the part before it val.
"""

import contextlib
import glob
import hashlib
import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import console
from configurator import check, override
from console import Progress, UsageError, UserError, atomic_file, flush_to_disk, user_errors
from tokenizer import CharTokenizer, tokenizer_from, tokenizer_of

# What files contain that are not UTF-8, by how they begin, or by zeros beside plain letters.
FORMATS = {
    rb'^\x1f\x8b': 'gzip', rb'^PK\x03\x04': 'zip, like .docx and .epub', rb'^%PDF': 'PDF',
    rb'^BZh': 'bzip2', rb'^\xfd7zXZ': 'xz', rb'^7z\xbc\xaf': '7z', rb'^\(\xb5/\xfd': 'zstd',
    rb'^Rar!': 'RAR', rb'^\xd0\xcf\x11\xe0': 'Word', rb'^{\\rtf': 'RTF', rb'^PAR1': 'parquet',
    rb'^\x89PNG': 'PNG', rb'^\xff\xfe\0\0|^\0\0\xfe\xff|(\0\0\0[^\0]){8}': 'UTF-32',
    rb'^\xff\xfe|^\xfe\xff|(\0[^\0]){8}': 'UTF-16',
}

# From a given byte on, over HTTPS only; a connection that is silent for 30 s counts as broken.
CURL = 'curl --fail -L --proto =https --connect-timeout 30 --speed-time 30 --continue-at'.split()


@dataclass
class TextConfig:
    dataset: str = ''  # the name: files go to data/<name>
    tokenizer: str = 'char'  # char; gpt2; a Hugging Face folder or name; a dataset: data/NAME
    val_fraction: float = 0.1  # fraction of the text, or of the conversations, to validate on
    test_fraction: float = 0.0  # fraction for a final test, at the end
    separate: bool = True  # between text files: the end-of-text token; false: a line break
    errors: str = 'strict'  # strict: refuse bytes that are not UTF-8; replace: U+FFFD

    def __post_init__(self):
        check(self, below_1='val_fraction test_fraction', errors=['strict', 'replace'])


@dataclass
class FetchConfig:  # of the scripts that know where their text is
    dataset: str  # files go to data/<dataset>
    tokenizer: str = 'char'  # or gpt2, and all else that prepare_text.py takes
    input: str = ''  # a file to use instead of downloading


def files_of(inputs):
    """The paths that the arguments mean: files, patterns like *.txt, folders of .txt files."""
    paths = []
    for name in inputs:
        found = [name] if os.path.exists(name) else sorted(glob.glob(name))
        if os.path.isdir(name):
            found = sorted(map(str, Path(name).rglob('*.txt')))
        if not found:
            raise UserError(f'there are no text files {name!r}: name .txt files or their folder')
        paths += found
    return paths


def read_text(path, errors='strict'):
    """The text of a UTF-8 file, without a byte-order mark, its line ends made line feeds."""
    with user_errors(OSError, f'cannot read {path}', 'give the path of a text file'):
        data = Path(path).expanduser().read_bytes()
    kind = next((kind for sign, kind in FORMATS.items() if re.search(sign, data[:4096])), None)
    if kind:
        how = f'iconv -f {kind} -t UTF-8' if 'UTF' in kind else 'a program that saves it as text'
        raise UserError(f'cannot read {path}: it is {kind}, not UTF-8: convert it with {how}')
    try:
        text = data.decode('utf-8-sig', errors)
    except UnicodeDecodeError as error:
        broken = len(data) - len(data.decode(errors='ignore').encode())
        raise UserError(f'cannot read {path}: {broken:,} of its bytes are not UTF-8, the first at '
                        f'position {error.start}: convert it with iconv, or prepare it with '
                        '--errors=replace') from None
    return text.replace('\r\n', '\n').replace('\r', '\n')


def check_name(dataset):
    """Raise UsageError unless data/<dataset> is a folder in data/."""
    if not dataset or dataset != os.path.basename(dataset) or dataset.startswith('.'):
        raise UsageError(f'dataset={dataset!r} must name a folder in data/: try --dataset=my_text')


def read_meta(folder):
    """The contents of meta.json. nanoGPT writes none for GPT-2 ids: a missing one means those."""
    path, pickled = Path(folder, 'meta.json'), Path(folder, 'meta.pkl')
    if not path.exists() and pickled.exists():
        raise UserError(f'{pickled} is a pickle, which could run code, and is not read: prepare '
                        'the dataset with prepare_text.py')
    if not path.exists():
        return {'tokenizer': {'type': 'gpt2', 'vocab_size': 50257}}
    with user_errors((ValueError, KeyError, TypeError, AttributeError, OSError),
                     f'{path} is broken', 'prepare the dataset again'):
        meta = json.loads(path.read_text('utf-8'))
        if not {'type', 'vocab_size'} <= meta['tokenizer'].keys():
            raise ValueError('its tokenizer has no type or no vocab_size')
    return meta


def write_meta(folder, tokenizer, source, sha256, tokens, has_masks=False):
    """Write meta.json for the .bin files that come next; returns its contents.

    The old .bin files and masks are removed: a half-written dataset counts as missing.
    tokens: how many each split has, by its name. has_masks: whether each has a .mask too.
    """
    meta = dict(tokenizer=tokenizer.state(), vocab_size=tokenizer.vocab_size, source=source,
                sha256=sha256, tokens=tokens, has_masks=has_masks)
    with atomic_file(os.path.join(folder, 'meta.json')) as file:
        file.write(json.dumps(meta, indent=1).encode() + b'\n')
        file.flush()  # a full disk must show before the old files are removed
        for old in ('train.bin', 'val.bin', 'test.bin', 'train.mask', 'val.mask', 'test.mask'):
            Path(folder, old).unlink(missing_ok=True)
    return meta


def make_tokenizer(name, texts):
    """The tokenizer that the setting `tokenizer` names. Raises UserError."""
    if name == 'char':
        tokenizer = CharTokenizer('\n'.join(texts))
    elif os.path.exists(f'{name}/meta.json'):  # another dataset's
        tokenizer = tokenizer_from(read_meta(name)['tokenizer'])
    else:
        tokenizer = tokenizer_of(name)
    if tokenizer.vocab_size > 65536:
        raise UserError(f'the {tokenizer.vocab_size:,} ids of the tokenizer {name} are more than '
                        '65,536, so 16 bits cannot hold them: use --tokenizer=gpt2')
    return tokenizer


def fractions(length, val_fraction, test_fraction):
    """(begin, end) of each split of `length` characters or conversations, by its name."""
    val_start = int(length * (1 - val_fraction - test_fraction))
    test_start = int(length * (1 - test_fraction))
    parts = {'train': (0, val_start), 'val': (val_start, test_start), 'test': (test_start, length)}
    return parts if test_fraction else {name: parts[name] for name in ('train', 'val')}


def encode_split(tokenizer, texts, begin, end):
    """Yield arrays of ids: the characters from `begin` to `end` of all texts, put in a row.

    Each text begins with the tokenizer's `front`; `eot` stands between two texts.
    """
    progress, position = Progress(), 0
    for number, text in enumerate(texts):
        if begin <= position < end:
            yield np.array([tokenizer.eot] * (number > 0) + [*tokenizer.front], int)
        part = text[max(0, begin - position) : max(0, end - position)]
        for ids, done in tokenizer.encode_pieces(part):
            yield ids
            fraction = done / max(1, len(part))
            progress.show_progress(fraction, f'{(position + done) / 1e6:.0f} M characters')
        position += len(text)


def write_dataset(dataset, files, tokenizer, source, sha256):
    """Write data/<dataset>, whole or not at all; returns the contents of meta.json.

    files: iterables of arrays by file name. Raises UserError, also if a split is too short.
    """
    check_name(dataset)
    folder, tokens = os.path.join('data', dataset), {}
    with contextlib.ExitStack() as stack:  # closes in reverse: train.bin appears last of all
        stack.enter_context(console.locked(folder))
        for name, arrays in files.items():
            file = stack.enter_context(atomic_file(os.path.join(folder, name)))
            for array in arrays:
                file.write(array.astype('<u2' if name.endswith('.bin') else 'u1').data)
            flush_to_disk(file)  # a full disk must show before write_meta removes old files
            if name.endswith('.bin'):
                tokens[name.removesuffix('.bin')] = file.tell() // 2
        counts = ', '.join(f'{count:,} {split}' for split, count in tokens.items())
        if min(tokens.values()) < 2:
            raise UserError(f'{source} gives {counts} tokens: each split needs two, so take a '
                            'longer file or other fractions')
        meta = write_meta(folder, tokenizer, source, sha256, tokens, 'train.mask' in files)
    print(f'{folder}: {counts} tokens, {tokenizer.vocab_size:,} ids, from {source}')
    return meta


def prepare(texts, dataset, tokenizer='char', val_fraction=0.1, test_fraction=0.0, separate=True,
            errors='strict', source=''):
    """Write data/<dataset> from a text, or several; returns the contents of meta.json."""
    texts = [texts] if isinstance(texts, str) else texts
    encoder = make_tokenizer(tokenizer, texts)
    if encoder.eot is None or not separate:
        texts = [''.join(t if t.endswith('\n') else t + '\n' for t in texts[:-1]) + texts[-1]]
    digest = hashlib.sha256('\0'.join(texts).encode('utf-8', 'surrogatepass')).hexdigest()
    parts = fractions(sum(map(len, texts)), val_fraction, test_fraction)
    files = {f'{split}.bin': encode_split(encoder, texts, *part) for split, part in parts.items()}
    return write_dataset(dataset, files, encoder, source, digest)


def fetch(dataset, url, looks_right):
    """The path of data/<dataset>/input.txt, downloaded from `url` unless it is there already.

    looks_right: a function of the bytes, to refuse another file, for example an error page.
    """
    check_name(dataset)
    path = os.path.join('data', dataset, 'input.txt')
    if not os.path.exists(path):
        with user_errors((OSError, http.client.HTTPException), f'cannot fetch {url}',
                         f'give your copy: python {shlex.join(sys.argv)} --input=FILE'):
            with urllib.request.urlopen(url, timeout=10) as response:
                data = response.read(8 << 20)
            if not response.url.startswith('https://') or not looks_right(data):
                raise OSError(f'{response.url} is not HTTPS, or another text')
        with atomic_file(path) as file:
            file.write(data)
    return path


def download(url, path, print_line):
    """Get a large file; continues `path`.part if a broken connection or a kill has left one."""
    if not shutil.which(CURL[0]):
        raise UserError(f'curl fetches {url}: install it, or give a copy with --input=FOLDER')
    for wait in (0, 1, 2, 4, 8, 16, 32, 64):  # seconds before each try
        time.sleep(wait)
        print_line(f'fetching {url}')
        with open(f'{path}.part', 'ab') as file:
            start = file.truncate(max(0, file.tell() - 1))  # to ask for no byte is an error
            # Through a pipe, which breaks if we are killed: so curl never outlives us.
            with subprocess.Popen([*CURL, str(start), url], stdout=subprocess.PIPE) as curl:
                shutil.copyfileobj(curl.stdout, file, 1 << 20)
        if curl.returncode == 0:
            return os.replace(f'{path}.part', path)
    raise UserError(f'cannot fetch {url} (exit code {curl.returncode} of curl): the same command '
                    'continues from here, or give a copy with --input=FOLDER')


# Commands that make these datasets if they are missing.
PREPARE = {
    'wizard_char': 'prepare_wizard_char.py',
    'shakespeare_char': 'prepare_shakespeare_char.py',
    'shakespeare': 'prepare_shakespeare_char.py --dataset=shakespeare --tokenizer=gpt2',
    'wizard_chat': 'prepare_chat.py --dataset=wizard_chat',
}


def make_dataset(name, folder):
    """Run the script that makes the dataset `name`, if we know one. Raises UserError."""
    if name not in PREPARE:
        found = (path.parent.name for path in Path('data').glob('*/train.bin'))
        raise UserError(f'the dataset {folder} is missing: choose one of '
                        f'{", ".join(sorted({*PREPARE, *found}))}, or make it: python '
                        f'prepare_text.py your.txt --dataset={name} (of conversations: '
                        'prepare_chat.py; openwebtext, 12 GB: prepare_openwebtext.py)')
    with console.locked('data', wait=True):  # another process may be making it right now
        if os.path.exists(os.path.join(folder, 'train.bin')):
            return
        script, *args = PREPARE[name].split()
        if subprocess.run([sys.executable, Path(__file__).with_name(script), *args]).returncode:
            raise UserError(f'{PREPARE[name]} could not make {folder}: see its message above')


def main(argv):
    inputs = [arg for arg in argv if not arg.startswith('-')]
    cfg = override(TextConfig(), [arg for arg in argv if arg.startswith('-')], usage=__doc__)
    if not inputs or not cfg.dataset:
        raise UsageError('a text and --dataset are needed: for example my.txt --dataset=my_text')
    paths = files_of(inputs)
    source = ' '.join(map(os.path.basename, paths[:3]))
    source += f' and {len(paths) - 3:,} more' if len(paths) > 3 else ''
    with user_errors(MemoryError, 'not enough memory for all of the text', 'prepare less of it'):
        prepare([read_text(path, cfg.errors) for path in paths], **vars(cfg), source=source)


if __name__ == '__main__':
    console.run(main)
