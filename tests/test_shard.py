"""A run is the same with weights, gradients and optimizer state sharded over processes."""

import csv
import os
import signal

import pytest
import torch
from conftest import TINY, train_together

import dataset
import model as gpt
import runtime
import sample
import train
from checkpoint import load_checkpoint
from console import UserError
from train import TrainConfig

RUN = TINY | dict(gradient_accumulation_steps=4, max_iters=6, eval_interval=3, lr_decay_iters=12)


def losses(folder):
    with open(f'{folder}/log.csv', newline='') as file:
        return [tuple(float(row[name] or 0) for name in ('train_loss', 'val_loss', 'grad_norm'))
                for row in csv.DictReader(file)]


def run(processes=1, **settings):
    cfg = TrainConfig(**RUN | settings)
    train.train(cfg) if processes == 1 else train_together(cfg, processes)


def assert_near(a, b):
    for one, many in zip(losses(a), losses(b), strict=True):
        assert many == pytest.approx(one, rel=1e-4)
    ours, theirs = (load_checkpoint(f'{x}/ckpt.pt') for x in (a, b))
    assert ours['model'].keys() == theirs['model'].keys()
    for name, weight in ours['model'].items():
        assert torch.allclose(weight, theirs['model'][name], atol=1e-4), name
    for one, many in zip(ours['optimizers'], theirs['optimizers'], strict=True):
        assert one['state'].keys() == many['state'].keys()
        for key, moments in one['state'].items():
            for name, value in moments.items():
                assert torch.allclose(value, many['state'][key][name], atol=1e-4), (key, name)


@pytest.mark.parametrize('model, optimizer, processes', [
    ('gpt', 'adamw', 2), ('llama', 'adamw', 2), ('gpt', 'muon', 2), ('llama', 'muon', 2),
    pytest.param('gpt', 'adamw', 4, marks=pytest.mark.slow),
    pytest.param('llama', 'muon', 4, marks=pytest.mark.slow),
])
def test_sharded_equals_whole(tiny, capfd, model, optimizer, processes):
    more = dict(model=model, optimizer=optimizer)
    run(out_dir='whole', **more)
    capfd.readouterr()
    run(processes, out_dir='sharded', shard=True, **more)
    out = capfd.readouterr().out
    assert_near('whole', 'sharded')
    assert out.count('step 6:') == 1 and out.count('  | ') == 3 and 'no sample' not in out
    # One file format, to the byte count: shared weights stand there once.
    sizes = [os.path.getsize(f'{x}/ckpt.pt') for x in ('whole', 'sharded')]
    assert abs(sizes[0] - sizes[1]) < 4096
    sample.main(['--out_dir=sharded', '--start=T', '--max_new_tokens=5'])
    assert capfd.readouterr().out.count('T') >= 3


def test_a_run_goes_from_one_process_to_shards_and_back(tiny):
    run(out_dir='whole', max_iters=9)
    run(max_iters=3)
    run(2, max_iters=6, shard=True, init_from='resume')
    run(max_iters=9, init_from='resume')
    assert_near('whole', 'out')


def test_resumed_with_another_measure_the_best_is_measured_again(tiny, capfd):
    run(2, shard=True, max_iters=3)
    capfd.readouterr()
    run(2, shard=True, max_iters=6, init_from='resume', eval_iters=3)
    assert 'have changed: now out/best.pt has a loss of' in capfd.readouterr().out
    run(out_dir='whole', max_iters=3)
    run(out_dir='whole', max_iters=6, init_from='resume', eval_iters=3)
    assert_near('whole', 'out')


def test_finetuning_spreads_another_runs_weights(tiny):
    run(out_dir='first', max_iters=3)
    more = dict(init_from='first', block_size=8, max_iters=2, eval_interval=2, learning_rate=1e-3)
    run(out_dir='whole', **more)
    run(2, out_dir='sharded', shard=True, **more)
    assert_near('whole', 'sharded')
    assert load_checkpoint('sharded')['model']['transformer.wpe.weight'].shape == (8, 32)


@pytest.mark.parametrize('model', ['gpt', 'llama'])
def test_in_bf16_the_losses_are_the_same(tiny, model):
    more = dict(dtype='bfloat16', model=model, sample_tokens=0)
    run(2, out_dir='copied', **more)
    run(2, out_dir='sharded', shard=True, **more)
    for one, many in zip(losses('copied'), losses('sharded'), strict=True):
        assert many == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize('model', ['gpt', 'llama'])
def test_in_bf16_few_weights_are_held_for_the_backward_pass(tiny, monkeypatch, model):
    """Those of fewer than two of the eight blocks; the others are gathered again."""
    training_loss, blocks = train.training_loss, 8

    def watched(net, x, y):
        held, shapes = [], {tuple(p.shape) for block in net.blocks for p in block.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            result = training_loss(net, x, y)
        shapes |= {shape[::-1] for shape in shapes}
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in held
                    if t.dim() == 2 and tuple(t.shape) in shapes}
        with open(f'held{os.environ["RANK"]}', 'w') as file:
            file.write(str(sum(storage.size() for storage in storages.values())))
        return result

    monkeypatch.setattr(train, 'training_loss', watched)
    held = []
    for shard in (False, True):
        if not shard:
            monkeypatch.setattr('torch.nn.parallel.DistributedDataParallel.blocks',
                                property(lambda self: self.module.blocks), raising=False)
        run(2, out_dir=f'o{shard:d}', shard=shard, dtype='bfloat16', model=model, n_layer=blocks,
            batch_size=3, max_iters=1, sample_tokens=0)  # 48 tokens: no weight is so wide
        with open('held0') as file:
            held.append(int(file.read()))
    whole_block = 2 * 12 * 32 ** 2  # bytes in bf16
    assert held[0] >= 0.9 * blocks * whole_block and held[1] < 2 * whole_block


def test_gradients_travel_once_an_update(tiny, monkeypatch):
    """Counted where torch reduces them, however many micro-batches there are."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    reduce = group.foreach_reduce

    def counted(*args, **kwargs):
        with open('reductions', 'a') as file:
            file.write('.')
        return reduce(*args, **kwargs)

    monkeypatch.setattr(group, 'foreach_reduce', counted)
    counts = []
    for micro_batches in (2, 8):
        open('reductions', 'w').close()
        run(2, gradient_accumulation_steps=micro_batches, batch_size=2, shard=True, max_iters=2,
            out_dir=f'o{micro_batches}')
        counts.append(os.path.getsize('reductions'))
    assert counts[0] == counts[1] > 0


def test_on_one_process_the_flag_changes_nothing(tiny):
    run(out_dir='plain', max_iters=2)
    run(out_dir='flag', max_iters=2, shard=True)
    ours, theirs = (load_checkpoint(f'{x}/ckpt.pt')['model'] for x in ('plain', 'flag'))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_rank_that_fails_ends_all_with_its_reason(tiny, monkeypatch, capfd):
    """Also without torchrun, which would end the others."""
    batch, calls = dataset.Split.batch, []

    def failing(self, *args):
        calls.append(1)
        if os.environ['RANK'] == '1' and len(calls) == 10:
            raise UserError('rank 1 lost its disk: repair it')
        return batch(self, *args)

    monkeypatch.setattr(dataset.Split, 'batch', failing)
    train_together(TrainConfig(**RUN | dict(shard=True)), exit_codes=[1, 1])
    assert 'error: rank 1 lost its disk: repair it\n' in capfd.readouterr().err


def test_a_killed_rank_loses_nothing_that_was_saved(tiny, monkeypatch):
    learning_rate = train.learning_rate

    def rate(cfg, it):
        if it == 12 and os.environ['RANK'] == '1':
            os.kill(os.getpid(), signal.SIGKILL)
        return learning_rate(cfg, it)

    settings = dict(eval_interval=5, lr_decay_iters=100)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'learning_rate', rate)
        cfg = TrainConfig(**RUN | settings | dict(shard=True, max_iters=100))
        train_together(cfg, exit_codes=[1, -signal.SIGKILL])
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == 10
    run(2, shard=True, init_from='resume', max_iters=15, **settings)
    run(out_dir='whole', max_iters=15, **settings)
    assert_near('whole', 'out')


def test_memory_per_process_falls(tiny, monkeypatch):
    """Counts the elements of weights, gradients and moments of a rank after an update."""
    step = torch.optim.AdamW.step

    def counted(self, *args):
        step(self, *args)
        held = [t for p in self.state for t in (p, p.grad, *self.state[p].values())]
        with open('held', 'w') as file:
            file.write(str(sum(getattr(t, '_local_tensor', t).numel() for t in held)))

    monkeypatch.setattr(torch.optim.AdamW, 'step', counted)
    held = []
    for shard in (False, True):
        run(2, shard=shard, max_iters=1, out_dir=f'o{shard:d}')
        with open('held') as file:
            held.append(int(file.read()))
    assert held[1] < 0.55 * held[0]


def test_initial_weights_follow_from_the_seed(folder):
    """Also in one process: two new models have the same weights."""
    from model import GPT, GPTConfig

    config = GPTConfig(vocab_size=65, block_size=8, n_layer=1, n_head=1, n_embd=8)
    ours, theirs = (runtime.new_model(GPT, config, None, torch.device('cpu'), seed=5)
                    for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_the_mesh_is_the_runs_device(tiny, monkeypatch):
    """Also on a machine with an accelerator, which torch would use by default."""
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda **_: torch.device('mps'))
    run(2, shard=True, max_iters=1, sample_tokens=0)
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == 1


def test_sync_gradients_reaches_a_compiled_model():
    class Sharded(torch.nn.Linear):
        def set_requires_gradient_sync(self, sync):
            self.sync = sync

    model = Sharded(1, 1)
    for sync in (False, True):
        runtime.sync_gradients(torch.compile(model), sync)
        assert model.sync is sync


# --- edits: what the source does not foresee, on one process and sharded


class Odd(torch.optim.Optimizer):
    """State of several dtypes, and nested."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group['params']):
            if p not in self.state:
                self.state[p] |= {
                    'mean': torch.zeros_like(p, dtype=torch.bfloat16), 'steps': 0,
                    'signs': torch.zeros_like(p, dtype=torch.int8),
                    'deep': {'list': [torch.zeros_like(p)]}}
            state = self.state[p]
            state['mean'].lerp_(p.grad.bfloat16(), 0.1)
            state['signs'] += p.grad.sign().to(torch.int8)
            state['deep']['list'][0] += p.grad
            state['steps'] += 1
            p -= self.param_groups[0]['lr'] * (
                state['mean'] + 1e-3 * state['signs'] + 1e-3 * state['deep']['list'][0])


def state_of(folder):
    return torch.load(f'{folder}/ckpt.pt', weights_only=True)['optimizers'][0]['state'][0]


@pytest.mark.parametrize('processes', [1, 2])
def test_any_state_of_an_optimizer_is_resumed_exactly(tiny, monkeypatch, processes):
    monkeypatch.setitem(train.OPTIMIZERS, 'odd', lambda model, cfg, dtype: [
        Odd(model.parameters(), cfg.learning_rate)])
    settings = dict(optimizer='odd', shard=processes > 1)
    run(processes, out_dir='whole', **settings)
    run(processes, max_iters=3, **settings)
    run(processes, init_from='resume', **settings)
    ours, theirs = (load_checkpoint(f'{folder}/ckpt.pt')['model'] for folder in ('whole', 'out'))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    ours, theirs = state_of('whole'), state_of('out')
    assert theirs['mean'].dtype == torch.bfloat16 and theirs['signs'].dtype == torch.int8
    assert theirs['steps'] == 6
    assert torch.equal(ours['deep']['list'][0], theirs['deep']['list'][0])


def test_buffers_that_training_changes_are_rank_0s(tiny, monkeypatch):
    init, forward = gpt.Block.__init__, gpt.Block.forward

    def counting_init(block, config):
        init(block, config)
        block.register_buffer('mean', torch.zeros(config.n_embd))

    def counting(block, x, cache=None):
        if block.training:
            with torch.no_grad():
                block.mean.lerp_(x.mean((0, 1)), 0.1)
        return forward(block, x - block.mean, cache)

    monkeypatch.setattr(gpt.Block, '__init__', counting_init)
    monkeypatch.setattr(gpt.Block, 'forward', counting)
    run(2, out_dir='whole', shard=True)
    run(2, max_iters=3, shard=True)
    run(2, init_from='resume', shard=True)
    ours, theirs = (load_checkpoint(f'{folder}/ckpt.pt')['model'] for folder in ('whole', 'out'))
    assert ours['transformer.h.0.mean'].any()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_blocks_that_are_one_are_sharded_once(tiny, monkeypatch):
    init = gpt.GPT.__init__

    def shared(net, config):
        init(net, config)
        net.transformer.h[1] = net.transformer.h[0]

    monkeypatch.setattr(gpt.GPT, '__init__', shared)
    run(out_dir='whole', recompute=True)
    run(2, out_dir='sharded', shard=True, recompute=True)
    assert_near('whole', 'sharded')
    run(2, out_dir='sharded', shard=True, init_from='resume', max_iters=8)
    run(out_dir='whole', init_from='resume', max_iters=8)
    assert_near('whole', 'sharded')
