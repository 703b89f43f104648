"""Weights in 8 bits instead of 32: a quarter of the memory, and of the reading for each token.

    python sample.py --out_dir=out-wizard-char --quantize=int8

Every row of a matrix is stored as whole numbers from -127 to 127 and one scale, the row's largest
magnitude over 127 ("absmax": Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, without the
outliers). Activations keep their dtype. For writing only: such a model cannot be trained.
"""

import torch
from torch import nn
from torch.nn import functional as F

from console import UserError
from model import GPT


class Int8Matrix(nn.Module):
    """A quantized weight, rows * scale: `rows` (out, in) in int8, `scale` (out,)."""

    def __init__(self, weight, dtype):
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        rows = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.register_buffer('rows', rows)
        self.register_buffer('scale', scale.to(dtype))


class Int8Linear(nn.Module):
    """nn.Linear over an Int8Matrix."""

    def __init__(self, matrix, bias):
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, x):
        """(..., in) to (..., out), in the dtype of x."""
        rows, scale = self.matrix.rows, self.matrix.scale
        flat = x.reshape(-1, x.size(-1))
        if flat.size(0) <= 4 and x.dtype == torch.bfloat16 and x.device.type in ('cpu', 'cuda'):
            # Reads the int8 rows as they are, which is what takes the time for a few tokens; from
            # some 8 tokens on a product in bf16 is faster, even if the rows are converted first.
            y = torch._weight_int8pack_mm(flat, rows, scale)
        else:
            y = F.linear(flat, rows.to(x.dtype)) * scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """nn.Embedding over an Int8Matrix, the same one that predicts."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, idx):
        """(B, T) ids to (B, T, n_embd)."""
        return self.matrix.rows[idx] * self.matrix.scale[idx, None]


def quantize_int8(model):
    """Replace all matrices of a GPT by 8-bit ones, in place, and return it.

    Raises UserError for a model without them, such as the bigram.
    """
    if not isinstance(model, GPT):
        raise UserError(
            f'a {type(model).__name__} has no matrices to quantize: leave out --quantize'
        )
    dtype = model.lm_head.weight.dtype
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child is not model.lm_head:
                setattr(module, name, Int8Linear(Int8Matrix(child.weight, dtype), child.bias))
    tied = Int8Matrix(model.lm_head.weight, dtype)
    model.lm_head = Int8Linear(tied, None)
    model.transformer.wte = Int8Embedding(tied)
    return model
