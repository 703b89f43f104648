"""Edits to the source take effect where a reader expects it.

Each test changes a copy of the scripts, as a reader would, and runs it.
"""

import csv
import os
import re

import pytest
import torch
from conftest import ROOT, TINY, edited, flags, script, scripts_together, steps

from checkpoint import load_checkpoint

RUN = TINY | dict(sample_tokens=0)


def run(source, *more, script_name='train.py', **settings):
    """train.py of the edited source, or another script, in the current folder."""
    given = flags(**RUN | settings) if script_name == 'train.py' else flags(**settings)
    return script(source / script_name, *more, *given)


def works(source, *more, **settings):
    result = run(source, *more, **settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rows(folder='out'):
    with open(f'{folder}/log.csv', newline='') as file:
        return list(csv.DictReader(file))


# --- a mistake in the code keeps its traceback


@pytest.mark.parametrize('slip', [
    "raise ValueError('mine')", "x + 'mine'", 'x.view(7, 7, 7)', "raise OSError('mine')",
])
def test_a_mistake_in_a_block_shows_its_line(tiny, source, slip):
    works(source, max_iters=1)
    line = '        x = x + self.attn(self.ln_1(x), cache)\n'
    edited(source, 'model.py', (line, f'        {slip}\n{line}'))
    for result in (run(source, out_dir='other'),
                   run(source, script_name='sample.py', out_dir='out', device='cpu')):
        assert result.returncode == 1
        assert 'Traceback' in result.stderr and 'model.py", line' in result.stderr
        assert slip in result.stderr and not result.stderr.startswith('error:')


def test_a_mistake_in_generation_is_not_a_missing_sample(tiny, source):
    edited(source, 'model.py', ('    window = unread = idx[:, -block_size:]\n',
                                '    window = unread = idx[:, -block_sise:]\n'))
    result = run(source, sample_tokens=5)
    assert "NameError: name 'block_sise' is not defined" in result.stderr
    assert 'no sample' not in result.stdout


def test_a_mistake_in_a_constructor_shows_its_line_at_export(tiny, source):
    pytest.importorskip('transformers')
    works(source, max_iters=1)
    edited(source, 'model.py', ('        self.mlp = MLP(config)\n',
                                "        self.mlp = MLP(config)\n        int('many')\n"))
    result = run(source, script_name='export_hf.py', out_dir='out', to='hf')
    assert "int('many')" in result.stderr and 'Traceback' in result.stderr


# --- initialization and buffers


OWN_START = [('        self.mlp = MLP(config)\n', '''        self.mlp = MLP(config)
        self.scale = nn.Parameter(torch.full((config.n_embd,), 7.0))
        self.table = nn.Parameter(torch.eye(config.n_embd))
        nn.init.zeros_(self.mlp.c_proj.weight)
        self.mlp.c_fc.weight.data.fill_(0.5)
        self.register_buffer('seen', torch.full((3,), 4.0))
        self.register_buffer('hidden', torch.arange(5.0), persistent=False)
'''), ('        return x + self.mlp(self.ln_2(x))\n',
     '''        assert self.hidden.tolist() == [0, 1, 2, 3, 4]
        if self.training and torch.is_grad_enabled():
            self.seen += 1
        return x + (self.mlp(self.ln_2(x)) @ self.table) * self.scale
''')]


@pytest.mark.parametrize('processes', [1, 2])
def test_what_a_module_sets_itself_is_what_it_starts_with(tiny, source, processes):
    """Parameters and buffers, also sharded; buffers are resumed."""
    edited(source, 'model.py', *OWN_START)
    settings = dict(max_iters=1, learning_rate=0, min_lr=0, shard=processes > 1)

    def run(**more):
        if processes == 1:
            return works(source, **settings | more)
        codes, out = scripts_together(source / 'train.py', flags(**RUN | settings | more))
        assert codes == [0, 0], out

    run()
    weights = load_checkpoint('out/ckpt.pt')['model']
    block = 'transformer.h.1.'
    assert weights[f'{block}scale'].eq(7).all()
    assert torch.equal(weights[f'{block}table'], torch.eye(32))
    assert weights[f'{block}mlp.c_proj.weight'].eq(0).all()
    assert weights[f'{block}mlp.c_fc.weight'].eq(0.5).all()
    std = weights['transformer.h.1.attn.c_attn.weight'].std().item()
    assert std == pytest.approx(0.02, rel=0.1)  # GPT-2's start for the rest
    seen = 4 + 2 // processes  # micro-batches
    assert weights[f'{block}seen'].eq(seen).all() and f'{block}hidden' not in weights
    run(init_from='resume', max_iters=2)
    assert load_checkpoint('out/ckpt.pt')['model'][f'{block}seen'].eq(2 * seen - 4).all()


# --- the loss


@pytest.mark.parametrize('chunks', [False, True])
def test_an_edited_loss_is_the_loss_for_every_vocabulary(tiny, source, chunks):
    """Also in chunks, and also with a bias in the head."""
    edited(source, 'model.py', ("reduction='sum')\n", "reduction='sum') + 100 * len(logits)\n"),
           ('config.vocab_size, bias=False)\n', 'config.vocab_size, bias=True)\n'))
    if chunks:
        edited(source, 'model.py', ('MAX_LOGITS = 1 << 26', 'MAX_LOGITS = 8'),
               ('CHUNK = 1024', 'CHUNK = 10'))
    out = works(source, max_iters=3, eval_interval=3)
    assert all(103 < loss < 105 for _, *losses in steps(out) for loss in losses)
    assert 103 < float(rows()[0]['train_loss']) < 105
    assert load_checkpoint('out/ckpt.pt')['model']['lm_head.bias'].abs().sum() > 0


# --- the log


def test_a_column_is_one_edit_and_an_older_log_is_continued(tiny, source):
    works(source, max_iters=4)
    before = rows()
    edited(source, 'train.py', ("{'train_loss': loss, **parts,",
                                "{'train_loss': loss, 'twice, so to say': 2 * loss, **parts,"))
    works(source, max_iters=6, init_from='resume')
    after = rows()
    assert [row['iteration'] for row in after] == [str(it) for it in range(7)]
    for old, new in zip(before[:4], after):
        assert {name: new[name] for name in old} == old and new['twice, so to say'] == ''
    for row in after[4:6]:
        assert float(row['twice, so to say']) == pytest.approx(2 * float(row['train_loss']))
    edited(source, 'train.py', ("'twice, so to say': 2 * loss, ", ''))
    works(source, max_iters=8, init_from='resume')
    assert [row['twice, so to say'] != '' for row in rows()] == (
        [False] * 4 + [True] * 2 + [False] * 3)
    assert all(row['train_loss'] for row in rows()[:8])


# --- optimizers and schedules


LION = '''class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            print('rate', group['lr'])
            for p in group['params']:
                state = self.state[p]
                if not state:
                    state['mean'] = torch.zeros_like(p)
                    state['count'] = torch.zeros(())
                    state['rows'] = torch.zeros(p.size(0))
                    state['note'] = 3
                state['count'] += 1
                state['rows'] += p.grad.flatten(1).sum(1) if p.dim() > 1 else p.grad
                p.sub_(group['lr'] * state['mean'].lerp(p.grad, 0.1).sign())
                state['mean'].lerp_(p.grad, 0.01)


'''


def test_an_optimizer_is_one_entry_with_its_own_peak_and_is_resumed_exactly(tiny, source):
    """With state that isn't shaped like its weight: a counter, a factored mean."""
    edited(source, 'train.py', ("# By the setting `optimizer`: functions", LION +
                                "# By the setting `optimizer`: functions"),
           ("OPTIMIZERS = {'adamw': adamw, 'muon': muon}", "OPTIMIZERS = {'adamw': adamw, "
            "'muon': muon, 'lion': lambda model, cfg, dtype: "
            "[Lion(model.parameters(), cfg.learning_rate / 10)]}"))
    settings = dict(optimizer='lion', lr_decay_iters=6)
    out = works(source, **settings)
    rates = [float(line.split()[1]) for line in out.split('\n') if line.startswith('rate')]
    assert rates == pytest.approx([float(row['learning_rate']) / 10 for row in rows()[:6]])
    works(source, out_dir='b', max_iters=3, **settings)
    works(source, out_dir='b', init_from='resume', **settings)
    ours, theirs = (load_checkpoint(f'{folder}/ckpt.pt') for folder in ('out', 'b'))
    for name, weight in ours['model'].items():
        assert torch.equal(weight, theirs['model'][name]), name
    for number, state in ours['optimizers'][0]['state'].items():
        for name, value in state.items():
            other = theirs['optimizers'][0]['state'][number][name]
            assert torch.equal(value, other) if name != 'note' else value == other == 3
    assert 'lion' in run(source, optimizer='lioness').stderr


def test_a_third_optimizer_follows_the_schedule(tiny, source):
    edited(source, 'train.py', ('        bf16=dtype == torch.bfloat16)]\n', '''\
        bf16=dtype == torch.bfloat16), torch.optim.SGD(model.transformer.wpe.parameters(), lr=0.5)]
'''), ('        loss, norm, parts = update(', '''\
        print('rates', *(group['lr'] for o in optimizers for group in o.param_groups))
        loss, norm, parts = update('''))
    out = works(source, optimizer='muon', max_iters=4)
    lines = [line.split()[1:] for line in out.split('\n') if line.startswith('rates')]
    for row, (adamw, _, muon, sgd) in zip(rows(), lines, strict=False):
        rate = float(row['learning_rate'])
        assert float(adamw) == pytest.approx(rate)
        assert float(muon) == pytest.approx(rate * 0.02 / 1e-2)
        assert float(sgd) == pytest.approx(rate * 0.5 / 1e-2)
    assert len(load_checkpoint('out/ckpt.pt')['optimizers']) == 3


def test_a_schedule_is_one_entry(tiny, source):
    edited(source, 'train.py', ("    'linear': lambda done: 1 - done,\n",
                                "    'linear': lambda done: 1 - done,\n"
                                "    'steps': lambda done: 1.0 if done < 0.5 else 0.5,\n"))
    works(source, schedule='steps', warmup_iters=0, min_lr=0)
    assert [float(row['learning_rate']) for row in rows()[:6]] == [1e-2] * 3 + [5e-3] * 3
    assert "'steps'" in run(source, schedule='stairs').stderr


# --- settings belong to their model


def test_a_setting_added_to_one_model_is_refused_by_the_others(tiny, source):
    edited(source, 'model.py', ("    gelu: str = 'erf'  # 'erf'",
                                "    mine: int = 0\n    gelu: str = 'erf'  # 'erf'"))
    edited(source, 'train.py', ("    gelu: str = 'erf'  # gpt",
                                "    mine: int = 0  # mine\n    gelu: str = 'erf'  # gpt"))
    works(source, mine=3, max_iters=1)
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    assert checkpoint['model_args']['mine'] == 3
    result = run(source, mine=3, model='llama', out_dir='b')
    assert result.returncode == 1 and 'model=llama has no mine=3' in result.stderr
    works(source, model='llama', max_iters=1, out_dir='b')


# --- export


@pytest.mark.parametrize('changes, words', [
    ([(' + self.transformer.wpe(positions)', ''),
      ("            'wpe': Embedding(config.block_size, config.n_embd),\n", '')],
     '"transformer.wpe.weight"'),
    ([('        self.mlp = MLP(config)\n', '        self.mlp = MLP(config)\n'
       '        self.scale = nn.Parameter(torch.ones(config.n_embd))\n')],
     '"transformer.h.0.scale", "transformer.h.1.scale"'),
    ([("self.c_fc = Linear(config.n_embd, 4 *", "self.c_fc = Linear(config.n_embd, 8 *"),
      ("self.c_proj = Linear(4 *", "self.c_proj = Linear(8 *")], 'transformer.h.0.mlp.c_fc.weight'),
    ([("    gelu: str = 'erf'  # 'erf'", "    mine: int = 0\n    gelu: str = 'erf'  # 'erf'")],
     'has no setting mine'),
    ([("nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')", 'nn.ReLU()')],
     'computes something else'),
], ids=['no positions', 'another parameter', 'another width', 'another setting', 'ReLU'])
def test_a_model_that_was_changed_is_not_exported_as_a_gpt2(tiny, source, changes, words):
    pytest.importorskip('transformers')
    edited(source, 'model.py', *changes)
    works(source, max_iters=20, eval_interval=20)
    result = run(source, script_name='export_hf.py', out_dir='out', to='hf')
    assert result.returncode == 1 and words in result.stderr, result.stderr
    assert not os.path.exists('hf')


# --- more than one loss


def experts(source):
    """Make the edits that NOTES.md shows."""
    with open(os.path.join(ROOT, 'NOTES.md'), encoding='utf-8') as file:
        experts, balance = re.findall(r'^```python\n(.*?)^```', file.read(), re.M | re.S)[:2]
    edited(source, 'model.py', ('class Block(nn.Module):', experts + '\n\nclass Block(nn.Module):'),
           ('self.mlp = MLP(config)', 'self.mlp = Experts(config)'))
    edited(source, 'train.py', ('    return loss, {}\n', balance))


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_experts_and_their_balance_as_the_notes_show_them(tiny, source, optimizer):
    experts(source)
    settings = dict(optimizer=optimizer, lr_decay_iters=6)
    out = works(source, sample_tokens=5, **settings)
    assert out.count('  | ') >= 3 and 'no sample' not in out
    for row in rows()[:6]:
        balance = float(row['balance'])  # of two blocks, each from 1 to 4
        assert 1.99 < balance < 8
        plain = float(row['train_loss']) - 0.01 * balance
        assert row['train_eval_loss'] == '' or abs(plain - float(row['train_eval_loss'])) < 0.2
    works(source, out_dir='b', max_iters=3, **settings)
    works(source, out_dir='b', init_from='resume', **settings)
    ours, theirs = (load_checkpoint(f'{folder}/ckpt.pt')['model'] for folder in ('out', 'b'))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    sampled = run(source, script_name='sample.py', out_dir='out', device='cpu', max_new_tokens=9)
    assert sampled.returncode == 0, sampled.stderr
    if optimizer == 'muon':
        adamw, muon = torch.load('out/ckpt.pt', weights_only=True)['optimizers']
        shapes = {tuple(state['momentum_buffer'].shape) for state in muon['state'].values()}
        assert shapes == {(4, 64, 32), (4, 32, 64), (96, 32), (32, 32)}  # and no router


def test_two_processes_with_a_second_loss_equal_one(tiny, source):
    experts(source)
    codes, out = scripts_together(source / 'train.py', flags(**RUN | dict(out_dir='two')))
    assert codes == [0, 0], out
    works(source, out_dir='one')
    for one, two in zip(rows('one')[:6], rows('two')[:6], strict=True):
        for name in ('train_loss', 'balance'):
            assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-3)
