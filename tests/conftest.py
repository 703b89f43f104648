"""What the tests share: a folder to work in, a small dataset, the scripts as real processes."""

import contextlib
import glob
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types

# Tests see no GPU: once torch has used one, or only a thread for its gradients, scripts can no
# longer be forked. test_gpu.py gets the first GPU back.
GPU = {'CUDA_VISIBLE_DEVICES': os.environ.get('CUDA_VISIBLE_DEVICES', '0')}
os.environ['CUDA_VISIBLE_DEVICES'] = ''

import pytest
import torch
import torch._dynamo  # as an optimizer does: once here, not in each process that is forked

import console
import prepare_text
from console import Progress, UserError
from tokenizer import GPT2Tokenizer

os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # its threads would not survive a fork
os.environ['OMP_NUM_THREADS'] = '1'  # for the scripts: their models are small
torch.set_num_threads(1)
# nohup ignores SIGHUP, and a shell's background jobs SIGINT: these tests and their scripts don't.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STORY = os.path.join(ROOT, 'data', 'oz_retold.txt')

# A model and a run that take a second or two.
TINY = dict(
    dataset='tiny', out_dir='out', gradient_accumulation_steps=2, batch_size=4, block_size=16,
    n_layer=2, n_head=2, n_embd=32, learning_rate=1e-2, warmup_iters=2, max_iters=6,
    eval_interval=3, eval_iters=2, log_interval=1, sample_tokens=8, device='cpu', dtype='float32',
)


def pytest_addoption(parser):
    parser.addoption('--no-bf16', action='store_true',
                     help='as on a CPU without bf16 instructions: dtype "auto" is float32')


def pytest_configure(config):
    if config.getoption('--no-bf16'):
        torch.cpu.get_capabilities = dict


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing is slower than these training runs, so only test_plot.py does it."""
    if request.module.__name__ != 'test_plot':
        monkeypatch.setattr('plot_loss.draw', lambda *_: None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(folder):
    """A current folder with the dataset `tiny`: the first 20,000 characters of the retelling."""
    with open(STORY, encoding='utf-8') as file:
        text = file.read(20_000)
    prepare_text.prepare(text, 'tiny', test_fraction=0.1, source='test')
    return folder


def gpt2_tokenizer():
    """A GPT2Tokenizer; skips the test where tiktoken has no files and cannot download them."""
    tokenizer = GPT2Tokenizer()
    try:
        tokenizer.bpe
    except UserError:
        pytest.skip('tiktoken has no GPT-2 files here and cannot fetch them')
    return tokenizer


@pytest.fixture(scope='session')
def gpt2():
    return gpt2_tokenizer()


def flags(**settings):
    return [f'--{name}={value}' for name, value in settings.items()]


def script(name, *args, processes=1, input='', env=None, timeout=120):
    """Run one of the scripts in the current folder as a user would; under torchrun for several.

    One process, unless it needs another environment, is forked: torch is loaded here already.
    """
    if processes == 1 and not env:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile('w+', encoding='utf-8'))
                     for _ in range(3)]
            files[0].write(input)
            files[0].seek(0)
            process = forked(name, args, files)
            process.join(timeout)
            process.kill()
            for file in files:
                file.seek(0)
            _, output, errors = (file.read() for file in files)
        return subprocess.CompletedProcess(args, process.exitcode, output, errors)
    command = [sys.executable]
    if processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    environment = os.environ | (env or {})
    for _ in range(3):
        result = subprocess.run(
            [*command, os.path.join(ROOT, name), *args], input=input, capture_output=True,
            env=environment, timeout=timeout, encoding='utf-8',
        )
        # On a loaded machine gloo now and then aborts a process: that is not what is tested.
        if processes == 1 or 'SIGABRT' not in result.stderr:
            break
    return result


def forked(name, args, files, others=(), env=None):
    """Start a script in a fork of this process, with `files` as its standard ones.

    others: file descriptors that are not for it. A script elsewhere than in the project has the
    modules beside it.
    """
    path = os.path.join(ROOT, name)

    def work():
        os.environ.update(env or {})
        if os.path.dirname(path) != ROOT:
            sys.path.insert(0, os.path.dirname(path))
            for own in glob.glob(os.path.join(ROOT, '*.py')):
                sys.modules.pop(os.path.basename(own).removesuffix('.py'), None)
        for i, file in enumerate(files):
            os.dup2(file.fileno(), i)
        for descriptor in others:
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = (
            open(i, mode, encoding='utf-8', closefd=False) for i, mode in enumerate('rww'))
        sys.argv = [path, *args]
        runpy.run_path(path, run_name='__main__')

    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    return process


def piped(name, *args):
    """Start a script in a fork: its process, its output and its errors, to be read."""
    (output, out), (errors, err) = os.pipe(), os.pipe()
    with open(os.devnull) as nothing, open(out, 'wb') as out, open(err, 'wb') as err:
        process = forked(name, args, [nothing, out, err], [output, errors])
    return process, open(output, encoding='utf-8'), open(errors, encoding='utf-8')


@pytest.fixture
def source(tmp_path):
    """A copy of the project's scripts, to edit as a reader of it would."""
    folder = tmp_path / 'source'
    folder.mkdir()
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        shutil.copy(path, folder)
    return folder


def edited(source, file, *changes):
    """Replace texts in a file of the copy: pairs (old, new); each old one stands there once."""
    path = source / file
    text = path.read_text('utf-8')
    for old, new in changes:
        assert text.count(old) == 1, f'{text.count(old)} times in {file}: {old}'
        text = text.replace(old, new)
    path.write_text(text, 'utf-8')


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def rank_of(rank, processes, port):
    """The environment variables that torchrun sets, for machines of two processes each."""
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank % 2), 'WORLD_SIZE': str(processes),
            'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}


def train_together(cfg, processes=2, exit_codes=None):
    """Train in several processes without torchrun: forked, since torch is loaded here already.

    All must end with 0, or as `exit_codes` say.
    """
    import train

    def work(rank, port):
        os.environ.update(rank_of(rank, processes, port))
        console.run(lambda argv: train.train(cfg, catch_signals=True))  # errors as a script's

    context, port = multiprocessing.get_context('fork'), free_port()
    ranks = [context.Process(target=work, args=(rank, port)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == (exit_codes or [0] * processes)


def scripts_together(path, args, processes=2):
    """Run a script in several processes without torchrun: (exit codes, all that they wrote)."""
    port = free_port()
    with tempfile.TemporaryFile('w+') as output, open(os.devnull) as nothing:
        ranks = [forked(path, args, [nothing, output, output], env=rank_of(rank, processes, port))
                 for rank in range(processes)]
        for rank in ranks:
            rank.join(60)
            rank.kill()
        output.seek(0)
        return [rank.exitcode for rank in ranks], output.read()


@pytest.fixture
def saves(monkeypatch):
    """A list that grows with each checkpoint that is written: (path, its iteration)."""
    import checkpoint

    save, seen = torch.save, []

    def watched(state, file):
        seen.append((file.name.rsplit('.', 2)[0], state['iter_num']))
        save(state, file)

    monkeypatch.setattr(checkpoint.torch, 'save', watched)
    return seen


def validation_loss(model, cfg):
    """The loss of a model on the val split, as train.py computes it."""
    import runtime
    import train

    cpu, ranks = torch.device('cpu'), runtime.Ranks()
    return train.evaluate(
        model, {'val': train.Dataset(cfg.dataset, ranks).splits['val']}, cfg, ranks, cpu,
        torch.autocast('cpu', enabled=False), stop=types.SimpleNamespace(received=0),
        progress=Progress(enabled=False))['val']


def steps(output):
    """The evaluations that a run printed: [(iteration, train loss, val loss)]."""
    found = re.findall(r'^step (\d+): train loss ([\d.]+), val loss ([\d.]+)', output, re.M)
    return [(int(it), float(train), float(val)) for it, train, val in found]
