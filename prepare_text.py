"""Text to a dataset: data/<name>/train.bin, val.bin, perhaps test.bin, and meta.json.

    python prepare_text.py my.txt --dataset=my_text                    # characters
    python prepare_text.py a.txt b.txt --dataset=ab --tokenizer=gpt2   # GPT-2's byte pairs
    python prepare_text.py folder/*.txt --dataset=mine --test_fraction=0.1
    python prepare_text.py my.txt --dataset=my --tokenizer=FOLDER      # a Hugging Face folder's

Any UTF-8 text. Several files are joined, in the order given, with a line break. The last part of
the text becomes the test split, the part before it the val split.
"""

import contextlib
import hashlib
import http.client
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import console
from configurator import override
from console import UsageError, UserError, atomic_file
from tokenizer import CharTokenizer, tokenizer_of

# From a given byte on, over HTTPS only; a connection that is silent for 30 s counts as broken.
CURL = 'curl --fail -L --proto =https --connect-timeout 30 --speed-time 30 --continue-at'.split()


@dataclass
class TextConfig:
    dataset: str = ''  # the name: files go to data/<name>
    tokenizer: str = 'char'  # char: an id for each character; gpt2; a Hugging Face folder or name
    val_fraction: float = 0.1  # share of the text to validate on
    test_fraction: float = 0.0  # share at the very end, to look at once


def read_text(paths):
    """The text of some UTF-8 files, as one string.

    A byte-order mark is dropped, and line ends become line feeds.
    """
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text('utf-8-sig'))
        except OSError as error:
            raise UserError(f'cannot read {path} ({error.strerror}): name text files, say '
                            'my.txt or folder/*.txt') from None
        except UnicodeDecodeError as error:
            encoding = 'utf-16' if error.object[:2] in (b'\xff\xfe', b'\xfe\xff') else 'latin1'
            raise UserError(f'cannot read {path} ({error}): convert it to UTF-8, say with '
                            f'iconv -f {encoding} -t utf-8') from None
    return ''.join(text if text.endswith('\n') else text + '\n' for text in texts[:-1]) + texts[-1]


def check_name(dataset):
    """Raise UsageError unless data/<dataset> is a folder in data/."""
    if not dataset or dataset != os.path.basename(dataset) or dataset.startswith('.'):
        raise UsageError(f'dataset={dataset!r} must name a folder in data/: try --dataset=my_text')


def write_meta(folder, tokenizer, source, sha256, tokens):
    """Write meta.json for the .bin files that come next, and return what it says.

    The old train.bin and test.bin go first, so that a half-written dataset counts as missing.
    tokens: how many each split has, by its name.
    """
    meta = {
        'tokenizer': tokenizer.state(), 'vocab_size': tokenizer.vocab_size, 'source': source,
        'sha256': sha256, 'tokens': tokens,
    }
    with atomic_file(os.path.join(folder, 'meta.json')) as file:
        file.write(json.dumps(meta, indent=1).encode() + b'\n')
        file.flush()  # if the disk is full, the files of before stay
        for old in ('train.bin', 'test.bin'):
            Path(folder, old).unlink(missing_ok=True)
    return meta


def prepare(text, dataset, tokenizer='char', val_fraction=0.1, test_fraction=0.0, source=''):
    """Write data/<dataset>, made of `text`, whole or not at all; returns what meta.json says."""
    check_name(dataset)
    if not (0 < val_fraction and 0 <= test_fraction and val_fraction + test_fraction < 1):
        raise UsageError(f'val_fraction={val_fraction} must be above 0, test_fraction='
                         f'{test_fraction} 0 or more, and both together below 1')
    val_start = int(len(text) * (1 - val_fraction - test_fraction))
    test_start = int(len(text) * (1 - test_fraction))
    parts = {'train': text[:val_start], 'val': text[val_start:test_start]}
    if test_fraction:
        parts['test'] = text[test_start:]
    if min(map(len, parts.values())) < 2:
        raise UserError(f'{len(text)} characters are too few for {", ".join(parts)}: take more')
    encoder = CharTokenizer(text) if tokenizer == 'char' else tokenizer_of(tokenizer)
    if encoder.vocab_size > 65536:
        raise UserError(f'the {encoder.vocab_size:,} ids of the tokenizer {tokenizer} are more '
                        'than 65,536, which 16 bits can hold: use --tokenizer=gpt2')
    ids = {split: encoder.encode(part).astype('<u2') for split, part in parts.items()}
    tokens = {split: len(array) for split, array in ids.items()}
    folder = os.path.join('data', dataset)
    with contextlib.ExitStack() as files:  # closes in reverse: train.bin appears last of all
        files.enter_context(console.locked(folder))
        for split, array in ids.items():
            file = files.enter_context(atomic_file(os.path.join(folder, f'{split}.bin')))
            file.write(array.data)
            file.flush()
            os.fsync(file.fileno())  # a full disk must show before write_meta removes old files
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        meta = write_meta(folder, encoder, source, sha256, tokens)
    counts = ', '.join(f'{count:,} {split}' for split, count in tokens.items())
    print(f'{folder}: {counts} tokens, {encoder.vocab_size:,} ids, from {source}')
    return meta


def fetch(dataset, url, looks_right):
    """The path of data/<dataset>/input.txt, downloaded from `url` unless it is there already.

    looks_right: a function that tells the wanted file from, say, an HTML error page.
    """
    check_name(dataset)
    path = os.path.join('data', dataset, 'input.txt')
    if not os.path.exists(path):
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                data = response.read(8 << 20)
            if not response.url.startswith('https://') or not looks_right(data):
                raise OSError(f'{response.url} is not HTTPS, or another text')
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f'cannot fetch {url} ({getattr(error, "reason", error)}): give '
                            f'a copy of it, python {shlex.join(sys.argv)} --input=FILE') from None
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


def main(argv):
    inputs = [arg for arg in argv if not arg.startswith('-')]
    cfg = override(TextConfig(), [arg for arg in argv if arg.startswith('-')], usage=__doc__)
    if not inputs or not cfg.dataset:
        raise UsageError('a text and --dataset are needed: add, say, my.txt --dataset=my_text')
    names = [os.path.basename(path) for path in inputs]
    prepare(read_text(inputs), **vars(cfg), source=' '.join(names))


if __name__ == '__main__':
    console.run(main)
