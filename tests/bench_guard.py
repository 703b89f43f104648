"""What the guard against non-finite updates costs, on CPU: python tests/bench_guard.py

The same update with and without the guard's lines, in turn; the median of 60 ratios for each
shape.
"""

import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import runtime  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import TrainConfig, make_optimizer  # noqa: E402


def update(model, optimizer, x, amp, guarded):
    with amp:
        _, loss = model(x, x)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.found_inf = None
    if guarded:
        bad = ~(norm + loss.detach()).isfinite()
        optimizer.found_inf = bad.float() if bad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if guarded and bad * 1.0 >= 10:
        raise SystemExit


def main():
    device = torch.device('cpu')
    runtime.tune(device)
    amp = runtime.autocast(device, runtime.pick_dtype('auto', device))
    for n_layer, block_size, batch_size in ((2, 64, 12), (4, 64, 12), (4, 128, 16)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=65, block_size=block_size, n_layer=n_layer, n_head=4,
                              n_embd=128, bias=False))
        optimizer = make_optimizer(model, TrainConfig())
        x = torch.randint(65, (batch_size, block_size))
        ratios = []
        for _ in range(61):
            seconds = []
            for guarded in (True, False):
                began = time.perf_counter()
                for _ in range(10):
                    update(model, optimizer, x, amp, guarded)
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[0] / seconds[1])
        low, middle, high = statistics.quantiles(ratios[1:], n=4)
        print(f'{n_layer} layers x 128, T {block_size}, B {batch_size}: '
              f'{1e2 * seconds[1]:.1f} ms, with the guard {middle:.4f} of it '
              f'({low:.3f} to {high:.3f})')


if __name__ == '__main__':
    main()
