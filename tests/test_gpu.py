"""On a real NVIDIA GPU, if there is one: the numbers, which test_cuda.py cannot check."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from conftest import GPU, ROOT, TINY, flags, script

DEVICE = 'cuda'
RUN = TINY | dict(device=DEVICE, dtype='bfloat16', compile=False)


def on_gpu(code):
    """Run code in a process that sees the GPU; returns its errors, '' if there were none."""
    environment = os.environ | GPU | {'PYTHONPATH': ROOT}
    result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True,
                            encoding='utf-8', timeout=300)
    return result.stderr if result.returncode else ''


@pytest.fixture(autouse=True, scope='module')
def gpu():
    """A GPU that torch can use, or these tests are skipped."""
    if not torch.version.cuda or on_gpu('import torch; torch.zeros(1, device="cuda")'):
        pytest.skip('needs an NVIDIA GPU')


def run(out_dir, **settings):
    """Train; returns what was printed, and (loss, validation loss) of each iteration."""
    settings = RUN | dict(out_dir=out_dir) | settings
    result = script('train.py', *flags(**settings), env=GPU, timeout=300)
    assert result.returncode == 0, result.stderr
    with open(f'{out_dir}/log.csv', newline='') as file:
        return result.stdout, [
            [float(row[name] or 0) for name in ('train_loss', 'val_loss')]
            for row in csv.DictReader(file)]


def assert_near(rows, others, rel):
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=rel)


@pytest.mark.parametrize('settings', [
    dict(dtype='bfloat16'), dict(dtype='float16', recompute=True),
    dict(dtype='bfloat16', compile=True),
    dict(dtype='bfloat16', model='llama', n_kv_head=1, optimizer='muon'),
    dict(dtype='float16', model='llama', compile=True),
], ids=str)
def test_training_as_on_a_cpu(tiny, settings):
    """Compiled or not, in 16 bits, the losses are those of float32 on the CPU, within 3 %."""
    output, rows = run('gpu', **settings)
    assert 'torch.compile failed' not in output and 'no sample' not in output
    whole = settings | dict(dtype='float32', recompute=False, compile=False)
    assert_near(rows, run('cpu', **whole, device='cpu')[1], rel=0.03)


def test_resume_is_exact(tiny):
    """Up to rounding: on a GPU, the order in which attention adds gradients varies."""
    for dtype in 'bfloat16', 'float16':
        whole = run(dtype, dtype=dtype)[1]
        run('parts', dtype=dtype, max_iters=3, lr_decay_iters=6)
        resumed = run('parts', dtype=dtype, init_from='resume')[1]
        assert_near(resumed, whole, rel=1e-3)


def test_the_loss_in_chunks_is_the_whole_loss():
    assert not on_gpu(f'''
import torch, model
config = model.GPTConfig(block_size=64, vocab_size=512, n_layer=2, n_head=2, n_embd=64)
gpt = model.GPT(config).to('{DEVICE}')
ids = torch.randint(512, (40, 65), device='{DEVICE}')
found = []
for model.MAX_LOGITS in 1 << 26, 1:
    with torch.autocast('{DEVICE}', torch.bfloat16):
        loss = gpt(ids[:, :-1], ids[:, 1:], loss_only=True)[1]
    loss.backward()
    found.append((loss.detach(), gpt.lm_head.weight.grad))
    gpt.zero_grad()
torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=1e-4)
''')


def test_batches_and_samples_do_not_wait(tiny):
    """Batches equal those of the CPU, and neither copying them nor sampling waits."""
    assert not on_gpu(f'''
import numpy as np, torch, dataset, model
device = torch.device('{DEVICE}')
split = dataset.Split('data/tiny/val.bin', 64)
offsets = np.array([0, 7, split.tokens - 3])
gpt = model.GPT(model.GPTConfig(8, 64, 1, 2, 32)).to(device)
idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
for mode in 'default', 'error':  # 'error' raises if the host waits; first to load all kernels
    torch.cuda.set_sync_debug_mode(mode)
    batch = split.batch(offsets, 16, device)
    gpt.generate(idx, 12, 0.8, top_p=0.95)
torch.cuda.set_sync_debug_mode('default')
for ours, theirs in zip(batch, split.batch(offsets, 16, torch.device('cpu'))):
    assert ours.device.type == device.type and torch.equal(ours.cpu(), theirs)
''')


def test_a_bad_batch_is_skipped(tiny):
    for dtype in 'bfloat16', 'float16':
        assert not on_gpu(f'''
import math, torch, train
from checkpoint import load_checkpoint
loss_of, calls = train.training_loss, []
def spoilt(model, x, y):
    calls.append(x)
    loss, parts = loss_of(model, x, y)
    return (loss * math.nan if len(calls) == 5 else loss), parts
train.training_loss = spoilt
train.train(train.TrainConfig(**{RUN | dict(dtype=dtype, out_dir=dtype)}))
saved = load_checkpoint('{dtype}/ckpt.pt')
assert saved['skipped'] == 1 and all(w.isfinite().all() for w in saved['model'].values())
''')


def test_sampling(tiny):
    run('out', max_iters=3)
    for more in (dict(dtype='bfloat16'), dict(dtype='float16', quantize='int8'),
                 dict(dtype='bfloat16', quantize='int8'), dict(dtype='float32', compile=True)):
        result = script('sample.py', *flags(device=DEVICE, start='The', max_new_tokens=30, **more),
                        env=GPU, timeout=300)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count('The') >= 3
