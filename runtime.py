"""The machine room, so that train.py stays the algorithm.

The device, its precision and its peak; many processes, their weights copied or sharded; signals;
the log of a run.
"""

import atexit
import contextlib
import csv
import ctypes
import gc
import inspect
import io
import os
import signal
import sys
import time
from functools import partial
from importlib.util import find_spec
from textwrap import shorten
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import plot_loss
from console import Progress, UsageError, UserError, file_errors, user_errors

# --- device and precision


def device_and_dtype(cfg):
    """The torch device and dtype of a run, a GPU for each process. Raises UsageError."""
    name = cfg.device
    if name == 'auto':
        name = torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    try:
        device = torch.device(name)
        if device.type == 'cuda' and Ranks().world_size > 1:
            device = torch.device('cuda', Ranks().local_rank)
            torch.cuda.set_device(device)
        torch.empty(0, device=device).cpu()  # fails on meta, for one
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f'device={cfg.device!r} is not on this machine '
                         f'({shorten(str(error), 80)}): take another, --device=cpu say') from None
    return device, pick_dtype(cfg.dtype, device)


def pick_dtype(name, device):
    """The torch dtype called `name`; 'auto': what the hardware multiplies. Raises UsageError."""
    if name != 'auto':
        names = ['float32', 'bfloat16'] + ['float16'] * (device.type != 'cpu')
        if name not in names:
            raise UsageError(f'dtype={name!r} must be one of auto, {", ".join(names)} on {device}')
        return getattr(torch, name)
    if device.type == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # Before torch 2.10 the processor's instructions can't be asked for.
    has = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
    native = any(has.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16'))
    return torch.bfloat16 if native else torch.float32


def tune(device, shard=False):
    """Make the fast way the default, once at start-up; returns a warning, or None."""
    torch.set_float32_matmul_precision('high')  # TF32 on CUDA where a product is float32
    gc.freeze()  # what is imported stays: searching it for garbage takes a tenth of a second
    # Undecorated: the decorators import torch.compile's machinery, which takes a second or more,
    # only to keep these methods out of its graphs.
    for name in ('add_param_group', 'state_dict', 'load_state_dict'):
        setattr(Optimizer, name, inspect.unwrap(getattr(Optimizer, name)))
    AdamW.step = torch.no_grad()(inspect.unwrap(AdamW.step))
    if device.type != 'cpu' or sys.platform != 'linux':
        return None
    # glibc hands every large block back to the kernel and faults it in again, zeroed, on the next
    # step. Keeping freed memory trains faster.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Shards gather and free weights all the time, which would fragment such a heap.
        mallopt(-3, 1 << 16 if shard else 1 << 30)  # M_MMAP_THRESHOLD: below, from the heap
        mallopt(-1, 1 << 17 if shard else (1 << 31) - 1)  # M_TRIM_THRESHOLD: what it keeps
    with contextlib.suppress(OSError), open('/proc/loadavg') as file:  # some sandboxes hide it
        load, _, _, running, _ = file.read().split()
        # Busy in the last minute and still now; the load alone has our own run before this.
        busy = min(round(float(load)), int(running.split('/')[0]) - 1)
        free, threads = max(1, (os.cpu_count() or 1) - busy), torch.get_num_threads()
        if free < threads and 'OMP_NUM_THREADS' not in os.environ:
            return f'other work wants {busy} cores: meanwhile, OMP_NUM_THREADS={free} is faster'
    return None


@contextlib.contextmanager
def out_of_memory(remedy):
    """Turn any failure to get memory inside into a UserError of one line that ends in `remedy`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        signs = 'out of memory', 'not enough memory', 'allocate memory'
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
            raise
        raise UserError(f'not enough memory ({shorten(repr(error), 160)}): {remedy}') from None


# Peaks in TFLOP/s for 16 bits, dense, from the vendors' datasheets; MFU is the share that we use.
# By the whole name, since a slice of a card or its laptop form has much the same one.
PEAK_TFLOPS = {
    'NVIDIA B200': 2250, 'NVIDIA H200': 989, 'NVIDIA H100 80GB HBM3': 989, 'NVIDIA H100 PCIe': 756,
    'NVIDIA A100-SXM4-80GB': 312, 'NVIDIA A100-SXM4-40GB': 312, 'NVIDIA A100 80GB PCIe': 312,
    'NVIDIA A100-PCIE-40GB': 312, 'NVIDIA L4': 121, 'Tesla T4': 65,
    'NVIDIA GeForce RTX 5090': 209, 'NVIDIA GeForce RTX 4090': 165, 'NVIDIA GeForce RTX 3090': 71,
}


def peak_flops(device, dtype, tflops=0.0):
    """FLOP/s that this device could do at most, or 0 where it is not known."""
    if not tflops and device.type == 'cuda' and dtype in (torch.bfloat16, torch.float16):
        tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name(device), 0)
    return tflops * 1e12


# --- many processes


class Ranks:
    """This process among those that train together, as torchrun tells; alone, rank 0 of 1."""

    def __init__(self):
        self.rank = int(os.environ.get('RANK', 0))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))  # on its machine
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.is_main = self.rank == 0

    @contextlib.contextmanager
    def joined(self, device, backend):
        """Inside, the process group exists, with the backend that fits the device."""
        if self.world_size == 1:
            yield
            return
        if backend in ('auto', 'nccl'):  # gloo besides, for what never leaves the CPU
            backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend)
        try:
            yield
        except SystemExit as stop:  # all ranks stop here
            # gloo's threads sometimes keep Python from ending, until torchrun kills it.
            atexit.register(lambda code=stop.code: (sys.stdout.flush(), os._exit(code)))
            raise
        dist.destroy_process_group()  # not after an error: it would wait for the other ranks

    def sum(self, tensor):
        """`tensor`, summed over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether `flag` is true on any rank; asked on the CPU, so that nobody waits for a GPU."""
        return bool(self.sum(torch.tensor(float(flag))))


def build(cls, config, weights, device, shard=False, seed=0):
    """The model `cls(config)` on `device`, with `weights` by name, or drawn from `seed` if None.

    With `shard`, each rank makes and keeps only its part of every weight, of a gradient, and of
    what an optimizer keeps (FSDP; ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054). Only rank 0
    needs `weights`; whole weights exist one at a time. Sharded or not, the numbers are the same.
    Raises ValueError, in one line, where the weights do not fit.
    """
    with torch.device('meta' if shard else device):
        model = cls(config)
    if weights is not None:
        expected, found = ({name: getattr(weight, 'shape', None) for name, weight in state.items()}
                           for state in (model.state_dict(), weights))
        if wrong := sorted(dict(expected.items() ^ found.items())):
            raise ValueError('the weights do not fit the model that comes with them: '
                             + shorten(', '.join(wrong), 200))
    if shard:
        from torch.distributed.fsdp import fully_shard  # here, since it takes a second to import

        for module in (*model.blocks, model):
            fully_shard(module)
        torch.__future__.set_swap_module_params_on_conversion(True)  # shared weights stay one
        model.to_empty(device=device)
    torch.manual_seed(seed)  # here, since cls(config) has drawn numbers
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape) if weights is None else weights[name]
        if weights is None:
            model.init_parameter(name, whole)
        p.data.copy_(placed_like(whole, p))
    return model


def placed_like(tensor, p):
    """`tensor`, from rank 0, where and as the weight `p` is: on its device, sharded as it is."""
    if tensor.shape != p.shape:
        raise ValueError(f'{tuple(tensor.shape)} in the place of {tuple(p.shape)}')
    if hasattr(p, 'full_tensor'):  # a DTensor, whose type takes long to import
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements)
    return tensor.to(p.device).contiguous()  # a fused optimizer takes memory as it lies


def gathered(value):
    """`value`, a tensor or nested dicts, with all that is sharded gathered.

    All ranks must call it; the tensors come to the CPU of rank 0, the others get None instead, but
    for scalars, which all get. A weight under two names stays shared, if the dict has parameters
    themselves (`keep_vars`).
    """
    if isinstance(value, dict):
        once = {id(item): gathered(item) for item in value.values()}
        return {key: once[id(item)] for key, item in value.items()}
    value = value.detach() if isinstance(value, torch.Tensor) else value
    if not hasattr(value, 'full_tensor'):
        return value
    full = value.full_tensor()
    return full.cpu() if dist.get_rank() == 0 or not full.dim() else None


def wrap(raw, cfg, ranks, device, amp, example):
    """The model as training calls it: compiled if asked for, gradients averaged over the ranks.

    Whether torch.compile fails shows at the first use: here, on the training batch `example`.
    """
    model = raw
    if cfg.compile or (cfg.compile is None and device.type == 'cuda'):
        try:
            model = torch.compile(raw)
            with amp:
                _, loss = model(*example, loss_only=True)
            loss.backward()
        except Exception as error:
            Progress(ranks.is_main).say(
                f'torch.compile failed ({shorten(repr(error), 200)}): going on without it; '
                '--compile=false says so at once')
            model = raw
        raw.zero_grad()
    if ranks.world_size == 1 or cfg.shard:  # a sharded model averages by itself
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def sync_gradients(model, sync):
    """Set whether the next backward pass averages gradients over the ranks."""
    if hasattr(model, 'set_requires_gradient_sync'):  # sharded; torch.compile passes it on
        model.set_requires_gradient_sync(sync)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync


# --- signals


@contextlib.contextmanager
def stop_signal(speaks):
    """Inside, Ctrl-C and SIGTERM only set `received` to their number, so that a run can end well.

    A second Ctrl-C exits at once. Of several processes, one `speaks`.
    """
    stop = SimpleNamespace(received=0)

    def handle(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system obeys it, whatever Python does
        if speaks and not stop.received:
            with contextlib.suppress(OSError):  # os.write, since print may be what was interrupted
                os.write(1, b'\nfinishing this iteration, then saving; '
                            b'Ctrl-C again to quit without\n')
        stop.received = stop.received or number

    with contextlib.ExitStack() as at_end:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # signals are for the main thread only
                at_end.callback(signal.signal, number, signal.signal(number, handle))
        yield stop


# --- the log of a run


class Log:
    """`log.csv`, one row per logged iteration; loss.png; and Weights & Biases if asked for.

    The rows of a new run wait in memory until `open`, after its first save: nothing of a former
    run is touched before there is something to keep. A resumed one goes on at `position`, which
    its checkpoint has: what was written after that is cut off, and will be written again.
    """

    columns = ('iteration tokens epochs train_loss train_eval_loss val_loss learning_rate '
               'grad_norm skipped tokens_per_s mfu seconds').split()

    def __init__(self, cfg, ranks, position=None):
        self.out_dir, self.path = cfg.out_dir, os.path.join(cfg.out_dir, 'log.csv')
        self.is_main, self.is_open = ranks.is_main, False
        self.file, self.wandb = io.StringIO(), None
        self.began = time.perf_counter() - (position or {}).get('seconds', 0.0)
        self.file_errors = partial(file_errors, f'cannot write {self.path}',
                                   'make room, then go on with --init_from=resume')
        if self.is_main and cfg.wandb_log:
            with user_errors():
                import wandb
            self.wandb = wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name,
                                    config=vars(cfg))
        csv.writer(self.file).writerow(self.columns)
        if position is not None:
            self.open(position.get('bytes', sys.maxsize))  # nanoGPT's have none: keep all

    def open(self, size=0):
        """Write to the file from now on, after its first `size` bytes."""
        if not self.is_main or self.is_open:
            return
        waiting, self.is_open = self.file.getvalue(), True
        with self.file_errors():
            self.file = open(self.path, 'a', newline='', encoding='utf-8')
            self.file.truncate(min(size, self.file.tell()))
            if not self.file.seek(0, os.SEEK_END):  # `truncate` leaves `tell` where it was
                self.file.write(waiting)
                self.file.flush()

    def position(self):
        """What a checkpoint keeps of the log, to go on from there."""
        return {'bytes': self.file.tell(), 'seconds': time.perf_counter() - self.began}

    def write(self, row):
        """Add a row, a dict of some of `columns`."""
        if not self.is_main:
            return
        row = row | {'seconds': round(time.perf_counter() - self.began, 3)}
        with self.file_errors():
            csv.DictWriter(self.file, self.columns).writerow(row)
            self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=row['iteration'])
        if row['val_loss'] is not None and self.is_open and find_spec('matplotlib'):
            try:
                plot_loss.draw([self.out_dir], os.path.join(self.out_dir, 'loss.png'))
            except Exception as error:  # no picture is worth a run
                Progress().say(f'(no loss.png: {error})')
