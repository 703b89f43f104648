"""Eight-bit weights against the ones they came from."""

import copy

import pytest
import torch
from conftest import TINY, script

import console
import runtime
import train
from model import GPT, Bigram, GPTConfig, build_model, load_checkpoint
from quantize import quantize_int8


def size(model):
    """Bytes of weights, shared ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_gpt2_takes_at_most_0_30_of_float32():
    model = GPT(GPTConfig(n_layer=3))  # the share is the same for 12 layers, within 0.01
    float32 = size(model)
    assert size(quantize_int8(model.to(torch.bfloat16))) < 0.30 * float32


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('B, T', [(1, 1), (2, 2), (3, 16)])
@torch.no_grad()
def test_logits_stay_near(dtype, B, T):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=64)).to(dtype)
    model.transformer.h[0].attn.c_attn.bias.data.normal_()
    idx = torch.randint(65, (B, T))
    plain, _ = model(idx, idx)
    quantized, _ = quantize_int8(copy.deepcopy(model))(idx, idx)
    assert quantized.dtype == dtype
    assert (plain - quantized).norm() < 0.03 * plain.norm()


def test_the_loss_of_a_trained_model_stays_within_0_01(tiny):
    cfg = train.TrainConfig(**TINY | dict(
        max_iters=300, eval_interval=300, eval_iters=0, n_embd=64, batch_size=16,
        log_interval=100))
    train.train(cfg)
    cpu = torch.device('cpu')
    split = train.Dataset(cfg, train.Ranks()).splits['val']
    losses = [
        train.evaluate(model, split, cfg, train.Ranks(), cpu, runtime.autocast(cpu, torch.float32))
        for model in (build_model(load_checkpoint('out')),
                      quantize_int8(build_model(load_checkpoint('out'))))
    ]
    assert losses[0] < 2.6 and 0 < abs(losses[0] - losses[1]) < 0.01
    sampled = script('sample.py', '--quantize=int8', '--start=T', '--max_new_tokens=20')
    assert sampled.returncode == 0 and len(sampled.stdout) > 20, sampled.stderr


def test_a_bigram_is_refused():
    with pytest.raises(console.UserError, match='Bigram'):
        quantize_int8(Bigram(GPTConfig(vocab_size=65)))
