"""What changed since GPT-2: Llama's block, with the interface of `model.GPT`.

    python train.py config/train_wizard_llama.py

RMSNorm for LayerNorm, rotary for learned positions, SwiGLU for the GELU MLP, fewer heads for keys
and values, no biases: Touvron et al. 2023 (Llama 2), arXiv:2307.09288. Newer than that are a norm
on queries and keys, and the optimizer Muon, below.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from model import GPTConfig, LanguageModel, attention, logits_and_loss


@dataclass
class LlamaConfig(GPTConfig):
    """The shape of a Llama: `GPTConfig` and what is new. Raises ValueError as that does."""

    bias: bool = False
    n_kv_head: int | None = None  # heads of keys and values; none means n_head
    qk_norm: bool = True  # normalize queries and keys; Llama itself doesn't, Qwen 3 does
    head_size: int | None = None  # none means n_embd / n_head
    n_hidden: int | None = None  # width inside the MLP; none: as many weights as GPT-2's MLP has
    rope_theta: float = 10000.0  # the slowest pair turns once in up to 2 pi times so many
    norm_eps: float = 1e-5
    tied: bool = True  # one matrix reads tokens and predicts them, as in GPT-2; else two

    def __post_init__(self):
        super().__post_init__()
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        # Three matrices instead of two, so 8/3 of the width instead of 4; a multiple of 32.
        self.n_hidden = self.n_hidden or 32 * max(1, round(8 * self.n_embd / 3 / 32))
        if self.bias or self.n_kv_head < 1 or self.n_head % self.n_kv_head or self.head_size % 2:
            raise ValueError(f'bias={self.bias}, n_head={self.n_head}, n_kv_head={self.n_kv_head} '
                             f'and head_size={self.head_size}: a Llama has no bias, n_head must '
                             'be a multiple of n_kv_head, and head_size even')


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight: LayerNorm without the mean and the bias.

    The mean of squares is over the last dimension. Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    def forward(self, x):
        return Normalize.apply(x, self.weight, self.eps)


class Normalize(torch.autograd.Function):
    """What `RMSNorm` computes, in float32: (B, ..., width) to the same, in the dtype of weight.

    The gradient is written out: on a CPU torch's own takes about as long as a matrix product.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.float()
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
        y = x * scale
        ctx.save_for_backward(y, scale, weight)
        return (y * weight).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, scale, weight = ctx.saved_tensors
        grad = grad.float()
        grad_weight = (grad * y).sum(0).sum_to_size(weight.shape)  # B first, which is faster
        grad = grad * weight
        along = (grad * y).mean(dim=-1, keepdim=True)  # the part that would change the length
        return grad.addcmul_(y, along, value=-1).mul_(scale), grad_weight, None


def rotation(positions, head_size, theta):
    """What `rotate` takes, from positions (T,): (cos, cos), (-sin, sin), each (T, head_size).

    Pair i of a head's numbers turns by position * theta^(-2 i / head_size), so that the product of
    a query and a key depends only on how far apart they are. It replaces learned positions.
    RoFormer: Su et al. 2021, arXiv:2104.09864.
    """
    speed = theta ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angle = positions[:, None] * speed  # (T, head_size / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Turn each pair (a, b) = (x[i], x[i + head_size / 2]) into (a cos - b sin, b cos + a sin).

    (B, heads, T, head_size) to the same shape. These are Hugging Face's pairs, not neighbours.
    """
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).to(x.dtype)


class GroupedAttention(nn.Module):
    """Attention where n_head / n_kv_head heads of queries share one of keys and values.

    That makes the cache smaller: GQA, Ainslie et al. 2023, arXiv:2305.13245. With `qk_norm`,
    queries and keys are normalized, so that their products cannot grow without bound: Henry et al.
    2020, arXiv:2010.04245; Qwen 3, arXiv:2505.09388.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.qkv_proj = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_size, bias=False)
        self.o_proj = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_size, c.norm_eps)
            self.k_norm = RMSNorm(c.head_size, c.norm_eps)

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        c = self.config
        heads = self.qkv_proj(x).view(B, T, -1, c.head_size)  # of queries, keys, values
        heads = heads.transpose(1, 2)  # (B, n_head + 2 n_kv_head, T, head_size)
        q, k, v = heads.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        # In float32 and contiguous, since norm and rotation are fastest so on a CPU.
        q, k = (t.to(torch.float32, memory_format=torch.contiguous_format) for t in (q, k))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(t, cos, sin).to(v.dtype) for t in (q, k))
        if cache is not None:
            k, v = cache.append(k, v)
        if c.n_kv_head < c.n_head:  # each head of keys and values serves a group of queries
            k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for t in (k, v))
        y = attention(q, k, v).to(q.dtype)  # (B, n_head, T, head_size)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """An MLP in which one projection decides how much of another passes, instead of a GELU.

    Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """As GPT-2's block: x + attention, then x + MLP, each of the normalized stream x."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = GroupedAttention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)  # against overfitting; a Llama itself has none

    def forward(self, x, cos, sin, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(LanguageModel):
    """Token embeddings, n_layer blocks, a norm, and logits over the tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            'embed_tokens': nn.Embedding(config.vocab_size, config.n_embd),
            'layers': nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer)),
            'norm': RMSNorm(config.n_embd, config.norm_eps),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @property
    def blocks(self):
        return self.model.layers

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        """As `GPT.forward`."""
        positions = self.positions(idx, cache)
        cos, sin = rotation(positions, self.config.head_size, self.config.rope_theta)
        x = self.model.embed_tokens(idx)  # (B, T, n_embd)
        for layer, block in enumerate(self.model.layers):
            x = block(x, cos, sin, cache[layer] if cache else None)
        return logits_and_loss(self.model.norm(x), self.lm_head, targets, loss_only)


# --- the optimizer


class Muon(torch.optim.Optimizer):
    """For matrices: the running mean of the gradient, made orthogonal, is the update.

    A gradient has a few strong directions and many weak ones. Made orthogonal, all are equally
    strong, so that rare ones are learnt as well: Jordan et al. 2024, "Muon: an optimizer for
    hidden layers in neural networks". With weight decay: Liu et al. 2025, arXiv:2502.16982.

    A tall matrix is taken in square pieces and a rest, which keeps queries, keys and values apart,
    n_embd rows each as a rule, and Jordan's factor for it, sqrt(rows / columns), is then 1. Pieces
    of one shape are multiplied together.

    Settings as torch.optim.Muon's: lr, momentum, weight_decay, ns_steps; and bf16: whether to
    multiply in it, since a direction needs few digits.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            pieces = defaultdict(list)  # (weights, gradient ahead) by shape
            for p in group['params']:
                if p not in self.state:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                mean = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
                ahead = p.grad.lerp(mean, group['momentum'])  # Nesterov: one step further
                ahead = ahead.bfloat16() if group['bf16'] else ahead
                p.mul_(1 - group['lr'] * group['weight_decay'])
                for piece, gradient in zip(p.split(p.size(1)), ahead.split(p.size(1))):
                    pieces[piece.shape].append((piece, gradient))
            for same_shape in pieces.values():
                weights, gradients = zip(*same_shape)
                updates = orthogonal(torch.stack(gradients), group['ns_steps'])
                torch._foreach_sub_(weights, updates.unbind(), alpha=group['lr'])


# Newton-Schulz's polynomials s -> a s + b s^3 + c s^5, one a step. Each brings the interval that
# the step before left, at first 0.005 to 1, as near to 1 as any (a, b, c) can, with room of 2 %
# for rounding: the Polar Express, Amsel et al. 2025, arXiv:2505.16932.
POLYNOMIALS = (
    (8.1400, -23.0368, 16.3967), (3.8518, -2.7640, 0.5084), (3.1586, -2.2837, 0.4577),
    (2.1981, -1.5352, 0.3822), (1.8668, -1.2229, 0.3564),
)


def orthogonal(matrices, steps):
    """(N, rows, columns), rows <= columns, to the same shape, singular values brought near 1.

    Products alone apply a polynomial to all singular values at once. 3 steps take each s from
    0.005 to 1 into 0.48 to 1.52, 5 steps to 1 within a thousandth; smaller ones stay smaller.
    """
    x = matrices
    for step in range(steps):
        a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
        gram = x @ x.mT  # (N, rows, rows); its singular values are the squares of x's
        if step == 0:  # a matrix's norm is at least its largest singular value: all s <= 1
            norm = torch.linalg.matrix_norm(gram, keepdim=True) + 1e-14
            x, gram = x / norm.sqrt(), gram / norm
        # baddbmm(m, p, q, beta=b, alpha=c) is b m + c p q
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
