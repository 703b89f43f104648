"""How fast is this machine at what train.py, sample.py and prepare_text.py do?

    python bench.py                # the whole table, some minutes
    python bench.py --only=baby    # the rows with this word in their name

Every row runs in new processes and calls what the scripts themselves run. Speeds are medians; on a
shared machine compare only figures of one run. Memory is the peak of a process, on its GPU where
it uses one; where several train, of the last, since the first gathers the checkpoint besides.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

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
    only: str = ''  # rows with this in their name
    device: str = 'auto'  # the best there is of cuda, mps, cpu
    dtype: str = 'auto'  # what the hardware does natively of bfloat16, float16, float32
    compile: bool | None = None  # torch.compile in training; none means on CUDA only
    batch_size: int = 0  # of the training rows, to find the best; 0 takes their own
    row: str = ''  # for bench.py itself: measure this row, in this process


def bench_training(cfg, updates, batch_size, tokenizer='char', **settings):
    """tokens/s and MFU as log.csv has them, after the first rows."""
    os.chdir(tempfile.mkdtemp(dir='.'))  # where no other rank prepares the dataset
    prepare_text.prepare(prepare_text.read_text(RETOLD), 'story', tokenizer)
    train(TrainConfig(
        **settings, batch_size=cfg.batch_size or batch_size, dataset='story', out_dir='../out',
        device=cfg.device, dtype=cfg.dtype, compile=cfg.compile, max_iters=updates,
        eval_interval=updates + 1, eval_iters=1, log_interval=max(1, updates // 20),
        sample_tokens=0, gradient_accumulation_steps=runtime.Ranks().world_size,
    ))
    # The last row only evaluates.
    log = np.genfromtxt('../out/log.csv', delimiter=',', names=True)[3:-1]
    mfu = f'{np.median(log["mfu"]):.1%}' if 'mfu' in log.dtype.names else 'n/a'
    return f'{np.median(log["tokens_per_s"]):,.0f} tok/s', mfu


def bench_sampling(cfg, prompt=1, new=100, samples=1, quantize='', **shape):
    """New tokens/s over all samples; for a long prompt, prompt tokens/s."""
    device, dtype = runtime.device_and_dtype(cfg)
    runtime.set_speed_options()
    model = GPT(GPTConfig(**shape))
    amp = prepare_for_sampling(model, device, dtype, quantize)
    speeds = []
    for _ in range(6):
        idx = torch.randint(65, (samples, prompt), device=device)
        began = time.perf_counter()
        with amp:
            model.generate(idx, new, top_k=200).cpu()
        speeds.append(max(prompt, samples * new) / (time.perf_counter() - began))
    return f'{np.median(speeds[1:]):,.0f} tok/s', ''


def bench_preparing(cfg, tokenizer, copies):
    """MB of UTF-8 text that become .bin files in a second."""
    text = prepare_text.read_text(RETOLD) * copies
    began = time.perf_counter()
    prepare_text.prepare(text, 'story', tokenizer)
    return f'{len(text.encode()) / 1e6 / (time.perf_counter() - began):,.1f} MB/s', ''


BABY = dict(n_layer=6, n_head=6, n_embd=384, block_size=256)
SMALL = dict(n_layer=4, n_head=4, n_embd=128, block_size=64)
# Where no shape is set it is GPT-2's, the default. With few tokens its weights take the memory.
GPT2 = dict(updates=200, batch_size=32, block_size=1024, tokenizer='gpt2')
FEW_TOKENS = dict(updates=10, batch_size=4, block_size=64)
SAMPLE_BABY = BABY | dict(vocab_size=65, new=500)
ROWS = {  # name: the function that measures it, its arguments
    'train baby 6x384, T 256, B 16': (bench_training, BABY | dict(updates=60, batch_size=16)),
    'train small 4x128, T 64, B 12': (bench_training, SMALL | dict(updates=1000, batch_size=12)),
    'train gpt2 124M, on CUDA': (bench_training, GPT2),
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
    """Measure `cfg.row` in this process and those that torchrun started with it; print it."""
    ranks = runtime.Ranks()
    function, arguments = ROWS[cfg.row]
    figures = function(cfg, **arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == 'darwin' else 1024  # bytes there, KiB elsewhere
    device, _ = runtime.device_and_dtype(cfg)
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
    memory = f'{peak / 2**30:.2f} GiB'
    if ranks.rank == ranks.world_size - 1:
        name = f'{cfg.row}, {ranks.world_size} processes' if 'shard' in arguments else cfg.row
        print('| ' + ' | '.join((name, *figures, memory)) + ' |')


def main(argv):
    cfg = override(BenchConfig(), argv, usage=__doc__)
    if cfg.row:
        return measure(cfg)
    device, dtype = runtime.device_and_dtype(cfg)
    gpus = torch.cuda.device_count() if device.type == 'cuda' else 0
    chosen = [name for name in ROWS if cfg.only in name]
    if not chosen:
        raise UserError(f'only={cfg.only!r} is in no name: choose from {"; ".join(ROWS)}')
    if not gpus:
        chosen = [name for name in chosen if 'CUDA' not in name]
    if not chosen:
        raise UserError(f'only={cfg.only!r}: these rows need an NVIDIA GPU, and the device is {device}')
    hardware = torch.cuda.get_device_name(device) if gpus else f'{os.cpu_count()} cores'
    print(f'torch {torch.__version__}, {device} ({hardware}), {str(dtype).split(".")[1]}\n')
    print('| work | speed | MFU | peak memory |\n|---|---|---|---|', flush=True)
    torchrun, failed = ['-m', 'torch.distributed.run', '--standalone'], []
    for name in chosen:
        launcher = [*torchrun, f'--nproc_per_node={gpus or 2}'] if 'sharded' in name else []
        flags = [f'--{key}={value}' for key, value in (vars(cfg) | {'row': name}).items()]
        command = [sys.executable, *launcher, os.path.abspath(__file__), *flags]
        with tempfile.TemporaryDirectory() as folder:
            result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, encoding='utf-8')
        row = re.search(r'^\| .*', result.stdout, re.M)
        print(row.group() if row else f'| {name} | failed, see above | | |', flush=True)
        failed += [] if row else [name]
    if failed:
        raise UserError(f'no figures of {", ".join(failed)}: see what is printed above')


if __name__ == '__main__':
    console.run(main)
