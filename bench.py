"""How fast is this machine at what train.py, sample.py and prepare_text.py do?

    python bench.py                                  # the whole table, some minutes
    python bench.py --only=baby                      # the rows with this word in their name
    python bench.py --profile=trace.json --only=baby # a torch profiler trace, for ui.perfetto.dev

Every row runs in a process of its own and calls what the scripts themselves run; only the row
"loss ... by torch" is there to compare. Speeds are medians; on a shared machine compare only
figures of one run.
"""

import contextlib
import csv
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

import console
import prepare_text
import runtime
from configurator import override
from model import GPT, MODEL_SIZES, ChunkedLoss, GPTConfig, next_token_loss
from sample import ready
from train import TrainConfig, train

STORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'oz_retold.txt')


@dataclass
class BenchConfig:
    only: str = ''  # rows with this in their name
    device: str = 'auto'  # the best there is of cuda, mps, cpu
    dtype: str = 'auto'  # what the hardware does natively of bfloat16, float16, float32
    compile: bool | None = None  # torch.compile in training; none means on CUDA only
    peak_tflops: float = 0.0  # the device's peak, to know MFU by; 0 looks it up
    batch_size: int = 0  # instead of the rows' own, to find the best
    iterations: int = 0  # updates per training row; 0 takes the row's own number
    profile: str = ''  # write a trace of the training rows to this file


CHAR = dict(dataset='chars', gradient_accumulation_steps=1)
BABY = dict(n_layer=6, n_head=6, n_embd=384)
SMALL = dict(n_layer=4, n_head=4, n_embd=128)
GPT2 = dict(zip(('n_layer', 'n_head', 'n_embd'), MODEL_SIZES['gpt2']))

TRAINING = {  # name: settings, updates
    'train baby 6x384, T 256, B 16': (CHAR | BABY | dict(block_size=256, batch_size=16), 60),
    'train small 4x128, T 64, B 12': (CHAR | SMALL | dict(block_size=64, batch_size=12), 1000),
}
TRAINING_CUDA = {
    'train gpt2 124M, T 1024': (
        GPT2 | dict(dataset='ids', block_size=1024, batch_size=32, gradient_accumulation_steps=1),
        200,
    ),
}
SAMPLING = {  # name: shape, prompt tokens, new tokens, samples, quantize
    'sample baby 6x384, batch 1': (BABY | dict(vocab_size=65, block_size=256), 1, 500, 1, ''),
    'sample baby 6x384, batch 16': (BABY | dict(vocab_size=65, block_size=256), 1, 500, 16, ''),
    'sample gpt2 124M, batch 1': (GPT2, 1, 100, 1, ''),
    'sample gpt2 124M, batch 1, int8': (GPT2, 1, 100, 1, 'int8'),
    'sample gpt2 124M, batch 16': (GPT2, 1, 100, 16, ''),
    'prefill gpt2 124M, 1000 tokens': (GPT2, 1000, 1, 1, ''),
}
LOSSES = ['whole', 'in chunks', 'by torch']
PREPARING = {'prepare characters, 50 MB': 'char', 'prepare gpt2 BPE, 10 MB': 'gpt2'}


def machine(cfg):
    """The torch device and dtype that the settings stand for."""
    device = runtime.pick_device(cfg.device)
    return device, runtime.pick_dtype(cfg.dtype, device)


def make_datasets():
    """data/chars and data/ids in the current folder."""
    with open(STORY, encoding='utf-8') as file:
        prepare_text.prepare(file.read(), 'chars')
    os.makedirs('data/ids')
    for split in ('train', 'val'):
        ids = np.random.default_rng(0).integers(50257, size=1_000_000).astype('<u2')
        ids.tofile(f'data/ids/{split}.bin')


def bench_training(settings, updates, cfg):
    """tokens/s and MFU as log.csv has them, after the first rows."""
    make_datasets()
    updates = cfg.iterations or updates
    settings = settings | ({'batch_size': cfg.batch_size} if cfg.batch_size else {})
    run = TrainConfig(
        **settings, out_dir='out', max_iters=updates, eval_interval=updates + 1, eval_iters=1,
        log_interval=max(1, updates // 20), sample_tokens=0, device=cfg.device, dtype=cfg.dtype,
        compile=cfg.compile, peak_tflops=cfg.peak_tflops,
    )
    profile = contextlib.nullcontext()
    if cfg.profile:
        profile = torch.profiler.profile()
    with profile:
        train(run)
    if cfg.profile:
        profile.export_chrome_trace(cfg.profile)
    with open('out/log.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['tokens_per_s']][3:]
    speed = statistics.median(float(row['tokens_per_s']) for row in rows)
    mfu = [float(row['mfu']) for row in rows if row['mfu']]
    return f'{speed:,.0f} tok/s', f'{statistics.median(mfu):.1%}' if mfu else 'n/a'


def bench_sampling(shape, prompt, new, samples, quantize, cfg):
    """New tokens/s over all samples; for a long prompt, prompt tokens/s."""
    device, dtype = machine(cfg)
    runtime.tune(device)
    torch.manual_seed(0)
    model = ready(GPT(GPTConfig(**shape)), device, dtype, quantize)
    speeds = []
    for _ in range(6):
        idx = torch.randint(65, (samples, prompt), device=device)
        began = time.perf_counter()
        model.generate(idx, new, top_k=200).cpu()
        tokens = prompt if prompt > new else samples * new
        speeds.append(tokens / (time.perf_counter() - began))
    return f'{statistics.median(speeds[1:]):,.0f} tok/s', ''


def bench_loss(kind, cfg):
    """Tokens/s of the head and the loss of GPT-2, forward and backward, for 4096 tokens."""
    device, dtype = machine(cfg)
    runtime.tune(device)
    x = torch.randn(4, 1024, 768, device=device, requires_grad=True)
    weight = torch.randn(50257, 768, device=device, requires_grad=True)
    targets = torch.randint(50257, (4, 1024), device=device)
    speeds = []
    for _ in range(6):
        x.grad = weight.grad = None
        began = time.perf_counter()
        with runtime.autocast(device, dtype):
            if kind == 'whole':
                loss = next_token_loss(F.linear(x, weight), targets)
            elif kind == 'in chunks':
                loss = ChunkedLoss.apply(x.flatten(0, 1), weight, targets.flatten(), True)
            else:  # autocast doesn't reach into it
                loss = F.linear_cross_entropy(
                    x.flatten(0, 1).to(dtype), weight.to(dtype), targets.flatten(),
                    options=torch.nn.LinearCrossEntropyOptions(),
                )
        loss.backward()
        loss.item()
        speeds.append(targets.numel() / (time.perf_counter() - began))
    return f'{statistics.median(speeds[1:]):,.0f} tok/s', ''


def bench_preparing(tokenizer, megabytes):
    """MB of UTF-8 text that become .bin files in a second."""
    with open(STORY, encoding='utf-8') as file:
        text = file.read()
    text *= int(megabytes * 1e6 / len(text.encode()))
    began = time.perf_counter()
    prepare_text.prepare(text, 'text', tokenizer)
    return f'{len(text.encode()) / 1e6 / (time.perf_counter() - began):,.1f} MB/s', ''


def run_row(function, args, results):
    """In a process of its own: measure, and add the peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                figures = function(*args)
            except console.UserError as error:
                figures = f'not measured: {error}', ''
        os.chdir('/')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == 'darwin' else 1024
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        peak = torch.cuda.max_memory_allocated()
    results.put((*figures, f'{peak / 2**30:.2f} GiB'))


def main(argv):
    cfg = override(BenchConfig(), argv, usage=__doc__)
    cfg.profile = os.path.abspath(cfg.profile) if cfg.profile else ''
    device, dtype = machine(cfg)
    training = TRAINING | (TRAINING_CUDA if device.type == 'cuda' else {})
    rows = {name: (bench_training, (*row, cfg)) for name, row in training.items()}
    rows |= {name: (bench_sampling, (*row, cfg)) for name, row in SAMPLING.items()}
    losses = LOSSES if hasattr(F, 'linear_cross_entropy') else LOSSES[:2]
    rows |= {f'loss of gpt2, {kind}': (bench_loss, (kind, cfg)) for kind in losses}
    rows |= {name: (bench_preparing, (kind, 50 if kind == 'char' else 10))
             for name, kind in PREPARING.items()}
    name = (torch.cuda.get_device_name(device) if device.type == 'cuda'
            else f'{os.cpu_count()} cores')
    print(f'torch {torch.__version__}, {device} ({name}), {str(dtype).removeprefix("torch.")}\n')
    print('| work | speed | MFU | peak memory |\n|---|---|---|---|')
    spawn = multiprocessing.get_context('spawn')
    for name, (function, args) in rows.items():
        if cfg.only in name:
            results = spawn.Queue()
            process = spawn.Process(target=run_row, args=(function, args, results))
            process.start()
            process.join()
            if process.exitcode:
                raise console.UserError(f'{name!r} failed: its message is above')
            print('| ' + ' | '.join((name, *results.get())) + ' |', flush=True)


if __name__ == '__main__':
    console.run(main)
