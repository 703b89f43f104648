"""torch.compile: how many graphs it needs, by a backend that counts them; recomputation."""

import csv
import os

import pytest
import torch
from conftest import TINY, train_together
from torch._dynamo.testing import CompileCounter

import model
import sample
import train
from checkpoint import load_checkpoint
from model import GPT, GPTConfig
from train import TrainConfig

RUN = TINY | dict(sample_tokens=0, compile=True, max_iters=4, eval_interval=2)


@pytest.fixture
def counter(monkeypatch):
    """A backend for torch.compile that counts graphs and runs them without compiling."""
    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, 'compile', lambda net, **options: (
        compile(net, **options | dict(backend=counter))))
    yield counter
    torch._dynamo.reset()


def breaks():
    return sum(torch._dynamo.utils.counters['graph_break'].values())


@pytest.mark.parametrize('settings', [
    {}, dict(dropout=0.1), dict(eval_iters=0, batch_size=64), dict(model='llama', n_kv_head=1),
    dict(model='llama', tied=False, block_size=12), dict(optimizer='muon'), dict(bias=True),
    dict(dtype='bfloat16'),
], ids=str)
def test_a_training_run_needs_two_graphs(tiny, counter, settings):
    """One to train and one to evaluate. The last, short window of a split needs no other."""
    train.train(TrainConfig(**RUN | settings))
    assert counter.frame_count == 2 and not breaks()


def test_the_loss_in_chunks_adds_no_graph(tiny, counter, monkeypatch):
    """When it is compiled, all logits are in one graph."""
    monkeypatch.setattr(model, 'MAX_LOGITS', 8)
    train.train(TrainConfig(**RUN))
    assert counter.frame_count == 2 and not breaks()


@pytest.mark.parametrize('settings, graphs', [({}, 2), (dict(shard=True, n_layer=12), 6)],
                         ids=['copied', 'sharded'])
def test_graphs_of_several_processes(tiny, monkeypatch, settings, graphs):
    """Twelve sharded layers need six graphs: blocks of one shape have one graph."""
    def counted(*args):
        counter, compile = CompileCounter(), torch.compile
        torch.compile = lambda model: compile(model, backend=counter)
        best = training_run(*args)
        with open(f'graphs{os.environ["RANK"]}', 'w') as file:
            file.write(str(counter.frame_count))
        return best

    training_run = train.training_run
    monkeypatch.setattr(train, 'training_run', counted)
    train_together(TrainConfig(**RUN | settings))
    for rank in range(2):
        with open(f'graphs{rank}') as file:
            assert int(file.read()) == graphs, rank


def test_shorter_windows_need_few_graphs(counter):
    """One to train, one to evaluate the same shape, one to evaluate any shorter one."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2, n_embd=8))
    compiled = torch.compile(net)
    for T, training in ((16, True), (16, False), (7, False), (11, False), (5, False), (16, True)):
        idx = torch.randint(20, (4, T))
        compiled.train(training)
        with torch.set_grad_enabled(training):
            _, loss = compiled(idx, idx, loss_only=True)
            _, plain = net(idx, idx, loss_only=True)
        torch.testing.assert_close(loss, plain)
    assert counter.frame_count <= 3 and not breaks()


def test_sampling_needs_few_graphs(tiny, monkeypatch, counter, capsys):
    train.train(TrainConfig(**TINY | dict(max_iters=2)))
    args = ['--device=cpu', '--dtype=float32', '--num_samples=2', '--max_new_tokens=60']
    texts = []
    for compile in (False, True):
        if compile:
            monkeypatch.setattr(torch._dynamo.config, 'fail_on_recompile_limit_hit', True)
        capsys.readouterr()
        sample.main([*args, f'--compile={compile}'])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 100
    assert 1 <= counter.frame_count <= 4


# --- recomputation


def weights_and_losses(folder):
    with open(f'{folder}/log.csv', newline='') as file:
        losses = [(row['train_loss'], row['val_loss']) for row in csv.DictReader(file)]
    return load_checkpoint(f'{folder}/ckpt.pt')['model'], losses


@pytest.mark.parametrize('model', ['gpt', 'llama'])
@pytest.mark.parametrize('how', ['alone', 'together', 'sharded', 'compiled'])
def test_recomputed_activations_give_the_same_run_to_the_bit(tiny, monkeypatch, how, model):
    settings = RUN | dict(compile=how == 'compiled', shard=how == 'sharded', model=model,
                          dropout=0.1)
    if how == 'compiled':
        compile = torch.compile
        monkeypatch.setattr(torch, 'compile', lambda net: compile(net, backend='aot_eager'))
        torch._dynamo.reset()
    for recompute in (False, True):
        cfg = TrainConfig(**settings | dict(recompute=recompute, out_dir=f'o{recompute:d}'))
        train_together(cfg) if how in ('together', 'sharded') else train.train(cfg)
    (ours, our_losses), (theirs, their_losses) = map(weights_and_losses, ('o0', 'o1'))
    assert our_losses == their_losses
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_recomputing_holds_fewer_activations(tiny, monkeypatch):
    """Counts the bytes that the forward pass keeps for the backward pass."""
    training_loss, held = train.training_loss, {}

    def watched(net, x, y):
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: tensors.update({t.untyped_storage()._cdata: t}) or t, lambda t: t):
            result = training_loss(net, x, y)
        held[recompute] = sum(t.untyped_storage().nbytes() for t in tensors.values())
        return result

    monkeypatch.setattr(train, 'training_loss', watched)
    for recompute in (False, True):
        train.train(TrainConfig(**RUN | dict(compile=False, recompute=recompute, n_layer=8,
                                             batch_size=64, max_iters=1)))
    assert held[True] < 0.4 * held[False]
