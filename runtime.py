"""The machine room, so that train.py stays the algorithm.

The device, its precision and its peak; many processes, their weights copied or sharded; signals;
the log of a run.
"""

import atexit
import contextlib
import csv
import ctypes
import importlib.util
import io
import os
import signal
import sys
import time
from dataclasses import dataclass
from textwrap import shorten
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import plot_loss
from console import Progress, UsageError, UserError, user_errors

# --- device and precision

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def pick_device(name):
    """The torch device for the setting `device`: 'auto' takes cuda, then mps, then cpu."""
    if name == 'auto':
        if torch.cuda.is_available():
            return torch.device('cuda')
        return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        torch.empty(0, device=name).cpu()  # fails on meta, for one
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f'device={name!r} is not on this machine ({shorten(str(error), 80)}): '
            'use auto, cpu, cuda, cuda:1 or mps, say --device=cpu'
        ) from None


def pick_dtype(name, device):
    """The torch dtype for `dtype`: 'auto' takes what the hardware multiplies natively."""
    if name != 'auto' and name not in DTYPES:
        raise UsageError(f'dtype={name!r} must be one of auto, {", ".join(DTYPES)}')
    if name == 'float16' and device.type == 'cpu':
        raise UsageError("dtype='float16' needs a GPU: use bfloat16 or float32 on cpu")
    if name != 'auto':
        return DTYPES[name]
    if device.type == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # Before torch 2.10 the processor's instructions can't be asked for.
    has = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
    native = any(has.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16'))
    return torch.bfloat16 if native else torch.float32


def tune(device, shard=False):
    """Make the fast way the default, once at start-up; returns a warning, or ''."""
    torch.set_float32_matmul_precision('high')  # TF32 on CUDA where a product is float32
    if device.type != 'cpu' or sys.platform != 'linux':
        return ''
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
        cores, threads = os.cpu_count() or 1, torch.get_num_threads()
        busy = min(cores, round(float(load)), int(running.split('/')[0]) - 1)
        if cores - busy < threads > 1 and 'OMP_NUM_THREADS' not in os.environ:
            return (f'{busy} of {cores} cores are busy with other work: if that goes on, '
                    f'OMP_NUM_THREADS={max(1, cores - busy)} is faster')
    return ''


@contextlib.contextmanager
def out_of_memory(remedy):
    """Turn any failure to get memory inside into a UserError of one line that ends in `remedy`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        text = str(error)
        signs = ('out of memory', 'not enough memory', 'allocate memory', 'unable to allocate')
        if not isinstance(error, MemoryError) and not any(s in text.lower() for s in signs):
            raise
        start = max(text.lower().find('tried to allocate'), 0)
        asked = shorten(text[start:].split('. ')[0] or 'no reason given', 100)
        raise UserError(f'not enough memory ({asked}): {remedy}') from None


# bf16 peaks in TFLOP/s, dense, from the vendors' datasheets; MFU is the share of it that we use.
PEAK_TFLOPS = {
    'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, 'L4': 121,
    'RTX 5090': 209, 'RTX 4090': 165, 'RTX 3090': 71, 'T4': 65,
}


def peak_flops(device, dtype, tflops=0.0):
    """FLOP/s that this device could do at most, or 0 where it is not known."""
    if tflops:
        return tflops * 1e12
    if device.type != 'cuda' or dtype not in (torch.bfloat16, torch.float16):
        return 0
    words = f' {torch.cuda.get_device_name(device)} '.replace('-', ' ')
    if {'MIG', 'NVL', 'Laptop', 'Ti', 'D'} & {*words.split()}:
        return 0  # a slice of a card, or another card under the same name
    if ' T4 ' in words and dtype != torch.float16:  # it has no bf16
        return 0
    return next((t * 1e12 for name, t in PEAK_TFLOPS.items() if f' {name} ' in words), 0)


# --- many processes


@dataclass
class Ranks:
    """This process among those that train together; alone, it is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls):
        """As torchrun tells, in RANK, LOCAL_RANK and WORLD_SIZE."""
        names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')
        return cls(*(int(os.environ.get(n, d)) for n, d in zip(names, (0, 0, 1))))

    @property
    def is_main(self):
        return self.rank == 0

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
        return self.sum(torch.tensor(float(flag))).item() > 0 if self.world_size > 1 else flag

    def from_main(self, value):
        """Rank 0's `value`, a plain object, on every rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]


def device_and_dtype(cfg, ranks=Ranks()):
    """The device and the dtype of a run."""
    device = pick_device(cfg.device)
    if device.type == 'cuda' and ranks.world_size > 1:
        device = torch.device('cuda', ranks.local_rank)
        torch.cuda.set_device(device)
    return device, pick_dtype(cfg.dtype, device)


def compiled(raw, cfg, device, amp, example):
    """The model by torch.compile, if `cfg` or the device ask for it; if that fails, as it is.

    Whether it fails shows at the first use: here, on the training batch `example`.
    """
    if not (cfg.compile or (cfg.compile is None and device.type == 'cuda')):
        return raw
    try:
        model = torch.compile(raw)
        with amp:
            _, loss = model(*example, loss_only=True)
        loss.backward()
    except Exception as error:
        reason = shorten(str(error).strip() or type(error).__name__, 200)
        print(f'torch.compile failed ({reason}): going on without it; '
              '--compile=false says so at once')
        model = raw
    raw.zero_grad()
    return model


def build(cls, config, weights, device, shard=False, seed=0):
    """The model `cls(config)` on `device`, with `weights` by name, or drawn from `seed` if None.

    With `shard`, each rank makes and keeps only its part of every weight, of a gradient, and of
    what an optimizer keeps (FSDP; ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054). Only rank 0
    needs `weights`; whole weights exist one at a time. The numbers are the same either way. Raises
    ValueError, in one line, where the weights do not fit.
    """
    with torch.device('meta') if shard else contextlib.nullcontext():
        model = cls(config)
    if weights is None:
        torch.manual_seed(seed)  # here, since cls(config) has drawn numbers
    if not shard:
        try:
            model.init_weights() if weights is None else model.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError('the weights do not fit the model that comes with them: '
                             + shorten(str(error), 200)) from None
        return model.to(device)
    from torch.distributed.fsdp import fully_shard  # here, since it takes a second to import

    for module in (*model.blocks, model):
        fully_shard(module)
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that shared weights stay one
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        whole = torch.empty(p.shape)
        if weights is None:
            model.init_parameter(name, whole)
        elif dist.get_rank() == 0:
            whole = weights.get(name)
            if getattr(whole, 'shape', None) != p.shape:
                raise ValueError(f'the weights do not fit the model that comes with them: {name}')
        p.data.copy_(placed_like(whole, p))
    return model


def placed_like(tensor, p):
    """`tensor`, from rank 0, where and as the weight `p` is: on its device, sharded as it is."""
    if tensor.shape != p.shape:
        raise ValueError(f'{tuple(tensor.shape)} in the place of {tuple(p.shape)}')
    if hasattr(p, 'full_tensor'):  # a DTensor, whose type takes long to import
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements)
    return tensor.to(p.device).contiguous()


def gathered(value):
    """`value`, a tensor or nested dicts, with all that is sharded gathered.

    All ranks must call it; the tensors come to the CPU of rank 0, the others get None instead, but
    for scalars, which all get.
    """
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if not hasattr(value, 'full_tensor'):
        return value
    full = value.full_tensor()
    return full.cpu() if dist.get_rank() == 0 or not full.dim() else None


def gathered_weights(model):
    """The state dict of `model` with whole tensors, see `gathered`; shared weights stay shared."""
    state = model.state_dict(keep_vars=True)
    by_weight = {p: gathered(p.detach()) for p in dict.fromkeys(state.values())}
    return {name: by_weight[p] for name, p in state.items()}


def wrap(model, ranks, shard):
    """The model with its gradients averaged over the ranks; a sharded one does that by itself."""
    if ranks.world_size == 1 or shard:
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

    before = {}
    with contextlib.suppress(ValueError):  # signals are for the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the log of a run


class Log:
    """`log.csv`, one row per logged iteration; loss.png; and Weights & Biases if asked for.

    The rows of a new run wait in memory until `open`, at its first save: nothing of a former run
    is touched before there is something to keep. A resumed run goes on at `position`, which its
    checkpoint has: what was written after that is cut off, and will be written again.
    """

    columns = ('iteration tokens epochs train_loss train_eval_loss val_loss learning_rate '
               'grad_norm skipped tokens_per_s mfu seconds').split()

    def __init__(self, cfg, ranks, position=None):
        self.out_dir, self.path = cfg.out_dir, os.path.join(cfg.out_dir, 'log.csv')
        self.is_main, self.file, self.wandb = ranks.is_main, io.StringIO(), None
        self.draws = importlib.util.find_spec('matplotlib') is not None
        self.began = time.perf_counter() - (position or {}).get('seconds', 0.0)
        if self.is_main and cfg.wandb_log:
            with user_errors():
                import wandb
            self.wandb = wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name,
                                    config=vars(cfg))
        csv.writer(self.file).writerow(self.columns)
        if position is not None:
            self.open(position.get('bytes', sys.maxsize))  # nanoGPT's have none: keep all

    def is_open(self):
        return not isinstance(self.file, io.StringIO)

    def open(self, size=0):
        """Write to the file from now on, after its first `size` bytes."""
        if not self.is_main or self.is_open():
            return
        waiting = self.file.getvalue()
        with self.writing():
            self.file = open(self.path, 'a', newline='', encoding='utf-8')
            self.file.truncate(min(size, self.file.tell()))
            if not self.file.seek(0, os.SEEK_END):  # `truncate` leaves `tell` where it was
                self.file.write(waiting)
                self.file.flush()

    @contextlib.contextmanager
    def writing(self):
        """Inside, a full disk and the like is a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f'cannot write {self.path} ({error.strerror}): make room or '
                            'let us write, then go on with --init_from=resume') from None

    def position(self):
        """What a checkpoint keeps of the log, to go on from there."""
        return {'bytes': self.file.tell(), 'seconds': time.perf_counter() - self.began}

    def write(self, row):
        """Add a row, a dict of some of `columns`."""
        if not self.is_main:
            return
        row['seconds'] = round(time.perf_counter() - self.began, 3)
        with self.writing():
            csv.DictWriter(self.file, self.columns).writerow(row)
            self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=row['iteration'])
        if row['val_loss'] is not None and self.draws and self.is_open():
            try:
                plot_loss.draw([self.out_dir], os.path.join(self.out_dir, 'loss.png'))
            except Exception as error:  # no picture is worth a run
                self.draws = False
                Progress().say(f'(no loss.png from here on: {error})')
