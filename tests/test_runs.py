"""Sequences of commands that people type: each keeps the files that it should."""

import csv
import gc
import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    STORY, TINY, flags, forked, free_port, gpt2_tokenizer, piped, rank_of, script,
    scripts_together, steps, train_together, validation_loss,
)
from test_resume import assert_same_run, log_of, stop_at

import console
import prepare_text
import runtime
import sample
import train
from checkpoint import load_checkpoint, load_model
from configurator import override
from console import UserError
from train import TrainConfig

RUN = TINY | dict(sample_tokens=0)


def run(**settings):
    return train.train(TrainConfig(**RUN | settings))


def contents(folder):
    paths = sorted(Path(folder).iterdir())
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def rows(folder='out'):
    with open(f'{folder}/log.csv', newline='') as file:
        return list(csv.DictReader(file))


def story(start, length):
    with open(STORY, encoding='utf-8') as file:
        return file.read()[start : start + length]


# --- best.pt, by the current measure


@pytest.mark.parametrize('how', ['copy', 'slash', 'renamed'])
def test_the_same_data_under_another_name_keep_the_best(tiny, monkeypatch, how, capsys):
    """A worse model does not replace best.pt."""
    run()
    best = load_checkpoint('out/best.pt')
    if how == 'copy':
        shutil.copytree('data/tiny', 'data/other')
    elif how == 'renamed':
        os.rename('data/tiny', 'data/other')
    capsys.readouterr()
    run(init_from='resume', dataset='tiny/' if how == 'slash' else 'other', max_iters=9,
        learning_rate=3.0, decay_lr=False)
    assert 'measured' not in capsys.readouterr().out
    assert float(rows()[9]['val_loss']) > best['best_val_loss']
    assert load_checkpoint('out/best.pt')['iter_num'] == best['iter_num']
    assert load_checkpoint('out/ckpt.pt')['best_val_loss'] == best['best_val_loss']


@pytest.mark.parametrize('change', [
    dict(eval_iters=7), dict(batch_size=3), dict(seed=5), dict(eval_iters=0), 'other text',
], ids=str)
def test_where_the_measure_has_changed_best_pt_is_measured_again(tiny, capsys, change):
    """With a loss that is not comparable, best.pt would be replaced always or never."""
    run()
    if change == 'other text':
        text = story(50_000, 20_000)
        kept = set(story(0, 20_000))
        prepare_text.prepare(''.join(c for c in text if c in kept) + ''.join(kept), 'tiny',
                             test_fraction=0.1)
        change = {}
    capsys.readouterr()
    assert run(init_from='resume', max_iters=7, learning_rate=0, min_lr=0, **change) is not None
    out = capsys.readouterr().out
    cfg = TrainConfig(**RUN | change)
    expected = validation_loss(load_model('out/best.pt')[0], cfg)
    assert f'now out/best.pt has a loss of {expected:.4f}' in out
    # A rate of 0 moves nothing: the same weights have the same loss by the new measure.
    assert load_checkpoint('out/ckpt.pt')['best_val_loss'] == pytest.approx(expected, rel=1e-6)
    assert steps(out)[-1][2] == pytest.approx(expected, abs=1e-4)
    run(init_from='resume', max_iters=8, learning_rate=0, min_lr=0, **change)
    assert 'has a loss of' not in capsys.readouterr().out  # once is enough


def test_without_best_pt_the_first_evaluation_by_a_new_measure_is_the_best(tiny, capsys):
    run(always_save_checkpoint=False)
    os.remove('out/best.pt')
    run(init_from='resume', max_iters=9, eval_iters=5, learning_rate=1.0, decay_lr=False,
        always_save_checkpoint=False)
    assert load_checkpoint('out/best.pt')['iter_num'] == 6  # where it resumed


def test_fine_tuning_must_improve_on_where_it_started(tiny, capsys):
    run(max_iters=30)
    capsys.readouterr()
    tuned = dict(init_from='out', out_dir='tuned', eval_iters=0)
    start = run(learning_rate=3.0, decay_lr=False, **tuned)
    out = capsys.readouterr().out
    (_, _, first), *others = steps(out)
    assert all(loss > first for _, _, loss in others) and start == pytest.approx(first, abs=1e-4)
    assert 'the best so far' not in out and not os.path.exists('tuned/best.pt')
    assert ' (before the first update) after ' in out
    run(learning_rate=1e-3, max_iters=30, **tuned)
    assert 'the best so far' in capsys.readouterr().out and os.path.exists('tuned/best.pt')


# --- the log


@pytest.mark.parametrize('how', ['no memory', 'Ctrl-C'])
def test_a_resume_that_fails_at_once_leaves_the_log(tiny, monkeypatch, how):
    run(max_iters=5, eval_interval=2)  # the log continues after the last save, of iteration 5
    with open('out/log.csv', 'a') as file:
        file.write('7,896,0.5,1,,,9.9,0.01,1,0,100\n')
    before = contents('out')

    def fails(*_, **__):
        raise MemoryError() if how == 'no memory' else KeyboardInterrupt()

    with monkeypatch.context() as patch:
        patch.setattr(train, 'update', fails)
        with pytest.raises((UserError, KeyboardInterrupt)):
            run(init_from='resume', max_iters=9)
    assert contents('out') == before
    run(init_from='resume', max_iters=9)
    assert [int(row['iteration']) for row in rows()] == list(range(10))


def test_line_ends_that_an_editor_changed_do_no_harm(tiny):
    run(out_dir='whole', max_iters=9, lr_decay_iters=9)
    run(max_iters=6, lr_decay_iters=9)
    with open('out/log.csv', 'rb') as file:
        text = file.read()
    with open('out/log.csv', 'wb') as file:
        file.write(text.replace(b'\n', b'\r\n'))
    run(init_from='resume', max_iters=9, lr_decay_iters=9)
    assert [row['train_loss'] for row in rows()] == [row['train_loss'] for row in rows('whole')]
    assert [int(row['iteration']) for row in rows()] == list(range(10))


@pytest.mark.parametrize('at', ['first save', 'second save of an extended run'])
def test_a_kill_around_a_save_costs_no_rows(tiny, monkeypatch, at):
    """At any step of writing files."""
    if at != 'first save':
        run(out_dir='before', max_iters=3, lr_decay_iters=6)
    run(out_dir='whole', lr_decay_iters=6)
    replace, moment = os.replace, 0
    while True:
        shutil.rmtree('out', ignore_errors=True)
        if at != 'first save':
            shutil.copytree('before', 'out')
        moment, calls = moment + 1, []

        def killed(*args):
            calls.append(args)
            if len(calls) == moment:
                raise KeyboardInterrupt
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', killed)
            try:
                run(init_from='resume' if os.path.exists('out/ckpt.pt') else 'scratch',
                    lr_decay_iters=6)
                break  # it was not killed: there are no more moments
            except KeyboardInterrupt:
                pass
        run(init_from='resume' if os.path.exists('out/ckpt.pt') else 'scratch', lr_decay_iters=6)
        numbers = [int(row['iteration']) for row in rows()]
        assert numbers == list(range(7)), moment
        assert [row['train_loss'] for row in rows()] == [row['train_loss'] for row in rows('whole')]
    assert moment >= 4


# --- the previous run


def test_a_first_save_on_a_full_disk_moves_nothing(tiny, monkeypatch):
    run()
    before = contents('out')

    def full(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        with pytest.raises(UserError, match='before is untouched'):
            run(seed=1)
    assert contents('out') == before and not os.path.exists('out/previous')
    run(seed=2)
    assert contents('out/previous') == before


def test_a_missing_checkpoint_is_looked_for_in_previous_too(tiny):
    run()
    run(seed=1)
    os.remove('out/ckpt.pt')
    os.remove('out/best.pt')
    with pytest.raises(UserError, match='no checkpoint out/ckpt.pt .found: out/previous.'):
        run(init_from='resume')


def test_an_accidental_restart_moves_no_other_run(tiny, capsys):
    """It is stopped before its first evaluation: it gets a folder of its own."""
    run(out_dir='whole', seed=1, lr_decay_iters=6)
    run()
    before = contents('out')
    for number, seed in enumerate((1, 2), 1):
        cfg = TrainConfig(**RUN | dict(eval_interval=3, seed=seed, lr_decay_iters=6))
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 2, cfg)
        stopped, out = f'out/stopped-{number}/ckpt.pt', capsys.readouterr().out
        assert contents('out') == before and not os.path.exists('out/previous')
        assert f'{stopped} is saved' in out and f'--init_from=resume:{stopped}' in out
        assert load_checkpoint(stopped)['config']['seed'] == seed
    run(init_from='resume:out/stopped-1/ckpt.pt', out_dir='new', seed=1, lr_decay_iters=6)
    ours, theirs = (load_checkpoint(f'{folder}/ckpt.pt')['model'] for folder in ('new', 'whole'))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = ([row['train_loss'] for row in rows(folder)] for folder in ('new', 'whole'))
    assert ours == theirs


def test_every_checkpoint_of_a_previous_run_is_moved(tiny):
    run(keep_interval=2)
    shutil.copy('out/ckpt.pt', 'out/mine.pt')
    with open('out/notes.txt', 'w') as file:
        file.write('mine')
    before = contents('out')
    assert {'ckpt-2.pt', 'ckpt-4.pt', 'ckpt-6.pt', 'mine.pt'} <= before.keys()
    run(seed=1)
    assert contents('out/previous') == {name: data for name, data in before.items()
                                        if name != 'notes.txt'}
    assert os.path.exists('out/notes.txt')


# --- kept checkpoints


def test_kept_checkpoints_are_full_and_can_be_resumed_elsewhere(tiny):
    settings = dict(max_iters=9, eval_interval=4, dropout=0.1, lr_decay_iters=9)
    run(out_dir='whole', keep_interval=3, **settings)
    assert {name for name in os.listdir('whole') if name.endswith('.pt')} == {
        'ckpt.pt', 'best.pt', 'ckpt-3.pt', 'ckpt-6.pt', 'ckpt-9.pt'}  # 3 is no evaluation
    run(init_from='resume:whole/ckpt-3.pt', out_dir='branch', **settings)
    ours, theirs = (load_checkpoint(f'{folder}/ckpt.pt') for folder in ('branch', 'whole'))
    assert ours['iter_num'] == theirs['iter_num'] == 9
    assert all(torch.equal(ours['model'][name], w) for name, w in theirs['model'].items())
    assert log_of('branch') == log_of('whole')  # with the rows of before
    assert os.path.exists('branch/best.pt')
    run(init_from='resume:whole/ckpt-3.pt', out_dir='other', **settings | dict(
        schedule='plateau', max_iters=6))
    assert load_checkpoint('other/ckpt.pt')['iter_num'] == 6


# --- several machines


def resume_on_two(folder, **settings):
    """Two processes, each with its own disk: (exit codes, all output)."""
    port, processes = free_port(), []
    with open(folder / 'output', 'w+') as output, open(os.devnull) as nothing:
        for rank in range(2):
            os.chdir(folder / f'disk{rank}')
            env = rank_of(rank, 2, port) | {'LOCAL_RANK': '0'}
            processes.append(forked('train.py', flags(**RUN | dict(init_from='resume') | settings),
                                    [nothing, output, output], env=env))
        os.chdir(folder)
        for process in processes:
            process.join(60)
            process.kill()
        output.seek(0)
        return [process.exitcode for process in processes], output.read()


@pytest.mark.parametrize('spoil, words', [
    (lambda: run(init_from='resume', max_iters=9, lr_decay_iters=20), 'a file of digest'),
    (lambda: run(seed=3), 'a file of digest'),  # as many iterations
    (lambda: os.remove('out/ckpt.pt'), 'missing'),
    (lambda: prepare_text.prepare(story(100, 20_000), 'tiny', test_fraction=0.1), 'sha256'),
], ids=['stale', 'another run', 'missing', 'other data'])
def test_machines_that_do_not_share_a_disk_must_have_the_same(tiny, spoil, words):
    run()
    for disk in ('disk0', 'disk1'):
        os.mkdir(disk)
        for name in ('data', 'out'):
            shutil.copytree(name, f'{disk}/{name}')
    codes, out = resume_on_two(tiny, max_iters=12)
    assert codes == [0, 0], out
    os.chdir('disk1')
    shutil.rmtree('out')
    shutil.copytree('../out', 'out')
    spoil()
    os.chdir(tiny)
    shutil.rmtree('disk0/out')
    shutil.copytree('out', 'disk0/out')
    codes, out = resume_on_two(tiny, max_iters=12)
    assert codes == [1, 1] and words in out and 'copy it from the right machine' in out
    assert os.uname().nodename in out


# --- a stop


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_that_end_jobs_save_first(tiny, monkeypatch, number, capsys):
    stop_at(monkeypatch, 4, TrainConfig(**RUN), number)
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == 4
    run(out_dir='whole')
    run(init_from='resume')
    assert_same_run('out', 'whole')


def test_a_signal_that_is_ignored_stays_ignored(tiny):
    """nohup python train.py"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with console.stop_signals(True, announce=False) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


# --- changed settings are reported


def test_settings_that_differ_from_the_checkpoints_are_named(tiny, capsys):
    run(max_iters=4)
    capsys.readouterr()
    run(max_iters=4, init_from='resume')
    assert 'changed since' not in capsys.readouterr().out
    run(max_iters=6, init_from='resume', learning_rate=6e-4, dropout=0.1)
    (line,) = [line for line in capsys.readouterr().out.split('\n') if 'changed since' in line]
    for words in ('learning_rate=0.0006 (was 0.01)', 'dropout=0.1 (was 0.0)',
                  'max_iters=6 (was 4)'):
        assert words in line
    assert 'init_from' not in line


# --- data that do not fit meta.json


@pytest.mark.parametrize('spoil', [
    lambda: os.truncate('data/tiny/train.bin', 20_000),
    lambda: shutil.copy('data/tiny/val.bin', 'data/tiny/train.bin'),
    lambda: np.fromfile('data/tiny/val.bin', '<u2').astype('<u4').tofile('data/tiny/val.bin'),
    lambda: os.truncate('data/tiny/test.bin', 100),
], ids=['cut', 'val as train', 'uint32', 'cut test'])
def test_a_file_of_another_length_is_refused(tiny, spoil):
    spoil()
    with pytest.raises(UserError, match=r'bytes instead of \d+; prepare the dataset again'):
        run()


# --- half an environment


WHOLE = rank_of(0, 1, 1234)


@pytest.mark.parametrize('env, words', [
    (dict(RANK='', LOCAL_RANK='', WORLD_SIZE=''), "'RANK': ''"),
    (dict(RANK='0'), "'WORLD_SIZE': None"), (WHOLE | dict(WORLD_SIZE=''), "'WORLD_SIZE': ''"),
    (dict(WORLD_SIZE='2', RANK='1', LOCAL_RANK='1'), 'MASTER_ADDR'),
    (WHOLE | dict(RANK='first'), "'RANK': 'first'"), (WHOLE | dict(RANK='-1'), "'RANK': '-1'"),
    (WHOLE | dict(LOCAL_RANK='1.5'), "'LOCAL_RANK': '1.5'"),
    (WHOLE | dict(RANK='3'), "'RANK': '3'"), (WHOLE | dict(WORLD_SIZE='0'), "'WORLD_SIZE': '0'"),
    (WHOLE | dict(WORLD_SIZE='2', MASTER_PORT='http'), "'http'"),
], ids=str)
def test_half_an_environment_is_one_line(tiny, monkeypatch, env, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='torchrun') as error:
        run()
    assert words in str(error.value) and '\n' not in str(error.value)


def test_a_process_whose_group_never_starts_ends_with_one_line(tiny, monkeypatch):
    for name, value in rank_of(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, 'JOIN_TIMEOUT', runtime.timedelta(seconds=1))
    with pytest.raises(UserError, match='not all 2 processes came to MASTER_ADDR=127.0.0.1'):
        run()
    assert not torch.distributed.is_initialized()


# --- from Python


def test_training_from_python_changes_nothing_in_the_process(tiny):
    def state():
        return dict(
            rng=torch.get_rng_state().tolist(), numpy=np.random.get_state()[1].tolist(),
            precision=torch.get_float32_matmul_precision(), dtype=torch.get_default_dtype(),
            threads=torch.get_num_threads(), frozen=gc.get_freeze_count(),
            grad=torch.is_grad_enabled(),
            signals=[signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
            swap=torch.__future__.get_swap_module_params_on_conversion(), path=list(sys.path),
            adamw=dict(vars(torch.optim.AdamW)), optimizer=dict(vars(torch.optim.Optimizer)),
            env=dict(os.environ), cwd=os.getcwd(), out=sys.stdout,
        )

    run(max_iters=1, out_dir='first')  # what torch itself sets up once
    gc.unfreeze()  # objects that other tests froze may be freed meanwhile
    before = state()
    run(max_iters=3, sample_tokens=5, optimizer='muon', dropout=0.1)
    run(max_iters=5, init_from='resume')
    run(init_from='out', out_dir='tuned', max_iters=1)
    run(init_from='out', eval_only=True)
    assert state() == before


def test_output_that_is_not_utf8_does_not_end_a_run(tiny, monkeypatch):
    with open('ascii.txt', 'w', encoding='ascii') as file, monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', file)
        run(sample_start='“', sample_tokens=20)
    with open('ascii.txt') as file:
        text = file.read()
    assert '  | ?' in text and 'step 6:' in text
    assert load_checkpoint(tiny / 'out/ckpt.pt')['iter_num'] == 6


# --- the shape, by flags


@pytest.mark.parametrize('argv, n_layer', [
    (['--model_size=gpt2-xl', '--n_layer=12'], 12), (['--n_layer=12', '--model_size=gpt2-xl'], 48),
    (['--n_layer=5'], 5),
    (['--model_size=gpt2-medium', '--n_layer=3', '--model_size=gpt2-large'], 36),
    (['config/train_wizard_char.py', '--model_size=gpt2-medium'], 24),
    (['config/train_gpt2.py', 'config/train_gpt2_xl.py'], 48), ([], 12),
])
def test_of_a_size_and_its_parts_the_last_one_wins(argv, n_layer):
    cfg = override(TrainConfig(), argv)
    assert cfg.n_layer == n_layer
    if n_layer in (24, 36, 48) and 'config/train_wizard_char.py' in argv:
        assert (cfg.n_head, cfg.n_embd) == (16, 1024)


def test_a_size_given_from_python_leaves_what_is_given_beside_it():
    cfg = TrainConfig(model_size='gpt2-xl', n_layer=12)
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == (12, 25, 1600)


@pytest.mark.parametrize('model, is_refused', [('gpt', True), ('llama', False), ('bigram', False)])
def test_a_longer_context_is_refused_only_where_positions_are_learned(tiny, model, is_refused):
    shape = {} if model != 'bigram' else dict.fromkeys(('n_layer', 'n_head', 'n_embd'))
    run(model=model, max_iters=1, **shape)
    longer = dict(init_from='out', out_dir='longer', block_size=32, max_iters=1, **shape)
    if is_refused:
        with pytest.raises(UserError, match="exceeds the model's 16, whose positions are learned"):
            run(**longer)
    else:
        run(**longer)
        assert load_checkpoint('longer')['model_args']['block_size'] == 32


def test_short_windows_do_not_shorten_a_llama(tiny):
    run(model='llama', max_iters=1)
    run(init_from='out', out_dir='tuned', block_size=8, max_iters=2)
    assert load_checkpoint('tuned')['model_args']['block_size'] == 16
    assert load_checkpoint('tuned')['config']['block_size'] == 8
    run(init_from='resume', out_dir='tuned', block_size=8, max_iters=3)
    tuned = load_checkpoint('tuned/ckpt.pt')
    assert tuned['model_args']['block_size'] == 16 and tuned['config']['block_size'] == 8
    assert int(rows('tuned')[-1]['tokens']) == 3 * 2 * 4 * 8


# --- evaluating


def test_an_evaluation_needs_neither_the_context_nor_a_fitting_batch(tiny, capsys):
    """The defaults have 1024 tokens, and 40 micro-batches for 3 processes."""
    run(max_iters=1)
    args = ['--init_from=out', '--eval_only', '--dataset=tiny', '--device=cpu', '--eval_iters=2',
            '--batch_size=2']
    codes, out = scripts_together(
        os.path.join(os.path.dirname(train.__file__), 'train.py'), args, 3)
    assert codes == [0] * 3 and 'val: loss' in out and 'from the checkpoint' in out


def test_a_loss_that_is_not_a_number_has_no_perplexity(tiny, monkeypatch, capsys):
    run(max_iters=1)
    monkeypatch.setattr(train, 'evaluate', lambda *_, **__: {'val': float('nan')})
    run(init_from='out', eval_only=True)
    assert re.search('^val: loss nan, .* perplexity nan', capsys.readouterr().out, re.M)


# --- two texts, one alphabet


def test_a_text_can_take_the_tokenizer_of_another_dataset(folder, capsys):
    (folder / 'a.txt').write_text('abcdefgh ' * 100)
    (folder / 'b.txt').write_text('bad cafe ' * 100)
    prepare_text.main(['a.txt', '--dataset=a'])
    prepare_text.main(['b.txt', '--dataset=b', '--tokenizer=data/a'])
    metas = [json.load(open(f'data/{name}/meta.json')) for name in 'ab']
    assert metas[0]['tokenizer'] == metas[1]['tokenizer'] and metas[1]['vocab_size'] == 9
    cfg = RUN | dict(block_size=8)
    train.train(TrainConfig(**cfg | dict(dataset='a')))
    train.train(TrainConfig(**cfg | dict(dataset='b', init_from='resume', max_iters=8)))
    with pytest.raises(UserError, match="'x' at position 2 of 'baxba"):
        prepare_text.prepare('bax' * 50, 'c', 'data/a')


# --- smaller things


@pytest.mark.parametrize('flag', [
    '--seed=99999999999999999999', '--batch_size=99999999999999999999', '--device=hpu',
    '--device=xla', '--seed=-1', '--n_embd=9223372036854775808',
])
def test_impossible_values_are_one_line(tiny, flag):
    result = script('train.py', *flags(**RUN), flag)
    assert result.returncode in (1, 2) and result.stderr.startswith('error: ')
    assert result.stderr.count('\n') == 1, result.stderr


@pytest.mark.parametrize('name, value', [
    ('batch_size', 2**40), ('block_size', 2**50), ('n_embd', 2**40), ('eval_iters', 2**60),
    ('gradient_accumulation_steps', 2**60),
])
def test_sizes_beyond_any_memory_are_one_line(tiny, name, value):
    result = script('train.py', *flags(**RUN | {'n_head': 1, name: value}))
    assert result.returncode == 1 and result.stderr.startswith('error: ')
    assert result.stderr.count('\n') == 1, result.stderr


def test_numbers_of_numpy_are_numbers_in_a_config_file(folder):
    (folder / 'a.py').write_text('''
import numpy as np
from datetime import datetime
learning_rate, batch_size, compile = np.float64(1e-3), np.int64(5), np.True_
wandb_run_name = 'run of ' + datetime(2026, 1, 2).isoformat()
''')
    cfg = override(TrainConfig(), ['a.py'])
    assert cfg.learning_rate == 1e-3 and cfg.batch_size == 5 and cfg.compile is True
    assert cfg.wandb_run_name == 'run of 2026-01-02T00:00:00'
    assert [type(value) for value in (cfg.learning_rate, cfg.batch_size)] == [float, int]
    for source, words in (('batch_size = np.arange(3)', 'must be a whole number'),
                          ('learning_rate = np.ones((2, 2))', 'must be a number'),
                          ('compile = np.zeros(2)', 'must be true or false'),
                          ('import torch; beta1 = torch.zeros(2)', 'must be a number'),
                          ('helper = 3', 'a name of your own must begin with _'),
                          ('def half(x): return x / 2', 'a name of your own must begin with _')):
        (folder / 'b.py').write_text('import numpy as np\n' + source)
        with pytest.raises(console.UsageError, match=words) as error:
            override(TrainConfig(), ['b.py'])
        assert '\n' not in str(error.value)


def test_a_damaged_log_is_reported_before_anything_is_done(tiny):
    run()
    with open('out/log.csv', 'w') as file:
        file.write('a,b\n1,2\n')
    before = contents('out')
    with pytest.raises(UserError, match='cannot read out/log.csv.*move it away'):
        run(init_from='resume', max_iters=9)
    assert contents('out') == before


def test_the_home_folder_can_be_written_as_a_tilde(tiny, monkeypatch):
    monkeypatch.setenv('HOME', str(tiny / 'home'))
    run(out_dir='~/runs/a', max_iters=1)
    assert os.path.exists('home/runs/a/ckpt.pt') and not os.path.exists('~')


def test_a_missing_vocabulary_is_asked_for_once(folder, monkeypatch, capsys):
    import tiktoken

    calls = []

    def fails(name):
        calls.append(name)
        raise OSError('no network')

    monkeypatch.setattr(tiktoken, 'get_encoding', fails)
    os.makedirs('data/raw')
    for name in ('train', 'val'):
        np.zeros(99, '<u2').tofile(f'data/raw/{name}.bin')
    run(dataset='raw', sample_tokens=5, n_layer=1, n_embd=8)
    out = capsys.readouterr().out
    assert len(calls) == 1 and "no sample for --sample_start='\\n': tiktoken cannot get" in out


def test_the_closing_hint_names_a_script_that_exists(tiny, monkeypatch, capsys):
    """From a notebook, or by a link to train.py elsewhere."""
    monkeypatch.setattr(sys, 'argv', ['/elsewhere/ipykernel_launcher.py', '-f', 'x.json'])
    run(max_iters=1)
    hint = capsys.readouterr().out.split('\nnow: ')[1].split()
    assert os.path.basename(hint[1]) == 'sample.py' and os.path.exists(hint[1])


def test_a_closed_pipe_and_an_interrupt_leave_no_temporary_files(tiny):
    process, output, errors = piped('train.py', *flags(**RUN | dict(max_iters=10**6,
                                                                   eval_interval=1)))
    for line in output:
        if line.startswith('step 5:'):
            break
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    run(max_iters=1)
    assert not [name for name in os.listdir('out') if name.endswith('.tmp')]


def test_a_temporary_name_is_unique(folder):
    """Two writers of one file disturb neither each other nor the user's files."""
    with open('x.tmp', 'w') as file:
        file.write('mine')
    with console.atomic_file('x') as first:
        with console.atomic_file('x') as second:
            second.write(b'second')
        first.write(b'first')
    with open('x', 'rb') as file:
        assert file.read() == b'first'
    with open('x.tmp') as file:
        assert file.read() == 'mine'
    assert sorted(os.listdir()) == ['x', 'x.tmp']


def test_two_first_runs_make_a_dataset_once(folder, monkeypatch):
    (folder / 'story.txt').write_text(story(0, 20_000), 'utf-8')
    monkeypatch.setitem(prepare_text.PREPARE, 'story', f'prepare_text.py {folder}/story.txt '
                        '--dataset=story')
    with open('output', 'w+') as output, open(os.devnull) as nothing:
        both = [forked('train.py', flags(**RUN | dict(dataset='story', out_dir=name, max_iters=1)),
                       [nothing, output, output]) for name in ('a', 'b')]
        for process in both:
            process.join(60)
        output.seek(0)
        text = output.read()
    assert [process.exitcode for process in both] == [0, 0], text
    assert text.count('data/story: ') == 1


def test_a_kept_checkpoint_before_the_first_evaluation_replaces_no_other_runs(tiny):
    settings = dict(max_iters=8, eval_interval=4, keep_interval=2)
    train.train(TrainConfig(**TINY | settings))
    before = load_checkpoint('out/ckpt-2.pt')['model']
    train.train(TrainConfig(**TINY | settings | dict(seed=7)))
    kept = load_checkpoint('out/previous/ckpt-2.pt')['model']
    assert all(torch.equal(before[name], kept[name]) for name in before)
    names = [path.name for path in Path('out').glob('*.pt')]
    assert sorted(names) == ['best.pt', 'ckpt-2.pt', 'ckpt-4.pt', 'ckpt-6.pt', 'ckpt-8.pt',
                             'ckpt.pt']
    assert load_checkpoint('out/ckpt-2.pt')['config']['seed'] == 7


# --- found by reviewing


def test_files_of_the_user_are_no_leftovers(tiny):
    (tiny / 'notes.20241231.tmp').write_text('mine')
    (tiny / 'x.0123456789abcdef0123456789abcdef.tmp').write_text('left by a killed process')
    with console.locked('.'):
        assert not list(tiny.glob('x.*')) and (tiny / 'notes.20241231.tmp').exists()


def test_a_slip_while_a_file_is_written_is_no_full_disk(folder):
    with pytest.raises(RuntimeError, match='mine'), console.atomic_file('a'):
        raise RuntimeError('mine')
    with pytest.raises(UserError, match='free some space'), console.atomic_file('a'):
        raise RuntimeError('[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0')
    assert not list(folder.iterdir())


def test_ranks_agree_that_there_is_no_sample(tiny, monkeypatch, capfd):
    """A sharded model needs all ranks to write; one machine may lack tiktoken's files."""
    def encode(tokenizer, text):
        if os.environ['RANK'] == '1':
            raise UserError('no files here')
        return [1]

    monkeypatch.setattr(train, 'prompt_ids', encode)
    train_together(TrainConfig(**RUN | dict(sample_tokens=5, shard=True, max_iters=2)))
    assert 'no sample: another process cannot encode' in capfd.readouterr().out


def test_best_pt_must_be_on_all_machines_to_be_measured_again(tiny):
    run()
    for disk in ('disk0', 'disk1'):
        os.mkdir(disk)
        for name in ('data', 'out'):
            shutil.copytree(name, f'{disk}/{name}')
    os.remove('disk1/out/best.pt')
    codes, out = resume_on_two(tiny, max_iters=9, eval_iters=3)
    assert codes == [1, 1] and 'out/best.pt is missing' in out, out


def test_a_branch_into_its_own_folder_has_the_best_of_what_it_does_itself(tiny, capsys):
    worse = dict(learning_rate=3.0, decay_lr=False)
    run(max_iters=3)
    run(init_from='resume', max_iters=6, **worse)
    run(init_from='resume:out/ckpt.pt', max_iters=9, **worse)
    assert os.path.exists('out/best.pt') and os.path.exists('out/previous/best.pt')
    assert 'before the first update' not in capsys.readouterr().out


def test_a_crash_between_two_files_loses_neither(tiny, monkeypatch):
    settings = dict(init_from='resume', keep_interval=5)
    run(max_iters=4)
    replace = os.replace

    def crash(old, new):
        if new == 'out/best.pt':
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', crash)
        with pytest.raises(KeyboardInterrupt):
            run(max_iters=5, **settings)
    # Worse from here on, and no evaluation at 5, where it had been better.
    run(max_iters=7, eval_interval=7, learning_rate=30.0, decay_lr=False, **settings)
    best = load_checkpoint('out/best.pt')['best_val_loss']
    assert load_checkpoint('out/ckpt.pt')['best_val_loss'] == best
    assert os.path.exists('out/ckpt-5.pt')


def test_a_diverged_model_has_no_sample_and_one_line(tiny, capsys):
    run()
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    for name in checkpoint['model']:
        if 'transformer.h.' in name:
            checkpoint['model'][name] *= 1e12  # finite, but products of them are not
    torch.save(checkpoint, 'diverged.pt')
    with pytest.raises(UserError, match='no probabilities'):
        sample.main(flags(init_from='diverged.pt', device='cpu', max_new_tokens=5))
    capsys.readouterr()
    run(init_from='diverged.pt', out_dir='b', sample_tokens=5, max_iters=1, learning_rate=0.0,
        min_lr=0.0)
    assert 'val loss nan' in capsys.readouterr().out


def test_the_home_folder_can_be_written_short(tiny, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tiny))
    run(out_dir='~/out', max_iters=1)
    sample.main(flags(out_dir='~/out', device='cpu', max_new_tokens=5, num_samples=1))
    run(init_from='~/out', out_dir='b', max_iters=1)
    run(init_from='resume:~/out/ckpt.pt', out_dir='c', max_iters=2)
    (tiny / 'a.txt').write_text('the lion ' * 99)
    prepare_text.prepare(prepare_text.read_text('~/a.txt'), 'a')
    assert not os.path.exists('~')


def test_a_lack_of_memory_is_no_damage(tiny, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("can't allocate memory: you tried to allocate 99 bytes")

    run(max_iters=1)
    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(RuntimeError, match='allocate'):
        load_checkpoint('out')


def test_bytes_that_are_not_utf8_can_be_a_prompt(tiny, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b'the\xff\n'))
    monkeypatch.setattr(sys, 'stdin', typed)
    assert sample.read_prompt('-') == 'the\ufffd'


def test_an_evaluation_names_no_results(tiny, capsys):
    run(max_iters=1)
    capsys.readouterr()
    run(init_from='out', eval_only=True)
    assert 'results in' not in capsys.readouterr().out


def test_a_signal_while_the_best_is_measured_again_is_no_loss(tiny, monkeypatch, capsys):
    run(max_iters=3)
    evaluate = train.evaluate

    def interrupted(*args, stop, **kwargs):
        stop.received = signal.SIGINT
        return evaluate(*args, stop=stop, **kwargs)

    monkeypatch.setattr(train, 'evaluate', interrupted)
    with pytest.raises(SystemExit):
        run(init_from='resume', eval_iters=3, max_iters=6)
    assert 'loss of' not in capsys.readouterr().out


@pytest.mark.parametrize('name', ['tiny', 'bpe'])
def test_weights_for_other_tokens_name_the_tokenizer_that_helps(tiny, name):
    gpt2_tokenizer()
    prepare_text.prepare(story(0, 20_000), 'bpe', 'gpt2')
    run(dataset=name, max_iters=1)
    other, remedy = {'tiny': ('bpe', 'data/NAME'), 'bpe': ('tiny', 'gpt2')}[name]
    with pytest.raises(UserError, match=f'--tokenizer={remedy}'):
        run(dataset=other, init_from='out', out_dir='b')


def test_a_dataset_that_is_missing_is_not_looked_for_elsewhere(folder):
    (folder / 'a.txt').write_text('the lion ' * 99)
    with pytest.raises(UserError, match="'data/none' is not known"):
        prepare_text.main(['a.txt', '--dataset=a', '--tokenizer=data/none'])


def test_a_branch_is_another_run_of_wandb(tiny):
    run(max_iters=3)
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    torch.save(checkpoint | {'wandb_id': 'abc'}, 'out/ckpt.pt')
    run(init_from='resume:out/ckpt.pt', out_dir='b', max_iters=4)
    assert load_checkpoint('b')['wandb_id'] is None
    run(init_from='resume', max_iters=4)
    assert load_checkpoint('out')['wandb_id'] == 'abc'
