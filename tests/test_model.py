"""The models, compared with independent computations."""

import math
from itertools import pairwise

import pytest
import torch

import runtime
from model import (
    GPT, MODEL_SIZES, Bigram, BigramConfig, GPTConfig, KVCache, attention, sample_from, stream,
)

SMALL = dict(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=32)


def small_gpt(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | changes)).eval()
    for p in model.parameters():  # larger than at the start, so that the logits differ
        if p.dim() >= 2:
            p.data *= 10
    return model


def make(cls, **changes):
    shape = SMALL | changes
    return cls(GPTConfig(**shape) if cls is GPT else BigramConfig(shape['block_size'],
                                                                   shape['vocab_size']))


def random_ids(*shape):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, idx):
    """(B, T, vocab_size) for all positions."""
    return model(idx, idx)[0]


@pytest.mark.parametrize('bias', [True, False])
def test_no_position_sees_a_later_one(bias):
    model, idx = small_gpt(bias=bias), random_ids(2, 32)
    changed = idx.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 65
    before, after = logits_of(model, idx), logits_of(model, changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])
    assert not torch.allclose(before[:, 31], after[:, 31])


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_equals_its_formula(dtype, tolerance):
    """Computed here in float32; the model has one path for short bf16, else torch's."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 48, 16).to(dtype)
    scores = q.float() @ k.float().transpose(-2, -1) / 4  # sqrt(head_size)
    hidden = torch.ones(48, 48, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v.float()
    assert (attention(q, k, v) - expected).abs().max() < tolerance
    for T in (1, 28):  # the queries are the last of more keys
        some = attention(q[:, :, -T:], k, v)
        assert (some - expected[:, :, -T:]).abs().max() < tolerance
    middle = attention(q[:, :, 20:25], k[:, :, :25], v[:, :, :25])
    assert (middle - expected[:, :, 20:25]).abs().max() < tolerance


def test_both_paths_of_attention_drop_weights():
    """Dropout sets about that fraction of the weights to 0, and scales the others up."""
    torch.manual_seed(0)
    q, v = torch.zeros(1, 1, 64, 64), torch.eye(64)[None, None]  # so the weights come out
    for dtype in (torch.float32, torch.bfloat16):
        weights = attention(*(t.to(dtype) for t in (q, q, v)), dropout=0.25)[0, 0].float()
        rows, columns = torch.tril_indices(64, 64)
        kept = weights[rows, columns] * (rows + 1)  # without dropout: 1 everywhere
        assert (kept == 0).float().mean() == pytest.approx(0.25, abs=0.05)
        assert torch.allclose(kept[kept != 0], torch.tensor(1 / 0.75), rtol=0.02)


@pytest.mark.parametrize('most_logits', [8, 1 << 26])
def test_compiled_as_one_graph_it_is_the_same(most_logits, monkeypatch):
    monkeypatch.setattr('model.MAX_LOGITS', most_logits)
    model, idx = small_gpt().train(), random_ids(3, 33)

    def loss_and_gradients(function):
        model.zero_grad()
        _, loss = function(idx[:, :-1], idx[:, 1:], loss_only=True)
        loss.backward()
        return torch.cat([loss.view(1), *(p.grad.flatten() for p in model.parameters())])

    # This backend needs no compiler, and runs what would be compiled.
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    assert torch.allclose(loss_and_gradients(compiled), loss_and_gradients(model), atol=1e-6)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_cached_logits_equal_uncached(dtype, tolerance):
    model, idx = small_gpt(block_size=150).to(dtype), random_ids(3, 150)
    whole = logits_of(model, idx)
    cache = [KVCache(150) for _ in model.blocks]
    for start, end in pairwise([0, 7, 8, 9, 20, 63, 64, 65, 66, 128, 129, 150]):  # steps, chunks
        logits, _ = model(idx[:, start:end], cache=cache)
        assert logits.shape == (3, 1, 65)
        assert (logits[:, 0] - whole[:, end - 1]).abs().max() < tolerance * whole.abs().max()


@torch.no_grad()
def test_greedy_generation_equals_the_loop_without_a_cache():
    model, idx = small_gpt(), random_ids(2, 5)
    expected = idx
    while expected.size(1) < 32:
        nxt = logits_of(model, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, nxt], dim=1)
    assert torch.equal(model.generate(idx, 27, temperature=0), expected)


@torch.no_grad()
def test_generation_past_block_size_reads_the_last_half_window_again():
    model, idx = small_gpt(), random_ids(1, 50)
    out = model.generate(idx, 40, temperature=0)
    assert out.shape == (1, 90) and torch.equal(out[:, :50], idx)
    assert out[0, 50] == logits_of(model, out[:, 18:50])[0, -1].argmax()  # the prompt's end
    for step in range(1, 40):  # then windows of 16 to 32 tokens
        start = 35 + 17 * ((step - 1) // 17)
        window = out[:, start : 50 + step]
        assert 16 <= window.size(1) <= 32
        assert out[0, 50 + step] == logits_of(model, window)[0, -1].argmax(), step


@pytest.mark.parametrize('block_size', [1, 2, 3])
def test_generation_works_in_the_smallest_contexts(block_size):
    model = small_gpt(block_size=block_size)
    assert model.generate(random_ids(2, 1), 10).shape == (2, 11)


def test_stream_yields_what_generate_returns():
    model, idx = small_gpt(), random_ids(3, 4)
    seed = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    whole = model.generate(idx, 60, 0.9, top_k=20, top_p=0.9, generator=seed())
    pieces = list(stream(model, idx, 60, 0.9, top_k=20, top_p=0.9, generator=seed()))
    assert [p.shape for p in pieces] == [(3, 1)] * 60
    assert torch.equal(torch.cat([idx, *pieces], dim=1), whole)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize('cls', [GPT, Bigram])
def test_padded_ids_are_never_sampled(cls):
    model = make(cls, vocab_size=128)
    assert model.generate(random_ids(8, 1), 200, temperature=5.0, vocab_size=65).max() < 65
    assert model.generate(random_ids(8, 1), 200, temperature=5.0).max() >= 65


def test_sampling_choices():
    order = [2, 0, 3, 1]  # of the tokens from the likeliest to the least
    logits = torch.log(torch.tensor([[0.3, 0.05, 0.5, 0.15]])).repeat(4000, 1)
    def count(**kw):
        return torch.bincount(sample_from(logits, **kw).flatten(), minlength=4)[order]

    torch.manual_seed(0)
    assert torch.allclose(count() / 4000, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    assert torch.allclose(count(top_k=2) / 4000, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert count(top_p=0.81).tolist()[3] == 0 and count(top_p=0.81)[2] > 0
    both = count(top_k=3, top_p=0.6) / 4000  # 0.5, 0.3, 0.15 of 0.95, then 0.6 of that
    assert torch.allclose(both, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert count(top_p=0.5).tolist() == [4000, 0, 0, 0]
    assert count(top_p=0.01).tolist() == [4000, 0, 0, 0]
    for least in (0, 1e-40):
        assert count(temperature=least).tolist() == [4000, 0, 0, 0]
    assert (count(temperature=0.1)[0] > 3900) and count(temperature=100.0).min() > 800
    for wrong in [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)]:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample_from(logits, **wrong)


@pytest.mark.parametrize('cls', [GPT, Bigram])
def test_an_untrained_model_knows_nothing(cls):
    torch.manual_seed(0)
    _, loss = make(cls)(random_ids(16, 32), random_ids(16, 32).flip(1))
    assert abs(loss.item() - math.log(65)) < 0.05


def test_targets_of_minus_one_do_not_count():
    model, idx = small_gpt(), random_ids(1, 8)
    targets = idx.clone()
    targets[:, 4:] = -1
    assert torch.allclose(model(idx, targets)[1], model(idx[:, :4], idx[:, :4])[1])


@pytest.mark.parametrize('counted', ['most', 'none'])
def test_the_loss_in_chunks_is_the_loss(monkeypatch, counted):
    idx, targets = random_ids(3, 32), random_ids(3, 32)
    if counted == 'none':
        targets.fill_(-1)
    targets[0, 5:9] = -1
    losses, gradients = [], []
    for size in (math.inf, 10):
        monkeypatch.setattr('model.MAX_LOGITS', size)
        monkeypatch.setattr('model.CHUNK', 10)
        model = small_gpt()
        logits, loss = model(idx, targets, loss_only=True)
        loss.backward()
        assert logits is None and (loss == 0) == (counted == 'none')
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_one_batch_can_be_memorized():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**SMALL)), random_ids(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_init_follows_gpt2():
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            expected = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert abs(p.std().item() / expected - 1) < 0.1, name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith('weight')))), name


def test_parameter_counts_by_name():
    """In millions, as the papers round them."""
    expected = {
        'gpt2': 124.4, 'gpt2-medium': 354.8, 'gpt2-large': 774.0, 'gpt2-xl': 1557.6,
        'gpt3-125m': 125.2, 'gpt3-350m': 355.9, 'gpt3-760m': 760.3, 'gpt3-1.3b': 1315.7,
        'gpt3-2.7b': 2651.6, 'gpt3-6.7b': 6658.4, 'gpt3-13b': 12853.4, 'gpt3-175b': 174604.3,
    }
    assert expected.keys() == MODEL_SIZES.keys()
    for name, (n_layer, n_head, n_embd) in MODEL_SIZES.items():
        block_size = 2048 if name.startswith('gpt3') else 1024
        with torch.device('meta'):
            model = GPT(GPTConfig(block_size, 50257, n_layer, n_head, n_embd))
        assert round(model.num_params() / 1e6, 1) == expected[name]
        nominal = name.removeprefix('gpt3-')
        if nominal != name:
            billions = float(nominal[:-1]) * {'m': 1e6, 'b': 1e9}[nominal[-1]]
            assert abs(model.num_params() / billions - 1) < 0.03


def test_flops_per_token_of_gpt2():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    looked_up_or_norms = 1024 * 768 + 25 * 2 * 768
    assert runtime.flops_per_token(model, 1024) == (
        6 * (124_439_808 - looked_up_or_norms) + 12 * 12 * 768 * 1024)


@pytest.mark.parametrize('wrong, words', [
    (dict(n_embd=33), 'multiple of n_head=2'), (dict(n_layer=0), 'n_layer is 0'),
    (dict(n_head=-1), 'n_head'), (dict(vocab_size=0), 'vocab_size'),
    (dict(block_size=0), 'block_size'),
    (dict(dropout=1.0), 'dropout'), (dict(gelu='relu'), 'relu'), (dict(n_embd=32.0), '32.0'),
])
def test_impossible_shapes_are_refused_with_a_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        GPTConfig(**SMALL | wrong)
    assert '\n' not in str(error.value)


def test_a_context_too_long_is_refused():
    with pytest.raises(ValueError, match='33 tokens .* block_size=32'):
        small_gpt()(random_ids(1, 33))
