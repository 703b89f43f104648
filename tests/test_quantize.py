"""8-bit weights, compared with the original ones."""

import copy

import numpy as np
import pytest
import torch
from conftest import TINY

import sample
import train
from checkpoint import load_model
from model import GPT, Bigram, GPTConfig
from quantize import Int8, quantize_int8


def size(model):
    """Bytes of weights, shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_gpt2_takes_at_most_0_30_of_float32():
    model = GPT(GPTConfig(n_layer=1))  # with more layers, the part that is not quantized is smaller
    float32 = size(model)
    assert size(quantize_int8(model.to(torch.bfloat16))) < 0.30 * float32


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('B, T', [(1, 1), (2, 2), (3, 16)])
@pytest.mark.parametrize('n_embd', [64, 40])  # 40: where the kernel for int8 rows can't be used
@torch.no_grad()
def test_logits_stay_near(dtype, B, T, n_embd):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=n_embd))
    model.to(dtype)
    model.transformer.h[0].attn.c_attn.bias.data.normal_()
    idx = torch.randint(65, (B, T))
    plain, _ = model(idx, idx)
    quantized, _ = quantize_int8(copy.deepcopy(model))(idx, idx)
    assert quantized.dtype == dtype
    assert (plain - quantized).norm() < 0.03 * plain.norm()


def test_the_loss_of_a_trained_model_stays_within_0_01(tiny, capsys):
    cfg = train.TrainConfig(**TINY | dict(
        max_iters=260, eval_interval=260, n_embd=64, batch_size=16, log_interval=100))
    train.train(cfg)
    ids = torch.from_numpy(np.fromfile('data/tiny/val.bin', '<u2').astype(np.int64))
    x, y = ids[:1984].view(-1, 16), ids[1:1985].view(-1, 16)
    plain, quantized = load_model('out')[0], load_model('out')[0]
    with torch.no_grad():
        losses = [model(x, y)[1].item() for model in (plain, quantize_int8(quantized))]
    assert losses[0] < 2.6 and 0 < abs(losses[0] - losses[1]) < 0.01
    capsys.readouterr()
    sample.main(['--quantize=int8', '--start=T', '--max_new_tokens=20', '--num_samples=1'])
    assert len(capsys.readouterr().out) == 1 + 20 + 1  # the prompt, the text, a line feed


def test_a_bigram_in_8_bits():
    torch.manual_seed(0)
    model = Bigram(GPTConfig(vocab_size=65)).bfloat16()
    model.table.weight.data.normal_()
    idx = torch.randint(65, (2, 9))
    plain = model(idx)[0]
    assert 0 < (quantize_int8(model)(idx)[0] - plain).norm() < 0.05 * plain.norm()


def test_the_scale_of_a_row_loses_nothing_to_rounding():
    """It is rounded to bf16 before the row is divided by it, so that the row's gain is right."""
    torch.manual_seed(0)
    weight = torch.randn(500, 256)
    layer = Int8(weight)
    assert torch.equal(layer.scale, layer.scale.bfloat16().float())
    restored = layer.rows * layer.scale[:, None]
    gain = (restored * weight).sum(1) / weight.square().sum(1)
    assert (gain - 1).abs().mean() < 0.0004  # 0.0008 if the scale is rounded afterwards


def test_a_compiled_model_does_without_the_kernel_for_int8(monkeypatch):
    """torch.compile cannot lower it on a CPU."""
    monkeypatch.setattr(torch, '_weight_int8pack_mm', lambda *_: pytest.fail('was called'))
    layer = Int8(torch.randn(8, 32)).eval()
    x = torch.randn(1, 32)
    y = torch.compile(layer, backend='eager', fullgraph=True)(x)
    assert torch.allclose(y, x @ layer.weight.T, atol=1e-5)
