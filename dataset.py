"""Datasets: data/<name>/train.bin, val.bin, perhaps test.bin, and meta.json.

prepare_*.py write them. A .bin file is a sequence of little-endian uint16 token ids. meta.json
contains the tokenizer's state, vocab_size, the source and its sha256, the number of tokens in each
split, and whether there are masks: conversations also have a .mask beside each .bin, a byte for
each token: 1 if the loss counts it as a target, 2 if a conversation begins with it, else 0.
"""

import hashlib
import os

import numpy as np
import torch

from console import UserError
from prepare_text import make_dataset, read_meta
from tokenizer import tokenizer_from


class Split:
    """One .bin file, and its .mask if there is one."""

    def __init__(self, path, vocab_size, tokens=None):
        """tokens: how many ids the file should contain, or None. Raises UserError."""
        self.path, self.vocab_size = path, vocab_size
        size = os.path.getsize(path) if os.path.exists(path) else 0
        expected = size - size % 2 if tokens is None else 2 * tokens
        if size < 4 or size != expected:
            raise UserError(f'{path} is missing or damaged: it has {size} bytes instead of '
                            f'{max(4, expected)}; prepare the dataset again')
        self.file, self.tokens, self.mask = open(path, 'rb'), size // 2, None
        # Where conversations begin, and, last, the end. A text counts as one long conversation.
        self.borders = np.array([0, self.tokens])
        if os.path.exists(mask := path.removesuffix('bin') + 'mask'):
            self.mask = np.fromfile(mask, np.uint8)
            self.borders = np.append(np.flatnonzero(self.mask == 2), self.tokens)
            if len(self.mask) != self.tokens or self.borders[0] or 1 not in self.mask:
                raise UserError(f'{mask} does not fit {path}: prepare the dataset again')
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

    def ends(self, begins, block_size):
        """Where the windows at `begins` end: at most block_size + 1 tokens later.

        A window ends after the last conversation that fits as a whole; its conversations see each
        other. If not even the first one fits, it contains as much of that one as fits.
        """
        reach = np.minimum(begins + block_size + 1, self.tokens)
        last = self.borders[self.borders.searchsorted(reach, 'right') - 1]
        return np.where(last > begins, last, reach)

    def windows(self, begins, block_size):
        """(positions, counted) of the windows at `begins`, each (..., block_size + 1).

        begins: (...,). counted: whether the loss counts a token; never one past the window's end.
        """
        positions = begins[..., None] + np.arange(block_size + 1)
        counted = positions < self.ends(begins, block_size)[..., None]
        positions = positions.clip(max=self.tokens - 1)
        if self.mask is not None:
            counted &= self.mask[positions] == 1
        return positions, counted

    def batch(self, begins, block_size, device):
        """Inputs x and targets y of the windows at `begins`, (B,): y is x one token later.

        Each is (B, block_size) int64 on `device`. A target that does not count is -1. An input
        after the window's end is harmless: no counted target sees it. Raises UserError.
        """
        positions, counted = self.windows(begins, block_size)
        ids = self.ids(positions).astype(int)
        x, y = ids[:, :-1], np.where(counted, ids, -1)[:, 1:]
        pair = torch.from_numpy(np.stack([x, y]))
        if device.type == 'cuda':  # pinned, so that the copy doesn't wait for the GPU's work
            return pair.pin_memory().to(device, non_blocking=True).unbind()
        return pair.to(device).unbind()

    def random_windows(self, seed, count, block_size):
        """Where `count` random windows begin; with a mask, at conversations. Raises UserError."""
        generator = np.random.default_rng(seed)
        if self.mask is not None:
            return generator.choice(self.borders[:-1], count)
        if self.tokens <= block_size:
            raise UserError(f'{self.path} has {self.tokens} tokens, too few for block_size='
                            f'{block_size}: use a smaller block_size or a longer text')
        return generator.integers(self.tokens - block_size, size=count)

    def all_windows(self, block_size):
        """Where windows begin that together contain each target of the split exactly once."""
        if self.mask is None:
            return np.arange(0, self.tokens - 1, block_size)
        begins = [0]
        while (end := self.ends(begins[-1], block_size)) < self.tokens:
            # A long conversation continues: the last token before `end` is its next input.
            begins.append(end if self.mask[end] == 2 else end - 1)
        return np.array(begins)


def training_batches(split, cfg, ranks, device, it):
    """Yield the micro-batches (x, y, divisor) of this rank, from iteration `it` on, without end.

    The windows of an update follow from (seed, iteration), and each rank takes its part: a resumed
    run sees the same data, on any number of processes. Divide each mean loss by its divisor, add
    them, and average over the ranks: this is the mean over all targets of the update.
    """
    B, T = cfg.batch_size, cfg.block_size
    while True:
        begins = split.random_windows((cfg.seed, it), cfg.gradient_accumulation_steps * B, T)
        begins = begins.reshape(ranks.world_size, -1, B)
        counts = np.ones(begins.shape[:2])  # targets per micro-batch; of a text, equally many
        if split.mask is not None:
            counts = split.windows(begins, T)[1][..., 1:].sum((-2, -1))
        divisors = (counts.mean(axis=0).sum() or 1) / counts[ranks.rank].clip(min=1)
        for micro_batch, divisor in zip(begins[ranks.rank], divisors):  # (B,), a number
            yield *split.batch(micro_batch, T, device), divisor
        it += 1


def evaluation_batches(split, cfg, ranks, device):
    """Yield (x, y, fraction done): `eval_iters` random batches, always the same; 0: all windows.

    Each rank gets the same number of batches; the last ones are filled up with empty windows.
    """
    B, T = cfg.batch_size, cfg.block_size
    # Update 0 draws from the same seed, so it learns from some of these windows of train: no harm.
    begins = (split.random_windows((cfg.seed, 0), cfg.eval_iters * B, T) if cfg.eval_iters
              else split.all_windows(T))
    fill = -len(begins) % (ranks.world_size * B)
    begins = np.pad(begins, (0, fill), constant_values=split.tokens)  # past the end: no targets
    batches = begins.reshape(-1, ranks.world_size, B)[:, ranks.rank]
    for i, batch in enumerate(batches):  # (B,)
        yield *split.batch(batch, T, device), i / len(batches)


class Dataset:
    """The splits and the tokenizer of data/<name>, which is made if missing. Raises UserError."""

    def __init__(self, name, ranks):
        folder = os.path.join('data', name)
        # Rank 0 prepares it; then local rank 0 of each machine that doesn't share rank 0's disk.
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
                if meta.get('has_masks') and self.splits[split].mask is None:
                    raise UserError(f'{path} has no .mask beside it: prepare the dataset again')
        # Identifies the data behind a validation loss. nanoGPT's datasets contain no sha256.
        self.sha256 = meta.get('sha256')
        if not self.sha256:
            with open(os.path.join(folder, 'val.bin'), 'rb') as file:
                self.sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
        ranks.agree(f'the sha256 of {folder}', self.sha256)
