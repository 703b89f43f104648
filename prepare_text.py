"""Turn text into a dataset: data/<name>/train.bin, val.bin, perhaps test.bin, and meta.json.

    python prepare_text.py my.txt --dataset=my_text                    # characters
    python prepare_text.py a.txt b.txt --dataset=ab --tokenizer=gpt2   # GPT-2's byte pairs
    python prepare_text.py folder/ --dataset=mine --test_fraction=0.1  # all its .txt files

Any UTF-8 text. Several files, in the order given or by name within a folder, are joined with a
line break. The last part of the text becomes the test split, the part before it the val split.

A .bin file is a row of little-endian uint16 ids. meta.json has the tokenizer's state, vocab_size,
the source, the sha256 of its text, and the number of tokens of each split.
"""

import contextlib
import hashlib
import http.client
import json
import os
import time
import urllib.request
from dataclasses import dataclass

import console
from configurator import override
from console import Progress, UsageError, UserError, atomic_file
from tokenizer import CharTokenizer, GPT2Tokenizer


@dataclass
class TextConfig:
    dataset: str = ''  # the name: files go to data/<name>
    tokenizer: str = 'char'  # char: an id for each character; gpt2: byte pairs, 50257 ids
    val_fraction: float = 0.1  # share of the text to validate on
    test_fraction: float = 0.0  # share at the very end, to look at once


def read_text(paths):
    """The text of some UTF-8 files and folders of .txt files, as one string.

    A byte-order mark is dropped and line ends become line feeds. Raises UserError for a file that
    is missing, empty or not UTF-8.
    """
    files = []
    for path in paths:
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if name.endswith('.txt'))
            if not names:
                raise UserError(f'the folder {path} has no .txt file: name the files')
            files += [os.path.join(path, name) for name in names]
        else:
            files.append(path)
    texts = []
    for path in files:
        try:
            with open(path, 'rb') as file:
                texts.append(as_text(file.read(), path))
        except OSError as error:
            raise UserError(f'cannot read {path} ({error.strerror}): check the name') from None
        if not texts[-1]:
            raise UserError(f'{path} is empty: there is nothing to learn from')
    return ''.join(text if text.endswith('\n') else text + '\n' for text in texts[:-1]) + texts[-1]


def as_text(data, source):
    """UTF-8 bytes to str, without byte-order mark and carriage returns."""
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(
            f'{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; '
            'convert it, say with iconv -f latin1 -t utf-8'
        ) from None
    return text.replace('\r\n', '\n').replace('\r', '\n')


def check_name(dataset):
    """Raise UsageError unless data/<dataset> is a folder in data/."""
    if not dataset or dataset != os.path.basename(dataset) or dataset.startswith('.'):
        raise UsageError(
            f'dataset={dataset!r} is no name for a folder in data/: use --dataset=my_text'
        )


def describe(folder, tokenizer, source, sha256, tokens):
    """Write meta.json for the files that come next, and return what it says.

    train.bin and test.bin of before go: while the files change there is no dataset. tokens: how
    many each split has, by its name.
    """
    meta = {
        'tokenizer': tokenizer.state(), 'vocab_size': tokenizer.vocab_size, 'source': source,
        'sha256': sha256, 'tokens': tokens,
    }
    with atomic_file(os.path.join(folder, 'meta.json')) as file:
        file.write(json.dumps(meta, indent=1, ensure_ascii=False).encode() + b'\n')
        file.flush()  # if the disk is full, the files of before stay
        for old in ('train.bin', 'test.bin'):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, old))
    return meta


def prepare(text, dataset, tokenizer='char', val_fraction=0.1, test_fraction=0.0, source=''):
    """Write the dataset `dataset` made of `text`; returns what meta.json says.

    The files appear together or not at all, and the same text gives the same bytes. Raises
    UserError if there is too little text for its splits or too many characters for 16-bit ids.
    """
    check_name(dataset)
    if tokenizer not in ('char', 'gpt2'):
        raise UsageError(f'tokenizer={tokenizer!r} is not known: use char or gpt2')
    if not (0 < val_fraction and 0 <= test_fraction and val_fraction + test_fraction < 1):
        raise UsageError(
            f'val_fraction={val_fraction} and test_fraction={test_fraction} do not leave a part '
            'of the text to each split: they must be above 0 (test: or 0) and below 1 together'
        )
    began = time.perf_counter()
    val_start = int(len(text) * (1 - val_fraction - test_fraction))
    test_start = int(len(text) * (1 - test_fraction))
    parts = {'train': text[:val_start], 'val': text[val_start:test_start]}
    if test_fraction:
        parts['test'] = text[test_start:]
    for name, part in parts.items():
        if not part:
            raise UserError(
                f'{len(text)} characters are too few for a {name} split: take more text'
            )
    encoder = CharTokenizer.of(text) if tokenizer == 'char' else GPT2Tokenizer()
    progress = Progress(len(text), f'encoding data/{dataset}:')
    ids = {name: encoder.encode(part, progress.advance).astype('<u2')
           for name, part in parts.items()}
    folder = os.path.join('data', dataset)
    with contextlib.ExitStack() as files:  # closes in reverse: train.bin appears last of all
        for name, part in ids.items():
            files.enter_context(atomic_file(os.path.join(folder, f'{name}.bin'))).write(part.data)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        meta = describe(folder, encoder, source, sha256, {k: len(v) for k, v in ids.items()})
    counts = ', '.join(f'{len(part):,} {name}' for name, part in ids.items())
    progress.say(f'{folder}: {counts} tokens, {encoder.vocab_size:,} ids, from {source} '
                 f'in {time.perf_counter() - began:.1f} s')
    return meta


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        if not url.startswith('https://'):
            raise UserError(f'{request.full_url} leads to {url}, which is not HTTPS: not followed')
        return super().redirect_request(request, file, code, message, headers, url)


def download(url, looks_right, limit=8 << 20):
    """The bytes at an HTTPS address, at most `limit`.

    looks_right: a function that tells the wanted file from, say, an HTML error page. Raises
    UserError.
    """
    if not url.startswith('https://'):
        raise UserError(f'{url} is not HTTPS: not fetched')
    request = urllib.request.Request(url, headers={'User-Agent': 'ozgpt'})
    try:
        with urllib.request.build_opener(HttpsOnly).open(request, timeout=10) as response:
            data = response.read(limit + 1)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or error
        raise UserError(
            f'cannot fetch {url} ({reason}): give a copy of it with --input=FILE'
        ) from None
    if len(data) > limit:
        raise UserError(f'{url} is larger than {limit:,} bytes, so it is not the file we know')
    if not looks_right(data):
        raise UserError(f'{url} did not answer with the text: give a copy of it with --input=FILE')
    return data


def fetch(dataset, url, looks_right):
    """The path of data/<dataset>/input.txt, downloaded from `url` unless it is there already."""
    path = os.path.join('data', dataset, 'input.txt')
    if not os.path.exists(path):
        data = download(url, looks_right)
        with atomic_file(path) as file:
            file.write(data)
    return path


def main(argv):
    inputs = [arg for arg in argv if not arg.startswith('-')]
    cfg = override(TextConfig(), [arg for arg in argv if arg.startswith('-')], usage=__doc__)
    if not inputs:
        raise UsageError('which text? python prepare_text.py my.txt --dataset=my_text')
    if not cfg.dataset:
        raise UsageError('what is the dataset to be called? add --dataset=my_text')
    names = [os.path.basename(os.path.abspath(path)) for path in inputs]  # folder/ has one too
    prepare(read_text(inputs), **vars(cfg), source=' '.join(names))


if __name__ == '__main__':
    console.run(main)
