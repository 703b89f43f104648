"""Measure the speed and memory of training, sampling and preparing on this machine.

    python bench.py                # the whole table, some minutes
    python bench.py --only=gpt2    # the rows with this word in their name

Each row runs in new processes, with the code of the scripts. Speeds are medians; on a shared
machine compare only figures of one run. Memory is a process's peak, on its GPU if it uses one;
with several processes, that of the last rank, since rank 0 also gathers the checkpoint.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from timeit import repeat, timeit

import numpy as np
import torch

import console
import prepare_text
import runtime
from configurator import override
from console import UserError
from model import GPT, GPTConfig
from prepare_wizard_char import RETOLD
from quantize import prepare_for_sampling
from train import TrainConfig, train


@dataclass
class BenchConfig:
    only: str = ''  # measure only the rows whose name contains this
    device: str = 'auto'  # the best of cuda, mps, cpu
    dtype: str = 'auto'  # the best the hardware supports natively: bfloat16, float16 or float32
    compile: bool | None = None  # torch.compile in training; none: on CUDA only
    batch_size: int = 0  # sequences per micro-batch of all training rows; 0: as in each row
    row: str = ''  # internal: measure this row in this process


def bench_training(cfg, updates, batch_size, tokenizer='char', **settings):
    """Tokens/s and MFU, from log.csv."""
    os.chdir(tempfile.mkdtemp(dir='.'))  # each rank prepares its own dataset
    prepare_text.prepare(prepare_text.read_text(RETOLD), 'story', tokenizer)
    train(TrainConfig(
        **settings, batch_size=cfg.batch_size or batch_size, dataset='story', out_dir='../out',
        device=cfg.device, dtype=cfg.dtype, compile=cfg.compile, max_iters=updates, eval_iters=1,
        sample_tokens=0, gradient_accumulation_steps=runtime.Ranks().world_size,
    ))
    log = np.genfromtxt('../out/log.csv', delimiter=',', names=True)
    # Each figure is a median of 20 updates already. The last row, an evaluation, has none.
    mfu = f'{np.nanmedian(log["mfu"]):.1%}' if 'mfu' in log.dtype.names else 'n/a'
    return f'{np.nanmedian(log["tokens_per_s"]):,.0f} tok/s', mfu


def bench_sampling(cfg, prompt=1, new=100, samples=1, quantize='', **shape):
    """Tokens/s: the new ones of all samples; with a long prompt, the prompt's."""
    device, dtype = runtime.device_and_dtype(cfg)
    model = GPT(GPTConfig(**shape))
    amp = prepare_for_sampling(model, device, dtype, quantize)
    idx = torch.randint(65, (samples, prompt), device=device)
    with amp:
        seconds = repeat(lambda: model.generate(idx, new, top_k=200).cpu(), repeat=6, number=1)
    return f'{max(prompt, samples * new) / np.median(seconds):,.0f} tok/s', ''


def bench_preparing(cfg, tokenizer, copies):
    """MB of text per second, made into .bin files."""
    text = prepare_text.read_text(RETOLD) * copies
    seconds = timeit(lambda: prepare_text.prepare(text, 'story', tokenizer), number=1)
    return f'{len(text.encode()) / 1e6 / seconds:,.1f} MB/s', ''


BABY = dict(n_layer=6, n_head=6, n_embd=384, block_size=256)
SMALL = dict(n_layer=4, n_head=4, n_embd=128, block_size=64)
TRAIN_BABY = BABY | dict(updates=60, batch_size=16)
SAMPLE_BABY = BABY | dict(vocab_size=65, new=500)
# The default shape is GPT-2's. With few tokens, its weights take most of the memory.
TRAIN_GPT2 = dict(updates=100, batch_size=32, block_size=1024, tokenizer='gpt2')
FEW_TOKENS = dict(updates=10, batch_size=4, block_size=64)
ROWS = {  # name: the function that measures it, its arguments
    'train baby 6x384, T 256, B 16': (bench_training, TRAIN_BABY),
    'train baby 6x384, T 256, B 16, recompute': (bench_training, TRAIN_BABY | dict(recompute=True)),
    'train small 4x128, T 64, B 12': (bench_training, SMALL | dict(updates=1000, batch_size=12)),
    'train gpt2 124M, on CUDA': (bench_training, TRAIN_GPT2),
    'train gpt2 124M, recompute, on CUDA': (bench_training, TRAIN_GPT2 | dict(recompute=True)),
    'train 12x768, unsharded': (bench_training, FEW_TOKENS | dict(shard=False)),
    'train 12x768, sharded': (bench_training, FEW_TOKENS | dict(shard=True)),
    'sample baby 6x384, batch 1': (bench_sampling, SAMPLE_BABY),
    'sample baby 6x384, batch 16': (bench_sampling, SAMPLE_BABY | dict(samples=16)),
    'sample gpt2 124M, batch 1': (bench_sampling, {}),
    'sample gpt2 124M, batch 1, int8': (bench_sampling, dict(quantize='int8')),
    'sample gpt2 124M, batch 16': (bench_sampling, dict(samples=16)),
    'prefill gpt2 124M, 1000 tokens': (bench_sampling, dict(prompt=1000, new=1)),
    'prepare characters, 50 MB': (bench_preparing, dict(tokenizer='char', copies=215)),
    'prepare gpt2 BPE, 10 MB': (bench_preparing, dict(tokenizer='gpt2', copies=43)),
}


def measure(cfg):
    """Measure `cfg.row` in this process, one of those that torchrun started; print the row."""
    function, arguments = ROWS[cfg.row]
    runtime.set_speed_options(arguments.get('shard', False))
    figures = function(cfg, **arguments)
    ranks, (device, _) = runtime.Ranks(), runtime.device_and_dtype(cfg)
    unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes, Linux KiB
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
    if ranks.rank == ranks.world_size - 1:
        name = f'{cfg.row}, {ranks.world_size} processes' if 'shard' in arguments else cfg.row
        print('| ' + ' | '.join((name, *figures, f'{peak / 2**30:.2f} GiB')) + ' |')


def main(argv):
    cfg = override(BenchConfig(), argv, usage=__doc__)
    if cfg.row:
        return measure(cfg)
    device, dtype = runtime.device_and_dtype(cfg)
    gpus = torch.cuda.device_count() if device.type == 'cuda' else 0
    chosen = [name for name in ROWS if cfg.only in name and (gpus or 'CUDA' not in name)]
    if not chosen:
        raise UserError(f'only={cfg.only!r} is in no name of a row for {device} (those on CUDA '
                        f'need an NVIDIA GPU): choose from {"; ".join(ROWS)}')
    hardware = torch.cuda.get_device_name(device) if gpus else f'{os.cpu_count()} cores'
    print(f'torch {torch.__version__}, {device} ({hardware}), {str(dtype)[6:]}\n')
    print('| work | speed | MFU | peak memory |\n|---|---|---|---|', flush=True)
    failed = []
    for name in chosen:
        torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={gpus or 2}']
        flags = [f'--{key}={value}' for key, value in vars(cfg).items() if key != 'row']
        command = [sys.executable, *(torchrun if 'sharded' in name else []),
                   os.path.abspath(__file__), *flags, f'--row={name}']
        with tempfile.TemporaryDirectory() as folder:
            result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, encoding='utf-8')
        row = re.search(r'^\| .*', result.stdout, re.M)
        print(row.group() if row else f'| {name} | failed, see above | | |', flush=True)
        failed += [] if row else [name]
    if failed:
        raise UserError(f'no figures of {", ".join(failed)}: see what is printed above')


if __name__ == '__main__':
    console.run(main)
