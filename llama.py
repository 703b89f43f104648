"""What changed since GPT-2: Llama's block, with the interface of `model.GPT`.

    python train.py config/train_wizard_llama.py

RMSNorm for LayerNorm, rotary for learned positions, SwiGLU for the GELU MLP, fewer heads of keys
and values, no biases: Touvron et al. 2023 (Llama 2), arXiv:2307.09288. Newer: norms on queries and
keys, and the optimizer in muon.py.
"""

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from model import (
    GPT, Bigram, BigramConfig, Embedding, GPTConfig, LanguageModel, Linear, attention, check_sizes,
    logits_and_loss, residual_std,
)


@dataclass
class LlamaConfig:
    """The shape of a Llama. Raises ValueError if the sizes don't fit together."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    n_kv_head: int | None = None  # heads of keys and values; None: n_head
    qk_norm: bool = True  # normalize queries and keys, as Qwen 3 does; False: as Llama
    head_size: int | None = None  # None: n_embd / n_head
    n_hidden: int | None = None  # width of the MLP; None: as many weights as GPT-2's MLP
    rope_theta: float = 10000.0  # the slowest pair turns once in about 2 pi * rope_theta positions
    norm_eps: float = 1e-5
    tied: bool = True  # one matrix reads tokens and predicts them, as in GPT-2; False: two

    def __post_init__(self):
        check_sizes(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        # Three matrices instead of two, so 8/3 of the width instead of 4; a multiple of 32.
        self.n_hidden = self.n_hidden or 32 * max(1, round(8 * self.n_embd / 3 / 32))
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head or self.head_size % 2:
            raise ValueError(f'n_head={self.n_head} must be a multiple of n_kv_head='
                             f'{self.n_kv_head}, and head_size={self.head_size} must be even')


def rotation_angles(positions, head_size, theta):
    """cos, and sin with a negative first half, for `rotate`: each (T, head_size); positions: (T,).

    Pair i of a head's numbers turns by position * theta^(-2 i / head_size), so that the product of
    a query and a key depends on their distance alone. RoFormer: Su et al. 2021, arXiv:2104.09864.
    """
    speed = theta ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angle = positions[:, None] * speed  # (T, head_size / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (a, b) = (x[i], x[i + head_size / 2]) into (a cos - b sin, b cos + a sin).

    x: (B, heads, T, head_size). The pairs are those of Hugging Face's Llama; Meta's are neighbors.
    """
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


class GroupedAttention(nn.Module):
    """Attention where n_head / n_kv_head heads of queries share one of keys and values.

    It makes the cache smaller: GQA, Ainslie et al. 2023, arXiv:2305.13245. With `qk_norm`, the
    products of queries and keys cannot grow without bound: Henry et al. 2020, arXiv:2010.04245.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.qkv_proj = Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_size, bias=False)
        self.o_proj = Linear(c.n_head * c.head_size, c.n_embd, False, residual_std(c))
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_size, c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_size, c.norm_eps)

    def forward(self, x, cos, sin, cache=None):
        """(B, T, n_embd) to the same shape. cos, sin: from `rotation_angles`."""
        B, T, _ = x.shape
        c = self.config
        heads = self.qkv_proj(x).view(B, T, -1, c.head_size).transpose(1, 2)
        # (B, n_head + 2 n_kv_head, T, head_size) -> three of (B, their heads, T, head_size)
        q, k, v = heads.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        if c.qk_norm:  # in float32, as the norms' weights are in training
            q = self.q_norm(q.to(self.q_norm.weight.dtype))
            k = self.k_norm(k.to(self.k_norm.weight.dtype))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        if c.n_kv_head < c.n_head:  # each head of keys and values serves a group of queries
            k = k.repeat_interleave(c.n_head // c.n_kv_head, dim=1)  # (B, n_head, S, head_size)
            v = v.repeat_interleave(c.n_head // c.n_kv_head, dim=1)  # (B, n_head, S, head_size)
        y = attention(q, k, v)  # (B, n_head, T, head_size)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """An MLP in which one projection gates another: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, False, residual_std(config))

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """x = x + attention(norm(x)), then x = x + MLP(norm(x)), as in GPT-2."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = GroupedAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)  # for small datasets; a Llama has none

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(LanguageModel):
    """Token embeddings, n_layer blocks, a norm, and logits over the tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            'embed_tokens': Embedding(config.vocab_size, config.n_embd),
            'layers': nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer)),
            'norm': nn.RMSNorm(config.n_embd, config.norm_eps),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self):
        return self.model.layers

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        """As `GPT.forward`."""
        c = self.config
        cos, sin = rotation_angles(self.positions(idx, cache), c.head_size, c.rope_theta)
        x = self.model.embed_tokens(idx)  # (B, T, n_embd)
        for layer, block in enumerate(self.model.layers):
            x = block(x, cos, sin, cache[layer] if cache else None)
        return logits_and_loss(self.model.norm(x), self.lm_head, targets, loss_only)


# The choices of train.py's setting `model`: a class and its config. Add your own here.
MODELS = {'gpt': (GPT, GPTConfig), 'llama': (Llama, LlamaConfig), 'bigram': (Bigram, BigramConfig)}


def class_and_config(settings, model_args):
    """Class and config of a model: `model_args`, completed from `settings`.

    Raises ValueError, KeyError or TypeError if there can be no such model.
    """
    cls, config_cls = MODELS[settings.get('model', 'gpt')]
    names = {field.name for field in fields(config_cls)} & settings.keys()
    return cls, config_cls(**{name: settings[name] for name in names} | model_args)
