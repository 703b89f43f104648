"""Datasets: data/<name>/train.bin, val.bin, perhaps test.bin, and meta.json.

prepare_*.py write them. A .bin file is a row of little-endian uint16 token ids. meta.json contains
the tokenizer's state, vocab_size, the source and its sha256, and the number of tokens in each
split.
"""

import hashlib
import os

import numpy as np
import torch

from console import UserError
from prepare_text import make_dataset, read_meta
from tokenizer import tokenizer_from

class Split:
    """One .bin file."""

    def __init__(self, path, vocab_size, tokens=None):
        """tokens: how many ids the file should contain, or None. Raises UserError."""
        self.path, self.vocab_size = path, vocab_size
        size = os.path.getsize(path) if os.path.exists(path) else 0
        expected = size - size % 2 if tokens is None else 2 * tokens
        if size < 4 or size != expected:
            raise UserError(f'{path} is missing or damaged: it has {size} bytes instead of '
                            f'{max(4, expected)}; prepare the dataset again')
        self.file, self.tokens = open(path, 'rb'), size // 2
        if size <= 64 << 20:  # small enough to check every id now; batches are checked anyway
            for start in range(0, self.tokens, 1 << 20):
                self.ids(np.arange(start, min(start + (1 << 20), self.tokens)))

    def ids(self, positions):
        """The ids at an array of positions. Raises UserError if one is beyond the vocabulary."""
        # A new memmap each time: with one kept open, every page read counts as our memory.
        ids = np.memmap(self.file, '<u2', 'r')[positions]
        wrong = ids >= self.vocab_size
        if wrong.any():
            raise UserError(f'{self.path} has the id {ids[wrong][0]} at position '
                            f'{positions[wrong][0]}, but the vocabulary ends at '
                            f'{self.vocab_size - 1}: prepare the dataset again')
        return ids

    def batch(self, offsets, block_size, device):
        """Inputs and targets from each of the B offsets on: y is x one token later.

        Each is (B, block_size) int64 on `device`. Past the split's end, inputs are 0, targets -1.
        """
        positions = np.reshape(offsets, (-1, 1)) + np.arange(block_size + 1)  # (B, T + 1)
        ids = self.ids(positions.clip(max=self.tokens - 1)).astype(np.int64)
        rows = torch.from_numpy(np.where(positions < self.tokens, ids, -1))
        if device.type == 'cuda':  # pinned, so that the copy doesn't wait for the GPU's work
            rows = rows.pin_memory().to(device, non_blocking=True)
        else:
            rows = rows.to(device)
        return rows[:, :-1].clamp(min=0), rows[:, 1:]

    def random_offsets(self, seed, count, block_size):
        """Start offsets of `count` random windows of block_size + 1 tokens."""
        if self.tokens <= block_size:
            raise UserError(f'{self.path} has {self.tokens} tokens, too few for block_size='
                            f'{block_size}: use a smaller block_size or a longer text')
        return np.random.default_rng(seed).integers(self.tokens - block_size, size=count)


def training_batches(split, cfg, ranks, device, it):
    """Yield the micro-batches (x, y) of this rank, from iteration `it` on, without end.

    The offsets of the global batch follow from (seed, iteration), and each rank takes its part: a
    resumed run sees the same data, on any number of processes.
    """
    B, T = cfg.batch_size, cfg.block_size
    while True:
        offsets = split.random_offsets((cfg.seed, it), cfg.gradient_accumulation_steps * B, T)
        for micro_batch in offsets.reshape(ranks.world_size, -1, B)[ranks.rank]:  # (B,)
            yield split.batch(micro_batch, T, device)
        it += 1


def evaluation_batches(split, cfg, ranks, device):
    """Yield (x, y, fraction done): `eval_iters` random batches, always the same; 0: all windows.

    Each rank gets the same number of batches, filled up with windows past the end of the split.
    """
    B, T = cfg.batch_size, cfg.block_size
    if cfg.eval_iters:  # the seed of update 0: on the train split, the windows that it trains on
        offsets = split.random_offsets((cfg.seed, 0), cfg.eval_iters * B, T)
    else:
        offsets = np.arange(0, split.tokens - 1, T)
    fill = -len(offsets) % (ranks.world_size * B)
    offsets = np.pad(offsets, (0, fill), constant_values=split.tokens)
    batches = offsets.reshape(-1, ranks.world_size, B)[:, ranks.rank]
    for i, batch in enumerate(batches):  # (B,)
        yield *split.batch(batch, T, device), i / len(batches)


class Dataset:
    """The splits of data/<name>, and the tokenizer that made them."""

    def __init__(self, name, ranks):
        folder = os.path.join('data', name)
        # Rank 0 first; then the first of each machine that doesn't share its disk.
        for is_first in (ranks.is_main, ranks.local_rank == 0):
            missing = not os.path.exists(os.path.join(folder, 'train.bin'))
            if missing and is_first:
                make_dataset(name, folder)
            ranks.any(missing)  # the others wait here
        meta = read_meta(folder)
        self.source = meta.get('source', folder)
        self.tokenizer = tokenizer_from(meta['tokenizer'])
        self.splits = {}
        for split in ('train', 'val', 'test'):
            path = os.path.join(folder, f'{split}.bin')
            if split != 'test' or os.path.exists(path):
                tokens = meta.get('tokens', {}).get(split)
                self.splits[split] = Split(path, self.tokenizer.vocab_size, tokens)
        # What a validation loss is measured on. nanoGPT's datasets have no sum of the source.
        self.sha256 = meta.get('sha256')
        if not self.sha256:
            with open(os.path.join(folder, 'val.bin'), 'rb') as file:
                self.sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
        ranks.agree(f'the sha256 of {folder}', self.sha256)
