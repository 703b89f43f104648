"""Devices and processes: precision, compilation, torchrun, sharding."""

import contextlib
import ctypes
import gc
import hashlib
import os
import socket
from datetime import timedelta
from functools import partial
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from console import Progress, UsageError, UserError, user_errors

# --- device and precision


def device_and_dtype(cfg):
    """The torch device and dtype of a run; each process has a GPU of its own. Raises UsageError."""
    name = cfg.device
    if name == 'auto':
        name = torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    try:
        device = torch.device(name)
        if device.type == 'cuda' and Ranks().world_size > 1:
            device = torch.device('cuda', Ranks().local_rank)
        torch.empty(0, device=device).cpu()  # fails on the device meta, for example
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f'device={cfg.device!r} is not on this machine ({shorten(str(error), 80)}'
                         '): choose another, for example --device=cpu') from None
    names = ['auto', 'float32', 'bfloat16'] + ['float16'] * (device.type != 'cpu')
    if cfg.dtype not in names:
        raise UsageError(f'dtype={cfg.dtype!r} must be one of {", ".join(names)} on {device}')
    return device, best_dtype(device) if cfg.dtype == 'auto' else getattr(torch, cfg.dtype)


def best_dtype(device):
    """The best torch dtype that the hardware supports natively."""
    if device.type == 'cuda':
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == 'xpu':
        native = torch.xpu.is_bf16_supported()
    else:  # before torch 2.10 the processor's instructions can't be asked for
        has = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
        native = any(has.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16'))
    return torch.bfloat16 if native else torch.float32


def set_speed_options(shard=False):
    """Settings of the whole process that make training faster: for a script's `main`."""
    torch.set_float32_matmul_precision('high')  # TF32 on CUDA where a product is float32
    gc.freeze()  # what is imported stays: searching it for garbage takes a tenth of a second
    # glibc returns large freed blocks to the kernel, and gets them again, zeroed, in the next step.
    # Keeping them trains faster; but shards, gathered and freed, would fragment what is kept.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 16 if shard else 1 << 30)  # M_MMAP_THRESHOLD: smaller blocks are kept
        mallopt(-1, 1 << 17 if shard else (1 << 31) - 1)  # M_TRIM_THRESHOLD: free bytes to keep


def is_out_of_memory(error):
    """Whether an exception of torch's or numpy's means a lack of memory."""
    signs = ('out of memory', "can't allocate memory", 'not enough memory: you tried',
             'CUBLAS_STATUS_ALLOC_FAILED', 'array is too big')
    types = torch.OutOfMemoryError, MemoryError
    return isinstance(error, types) or any(sign in str(error) for sign in signs)


def out_of_memory(remedy):
    """Context manager: report a lack of memory as a UserError that ends with `remedy`."""
    return user_errors((RuntimeError, MemoryError, ValueError), 'not enough memory', remedy,
                       is_out_of_memory)


# Peak TFLOP/s in 16 bits, dense, from the vendors' datasheets, by a card's whole name: a MIG slice
# has a longer one.
PEAK_TFLOPS = {
    'NVIDIA B200': 2250, 'NVIDIA H200': 989, 'NVIDIA GH200 480GB': 989,
    'NVIDIA H100 80GB HBM3': 989, 'NVIDIA H100 NVL': 835, 'NVIDIA H100 PCIe': 756,
    'NVIDIA A100-SXM4-80GB': 312, 'NVIDIA A100-SXM4-40GB': 312, 'NVIDIA A100 80GB PCIe': 312,
    'NVIDIA A100-PCIE-40GB': 312, 'NVIDIA L40S': 362, 'NVIDIA L4': 121, 'NVIDIA A10G': 70,
    'NVIDIA RTX A6000': 155, 'Tesla V100-SXM2-16GB': 125, 'Tesla V100-SXM2-32GB': 125,
    'Tesla V100-PCIE-16GB': 112, 'Tesla V100-PCIE-32GB': 112, 'Tesla T4': 65,
    'NVIDIA GeForce RTX 5090': 209, 'NVIDIA GeForce RTX 4090': 165, 'NVIDIA GeForce RTX 3090': 71,
}


def flops_per_token(model, block_size):
    """Floating-point operations to train on one token of a window.

    6 for each parameter of a Linear and 12 n_layer n_embd T for attention: Chowdhery et al. 2022
    (PaLM), arXiv:2204.02311, appendix B.
    """
    weights = sum(p.numel() for module in model.modules() if isinstance(module, nn.Linear)
                  for p in module.parameters())
    c = model.config
    has_heads = hasattr(c, 'n_head')  # a Bigram has none
    width = c.n_head * getattr(c, 'head_size', c.n_embd // c.n_head) if has_heads else 0
    return 6 * weights + 12 * len(model.blocks) * width * block_size


def peak_speed(model, cfg, ranks, device, dtype):
    """Tokens/s at the devices' peak, or 0 if that is not known. MFU is the fraction in use."""
    tflops = cfg.peak_tflops
    if not tflops and device.type == 'cuda' and dtype != torch.float32:
        tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name(device), 0)
    return 1e12 * tflops * ranks.world_size / (flops_per_token(model, cfg.block_size) or 1)


# --- many processes


JOIN_TIMEOUT = timedelta(minutes=30)  # the longest wait for another process


class Ranks:
    """This process's rank, and local_rank on its machine, from torchrun's variables; alone, 0 of 1.

    Raises UserError if a variable is missing or wrong.
    """

    def __init__(self):
        alone = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': 1}
        found = {name: os.environ.get(name) for name in alone}
        with user_errors((ValueError, TypeError), f'the environment has {found}',
                         'set all three, as torchrun does, or none'):
            found = alone if set(found.values()) == {None} else found
            self.rank, self.local_rank, self.world_size = map(int, found.values())
            if not 0 <= self.rank < self.world_size:
                raise ValueError('RANK must be from 0 to WORLD_SIZE - 1')
        self.is_main = self.rank == 0

    @contextlib.contextmanager
    def joined(self, device, backend):
        """Context manager: the process group exists, with a backend that fits the device."""
        if self.world_size == 1:
            yield
            return
        if backend in ('auto', 'nccl'):  # gloo is for tensors on the CPU
            backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        with user_errors((dist.DistError, RuntimeError, ValueError, OSError),
                         f'not all {self.world_size} processes came to MASTER_ADDR='
                         f'{os.environ.get("MASTER_ADDR")}', 'start all of them by torchrun'):
            dist.init_process_group(backend, timeout=JOIN_TIMEOUT)
        yield
        dist.destroy_process_group()  # not after an exception: it would wait for the others

    def sum(self, tensor):
        """`tensor`, summed over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether `flag` is true on any rank. A tensor on the CPU: nobody waits for a GPU."""
        return bool(self.sum(torch.tensor(float(flag))))

    def wait(self):
        """Return when all ranks have come here."""
        self.any(False)

    def agree(self, name, value):
        """Raise UserError unless `value` is the same on all ranks: machines may share no disk."""
        values = [(value, socket.gethostname())] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, values[0])
        for other, host in values:
            if other != values[0][0]:
                raise UserError(f'{name} is {other} on {host}, but {" on ".join(values[0])}: copy '
                                'it from the right machine to the others')

    def agree_on_file(self, path):
        """Whether the file `path` exists. Raises UserError unless it is the same on all ranks."""
        found = 'missing'
        if os.path.isfile(path):
            with open(path, 'rb') as file:  # a .pt ends with the check sums of its contents
                file.seek(max(0, os.path.getsize(path) - (1 << 20)))
                found = f'a file of digest {hashlib.sha256(file.read()).hexdigest()[:12]}'
        self.agree(path, found)
        return found != 'missing'

    def from_main(self, value):
        """Rank 0's `value`, on all ranks."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]


def wrap(raw, cfg, ranks, device, amp, split):
    """The model as training calls it: compiled if asked for, gradients averaged over the ranks.

    The first call of a compiled model is here, since it is the one that can fail.
    """
    model = raw
    if cfg.recompute:  # a block's activations are computed again when its gradient needs them
        for block in dict.fromkeys(raw.blocks):  # each once, if some are the same
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if cfg.compile or (cfg.compile is None and device.type == 'cuda'):
        try:
            model = torch.compile(raw)
            with amp:
                x, y = split.batch(np.zeros(cfg.batch_size, int), cfg.block_size, device)
                model(x, y, loss_only=True)[1].backward()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            Progress(ranks.is_main).print_line(
                f'torch.compile failed ({shorten(repr(error), 200)}): continuing without it; '
                '--compile=false skips this try')
            model = raw
        raw.zero_grad()
    if ranks.world_size == 1 or cfg.shard:  # a sharded model averages by itself
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def sync_gradients(model, sync):
    """Set whether the next backward pass averages gradients over the ranks."""
    if is_sharded(model):
        model.set_requires_gradient_sync(sync)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync


def is_matrix(p):
    """Whether a weight is a matrix, or several: not a bias, a norm, or a number for each head."""
    return p.dim() >= 2 and min(p.shape[-2:]) > 1


def sync_buffers(model):
    """Give all ranks rank 0's buffers, which a checkpoint contains."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


# --- sharding


def new_model(cls, config, weights, device, dtype=None, shard=False, seed=0):
    """The model `cls(config)` on `device`, with `weights`; None: initialized from `seed`.

    A seed gives the same numbers on every device, sharded or not. shard: each rank keeps only its
    part of each weight, gradient and moment (ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054), and
    only rank 0 needs `weights`. Raises UserError if they don't fit.
    """
    model = None
    if not shard or dist.get_rank() == 0:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = cls(config)
        if weights is not None:
            own = model.state_dict()
            weights = {name: weight for name, weight in weights.items()  # without nanoGPT's masks
                       if name in own or not name.endswith('.attn.bias')}
            with user_errors(RuntimeError, 'the weights do not fit their model',
                             'use others, or undo the edit of the model'):
                model.load_state_dict(weights)
    return spread(cls, config, model, device, dtype) if shard else model.to(device)


def spread(cls, config, whole, device, dtype):
    """Rank 0's model `whole`, `cls(config)`, spread over the ranks; the others pass None.

    The matrices of a block are gathered in `dtype` when the block computes. Norms, embeddings and
    all else belong to the root: gathered in float32, they stay whole during an update.
    """
    # Imported here, since it takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32,
                                  cast_forward_inputs=False)
    with torch.device('meta'):
        model = cls(config)
    model.rest = nn.ParameterList()  # the root takes only parameters with a name outside blocks
    for block in dict.fromkeys(model.blocks):
        rest = [p for p in block.parameters() if not is_matrix(p)]
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=set(rest))
        model.rest.extend(rest)
    fully_shard(model, mesh=mesh)
    del model.rest
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay one
    model.to_empty(device=device)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    load_weights(model, whole.state_dict() if whole else {})
    for name, buffer in model.named_buffers():  # also those that no state dict contains
        if whole:
            buffer.copy_(whole.get_buffer(name))
        dist.broadcast(buffer, 0)
    return model


def is_sharded(model):
    """Whether `spread` made this model; torch.compile passes the method on."""
    return hasattr(model, 'set_requires_gradient_sync')


def load_weights(model, weights):
    """Copy a state dict into a model; into a sharded one, that of rank 0."""
    if not is_sharded(model):
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.reshard()  # the root is whole after an evaluation
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # first ones
    weights = {name: weight for name, weight in weights.items() if name in names}
    set_model_state_dict(model, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True, strict=False))


def gather_weights(model):
    """A model's state dict; of a sharded one, whole on rank 0's CPU, and {} on other ranks."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True))
    first_names = {}  # a tied weight has two names, and is to be saved once
    for name, p in model.named_parameters(remove_duplicate=False) if weights else ():
        weights[name] = weights[first_names.setdefault(p, name)]
    return weights


def gather(value):
    """A sharded tensor as a whole: on rank 0's CPU, None elsewhere; a scalar: on all ranks."""
    if not hasattr(value, 'full_tensor'):
        return value
    value = value.full_tensor()
    if value.dim():
        return value.cpu() if dist.get_rank() == 0 else None
    return value  # on its device, like the other numbers of an update


def shard_like(tensor, p):
    """A whole tensor that all ranks have, sharded as the parameter p is, on its device."""
    if not hasattr(p, 'full_tensor'):
        return tensor
    return dist.tensor.distribute_tensor(
        tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def gather_state(optimizer):
    """An optimizer's state dict, each tensor as by `gather`."""
    state = optimizer.state_dict()
    state['state'] = tree_map(gather, state['state'])  # it may be nested
    return state


def fitting_state(optimizer, saved):
    """The state dict `saved`, with the optimizer's own settings, sharded as its parameters are.

    State may have any shape, except torch's own moments. Raises ValueError, KeyError or TypeError.
    """
    params = [p for group in optimizer.param_groups for p in group['params']]
    groups = [own | {'params': theirs['params']} for own, theirs
              in zip(optimizer.param_groups, saved['param_groups'], strict=True)]
    state = {}
    for number, values in saved['state'].items():
        p = params[number]
        if isinstance(optimizer, torch.optim.AdamW) and 'step' not in values:
            raise ValueError('a weight has no count of steps')
        for name in {'exp_avg', 'exp_avg_sq', 'momentum_buffer'} & values.keys():
            if values[name].shape != p.shape:
                raise ValueError(f'{name} does not have the shape of its weight, {p.shape}')
        state[number] = tree_map(lambda value: shard_like(value.contiguous(), p)
                                 if getattr(value, 'shape', None) == p.shape else value, values)
    return {'state': state, 'param_groups': groups}


def load_state(optimizer, fitting):
    """Load what `fitting_state` returned; torch alone would change its dtypes to the weights'."""
    optimizer.load_state_dict(fitting)
    params = [p for group in optimizer.param_groups for p in group['params']]
    for number, values in fitting['state'].items():
        own = optimizer.state[params[number]]
        own |= tree_map(lambda saved, loaded: saved.to(loaded.device) if torch.is_tensor(saved)
                        and saved.dtype != loaded.dtype else loaded, values, dict(own))
