"""The CUDA path without a GPU: whole runs on fake tensors, in their own process.

fake_cuda.py contains the fake GPU, and lists what it can detect. test_gpu.py is for a real GPU.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, STORY, TINY, edited, gpt2_tokenizer

import prepare_text

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None or torch.__version__ < '2.13'
    or sys.platform != 'linux' or not shutil.which('g++'),
    reason='needs g++ and a torch for CPUs, of which it replaces inner parts: 2.13 was tried')

RUN = TINY | dict(batch_size=2, block_size=4, n_layer=1, n_embd=16, max_iters=2, eval_interval=2,
                  eval_iters=1, sample_tokens=5, device='cuda', dtype='bfloat16', compile=False)
SHORT = RUN | dict(max_iters=1, sample_tokens=0)
EVALUATE = RUN | dict(init_from='gpt', eval_only=True)
BIGRAM = dict(model='bigram', n_layer=None, n_head=None, n_embd=None)
LLAMA = dict(model='llama', n_kv_head=1)
TRAIN = 'import train\ntrain.train(train.TrainConfig(**{}))'

# A prompt in two parts, then new tokens: all the ways to fill a cache.
PROMPT = '''
import torch
from llama import MODELS
from model import KVCache
cls, config_cls = MODELS['{}']
model = cls(config_cls(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=16)).to('cuda')
cache = [KVCache(8) for _ in model.blocks]
idx = torch.zeros(2, 3, dtype=torch.int64, device='cuda')
with torch.autocast('cuda', torch.bfloat16):
    model(idx, cache=cache)
    model(idx, cache=cache)
    model.generate(idx, 10, top_k=5)
    model.generate(idx, 2, 0.8, top_p=0.9)
    model.generate(idx, 2, 0)
'''


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    """fake_cuda.cpp, compiled."""
    torch_folder = os.path.dirname(torch.__file__)
    path = tmp_path_factory.mktemp('library') / 'fake_cuda.so'
    subprocess.run(
        ['g++', '-O0', '-w', '-std=c++20', '-shared', '-fPIC', f'-I{torch_folder}/include',
         os.path.join(ROOT, 'tests', 'fake_cuda.cpp'), '-o', path, f'-L{torch_folder}/lib',
         '-ltorch_cpu', '-lc10', f'-Wl,-rpath,{torch_folder}/lib'], check=True)
    return path


class FakeCUDA:
    """The process of fake_cuda.py. Its current folder has the dataset `tiny`."""

    def __init__(self, library, folder):
        self.folder = folder
        with open(STORY, encoding='utf-8') as file, contextlib.chdir(folder):
            prepare_text.prepare(file.read(20_000), 'tiny', test_fraction=0.1, source='test')
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, 'tests', 'fake_cuda.py'), library],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding='utf-8')

    def ask(self, code, fake=True, ranks=1, root=ROOT):
        """Run code there; returns the report as an object."""
        request = dict(code=code, fake=fake, ranks=ranks, root=str(root), cwd=str(self.folder))
        timer = threading.Timer(300, self.process.kill)  # a test that hangs should fail
        timer.start()
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, 'the process has ended'
        return SimpleNamespace(**json.loads(line))

    def train(self, ranks=1, fake=True, **settings):
        """A training run; returns its report."""
        report = self.ask(TRAIN.format(RUN | settings), fake, ranks)
        assert not report.error, report.error
        return report

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope='module')
def cuda(library, tmp_path_factory):
    """A fake GPU, and checkpoints with real numbers in the folders `gpt` and `llama`."""
    with contextlib.closing(FakeCUDA(library, tmp_path_factory.mktemp('work'))) as process:
        for name, settings in ('gpt', {}), ('llama', LLAMA | dict(optimizer='muon')):
            process.train(fake=False, out_dir=name, device='cpu', dtype='float32', **settings)
        yield process


def waits(report, function):
    """How often the host waited for the GPU in a function and the functions that it called."""
    return sum(count for names, count in report.waits.items() if function in names.split('/'))


def check(report, updates=2, looks=2, waits_per_update=1, devices=('cuda:0',)):
    """Check where a training run waited, and what it saved."""
    assert waits(report, 'update') == updates * waits_per_update, report.waits
    assert waits(report, 'batch') == waits(report, 'generate') == 0, report.waits
    assert waits(report, 'sample_text') == 2 * looks, report.waits  # the prompt, and the text
    assert report.output.count('  | ') == looks and 'no sample' not in report.output
    assert report.saved['ckpt.pt'] == list(devices)


RUNS = {  # settings, and the waits of each update
    'gpt': (dict(dropout=0.1, bias=True), 1),
    'float16': (dict(device='cuda:0', dtype='float16', recompute=True, dropout=0.1), 1),
    'bigram': (BIGRAM | dict(dtype='float32', keep_interval=1), 1),
    'llama and muon': (LLAMA | dict(device='cuda:1', dtype='auto', optimizer='muon'), 1),
    # Muon's step must know on the CPU whether gradients overflowed.
    'llama and muon in float16': (
        LLAMA | dict(dtype='float16', optimizer='muon', sample_tokens=0), 2),
}


@pytest.mark.parametrize('name', RUNS)
def test_a_training_run(cuda, name):
    settings, waits_per_update = RUNS[name]
    run = cuda.train(**settings)
    device = 'cuda:1' if name == 'llama and muon' else 'cuda:0'
    looks = 2 if settings.get('sample_tokens', 1) else 0
    check(run, 2, looks, waits_per_update, [device])
    assert run.saved['best.pt'] == [device]
    assert ('ckpt-1.pt' in run.saved) == ('keep_interval' in settings)
    assert waits(run, 'evaluate') <= 8  # 2 for each of 4 batches


def test_the_random_state_of_other_devices_is_left_alone(cuda):
    """To read it would start CUDA on each GPU, with a warning."""
    assert cuda.train(**BIGRAM, device='cuda:1').seeded == ['cuda:1']
    assert cuda.train(**BIGRAM, device='cpu', fake=False).seeded == []


def test_the_loss_in_chunks(cuda):
    run = cuda.ask(f'''
import model
before, model.MAX_LOGITS = model.MAX_LOGITS, 1
{TRAIN.format(SHORT | dict(optimizer='muon', dtype='float32'))}
model.MAX_LOGITS = before
''')
    assert not run.error, run.error
    check(run, updates=1, looks=0)


@pytest.mark.parametrize('fails', [False, True])
def test_compiled_first(cuda, fails):
    """On CUDA a run is compiled, or continues without it; torch.compile itself is replaced."""
    run = cuda.ask(f'''
import torch
def compiled(model):
    print('compiling')
    if {fails}:
        raise RuntimeError('no compiler')
    return model
before, torch.compile = torch.compile, compiled
{TRAIN.format(SHORT | dict(compile=None, device='auto'))}
torch.compile = before
''')
    assert not run.error, run.error
    check(run, updates=1, looks=0)
    assert run.output.count('compiling') == 1 and ('no compiler' in run.output) == fails


def test_fine_tuning(cuda):
    check(cuda.train(init_from='gpt', out_dir='tuned', block_size=3, dtype='float16'))
    check(cuda.train(**SHORT | dict(init_from='llama', out_dir='tuned')), updates=1, looks=0)


def test_resume(cuda):
    for name, settings in ('gpt', dict(dtype='float16')), ('llama', LLAMA | dict(sample_tokens=0)):
        shutil.copytree(cuda.folder / name, cuda.folder / f'{name}-resumed')
        # With other batches to evaluate on, best.pt is measured again.
        run = cuda.train(init_from='resume', out_dir=f'{name}-resumed', max_iters=3, eval_iters=2,
                         **settings)
        check(run, updates=1, looks=2 if name == 'gpt' else 0)
        assert 'resumed at iteration 2 of 3' in run.output
        assert 'the way to measure, have changed' in run.output


def test_evaluation_only(cuda):
    run = cuda.train(init_from='gpt', eval_only=True, eval_iters=0, batch_size=1000)
    assert run.output.count('perplexity') == 3 and not run.saved
    assert waits(run, 'evaluate') == 2 * 6 and waits(run, 'batch') == 0, run.waits


@pytest.mark.parametrize('flags', [
    ['--out_dir=gpt', '--dtype=bfloat16', '--top_p=0.9'],
    ['--out_dir=gpt', '--dtype=bfloat16', '--quantize=int8'],
    ['--out_dir=llama', '--dtype=float16', '--device=cuda:1', '--temperature=0'],
    ['--out_dir=llama', '--dtype=float32', '--quantize=int8'],
], ids=' '.join)
def test_sampling(cuda, flags):
    flags = ['--device=cuda', '--num_samples=2', '--max_new_tokens=6', '--start=The', *flags]
    run = cuda.ask(f'import sample\nsample.main({flags})')
    assert not run.error, run.error
    assert run.output.count('The') == 2
    # One for the prompt, and one for each token, which is printed as it comes.
    assert run.waits['main/write'] == 1 + 6 and waits(run, 'stream') == 0, run.waits


@pytest.mark.parametrize('name', ['gpt', 'llama', 'bigram'])
def test_a_prompt_in_two_parts(cuda, name):
    code = PROMPT.format(name)
    if name == 'bigram':
        code = code.replace(', n_layer=1, n_head=2, n_embd=16', '')
    run = cuda.ask(code)
    assert not run.error, run.error
    assert run.waits == {'': run.waits['']}  # of .to('cuda'), above, which no script calls


# Mistakes that must be detected: the code to run, the function that waits (None: there is an error
# instead), and the edit: a file, the old text and the new one.
SLIPS = {
    'positions on the CPU': (
        PROMPT.format('gpt'), None,
        'model.py', 'torch.arange(start, end, device=idx.device)', 'torch.arange(start, end)'),
    'angles on the CPU': (
        PROMPT.format('llama'), None,
        'llama.py', 'head_size, 2, device=positions.device)', 'head_size, 2)'),
    'a mask on the CPU': (
        PROMPT.format('gpt'), None,
        'model.py', 'dtype=torch.bool, device=q.device)', 'dtype=torch.bool)'),
    'a list as an index': (
        PROMPT.format('gpt'), 'logits_and_loss',
        'model.py', 'lm_head(x[:, -1:])', 'lm_head(x[:, [-1]])'),
    'a prompt on the CPU': (
        TRAIN.format(RUN), None,
        'train.py', 'prompt.to(device)', 'prompt'),
    'a loss for each micro-batch': (
        TRAIN.format(SHORT), 'update',
        'train.py', 'loss / divisor)', 'loss / divisor + 0 * loss.item())'),
    'numbers on two devices': (
        TRAIN.format(SHORT), None, 'train.py', 'runtime.gather(norm)', 'norm.cpu()'),
    'a batch that is not pinned': (
        TRAIN.format(EVALUATE), 'batch', 'dataset.py', 'pair.pin_memory().to', 'pair.to'),
    'a copy that waits': (
        TRAIN.format(EVALUATE), 'batch',
        'dataset.py', 'to(device, non_blocking=True)', 'to(device)'),
}


@pytest.mark.parametrize('slip', SLIPS)
def test_a_mistake_is_detected(cuda, source, slip):
    code, function, file, *change = SLIPS[slip]
    edited(source, file, change)
    run = cuda.ask(code, root=source)
    if function:
        assert waits(run, function) > 1, run.waits
    else:
        assert 'cpu' in run.error and 'cuda' in run.error


AVERAGED = '''
import torch, runtime
class Averaged(torch.nn.Module):
    def __init__(self, module, **_):
        super().__init__()
        self.module = module
    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)
runtime.DistributedDataParallel = Averaged
'''


@pytest.mark.slow
@pytest.mark.parametrize('settings', [
    dict(shard=True), LLAMA | dict(shard=True, dtype='float16', recompute=True, dropout=0.1), {},
], ids=str)
def test_one_of_four_ranks(library, tmp_path, settings):
    """Rank 0 of a new run and of a resumed one. The other ranks, and what they send, are fake."""
    with contextlib.closing(FakeCUDA(library, tmp_path)) as cuda:
        whole = {name: settings[name] for name in settings.keys() & LLAMA.keys()}
        cuda.train(fake=False, out_dir='whole', device='cpu', dtype='float32',
                   gradient_accumulation_steps=8, **whole)
        if not settings:  # torch's own needs numbers
            assert not cuda.ask(AVERAGED).error
        for start in dict(out_dir='new'), dict(out_dir='whole', init_from='resume', max_iters=4):
            run = cuda.train(ranks=4, gradient_accumulation_steps=8, **settings | start)
            check(run, devices=['cpu', 'cuda:0'] if settings else ['cuda:0'])
            assert run.saved['best.pt'] == ['cpu' if settings else 'cuda:0']
            assert run.backend == 'cpu:gloo,cuda:nccl'


BENCH = '''
import bench
bench.ROWS |= {
    'train': (bench.bench_training, dict(updates=3, batch_size=2, block_size=4, n_layer=1, n_head=2,
                                         n_embd=16, tokenizer='gpt2', recompute=True)),
    'sample': (bench.bench_sampling, dict(n_layer=1, n_head=2, n_embd=16, samples=2, new=3))}
bench.main(['--row=train', '--device=cuda', '--compile=false'])
bench.main(['--row=sample', '--device=cuda'])
'''


def test_bench_measures_on_a_gpu(cuda):
    gpt2_tokenizer()
    report = cuda.ask(BENCH)
    assert not report.error, report.error
    assert '| train | ' in report.output and '| sample | ' in report.output, report.output
