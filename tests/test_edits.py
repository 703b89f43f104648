"""Edits to the source take effect where a reader expects it.

Each test changes a copy of the scripts, as a reader would, and runs it.
"""

import csv
import os
import re
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, TINY, edited, flags, script, scripts_together, steps
from torch import nn
from torch.nn import functional as F

import export_hf
import model
import quantize as quantization
import start
import train
from checkpoint import load_checkpoint, load_model
from console import UserError
from llama import MODELS
from model import GPT, GPTConfig
from tokenizer import Tokenizer

RUN = TINY | dict(sample_tokens=0)
SHAPE = dict(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=32)


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


@pytest.mark.parametrize('processes', [1, 2])
def test_a_column_of_gradients_is_one_edit(tiny, source, processes):
    edited(source, 'train.py', ('    # Clip: one very', """\
    for number, block in enumerate(getattr(model, 'module', model).blocks):
        grads = [p.grad for p in block.parameters()]
        means[f'block {number}'] = torch.nn.utils.get_total_norm(grads)
    # Clip: one very"""))
    if processes == 1:
        works(source, out_dir='out')
    else:
        assert scripts_together(source / 'train.py', flags(**RUN))[0] == [0, 0]
    for row in rows()[:6]:
        norms = [float(row['block 0']), float(row['block 1'])]
        assert 0 < max(norms) <= float(row['grad_norm']) and 0 < min(norms)


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


# --- layers, weights and models of one's own


class Ternary(model.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('quantize', ['', 'int8'])
@torch.no_grad()
def test_a_layer_with_a_forward_of_its_own_is_sampled_with_it(dtype, quantize, monkeypatch):
    monkeypatch.setattr(model, 'Linear', Ternary)
    net = GPT(GPTConfig(**SHAPE)).eval()
    idx = torch.randint(65, (2, 16))
    expected, _ = net(idx, idx)
    with quantization.prepare_for_sampling(net, torch.device('cpu'), dtype, quantize):
        logits, _ = net(idx, idx)
    assert torch.allclose(logits.float(), expected, atol=0.05 * expected.std().item())


@pytest.mark.parametrize('dtype, quantize', [
    (torch.float32, ''), (torch.bfloat16, ''), (torch.float32, 'int8')])
@torch.no_grad()
def test_code_that_reads_a_weight_finds_it_when_sampling(dtype, quantize):
    net = GPT(GPTConfig(**SHAPE)).eval()
    layer = 'transformer.h.0.mlp.c_fc'
    before = net.get_submodule(layer).weight.clone()
    quantization.prepare_for_sampling(net, torch.device('cpu'), dtype, quantize)
    after = net.get_submodule(layer).weight
    assert (before - after).abs().max() < 0.01 * before.abs().max()


class Recurrent(model.LanguageModel):
    """A model without blocks, heads or a cache, and whose head has a bias."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = model.Embedding(config.vocab_size, 32)
        self.cells = nn.GRU(32, 32, batch_first=True)
        self.lm_head = nn.Linear(32, config.vocab_size)

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        x, _ = self.cells(self.table(idx))
        return model.logits_and_loss(x, self.lm_head, targets, loss_only)


@dataclass
class RecurrentConfig:
    block_size: int = 16
    vocab_size: int = 65


class Stack(Recurrent):
    """The same with blocks, of which nobody asks for the number of heads."""

    @property
    def blocks(self):
        return [self.cells]


@pytest.mark.parametrize('cls', [Recurrent, Stack])
def test_a_model_of_another_kind_is_trained_resumed_and_sampled(cls, tiny, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, 'mine', (cls, RecurrentConfig))
    settings = {name: value for name, value in TINY.items() if name[:2] != 'n_'} | {'model': 'mine'}
    train.train(train.TrainConfig(**settings))
    train.train(train.TrainConfig(**settings | dict(init_from='resume', max_iters=8)))
    assert '  | ' in capsys.readouterr().out
    net, _ = load_model('out')
    assert type(net) is cls
    idx = torch.tensor([[1, 2, 3]])
    written = net.generate(idx, 30, temperature=0)  # longer than its context of 16
    for _ in range(12):
        logits, _ = net(idx)
        idx = torch.cat([idx, logits.argmax(-1)], dim=1)
    assert torch.equal(written[:, :15], idx)
    if cls is Recurrent:
        with pytest.raises(UserError, match='muon needs a model with blocks'):
            train.train(train.TrainConfig(**settings | dict(optimizer='muon', out_dir='b')))


def test_two_entries_of_models_may_share_a_class(tiny, monkeypatch):
    @dataclass
    class WindowConfig(GPTConfig):
        window: int = 8

    monkeypatch.setitem(MODELS, 'windowed', (GPT, WindowConfig))
    train.train(train.TrainConfig(**RUN | dict(model='windowed', max_iters=1)))
    net, _ = load_model('out')
    assert type(net.config) is WindowConfig
    train.train(train.TrainConfig(**RUN | dict(model='windowed', init_from='resume', max_iters=2)))


def test_another_alphabet_reaches_every_weight_with_a_row_for_each_character():
    config = RecurrentConfig(vocab_size=4)
    weights = Recurrent(config).state_dict()
    before = {name: weight.clone() for name, weight in weights.items()}
    start.adapt_alphabet(weights, Recurrent, config, 'abcd', 'dxb')
    for name in ('table.weight', 'lm_head.weight', 'lm_head.bias'):
        assert torch.equal(weights[name][[0, 2]], before[name][[3, 1]])
        assert len(weights[name]) == 3 and 0 < weights[name][1].abs().max() < 0.2
    others = weights.keys() - {'table.weight', 'lm_head.weight', 'lm_head.bias'}
    assert others and all(torch.equal(weights[name], before[name]) for name in others)


@pytest.mark.parametrize('learns', ['head', 'bias', 'blocks'])
def test_frozen_weights_get_no_gradient_and_others_the_same_in_chunks(learns, monkeypatch):
    gradients = []
    idx = torch.randint(65, (2, 16), generator=torch.Generator().manual_seed(0))
    for most in (1 << 26, 0):
        monkeypatch.setattr(model, 'MAX_LOGITS', most)
        monkeypatch.setattr(model, 'CHUNK', 10)
        torch.manual_seed(0)
        net = GPT(GPTConfig(**SHAPE))
        net.lm_head = nn.Linear(32, 65)
        names = {'head': 'lm_head', 'bias': 'lm_head.bias', 'blocks': 'transformer.h'}
        for name, p in net.named_parameters():
            p.requires_grad = name.startswith(names[learns])
        net(idx, idx.roll(-1, 1), loss_only=True)[1].backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
        assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
    plain, chunked = gradients
    assert plain.keys() == chunked.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0 and torch.allclose(gradient, chunked[name], atol=1e-6)


def test_a_number_for_each_head_is_no_matrix():
    net = GPT(GPTConfig(**SHAPE))
    net.transformer.h[0].attn.temperature = nn.Parameter(torch.ones(2, 1, 1))
    net.transformer.h[0].experts = nn.Parameter(torch.ones(2, 3, 4))
    adamw, muon = train.muon(net, train.TrainConfig(**RUN | dict(optimizer='muon')), torch.float32)
    decayed, rest = ({id(p) for p in group['params']} for group in adamw.param_groups)
    block = net.transformer.h[0]
    assert id(block.attn.temperature) in rest
    assert id(block.experts) in {id(p) for p in muon.param_groups[0]['params']}
    assert adamw.param_groups[1]['weight_decay'] == 0
    assert decayed == {id(net.transformer.wte.weight), id(net.transformer.wpe.weight)}


def test_a_setting_newer_than_a_checkpoint_is_the_commands(tiny):
    train.train(train.TrainConfig(**RUN | dict(max_iters=1)))
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    del checkpoint['config']['gelu']  # which model_args do not contain either
    torch.save(checkpoint, 'out/ckpt.pt')
    train.train(train.TrainConfig(**RUN | dict(max_iters=2, init_from='resume', gelu='tanh')))
    net, _ = load_model('out/ckpt.pt')
    assert net.config.gelu == 'tanh'


def test_a_part_of_the_loss_cannot_take_the_name_of_the_whole(tiny, monkeypatch):
    def training_loss(net, x, y):
        loss = net(x, y, loss_only=True)[1]
        return loss + 10, {'loss': loss}

    monkeypatch.setattr(train, 'training_loss', training_loss)
    with pytest.raises(TypeError, match="'loss'"):
        train.train(train.TrainConfig(**RUN))


def test_a_slip_in_a_config_is_no_damaged_checkpoint(tiny, monkeypatch):
    train.train(train.TrainConfig(**RUN | dict(max_iters=1)))
    monkeypatch.setattr(GPTConfig, '__post_init__', lambda config: config.n_heads)
    with pytest.raises(AttributeError, match='n_heads'):
        load_checkpoint('out')


def test_a_tokenizer_of_another_kind_is_not_exported_as_gpt2s():
    pytest.importorskip('tokenizers')
    with pytest.raises(UserError, match='Bytes'):
        export_hf.hugging_face_tokenizer(type('Bytes', (Tokenizer,), {})())


def test_a_window_longer_than_a_few_tokens_is_not_exported(tiny, source):
    pytest.importorskip('transformers')
    train.train(train.TrainConfig(**RUN | dict(block_size=128, max_iters=30, eval_interval=30)))
    edited(source, 'model.py', ('    T, S = q.size(2), k.size(2)\n', '''\
    T, S = q.size(2), k.size(2)
    near = torch.ones(T, S, dtype=torch.bool).tril(S - T).triu(S - T - 100)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)
'''))
    result = run(source, script_name='export_hf.py', out_dir='out', to='hf')
    assert result.returncode == 1 and 'computes something else' in result.stderr, result.stderr
