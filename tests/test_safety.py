"""A failure during a run loses at most the work since the last save."""

import contextlib
import csv
import errno
import os
import pickle
import resource

import pytest
import torch
from conftest import TINY, flags, piped, script

import console
import prepare_text
import sample
import train
from checkpoint import load_checkpoint, load_model
from console import UserError, atomic_file
from model import GPT, GPTConfig
from start import adapt_alphabet
from train import TrainConfig

RUN = TINY | dict(max_iters=12, eval_interval=4)


def logged(name):
    """A column of log.csv."""
    with open('out/log.csv', newline='') as file:
        return [row[name] for row in csv.DictReader(file)]


def spoil(monkeypatch, when, what):
    """Make the training loss not finite in the updates `when`: replace it by `what(loss)`."""
    forward, calls = GPT.forward, [0]

    def spoilt(self, idx, targets=None, cache=None, loss_only=False):
        logits, loss = forward(self, idx, targets, cache, loss_only)
        if self.training and targets is not None:
            if calls[0] // 2 in when:  # two micro-batches an update
                loss = what(loss)
            calls[0] += 1
        return logits, loss

    monkeypatch.setattr(GPT, 'forward', spoilt)


# The second has finite gradients, so only the loss shows it; the third has a finite loss.
WAYS = {
    'nan': lambda loss: loss * float('nan'),
    'inf plus': lambda loss: loss + float('inf'),
    'gradient': lambda loss: loss + (loss - loss.detach()).sqrt(),
}


@pytest.mark.parametrize('what', WAYS.values(), ids=WAYS)
def test_an_update_that_is_not_finite_is_skipped_and_counted(tiny, monkeypatch, what):
    spoil(monkeypatch, (3, 4, 8), what)
    train.train(TrainConfig(**RUN))
    assert logged('skipped')[:12] == list('000122223333')
    checkpoint = load_checkpoint('out/ckpt.pt')
    assert all(w.isfinite().all() for w in checkpoint['model'].values())
    assert {int(s['step']) for s in checkpoint['optimizer']['state'].values()} == {9}


def test_a_skipped_update_leaves_weights_and_moments_as_they_were(tiny, monkeypatch):
    train.train(TrainConfig(**RUN | dict(max_iters=4, lr_decay_iters=12)))
    before = load_checkpoint('out/ckpt.pt')
    spoil(monkeypatch, (0,), WAYS['nan'])
    train.train(TrainConfig(**RUN | dict(init_from='resume', max_iters=5, lr_decay_iters=12)))
    after = load_checkpoint('out/ckpt.pt')
    assert after['iter_num'] == 5
    assert all(torch.equal(before['model'][k], after['model'][k]) for k in before['model'])
    for key, state in before['optimizer']['state'].items():
        assert all(torch.equal(v, after['optimizer']['state'][key][k]) for k, v in state.items())


def test_ten_in_a_row_stop_the_run(tiny, monkeypatch):
    spoil(monkeypatch, range(2, 100), WAYS['nan'])
    with pytest.raises(UserError, match='ten times in a row, up to iteration 11') as error:
        train.train(TrainConfig(**RUN | dict(max_iters=100, eval_interval=2)))
    for remedy in ('--learning_rate', '--dtype=float32', '--grad_clip', 'checkpoint in out,'):
        assert remedy in str(error.value)
    assert '\n' not in str(error.value)
    checkpoint = load_checkpoint('out/ckpt.pt')
    assert all(w.isfinite().all() for w in checkpoint['model'].values())


def test_weights_that_are_not_finite_are_never_saved(tiny):
    """A learning rate so large that one finite gradient is enough."""
    train.train(TrainConfig(**RUN | dict(max_iters=4)))
    ruin = RUN | dict(learning_rate=1e38, weight_decay=10.0)
    for settings in (ruin | dict(init_from='resume'), ruin):
        with pytest.raises(UserError, match='weights are not finite'):
            train.train(TrainConfig(**settings, decay_lr=False))
    for name in ('ckpt.pt', 'best.pt'):
        weights = load_checkpoint(f'out/{name}')['model'].values()
        assert all(w.isfinite().all() for w in weights)


def test_a_reader_that_goes_away_does_not_stop_the_training(tiny):
    """python train.py | head -3"""
    process, output, errors = piped('train.py', *flags(**RUN))
    output.readline()
    output.close()
    process.join(60)
    assert process.exitcode == 0, errors.read()
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == 12


@contextlib.contextmanager
def limited(size):
    """Context manager: no file may grow beyond `size` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_as_it_was(tiny):
    train.train(TrainConfig(**RUN))
    before = {name: open(f'out/{name}', 'rb').read() for name in ('ckpt.pt', 'best.pt')}
    with limited(50_000):
        full = script('train.py', *flags(**RUN | dict(init_from='resume', max_iters=20)))
    assert full.returncode == 1 and full.stderr.count('\n') == 1
    assert full.stderr.startswith('error: cannot write out/') and 'free some space' in full.stderr
    assert {name: open(f'out/{name}', 'rb').read() for name in before} == before
    assert sorted(set(os.listdir('out')) - {'loss.png'}) == ['best.pt', 'ckpt.pt', 'log.csv']
    train.train(TrainConfig(**RUN | dict(init_from='resume', max_iters=20)))
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == 20


@pytest.mark.parametrize('broken', ['open', 'write', 'fsync', 'replace'])
def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch, broken):
    with atomic_file('deep/down/file.txt') as file:
        file.write(b'old')

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    if broken == 'open':
        monkeypatch.setattr('builtins.open', fails)
    elif broken != 'write':
        monkeypatch.setattr(os, broken, fails)
    with pytest.raises(UserError, match='file.txt .No space left'):
        with atomic_file('deep/down/file.txt') as file:
            file.write(b'new')
            if broken == 'write':
                fails()
    monkeypatch.undo()
    os.chdir(folder)
    assert os.listdir('deep/down') == ['file.txt']
    assert open('deep/down/file.txt').read() == 'old'


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ('exploded',)


def test_a_checkpoint_cannot_run_code(tiny):
    os.mkdir('out')
    torch.save({'model': {}, 'model_args': {}, 'config': Bomb()}, 'out/ckpt.pt')
    with open('out/best.pt', 'wb') as file:
        pickle.dump(Bomb(), file)
    for module, args in ((sample, ['--init_from=out/ckpt.pt']), (sample, ['--out_dir=out']),
                         (train, flags(**RUN | dict(init_from='resume'))),
                         (train, flags(**RUN | dict(init_from='out', out_dir='tuned')))):
        with pytest.raises(UserError, match='might run code') as error:
            module.main(args)
        assert '\n' not in str(error.value)
    assert not os.path.exists('exploded')
    with pytest.raises(FileExistsError):  # plain pickle does run the code
        os.mkdir('exploded')
        pickle.load(open('out/best.pt', 'rb'))


def test_a_pickled_dataset_is_not_read(tiny):
    os.rename('data/tiny/meta.json', 'data/tiny/meta.pkl')
    with open('data/tiny/meta.pkl', 'wb') as file:
        pickle.dump(Bomb(), file)
    with pytest.raises(UserError, match='meta.pkl is a pickle'):
        train.train(TrainConfig(**RUN))
    assert not os.path.exists('exploded')


@pytest.mark.parametrize('url, answer, words', [
    ('https://example.org/y', b'<!DOCTYPE html><title>404</title>', 'another text'),
    ('http://evil.org/x', b'text', 'http://evil.org/x is not HTTPS'),  # a redirect
    ('', OSError('timed out'), 'timed out'),
])
def test_downloads_are_careful(folder, monkeypatch, url, answer, words):
    import io
    import urllib.request

    def reply(request, timeout):
        assert timeout == 10
        if isinstance(answer, Exception):
            raise answer
        response = io.BytesIO(answer)
        response.url = url
        return response

    monkeypatch.setattr(urllib.request, 'urlopen', reply)
    with pytest.raises(UserError, match=words):
        prepare_text.fetch('x', 'https://example.org/x', lambda data: data.startswith(b'text'))
    assert not os.listdir('.')


def test_a_checkpoint_without_optimizer_cannot_be_resumed(tiny):
    train.train(TrainConfig(**RUN))
    os.replace('out/best.pt', 'out/ckpt.pt')
    with pytest.raises(UserError, match="optimizer does not fit.*'optimizer'.*--init_from"):
        train.train(TrainConfig(**RUN | dict(init_from='resume')))


def everything_in(folder):
    return {name: open(os.path.join(folder, name), 'rb').read()
            for name in os.listdir(folder) if name != 'previous'}


@pytest.mark.parametrize('init_from', ['resume', 'out'])
def test_evaluating_changes_nothing(tiny, init_from):
    train.train(TrainConfig(**RUN))
    before = everything_in('out')
    train.train(TrainConfig(**RUN | dict(init_from=init_from, eval_only=True)))
    assert everything_in('out') == before


def test_new_letters_start_the_same_in_every_process(tiny):
    """Whatever the random state, and equal in the embedding and the head, which are tied."""
    train.train(TrainConfig(**RUN | dict(max_iters=1)))
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        checkpoint = load_checkpoint('out')
        weights, theirs = checkpoint['model'], checkpoint['tokenizer']
        z = weights['transformer.wte.weight'][theirs['chars'].index('z')]
        config = GPTConfig(**checkpoint['model_args'])
        adapt_alphabet(weights, GPT, config, theirs['chars'], '#z')
        for name in ('transformer.wte.weight', 'lm_head.weight'):
            tables.append(weights[name])
            assert torch.equal(tables[-1][1], z) and 0 < tables[-1][0].std() < 0.04
    assert all(torch.equal(table, tables[0]) for table in tables)


def test_checkpoints_hold_plain_types_only(tiny):
    train.train(TrainConfig(**RUN))
    for name in ('ckpt.pt', 'best.pt'):
        checkpoint = torch.load(f'out/{name}', weights_only=True)
        assert checkpoint['format'] == {'name': 'ozgpt', 'version': 2}
        assert not any(key.startswith('_orig_mod.') for key in checkpoint['model'])
        assert load_model(f'out/{name}')[0].num_params() > 0


def test_a_log_on_a_full_disk_says_so(folder):
    log = console.Log(TrainConfig(out_dir='.'), {'iter_num': 0})
    log.write({'iteration': 0})
    log.open()
    with limited(12), pytest.raises(UserError, match='log.csv .File too large'):
        log.write({'iteration': 1})
