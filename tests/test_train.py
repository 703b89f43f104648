"""The training loop and its parts."""

import csv
import math
import os
import re
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, STORY, TINY, flags, script, steps, validation_loss

import export_hf
import prepare_text
import sample
import train
from checkpoint import load_checkpoint, load_model
from configurator import override
from console import UserError
from model import GPT, GPTConfig
from train import TrainConfig


def rows(path='out/log.csv'):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_it_can_be_imported_and_run(tiny, capsys):
    best = train.train(TrainConfig(**TINY | dict(max_iters=3)))
    out = capsys.readouterr().out
    assert [it for it, _, _ in steps(out)] == [0, 3]
    assert steps(out)[1][2] == round(best, 4) < 4.2
    assert re.search(r'^iter 1: loss [\d.]+, time [\d.]+ms', out, re.M)
    assert '  | ' in out and 'sample.py --out_dir=out' in out and 'weights in out' in out
    assert '\r' not in out and '\x1b' not in out


def test_a_run_from_the_shell_and_a_sample_of_it(tiny):
    """End to end: a model that learns, its checkpoints, its log, and samples."""
    result = script('train.py', *flags(**TINY | dict(max_iters=60, eval_interval=20)))
    assert result.returncode == 0, result.stderr
    seen = steps(result.stdout)
    assert [it for it, _, _ in seen] == [0, 20, 40, 60]
    updates = [line for line in result.stdout.split('\n') if line.startswith('iter ')]
    assert all(' left, ' in line for line in updates)
    assert seen[-1][2] < seen[0][2] - 1
    ckpt, best = load_checkpoint('out/ckpt.pt'), load_checkpoint('out/best.pt')
    keys = 'model model_args iter_num best_val_loss config tokenizer format'
    numbers = 'measured_on tokens skipped seconds wandb_id'
    assert set(best) == set(keys.split() + numbers.split())
    assert set(ckpt) == set(best) | {'optimizer', 'optimizers', 'scaler'}
    assert ckpt['iter_num'] == 60 and ckpt['model_args'].keys() == {
        'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    log = rows()
    assert [int(row['iteration']) for row in log] == list(range(61))
    assert log[20]['val_loss'] and log[20]['train_loss'] and not log[21]['val_loss']
    assert int(log[60]['tokens']) == 60 * 2 * 4 * 16
    assert set(os.listdir('out')) - {'loss.png'} == {'ckpt.pt', 'best.pt', 'log.csv'}

    sample = script('sample.py', '--out_dir=out', '--start=Dorothy', '--max_new_tokens=30',
                    '--num_samples=2', '--device=cpu')
    assert sample.returncode == 0, sample.stderr
    first, second = sample.stdout.split('---------------\n')
    assert first.startswith('Dorothy') and second.startswith('Dorothy') and first != second
    assert len(first.strip('\n')) >= 30


def test_the_wizards_config_learns_portuguese(folder, capsys):
    prepare_text.main([os.path.join(ROOT, 'README.pt-BR.md'), '--dataset=pt'])
    config = os.path.join(ROOT, 'config', 'train_wizard_char.py')
    train.main([config, '--dataset=pt', '--sample_start=Não', '--max_iters=60', '--batch_size=4',
                '--sample_tokens=20', '--eval_interval=60', '--eval_iters=5', '--out_dir=out',
                '--device=cpu'])
    out = capsys.readouterr().out
    (_, _, before), (_, _, after) = steps(out)
    assert before > 4 and after < 3.2
    assert '  | Não' in out
    sample.main(['--start=Você não está só: ação', '--max_new_tokens=20'])
    assert capsys.readouterr().out.startswith('Você não está só: ação')


def test_best_is_really_the_best(tiny, monkeypatch, capsys):
    """The weights move away from the best ones, at any rounding: best.pt is not the last."""
    update = train.update

    def spoiling(model, *args):
        result = update(model, *args)
        if spoiling.calls >= 6:
            with torch.no_grad():
                model.transformer.ln_f.weight.mul_(3)  # far too confident logits
        spoiling.calls += 1
        return result

    spoiling.calls = 0
    monkeypatch.setattr(train, 'update', spoiling)
    cfg = TrainConfig(**TINY | dict(max_iters=12, eval_interval=3, eval_iters=4))
    train.train(cfg)
    seen = steps(capsys.readouterr().out)
    best_at, _, best_loss = min(seen, key=lambda step: step[2])
    assert best_at == 6 and seen[-1][2] > best_loss + 0.5
    best = load_checkpoint('out/best.pt')
    assert best['iter_num'] == best_at and round(best['best_val_loss'], 4) == best_loss
    assert validation_loss(load_model('out')[0], cfg) == best['best_val_loss']
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == 12


@pytest.mark.parametrize('always, expected', [
    (False, [('ckpt.pt', 2), ('best.pt', 2)]),
    (True, [('ckpt.pt', 2), ('best.pt', 2), ('ckpt.pt', 4), ('ckpt.pt', 6), ('ckpt.pt', 8)]),
])
def test_what_is_saved_when(tiny, monkeypatch, saves, always, expected):
    """Nothing at iteration 0, however good; without `always`, only improvements."""
    losses = iter([1, 2, 9, 8, 7])
    monkeypatch.setattr(train, 'evaluate', lambda *_, **__: dict(train=3, val=next(losses)))
    best = train.train(TrainConfig(**TINY | dict(max_iters=8, eval_interval=2),
                                   always_save_checkpoint=always))
    assert saves == [(f'out/{name}', it) for name, it in expected] and best == 2


def test_learning_rate_rises_and_falls():
    cfg = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
    rate = [train.learning_rate(cfg, it) for it in range(200)]
    assert rate[0] == 0.1 and rate[8] == 0.9 and rate[9] == 1.0
    assert rate[59] == pytest.approx(0.55) and rate[109] == rate[199] == 0.1
    assert all(a < b for a, b in zip(rate[:9], rate[1:10]))
    assert all(a > b for a, b in zip(rate[9:109], rate[10:110]))
    cfg = override(TrainConfig(), ['--max_iters=20', '--warmup_iters=0', '--min_lr=0'])
    assert train.learning_rate(cfg, 10) == pytest.approx(cfg.learning_rate / 2)  # none: max_iters
    steady = TrainConfig(learning_rate=1.0, decay_lr=False, warmup_iters=9)  # as nanoGPT's
    assert train.learning_rate(steady, 0) == train.learning_rate(steady, 500_000) == 1.0


def test_weight_decay_is_for_matrices_only():
    model = GPT(GPTConfig(vocab_size=65, block_size=8, n_layer=2, n_head=2, n_embd=16))
    (optimizer,) = train.OPTIMIZERS['adamw'](
        model, TrainConfig(weight_decay=0.3, beta2=0.9), torch.float32)
    matrices, vectors = optimizer.param_groups
    assert matrices['weight_decay'] == 0.3 and vectors['weight_decay'] == 0
    assert all(p.dim() == 2 for p in matrices['params'])
    assert all(p.dim() == 1 for p in vectors['params'])
    count = sum(p.numel() for group in optimizer.param_groups for p in group['params'])
    assert count == model.num_params() and optimizer.defaults['betas'] == (0.9, 0.9)


def test_accumulation_equals_one_large_batch(tiny):
    """Two micro-batches of 4 are one batch of 8, up to rounding."""
    base = TINY | dict(max_iters=10, eval_interval=5)
    a = train.train(TrainConfig(**base | dict(out_dir='a')))
    b = train.train(TrainConfig(**base | dict(
        out_dir='b', gradient_accumulation_steps=1, batch_size=8, eval_iters=1)))
    assert [float(r['train_loss']) for r in rows('a/log.csv')[:10]] == pytest.approx(
        [float(r['train_loss']) for r in rows('b/log.csv')[:10]], rel=1e-5)
    assert a == pytest.approx(b, rel=1e-5)


def test_bf16_learns_what_float32_does(tiny):
    """Within 0.01 nats; another seed makes 0.04."""
    losses = [
        train.train(TrainConfig(**TINY | dict(
            out_dir=dtype, dtype=dtype, max_iters=120, eval_interval=200, eval_iters=0,
            n_embd=64, batch_size=16, learning_rate=3e-3, log_interval=100)))
        for dtype in ('float32', 'bfloat16')
    ]
    assert losses[0] < 2.5 and losses[1] == pytest.approx(losses[0], abs=0.01)


def test_evaluations_and_samples_do_not_change_the_training(tiny):
    base = TINY | dict(max_iters=10, dropout=0.2)
    train.train(TrainConfig(**base | dict(out_dir='a', eval_interval=2)))
    train.train(TrainConfig(**base | dict(out_dir='b', eval_interval=7, sample_tokens=0)))
    losses = [[row['train_loss'] for row in rows(f'{name}/log.csv')[:10]] for name in 'ab']
    assert losses[0] == losses[1]
    weights = [load_checkpoint(f'{name}/ckpt.pt')['model'] for name in 'ab']
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_bigram_comes_near_the_counts(folder, capsys):
    """The trained table against the counted one, on the same validation text."""
    with open(STORY, encoding='utf-8') as file:
        text = file.read(100_000)
    prepare_text.prepare(text, 'story')
    ids = np.fromfile('data/story/train.bin', '<u2').astype(int)
    val = np.fromfile('data/story/val.bin', '<u2').astype(int)
    V = len(set(text))
    counts = np.full((V, V), 0.5)  # half a count for what was never seen
    for pair, count in Counter(zip(ids, ids[1:])).items():
        counts[pair] += count
    log_probs = np.log(counts / counts.sum(1, keepdims=True))
    counted = -log_probs[val[:-1], val[1:]].mean()
    trained = train.train(TrainConfig(
        dataset='story', out_dir='out', model='bigram', gradient_accumulation_steps=1,
        batch_size=128, block_size=64, learning_rate=0.1, min_lr=1e-3, warmup_iters=0, beta2=0.99,
        weight_decay=0.0, max_iters=200, eval_interval=50, eval_iters=0, log_interval=100,
        device='cpu', dtype='float32', sample_tokens=20,
    ))
    assert 2 < counted < 3 and abs(trained - counted) < 0.02
    capsys.readouterr()
    sample.main(['--out_dir=out', '--max_new_tokens=20', '--num_samples=1', '--device=cpu'])
    assert len(capsys.readouterr().out) == 1 + 20 + 1  # the prompt, the text, a line feed


def test_eval_only_reports_every_split_whole(tiny, capsys):
    train.train(TrainConfig(**TINY))
    capsys.readouterr()
    train.train(TrainConfig(**TINY | dict(init_from='out', eval_only=True, eval_iters=0)))
    out = capsys.readouterr().out
    found = re.findall(r'^(\w+): loss ([\d.]+), ([\d.]+) bits per token, perplexity ([\d.]+)',
                       out, re.M)
    assert [name for name, *_ in found] == ['train', 'val', 'test']
    model = load_model('out')[0].eval()
    for name, *figures in found:
        ids = torch.from_numpy(np.fromfile(f'data/tiny/{name}.bin', '<u2').astype(np.int64))
        total = 0.0  # one window after another, the short last one as well
        for start in range(0, len(ids) - 1, 16):
            chunk = ids[start : start + 17][None]
            with torch.no_grad():
                total += model(chunk[:, :-1], chunk[:, 1:])[1].item() * (chunk.size(1) - 1)
        loss = total / (len(ids) - 1)
        assert [float(f) for f in figures] == pytest.approx(
            [loss, loss / math.log(2), math.exp(loss)], rel=1e-4)


def test_finetuning_from_a_checkpoint(tiny, capsys):
    train.train(TrainConfig(**TINY | dict(max_iters=60)))
    before = steps(capsys.readouterr().out)[-1][2]
    train.train(TrainConfig(**TINY | dict(
        init_from='out', out_dir='tuned', n_layer=7, block_size=8, dropout=0.1, max_iters=5)))
    seen = steps(capsys.readouterr().out)
    assert seen[0][2] < before + 0.3
    tuned = load_checkpoint('tuned')
    assert tuned['model_args']['n_layer'] == 2 and tuned['model_args']['block_size'] == 8
    assert tuned['model_args']['dropout'] == 0.1 and tuned['iter_num'] <= 5


def test_a_shorter_context_keeps_the_logits(tiny):
    train.train(TrainConfig(**TINY))
    short = TINY | dict(init_from='out', out_dir='short', learning_rate=0, min_lr=0, max_iters=1)
    train.train(TrainConfig(**short | dict(block_size=8)))
    model, cropped = load_model('out')[0].eval(), load_model('short')[0].eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, ids)[0], cropped(ids, ids)[0])
    assert cropped.transformer.wpe.weight.shape == (8, 32)
    with pytest.raises(UserError, match='block_size=17'):
        train.train(TrainConfig(**short | dict(block_size=17)))


def test_finetuning_on_another_alphabet_keeps_what_it_knows(tiny, capsys):
    train.train(TrainConfig(**TINY | dict(max_iters=60, eval_interval=30)))
    text = open(STORY, encoding='utf-8').read(40_000)[20_000:]
    prepare_text.prepare(text.replace('z', 'ã').replace('k', '#'), 'other')
    capsys.readouterr()
    settings = TINY | dict(dataset='other', out_dir='other', max_iters=1, sample_tokens=0)
    train.train(TrainConfig(**settings))
    train.train(TrainConfig(**settings | dict(init_from='out')))
    (_, _, from_scratch), _, (_, _, tuned), _ = steps(capsys.readouterr().out)
    assert tuned < from_scratch - 1
    assert '#' in load_checkpoint('other')['tokenizer']['chars']


def test_compile_that_fails_is_reported_in_one_line(tiny, monkeypatch, capsys):
    def broken(model):
        raise RuntimeError('no compiler here\n' + 'and a long story' * 100)

    monkeypatch.setattr(torch, 'compile', broken)
    train.train(TrainConfig(**TINY | dict(compile=True)))
    line = next(x for x in capsys.readouterr().out.split('\n') if 'no compiler here' in x)
    assert '--compile=false' in line and len(line) < 300


def raw_gpt2_ids():
    """data/theirs: random ids, and no meta.json."""
    os.makedirs('data/theirs')
    for name in ('train', 'val'):
        np.random.default_rng(0).integers(50257, size=500).astype('<u2').tofile(
            f'data/theirs/{name}.bin')


def test_raw_gpt2_ids_without_meta_are_taken(folder, capsys):
    """nanoGPT's BPE datasets are two .bin files."""
    raw_gpt2_ids()
    train.train(TrainConfig(**TINY | dict(dataset='theirs', max_iters=1, sample_tokens=0)))
    assert load_checkpoint('out')['model_args']['vocab_size'] == 50304
    assert 9 < steps(capsys.readouterr().out)[0][2] < 12


def test_a_nanogpt_checkpoint_is_resumed_and_sampled(tiny, capsys):
    """Only nanoGPT's keys, an _orig_mod. prefix, a tensor for the loss, no tokenizer."""
    train.train(TrainConfig(**TINY))
    ours = torch.load('out/ckpt.pt', weights_only=True)
    theirs = {key: ours[key] for key in ('optimizer', 'model_args', 'iter_num')}
    theirs['model'] = {f'_orig_mod.{key}': value for key, value in ours['model'].items()}
    theirs['best_val_loss'] = torch.tensor(ours['best_val_loss'])
    theirs['config'] = {'dataset': 'tiny', 'batch_size': 4}
    for group in theirs['optimizer']['param_groups']:
        group['fused'] = None  # as theirs is on a CPU
    os.remove('out/best.pt')
    torch.save(theirs, 'out/ckpt.pt')
    capsys.readouterr()
    sample.main(['--max_new_tokens=5', '--start=T'])
    assert capsys.readouterr().out.startswith('T')
    train.train(TrainConfig(**TINY | dict(max_iters=8, init_from='resume')))
    assert [it for it, *_ in steps(capsys.readouterr().out)] == [6, 8]


def test_wandb_gets_the_same_numbers_in_one_run(tiny, monkeypatch):
    """A resumed run continues the run there, too."""
    logged, ids = [], []

    class Run:
        id = 'abc'

        def log(self, row, step):
            logged.append((step, row))

        def finish(self):
            logged.append('finished')

    def init(project, name, config, id, resume):
        ids.append(id)
        assert config['n_layer'] == 2 and resume == 'allow'
        return Run()

    wandb = types.ModuleType('wandb')
    wandb.init = init
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    train.train(TrainConfig(**TINY, wandb_log=True))
    assert [step for step, _ in logged[:-1]] == list(range(7)) and logged[-1] == 'finished'
    assert logged[3][1]['val_loss'] == float(rows()[3]['val_loss'])
    train.train(TrainConfig(**TINY | dict(max_iters=8, init_from='resume'), wandb_log=True))
    assert ids == [None, 'abc'] and logged[-2][0] == 8


def test_a_nanogpt_checkpoint_of_fewer_tokens_is_refused(tiny):
    """It has no tokenizer, so only the number of tokens can be checked."""
    train.train(TrainConfig(**TINY | dict(max_iters=1)))
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    del checkpoint['tokenizer']
    torch.save(checkpoint, 'out/ckpt.pt')
    raw_gpt2_ids()
    with pytest.raises(UserError, match='trained on other tokens than data/theirs has'):
        train.train(TrainConfig(**TINY | dict(init_from='resume', dataset='theirs')))


def test_a_resumed_run_takes_the_settings_it_is_given(tiny):
    """The optimizer's moments come from the checkpoint, its settings from the command."""
    train.train(TrainConfig(**TINY))
    train.train(TrainConfig(**TINY | dict(max_iters=8, init_from='resume'), weight_decay=0.7))
    groups = load_checkpoint('out/ckpt.pt')['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [0.7, 0.0]
    assert all(group['fused'] for group in groups)


def test_a_bigram_is_resumed_but_not_with_another_alphabet(tiny):
    bigram = {name: value for name, value in TINY.items()
              if name not in ('n_layer', 'n_head', 'n_embd')} | dict(model='bigram')
    train.train(TrainConfig(**bigram))
    more = bigram | dict(init_from='out', out_dir='more')
    train.train(TrainConfig(**more | dict(block_size=8)))
    prepare_text.prepare('zyx ' * 100, 'other')
    with pytest.raises(
            UserError, match='on char tokens, .* other .char. ones: train from scratch'):
        train.train(TrainConfig(**more | dict(dataset='other')))
    with pytest.raises(UserError, match='Bigram has no Hugging Face form'):
        export_hf.main(['--out_dir=out', '--to=hf'])
    assert not os.path.exists('hf') and not os.path.exists('hf.tmp')
