"""Datasets: data/<name>/train.bin, val.bin, perhaps test.bin, and meta.json.

A .bin file is a row of little-endian uint16 token ids. meta.json has the tokenizer's state,
vocab_size, the source and the sha256 of its text, and how many tokens each split has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from console import UsageError, UserError, atomic_file
from tokenizer import tokenizer_from

# What makes these datasets, when they are asked for and missing.
PREPARE = {
    'wizard_char': 'prepare_wizard_char.py',
    'shakespeare_char': 'prepare_shakespeare_char.py',
    'shakespeare': 'prepare_shakespeare_char.py --dataset=shakespeare --tokenizer=gpt2',
}


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
        file.write(json.dumps(meta, indent=1, ensure_ascii=False).encode() + b'\n')
        file.flush()  # if the disk is full, the files of before stay
        for old in ('train.bin', 'test.bin'):
            Path(folder, old).unlink(missing_ok=True)
    return meta


def read_meta(folder):
    """meta.json; for a dataset without it, as nanoGPT leaves raw GPT-2 ids, its equivalent."""
    path, pickled = Path(folder, 'meta.json'), Path(folder, 'meta.pkl')
    if pickled.exists() and not path.exists():
        raise UserError(
            f'{pickled} is a pickle, which could run code, and is not read: make a meta.json with '
            f'python prepare_text.py TEXT --dataset={os.path.basename(folder)}'
        )
    if not path.exists():
        return {'tokenizer': {'type': 'gpt2', 'vocab_size': 50257}}
    try:
        meta = json.loads(path.read_text('utf-8'))
        meta['tokenizer']['type']
        return meta
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f'{path} is broken ({error}): prepare the dataset again') from None


class Split:
    """One .bin file. Plain reads rather than a memory map, whose pages count as our memory."""

    def __init__(self, path, vocab_size):
        self.path, self.vocab_size = path, vocab_size
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size % 2 or size < 4:
            raise UserError(f'{path} is missing or damaged, with {size} bytes: prepare it again')
        self.tokens = size // 2
        self.file = open(path, 'rb', buffering=0)
        if size <= 64 << 20:  # small enough to check every id now; batches are checked anyway
            self.read([0], self.tokens)

    def read(self, offsets, length):
        """`length` ids from each of the B offsets on: (B, length) int64 numpy array."""
        rows = np.empty((len(offsets), length), '<u2')
        for row, offset in zip(rows, offsets):
            self.file.seek(2 * int(offset))
            self.file.readinto(row)
        if rows.size and rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise UserError(
                f'{self.path} has the id {rows[row, column]} at position {offsets[row] + column}, '
                f'but the vocabulary ends at {self.vocab_size - 1}: prepare the dataset again'
            )
        return rows.astype(np.int64)

    def batch(self, offsets, block_size, device):
        """Inputs and targets, each (B, block_size) int64 on `device`: y is x one token later."""
        import torch  # here, so that preparing text starts without it

        rows = torch.from_numpy(self.read(offsets, block_size + 1))
        if device.type == 'cuda':  # pinned, so that the copy doesn't wait for the GPU's work
            rows = rows.pin_memory().to(device, non_blocking=True)
        rows = rows.to(device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def random_offsets(self, seed, count, block_size):
        """Where `count` random windows begin, of `block_size` tokens and the next one."""
        if self.tokens <= block_size:
            raise UserError(f'{self.path} has {self.tokens} tokens, too few for block_size='
                            f'{block_size}: take a smaller block_size or a longer text')
        return np.random.default_rng(seed).integers(self.tokens - block_size, size=count)


def training_batches(split, cfg, ranks, device, it):
    """Yield the micro-batches (x, y) of this rank, from iteration `it` on, without end.

    The offsets of the global batch follow from (seed, iteration), and each rank takes its
    share: a resumed run sees the same data, on any number of processes.
    """
    B, T = cfg.batch_size, cfg.block_size
    while True:
        offsets = split.random_offsets((cfg.seed, it), cfg.gradient_accumulation_steps * B, T)
        for mine in offsets.reshape(ranks.world_size, -1, B)[ranks.rank]:  # (micro_steps, B)
            yield split.batch(mine, T, device)
        it += 1


def evaluation_batches(split, cfg, ranks, device):
    """Yield (x, y, fraction done): `eval_iters` random batches, always the same, or all there is.

    Each rank gets the same number of batches; targets of -1 do not count.
    """
    B, T = cfg.batch_size, cfg.block_size
    if cfg.eval_iters:
        # On the train split they begin with those of update 0.
        offsets, rest = split.random_offsets((cfg.seed, 0), cfg.eval_iters * B, T), 0
    else:
        offsets, rest = np.arange(0, split.tokens - T, T), (split.tokens - 1) % T
    batches = [(offsets[i : i + B], T) for i in range(0, len(offsets), B)]
    if rest:  # a last window that is shorter
        batches.append(([split.tokens - 1 - rest], rest))
    for i in range(0, len(batches), ranks.world_size):
        mine, length = batches[min(i + ranks.rank, len(batches) - 1)]
        x, y = split.batch(mine, length, device)
        if i + ranks.rank >= len(batches):  # nothing left for this rank
            y.fill_(-1)
        yield x, y, i / len(batches)


class Dataset:
    """The splits of data/<name>, and the tokenizer that made them."""

    def __init__(self, name, ranks):
        check_name(name)
        folder = os.path.join('data', name)
        # Rank 0 first; then the first of each machine that doesn't share its disk.
        for is_first in (ranks.is_main, ranks.local_rank == 0):
            missing = not os.path.exists(os.path.join(folder, 'train.bin'))
            if missing and is_first:
                make(name, folder)
            ranks.any(missing)  # the others wait here
        meta = read_meta(folder)
        self.source = meta.get('source', folder)
        self.tokenizer = tokenizer_from(meta['tokenizer'])
        paths = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val', 'test')}
        self.splits = {split: Split(path, self.tokenizer.vocab_size)
                       for split, path in paths.items() if split != 'test' or os.path.exists(path)}


def make(name, folder):
    """Run the script that makes the dataset `name`, if we know one. Raises UserError."""
    if name in PREPARE:
        script, *args = PREPARE[name].split()
        if subprocess.run([sys.executable, Path(__file__).with_name(script), *args]).returncode:
            raise UserError(f'{PREPARE[name]} could not make {folder}: run it by hand to see why')
        return
    if name == 'openwebtext':
        raise UserError(f'{folder} is missing: python prepare_openwebtext.py downloads 12 GB for '
                        'it; to begin with, python train.py config/train_wizard_char.py')
    known = sorted({*PREPARE, *(path.parent.name for path in Path('data').glob('*/train.bin'))})
    raise UserError(f'the dataset {folder} is missing: choose one of {", ".join(known)}, or make '
                    f'it with python prepare_text.py your.txt --dataset={name}')
