"""A resumed run equals an uninterrupted one, to the last bit."""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, flags, piped, steps, train_together

import train
from checkpoint import load_checkpoint
from train import TrainConfig

RUN = TINY | dict(max_iters=12, eval_interval=4, dropout=0.2, sample_tokens=0)


def log_of(folder):
    """log.csv without the columns that depend on time."""
    with open(f'{folder}/log.csv', newline='') as file:
        return [
            {k: v for k, v in row.items() if k not in ('seconds', 'tokens_per_s', 'mfu')}
            for row in csv.DictReader(file)
        ]


def assert_same_run(a, b):
    """Weights, optimizer state, best loss and log of two folders, compared bit by bit."""
    ours, theirs = (load_checkpoint(f'{folder}/ckpt.pt') for folder in (a, b))
    assert ours['iter_num'] == theirs['iter_num']
    assert ours['best_val_loss'] == theirs['best_val_loss']
    assert ours['model'].keys() == theirs['model'].keys()
    for key, weight in ours['model'].items():
        assert torch.equal(weight, theirs['model'][key]), key
    states = ours['optimizer']['state'], theirs['optimizer']['state']
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        for name, value in states[0][key].items():
            assert torch.equal(value, states[1][key][name]), (key, name)
    best = [load_checkpoint(f'{folder}/best.pt') for folder in (a, b)]
    assert best[0]['iter_num'] == best[1]['iter_num']
    assert log_of(a) == log_of(b)


def stop_at(monkeypatch, iteration, cfg, number=signal.SIGINT):
    """Train `cfg`, but a signal comes during the update before `iteration`."""
    learning_rate = train.learning_rate

    def interrupted(cfg, it):
        if it == iteration - 1:
            os.kill(os.getpid(), number)
        return learning_rate(cfg, it)

    with monkeypatch.context() as patch:
        patch.setattr(train, 'learning_rate', interrupted)
        with pytest.raises(SystemExit) as stopped:
            train.train(cfg, catch_signals=True)
    assert stopped.value.code == 128 + number


@pytest.mark.parametrize('dtype, stop, number', [
    ('float32', 1, signal.SIGINT), ('float32', 4, signal.SIGTERM), ('bfloat16', 7, signal.SIGINT),
])
def test_resumed_equals_uninterrupted(tiny, monkeypatch, capsys, dtype, stop, number):
    run = RUN | dict(dtype=dtype)
    train.train(TrainConfig(**run | dict(out_dir='whole')))
    stop_at(monkeypatch, stop, TrainConfig(**run), number)
    assert f'stopped at iteration {stop}' in capsys.readouterr().out
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == stop
    train.train(TrainConfig(**run | dict(init_from='resume')))
    assert_same_run('out', 'whole')


def test_evaluations_at_other_intervals_change_nothing(tiny, monkeypatch):
    train.train(TrainConfig(**RUN | dict(out_dir='whole', eval_interval=12)))
    stop_at(monkeypatch, 5, TrainConfig(**RUN | dict(eval_interval=2)))
    train.train(TrainConfig(**RUN | dict(init_from='resume', eval_interval=3)))
    ours, theirs = (load_checkpoint(f'{x}/ckpt.pt')['model'] for x in ('out', 'whole'))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    a, b = (
        [(row['iteration'], row['train_loss'], row['grad_norm']) for row in log_of(x)]
        for x in ('out', 'whole')
    )
    assert a == b


def test_rows_after_the_checkpoint_are_written_once(tiny, monkeypatch):
    """Rows after the last save are dropped and written again."""
    train.train(TrainConfig(**RUN | dict(out_dir='whole')))
    stop_at(monkeypatch, 6, TrainConfig(**RUN))
    with open('out/log.csv', 'a') as file:
        file.write('6,768,1,9.9,,,1,1,0,1,,1\n7,896,1,9.9,,,1,1,0,1,,1\n8,10')
    train.train(TrainConfig(**RUN | dict(init_from='resume')))
    assert [int(row['iteration']) for row in log_of('out')] == list(range(13))
    assert_same_run('out', 'whole')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_two_processes_resume_exactly(tiny, dtype):
    run = RUN | dict(max_iters=8, gradient_accumulation_steps=4, dtype=dtype)
    for settings in (dict(out_dir='whole'), dict(max_iters=5, lr_decay_iters=8),
                     dict(init_from='resume', lr_decay_iters=8)):
        train_together(TrainConfig(**run | settings))
    log = log_of('out')
    assert [row['train_loss'] for row in log] == [row['train_loss'] for row in log_of('whole')]
    ours, theirs = (load_checkpoint(f'{x}/ckpt.pt')['model'] for x in ('out', 'whole'))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_of_one_process_is_resumed_by_two(tiny):
    run = RUN | dict(dropout=0.0, max_iters=10)
    train.train(TrainConfig(**run | dict(out_dir='whole')))
    train.train(TrainConfig(**run | dict(max_iters=5, lr_decay_iters=10)))
    train_together(TrainConfig(**run | dict(init_from='resume')))
    pairs = zip(log_of('out')[:10], log_of('whole')[:10], strict=True)
    for ours, theirs in pairs:
        assert float(ours['train_loss']) == pytest.approx(float(theirs['train_loss']), rel=1e-5)


def test_a_finished_run_can_be_extended(tiny, capsys):
    train.train(TrainConfig(**RUN))
    capsys.readouterr()
    train.train(TrainConfig(**RUN | dict(init_from='resume', max_iters=16)))
    out = capsys.readouterr().out
    assert 'resumed at iteration 12 of 16; changed since then: max_iters=16 (was 12)\n' in out
    assert [s[0] for s in steps(out)] == [12, 16]
    assert log_of('out')[12]['val_loss'] and log_of('out')[12]['train_loss']
    assert [int(row['iteration']) for row in log_of('out')] == list(range(17))
    train.train(TrainConfig(**RUN | dict(init_from='resume', max_iters=20, lr_decay_iters=16)))
    assert 'max_iters=20 (was 16), lr_decay_iters=16 (was None)\n' in capsys.readouterr().out
    before = load_checkpoint('out/ckpt.pt')
    train.train(TrainConfig(**RUN | dict(init_from='resume')))
    assert 'from the checkpoint: max_iters=20\n' in capsys.readouterr().out
    after = load_checkpoint('out/ckpt.pt')
    assert after['iter_num'] == before['iter_num'] == 20
    assert all(torch.equal(before['model'][key], after['model'][key]) for key in before['model'])
    assert [int(row['iteration']) for row in log_of('out')] == list(range(21))


def test_an_interrupted_run_that_is_extended_is_evaluated_when_due(tiny, monkeypatch, capsys):
    run = RUN | dict(max_iters=10, eval_interval=4)
    stop_at(monkeypatch, 6, TrainConfig(**run))
    capsys.readouterr()
    train.train(TrainConfig(**run | dict(init_from='resume', max_iters=14)))
    assert [it for it, *_ in steps(capsys.readouterr().out)] == [8, 12, 14]


@pytest.mark.parametrize('change', [
    dict(n_layer=3, n_head=4, n_embd=64, block_size=8, bias=True, gelu='tanh'),
    dict(model='bigram'), dict(model_size='gpt2', n_layer=12, n_head=12, n_embd=768),
], ids=str)
def test_a_resumed_run_has_its_checkpoints_shape(tiny, monkeypatch, capsys, change):
    """As in nanoGPT: flags for the shape are overridden; a message says so."""
    train.train(TrainConfig(**RUN | dict(out_dir='whole')))
    stop_at(monkeypatch, 6, TrainConfig(**RUN))
    capsys.readouterr()
    train.train(TrainConfig(**RUN | dict(init_from='resume') | change))
    (note,) = re.findall('^from the checkpoint: (.*)$', capsys.readouterr().out,
                         re.M)
    overridden = 'n_layer n_head n_embd'.split() if 'model_size' in change else change
    expected = {name: ({'model': 'gpt', 'bias': False, 'gelu': 'erf'} | RUN)[name]
                for name in overridden}
    assert set(note.split(', ')) == {f'{name}={value}' for name, value in expected.items()}
    assert_same_run('out', 'whole')


def start(*more, processes=1, **settings):
    """train.py in its own process and its own process group."""
    command = [sys.executable]
    if processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return subprocess.Popen(
        [*command, os.path.join(ROOT, 'train.py'), *flags(**settings), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        encoding='utf-8',
    )


def wait_for(process, words):
    for line in process.stdout:
        if line.startswith(words):
            return
    raise AssertionError(process.stderr.read())


LONG = RUN | dict(max_iters=100_000, eval_interval=100_000)


def test_ctrl_c_saves_and_ends_the_run(tiny):
    process, output, errors = piped('train.py', *flags(**LONG))
    assert any(line.startswith('iter 5:') for line in output), errors.read()
    os.kill(process.pid, signal.SIGINT)
    out = output.read()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT and not errors.read()
    stopped = int(out.split('stopped at iteration ')[1].split(';')[0])
    assert 'out/ckpt.pt is saved' in out and '--init_from=resume' in out
    ckpt = load_checkpoint('out/ckpt.pt')
    assert ckpt['iter_num'] == stopped >= 6
    assert [int(row['iteration']) for row in log_of('out')] == list(range(stopped))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_every_rank(tiny, number):
    """Ctrl-C reaches the terminal's whole group; SIGTERM only torchrun, which passes it on."""
    process = start(processes=2, **LONG)
    wait_for(process, 'iter 5:')
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert 'stopped at iteration' in out, err
    assert load_checkpoint('out/ckpt.pt')['iter_num'] >= 6
    assert 'Error' not in out


def test_a_second_ctrl_c_exits_at_once(tiny):
    """Even if the current iteration never ended."""
    code = f'''
import sys, time
sys.path.insert(0, {ROOT!r})
import console
with console.stop_signals(True, announce=True) as stop:
    print('ready', flush=True)
    while not stop.received:
        pass
    print('asked', flush=True)
    time.sleep(1000)
'''
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    wait_for(process, 'ready')
    process.send_signal(signal.SIGINT)
    wait_for(process, 'finishing this iteration, then saving; Ctrl-C again to quit without')
    wait_for(process, 'asked')
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT  # a shell makes it 128 + SIGINT as well


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(tiny):
    """30 kills of a run that saves at every iteration; the end equals that of a run without."""
    run = RUN | dict(max_iters=1000, eval_interval=1, eval_iters=1)
    train.train(TrainConfig(**run | dict(out_dir='whole')))
    moments = random.Random(0)
    kills = 0
    while kills < 30:
        resume = os.path.exists('out/ckpt.pt')
        process = start(**run | dict(init_from='resume' if resume else 'scratch'))
        for _ in range(3):  # the first one repeats the last one before
            wait_for(process, 'step ')
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, 'the run ended before it was killed'
        kills += 1
        for name in ('ckpt.pt', 'best.pt'):
            if os.path.exists(f'out/{name}'):
                assert load_checkpoint(f'out/{name}')['iter_num'] < 1000
    assert load_checkpoint('out/ckpt.pt')['iter_num'] > 30
    train.train(TrainConfig(**run | dict(init_from='resume')))
    assert_same_run('out', 'whole')


@pytest.mark.slow
def test_soak(folder, monkeypatch):
    """20,000 iterations on a 1.2 GB dataset: memory stays flat and no file stays open."""
    os.makedirs('data/big')
    for name, size in (('train', 1_200_000_000), ('val', 2_000)):
        with open(f'data/big/{name}.bin', 'wb') as file:
            file.truncate(size)
    with open('data/big/meta.json', 'w') as file:
        file.write('{"tokenizer": {"type": "char", "vocab_size": 2, "chars": "ab"}}')
    seen = []

    save = train.save_run

    def look(*args, **settings):
        with open('/proc/self/statm') as file:
            rss = int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
        seen.append((rss, len(os.listdir('/proc/self/fd'))))
        return save(*args, **settings)

    monkeypatch.setattr(train, 'save_run', look)
    train.train(TrainConfig(
        dataset='big', out_dir='out', gradient_accumulation_steps=1, batch_size=4,
        block_size=16, n_layer=1, n_head=1, n_embd=8, max_iters=20_000, eval_interval=1_000,
        eval_iters=5, log_interval=100, sample_tokens=0, device='cpu', dtype='float32',
    ))
    memory, handles = zip(*seen[2:])
    assert len(seen) >= 20
    assert max(memory) / min(memory) < 1.05 and max(handles) == min(handles)
