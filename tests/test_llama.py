"""Llama and Muon, compared with independent computations."""

import json
import math
import os

import pytest
import torch
from conftest import TINY, steps, train_together
from test_resume import assert_same_run, stop_at

import export_hf
import train
from checkpoint import load_checkpoint, load_model
from console import UserError
from llama import Llama, LlamaConfig, rotate, rotation_angles
from muon import Muon, orthogonal
from model import GPT, GPTConfig, KVCache, stream
from pretrained import read_pretrained
from quantize import quantize_int8
from tokenizer import CharTokenizer
from train import TrainConfig

SHAPE = dict(vocab_size=65, block_size=32, n_layer=2, n_head=4, n_embd=32)
RUN = TINY | dict(model='llama', n_head=4, n_kv_head=2, optimizer='muon', max_iters=8,
                  eval_interval=4, sample_tokens=0)


def make(**changes):
    """A Llama whose weights are large enough that its logits differ."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SHAPE | changes)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def ids(*shape):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('changes', [{}, dict(n_kv_head=1, qk_norm=False), dict(n_kv_head=2)])
@torch.no_grad()
def test_cached_logits_equal_uncached(changes):
    model, idx = make(**changes), ids(3, 32)
    whole, _ = model(idx, idx)
    cache, start = [KVCache(32) for _ in model.blocks], 0
    for end in (5, 6, 7, 20, 32):
        logits, _ = model(idx[:, start:end], cache=cache)
        assert torch.allclose(logits[:, 0], whole[:, end - 1], atol=1e-4)
        start = end


@torch.no_grad()
def test_no_position_sees_a_later_one():
    model, idx = make(), ids(2, 32)
    changed = idx.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 65
    before, after = model(idx, idx)[0], model(changed, changed)[0]
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 31], after[:, 31])


def test_rotation_makes_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16)
    def product(i, j):
        at = [rotation_angles(torch.tensor([p]), 16, 10000.0) for p in (i, j)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum().item()
    assert product(3, 1) == pytest.approx(product(30, 28), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(30, 20), abs=1e-3)


@pytest.mark.parametrize('n_layer, n_embd', [(2, 128), (12, 768)])
def test_it_has_as_many_weights_as_gpt2(n_layer, n_embd):
    shape = dict(vocab_size=65, block_size=16, n_layer=n_layer, n_embd=n_embd, n_head=4)
    with torch.device('meta'):
        ours = Llama(LlamaConfig(**shape)).num_params()
        gpt = GPT(GPTConfig(**shape, bias=False)).num_params()
    assert ours == pytest.approx(gpt, rel=0.02)


@pytest.mark.parametrize('wrong, words', [
    (dict(n_kv_head=3), 'n_kv_head=3'), (dict(n_kv_head=-1), 'n_kv_head=-1'),
    (dict(n_embd=36), 'head_size=9'),
])
def test_impossible_shapes_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        LlamaConfig(**SHAPE | wrong)


@torch.no_grad()
def test_eight_bits_stay_near():
    model, idx = make(), ids(2, 20)
    plain, _ = model(idx, idx)
    quantized, _ = quantize_int8(model)(idx, idx)
    assert 0 < (plain - quantized).norm() < 0.05 * plain.norm()


def test_a_compiled_llama_is_one_graph():
    model, idx = make().train(), ids(3, 33)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    _, loss = compiled(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(model(idx[:, :-1], idx[:, 1:])[1].item(), rel=1e-5)


# --- Muon


@pytest.mark.parametrize('model', ['gpt', 'llama'])
def test_muon_takes_the_matrices_inside_blocks(model):
    cls, config = {'gpt': (GPT, GPTConfig), 'llama': (Llama, LlamaConfig)}[model]
    net = cls(config(**SHAPE))
    adamw, muon = train.OPTIMIZERS['muon'](
        net, TrainConfig(model=model, optimizer='muon'), torch.float32)
    inside = {id(p) for block in net.blocks for p in block.parameters() if p.dim() == 2}
    assert {id(p) for p in muon.param_groups[0]['params']} == inside
    others = {id(p) for group in adamw.param_groups for p in group['params']}
    assert others | inside == {id(p) for p in net.parameters()} and not others & inside


def test_a_module_stays_out_of_muon_with_all_that_is_in_it():
    net = GPT(GPTConfig(**SHAPE))
    net.blocks[0].mlp.optimizer = 'adamw'
    _, muon = train.OPTIMIZERS['muon'](net, TrainConfig(optimizer='muon'), torch.float32)
    left_out = {id(p) for p in net.blocks[0].mlp.parameters()}
    assert not left_out & {id(p) for p in muon.param_groups[0]['params']}
    assert len(muon.param_groups[0]['params']) == 4 * len(net.blocks) - 2


def test_orthogonal_brings_singular_values_near_1():
    torch.manual_seed(0)
    m = torch.randn(3, 16, 40) * torch.logspace(0, -1, 16)[:, None]
    for number, lowest, highest in ((3, 0.47, 1.53), (5, 0.995, 1.005)):
        values = torch.linalg.svdvals(orthogonal(m, number))
        assert values.min() > lowest and values.max() < highest
    U, _, Vh = torch.linalg.svd(m, full_matrices=False)
    assert torch.allclose(orthogonal(m, 5), U @ Vh, atol=0.005)  # the same singular vectors
    assert torch.allclose(orthogonal(m * 1e-5, 5), U @ Vh, atol=0.01)  # however small
    assert orthogonal(torch.zeros(1, 4, 4), 5).eq(0).all()  # a gradient of 0 moves nothing


@pytest.mark.parametrize('bf16, near', [(False, 0.002), (True, 0.03)])
def test_muon_follows_its_definition(bf16, near):
    """U V^T of the Nesterov gradient, by an SVD; a tall matrix is several square ones."""
    torch.manual_seed(0)
    shapes = (8, 8), (24, 8), (8, 8), (8, 20)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [piece.detach().clone() for p in params for piece in p.split(p.size(1))]
    means = [torch.zeros_like(piece) for piece in expected]
    muon = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.2, ns_steps=10, bf16=bf16)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        gradients = [piece.clone() for p in params for piece in p.grad.split(p.size(1))]
        for weights, mean, gradient in zip(expected, means, gradients):
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            U, _, Vh = torch.linalg.svd(0.1 * gradient + 0.9 * mean, full_matrices=False)
            weights.mul_(1 - 0.1 * 0.2).sub_(0.1 * U @ Vh)
        muon.step()
    pieces = [piece for p in params for piece in p.split(p.size(1))]
    assert all(torch.allclose(a, b, atol=near) for a, b in zip(pieces, expected))


def test_muon_orthogonalizes_each_matrix_of_a_stack():
    torch.manual_seed(0)
    stack = torch.randn(3, 16, 8)
    together = torch.nn.Parameter(stack.clone())
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack]
    optimizers = Muon([together], lr=0.1), Muon(alone, lr=0.1)
    for _ in range(3):
        together.grad = torch.randn(3, 16, 8)
        for p, gradient in zip(alone, together.grad):
            p.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(together, torch.stack(list(alone)), atol=1e-6)


def test_muon_skips_a_weight_without_a_gradient():
    used, unused = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([used, unused], lr=0.1)
    used.grad = torch.randn(4, 4)
    optimizer.step()
    assert unused.eq(1).all() and not used.eq(1).any() and len(optimizer.state) == 1


def test_a_head_of_its_own(tiny, capsys):
    run = RUN | dict(tied=False, max_iters=4, eval_interval=2)
    train.train(TrainConfig(**run | dict(out_dir='whole')))
    train.train(TrainConfig(**run | dict(max_iters=2, lr_decay_iters=4)))
    train.train(TrainConfig(**run | dict(init_from='resume', tied=True)))  # its own shape holds
    assert 'from the checkpoint: tied=False' in capsys.readouterr().out
    assert_same_run('out', 'whole')
    weights = load_model('out')[0].state_dict()
    assert not torch.equal(weights['lm_head.weight'], weights['model.embed_tokens.weight'])


def test_muon_learns_and_follows_the_schedule(tiny, capsys, monkeypatch):
    rates = []
    step = Muon.step
    monkeypatch.setattr(Muon, 'step', lambda self: (
        rates.append(self.param_groups[0]['lr']), step(self)))
    train.train(TrainConfig(**RUN | dict(max_iters=40, eval_interval=40)))
    seen = steps(capsys.readouterr().out)
    assert seen[-1][2] < seen[0][2] - 1
    cfg = TrainConfig(**RUN | dict(max_iters=40))
    expected = [train.learning_rate(cfg, it) / cfg.learning_rate * cfg.muon_lr for it in range(40)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize('stop', [3, 4])
def test_resumed_equals_uninterrupted(tiny, monkeypatch, stop):
    train.train(TrainConfig(**RUN | dict(out_dir='whole')))
    stop_at(monkeypatch, stop, TrainConfig(**RUN))
    train.train(TrainConfig(**RUN | dict(init_from='resume')))
    assert_same_run('out', 'whole')
    states = [load_checkpoint(f'{x}/ckpt.pt')['optimizers'][1]['state'] for x in ('out', 'whole')]
    assert states[0] and all(
        torch.equal(states[0][i]['momentum_buffer'], states[1][i]['momentum_buffer'])
        for i in states[1])


def test_two_processes_equal_one(tiny):
    run = RUN | dict(gradient_accumulation_steps=2)
    train.train(TrainConfig(**run | dict(out_dir='one')))
    train_together(TrainConfig(**run | dict(out_dir='two')))
    one, two = (load_checkpoint(f'{x}/ckpt.pt')['best_val_loss'] for x in ('one', 'two'))
    assert two == pytest.approx(one, rel=1e-3)  # Muon computes in bf16


def test_a_bad_batch_moves_nothing(tiny, monkeypatch):
    forward = Llama.forward

    def spoilt(self, idx, targets=None, **more):
        logits, loss = forward(self, idx, targets, **more)
        return logits, loss * math.nan if self.training and loss is not None else loss

    train.train(TrainConfig(**RUN | dict(max_iters=2, lr_decay_iters=9)))
    before = load_checkpoint('out/ckpt.pt')
    monkeypatch.setattr(Llama, 'forward', spoilt)
    train.train(TrainConfig(**RUN | dict(init_from='resume', max_iters=3, lr_decay_iters=9)))
    after = load_checkpoint('out/ckpt.pt')
    assert all(torch.equal(before['model'][k], after['model'][k]) for k in before['model'])
    moments = [c['optimizers'][1]['state'][0]['momentum_buffer'] for c in (before, after)]
    assert torch.equal(*moments)


def test_muon_needs_matrices_and_its_name(tiny):
    with pytest.raises(train.UsageError, match='a gpt or a llama'):
        train.train(TrainConfig(**TINY | dict(optimizer='muon', model='bigram', n_layer=None,
                                              n_head=None, n_embd=None)))
    assert not os.path.exists('out')
    with pytest.raises(train.UsageError, match="'adam'"):
        TrainConfig(optimizer='adam')


# --- Hugging Face


@pytest.fixture
def hf():
    return pytest.importorskip('transformers')


def theirs(hf, kind, **changes):
    """A small random model, as transformers makes and saves it, in the folder hf."""
    torch.manual_seed(0)
    settings = dict(vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, max_position_embeddings=32) | changes
    cls, config = ((hf.Qwen3ForCausalLM, hf.Qwen3Config) if kind == 'qwen3' else
                   (hf.LlamaForCausalLM, hf.LlamaConfig))
    model = cls(config(**settings)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained('hf')
    return model


@pytest.mark.parametrize('kind, changes', [
    ('llama', dict(num_key_value_heads=2, tie_word_embeddings=True)),
    ('llama', dict(num_key_value_heads=4, tie_word_embeddings=False, rms_norm_eps=1e-6)),
    ('qwen3', dict(num_key_value_heads=1, tie_word_embeddings=False, head_dim=16)),
    ('qwen3', dict(num_key_value_heads=4, tie_word_embeddings=True, head_dim=8)),
])
@torch.no_grad()
def test_logits_equal_transformers_both_ways(folder, hf, kind, changes):
    model = theirs(hf, kind, **changes)
    ours = read_pretrained('hf').eval()
    idx = ids(2, 32)
    expected = model(idx).logits
    assert (ours(idx, idx)[0] - expected).abs().max() < 1e-4
    export_hf.export(ours, CharTokenizer(''.join(map(chr, range(48, 113)))), 'back')
    back = hf.AutoModelForCausalLM.from_pretrained('back')
    assert back.config.model_type == kind
    assert (back(idx).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize('change, words', [
    (dict(model_type='mistral'), 'mistral'),
    (dict(attention_bias=True), 'attention_bias'),
    (dict(mlp_bias=True), 'mlp_bias'),
    (dict(rope_parameters={'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.0}), 'linear'),
    (dict(hidden_act='gelu'), 'hidden_act'),
])
def test_unsupported_values_in_config_json_are_named(folder, hf, change, words):
    theirs(hf, 'llama')
    with open('hf/config.json') as file:
        config = json.load(file) | change
    with open('hf/config.json', 'w') as file:
        json.dump(config, file)
    with pytest.raises(UserError, match=words):
        read_pretrained('hf')


def test_sliding_windows_are_refused(folder, hf):
    theirs(hf, 'qwen3', use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(UserError, match='use_sliding_window'):
        read_pretrained('hf')


@pytest.mark.parametrize('qk_norm', [True, False])
def test_an_exported_char_llama_writes_the_same(tiny, hf, qk_norm):
    train.train(TrainConfig(**RUN | dict(max_iters=60, eval_interval=60, block_size=64,
                                         qk_norm=qk_norm)))
    export_hf.main(['--out_dir=out', '--to=hf'])
    tokenizer = hf.AutoTokenizer.from_pretrained('hf')
    model = hf.AutoModelForCausalLM.from_pretrained('hf')
    prompt = tokenizer('“Oh,” said', return_tensors='pt').input_ids
    out = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0,
                         attention_mask=torch.ones_like(prompt))
    for path in ('out', 'hf'):
        ours, chars = load_model(path)
        idx = torch.tensor([chars.encode('“Oh,” said').tolist()])
        text = chars.decode(ours.generate(idx, 40, temperature=0)[0].tolist())
        assert text == tokenizer.decode(out[0])


def test_streaming_from_a_vocabulary_with_padding():
    model = make(vocab_size=128)
    tokens = list(stream(model, ids(4, 1), 50, temperature=5.0, vocab_size=65))
    assert torch.cat(tokens).max() < 65


@pytest.mark.parametrize('shard', [False, True])
def test_two_processes_fine_tune_from_a_folder(tiny, hf, shard):
    train.train(TrainConfig(**RUN | dict(max_iters=2, optimizer='adamw')))
    export_hf.main(['--out_dir=out', '--to=hf'])
    run = RUN | dict(init_from='hf', out_dir='more', max_iters=2, optimizer='adamw', shard=shard)
    train_together(TrainConfig(**run))
    train.train(TrainConfig(**run | dict(out_dir='alone', shard=False)))
    ours, theirs = (load_checkpoint(f'{x}/ckpt.pt')['model'] for x in ('more', 'alone'))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
