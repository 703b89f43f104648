"""Weights in 8 bits, or packed for a CPU's bf16 products, to sample with.

    python sample.py --out_dir=out-wizard-char --quantize=int8

In 8 bits, weights take a quarter of float32's memory, and of the reading for each token. Every row
of a matrix is stored as whole numbers from -127 to 127 and one scale, the row's largest magnitude
over 127 ("absmax": Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, without the outliers).
Activations keep their dtype. Neither form can be trained.
"""

import torch
from torch import nn
from torch.nn import functional as F

from console import UsageError


class Int8(nn.Module):
    """nn.Linear, nn.Embedding, or both in one where they share a weight, stored as rows * scale.

    `rows` is (out, in) in int8, `scale` is (out,).
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        scale = weight.abs().amax(dim=1).float().clamp(min=1e-12) / 127
        self.register_buffer('rows', (weight / scale[:, None]).round_().to(torch.int8))
        self.register_buffer('scale', scale.to(weight.dtype))
        self.bias = bias

    def forward(self, x):
        """Ids (B, T) to (B, T, in), as an embedding; else (..., in) to (..., out), linear."""
        if not x.is_floating_point():
            return self.rows[x] * self.scale[x, None]
        flat = x.reshape(-1, x.size(-1))
        few = {'cpu': 16, 'cuda': 4}.get(x.device.type, 0) if x.dtype == torch.bfloat16 else 0
        if flat.size(0) <= few and flat.size(1) % 32 == 0:  # it reads whole blocks of 32
            # Reads the int8 rows as they are, which is what takes the time for a few tokens; for
            # many, a product in bf16 is faster, even if the rows are converted first.
            y = torch._weight_int8pack_mm(flat.contiguous(), self.rows, self.scale)
            y = y.view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.rows.to(x.dtype) * self.scale[:, None], self.bias)


class PackedLinear(nn.Module):
    """nn.Linear with its weight in the order that oneDNN's bf16 product on a CPU reads.

    nn.Linear rearranges its weight at every call, which takes longer than the product for a few
    tokens.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach()), bias

    def forward(self, x):
        """(..., in) to (..., out), both bf16."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


def replace_layers(model, kinds, make):
    """Put `make(weight, bias)` in the place of every layer of these kinds; one for each weight."""
    made = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, kinds):
            if layer.weight not in made:
                made[layer.weight] = make(layer.weight, getattr(layer, 'bias', None))
            model.set_submodule(name, made[layer.weight])
    return model


def quantize_int8(model):
    """Replace all matrices of a model by 8-bit ones, in place; returns it."""
    return replace_layers(model, (nn.Linear, nn.Embedding), Int8)


def prepare_for_sampling(model, device, dtype, quantize='', compiled=False):
    """Bring a model, in place, into its fastest form to sample. Raises UsageError."""
    if quantize not in ('', 'int8'):
        raise UsageError(f'quantize={quantize!r} must be int8, or be left out')
    model.to(device, dtype).eval()
    if quantize == 'int8':
        return quantize_int8(model)
    if device.type == 'cpu' and dtype == torch.bfloat16 and not compiled:  # that packs by itself
        onednn = torch.ops.mkldnn
        if hasattr(onednn, '_linear_pointwise') and onednn._is_mkldnn_bf16_supported():
            replace_layers(model, nn.Linear, PackedLinear)
    return model
