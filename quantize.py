"""Weights in 8 bits, or in other forms that a CPU reads faster, to sample with.

    python sample.py --out_dir=out-wizard-char --quantize=int8

In 8 bits, weights take a quarter of float32's memory, and of the reading for each token. Every row
of a matrix is stored as whole numbers from -127 to 127 and one scale, the row's largest magnitude
over 127 ("absmax": Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, without the outliers).
Activations keep their dtype. Neither form can be trained.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F


class Int8(nn.Module):
    """nn.Linear, nn.Embedding, or both in one where they share a weight, stored as rows * scale.

    `rows` is (out, in) in int8, `scale` is (out,), rounded to bf16 before the rows are divided.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        scale = (weight.abs().amax(dim=1).float().clamp(min=1e-12) / 127).bfloat16().float()
        self.register_buffer('rows', (weight / scale[:, None]).round_().clamp_(-127, 127).char())
        self.register_buffer('scale', scale.to(weight.dtype))
        self.bias = bias

    @property
    def weight(self):  # for code that reads it
        return self.rows * self.scale[:, None]

    def forward(self, x):
        """Ids (B, T) to (B, T, in), as an embedding; else (..., in) to (..., out), linear."""
        if not x.is_floating_point():
            return self.rows[x] * self.scale[x, None]
        if (x.device.type == 'cpu' and x.numel() <= 16 * x.size(-1) and x.size(-1) % 32 == 0
                and not torch.compiler.is_compiling()):
            # For up to 16 tokens most of the time is spent on reading the weight. This kernel
            # reads the rows as they are, in whole blocks of 32.
            flat = x.reshape(-1, x.size(-1)).bfloat16()
            y = torch._weight_int8pack_mm(flat, self.rows, self.scale.bfloat16())
            y = y.view(*x.shape[:-1], -1).to(x.dtype)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.rows.to(x.dtype) * self.scale[:, None].to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """nn.Linear with its weight in the order that oneDNN's bf16 product on a CPU reads.

    nn.Linear rearranges its weight at every call, which is slower than the product for a few
    tokens.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.bias = bias
        self.packed = (torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16()),
                       bias if bias is None else bias.bfloat16())

    @property
    def weight(self):  # for code that reads it
        return self.packed[0].to_dense().float()

    def forward(self, x):
        """(..., in) to (..., out), in the dtype of x."""
        y = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), *self.packed, 'none', [], '')
        return y.to(x.dtype)


class FewTokensInBf16(nn.Module):
    """nn.Linear in float32, with a copy of its weight in bf16 for up to 4 tokens.

    So few tokens take as long as reading the weight does, on a CPU without bf16 products too.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.few = weight.detach().bfloat16(), bias if bias is None else bias.detach().bfloat16()

    def forward(self, x):
        """(..., in) to (..., out), in the dtype of x."""
        if x.numel() <= 4 * x.size(-1):
            return F.linear(x.bfloat16(), *self.few).to(x.dtype)
        return F.linear(x, self.weight, self.bias)


def replace_layers(model, kinds, make):
    """Put `make(weight, bias)` in the place of every layer of these kinds; one for each weight.

    A layer with a `forward` of its own stays as it is.
    """
    made, known = {}, (nn.Linear.forward, nn.Embedding.forward)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, kinds) and type(layer).forward in known:
            if layer.weight not in made:
                made[layer.weight] = make(layer.weight, getattr(layer, 'bias', None))
            model.set_submodule(name, made[layer.weight])
    return model


def quantize_int8(model):
    """Replace all matrices of a model by 8-bit ones, in place; returns it."""
    return replace_layers(model, (nn.Linear, nn.Embedding), Int8)


def prepare_for_sampling(model, device, dtype, quantize='', compiled=False, exact=False):
    """Bring a model, in place, into its fastest form to sample; returns the context to call it in.

    Linear layers have their weights in `dtype`; everything else stays in float32, as in training.
    exact: float32 is not replaced by bf16 where that is faster.
    """
    model.to(device).eval()
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    onednn = torch.ops.mkldnn
    if quantize == 'int8':
        quantize_int8(model)
        return amp if device.type == 'cuda' else nullcontext()
    if device.type == 'cpu' and dtype == torch.bfloat16 and not compiled and (
            hasattr(onednn, '_linear_pointwise') and onednn._is_mkldnn_bf16_supported()):
        replace_layers(model, nn.Linear, PackedLinear)
        return nullcontext()
    if device.type == 'cpu' and dtype == torch.float32 and not (compiled or exact):
        replace_layers(model, nn.Linear, FewTokensInBf16)
        return nullcontext()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
    return amp
