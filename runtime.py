"""The machine room, so that train.py stays the algorithm.

The device, its precision and its peak; the process group; checkpoints on disk; signals; the log
of a run and what it tells.
"""

import contextlib
import csv
import ctypes
import gc
import importlib.util
import os
import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from console import Progress, UsageError, UserError, atomic_file, blame_user, clock

# --- device and precision


def pick_device(name):
    """The torch device for the setting `device`: 'auto' takes cuda, then mps, then cpu."""
    if name == 'auto':
        if torch.cuda.is_available():
            return torch.device('cuda')
        return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f'device={name!r} is no device: use auto, cpu, cuda, cuda:1 or mps'
        ) from None
    there = {
        'cpu': 1,
        'cuda': torch.cuda.device_count() if torch.cuda.is_available() else 0,
        'mps': int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= there:
        raise UsageError(
            f'device={name!r} is not on this machine, which has {there} of that type: '
            'use --device=auto or --device=cpu'
        )
    return device


DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def pick_dtype(name, device):
    """The torch dtype for `dtype`: 'auto' takes what the hardware multiplies natively."""
    if name != 'auto' and name not in DTYPES:
        raise UsageError(f'dtype={name!r} is not supported: use auto, {", ".join(DTYPES)}')
    if name == 'float16' and device.type == 'cpu':
        raise UsageError("dtype='float16' needs a GPU: use bfloat16 or float32 on cpu")
    if name != 'auto':
        return DTYPES[name]
    if device.type == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == 'cpu' and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bf16():
    """Whether this processor has bf16 instructions (x86 or Arm, as Linux tells)."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            flags = set(file.read().split())
    except OSError:
        return False
    return bool(flags & {'avx512_bf16', 'amx_bf16', 'bf16'})


def autocast(device, dtype):
    """Run the matrix products inside in `dtype`; what needs the digits stays in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def tune(device):
    """Make the fast way the default, once at start-up."""
    torch.set_float32_matmul_precision('high')  # TF32 on CUDA where a product is float32
    if device.type == 'cpu' and sys.platform == 'linux':
        # glibc hands every large block back to the kernel and faults it in again, zeroed, on the
        # next step. Keeping freed memory trains a small model 26 % faster, a larger one 12 %.
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: allocate below 1 GB from the heap,
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: and do not shrink the heap


class PackedLinear(torch.nn.Module):
    """nn.Linear with its weight in the order that oneDNN's bf16 product on a CPU reads.

    nn.Linear rearranges its weight at every call. Without that, a call takes half the time for one
    token and 0.7 of it for 16. A GELU is applied to what comes out, which saves a pass and makes
    a small model 8 % faster. For writing only: such a model cannot be trained.
    """

    def __init__(self, linear, gelu=None):
        super().__init__()
        self.then = ('gelu', [], gelu.approximate) if gelu else ('none', [], '')
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x):
        """(..., in) to (..., out), both bf16."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.then)


def pack_linears(model):
    """Replace every nn.Linear by a PackedLinear, in place, if torch and the processor can."""
    onednn = torch.ops.mkldnn
    if hasattr(onednn, '_linear_pointwise') and onednn._is_mkldnn_bf16_supported():
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    bend = getattr(module, 'gelu', None)
                    fits = name == 'c_fc' and isinstance(bend, torch.nn.GELU)
                    setattr(module, name, PackedLinear(child, bend if fits else None))
                    if fits:
                        module.gelu = torch.nn.Identity()


def prepare_machine(cfg, ranks):
    """Settle the device and the dtype of a run, and refuse an out_dir that cannot be."""
    device = pick_device(cfg.device)
    if device.type == 'cuda' and ranks.world_size > 1:
        device = torch.device('cuda', ranks.local_rank)
        torch.cuda.set_device(device)
    if os.path.exists(cfg.out_dir) and not os.path.isdir(cfg.out_dir):
        raise UsageError(f'out_dir={cfg.out_dir} is a file: choose another folder')
    tune(device)
    return device, pick_dtype(cfg.dtype, device)


# bf16 peaks in TFLOP/s, dense, from the vendors' datasheets; MFU is the share of it that we use.
PEAK_TFLOPS = {
    'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, 'L4': 121,
    'RTX 5090': 209, 'RTX 4090': 165, 'RTX 3090': 71,
}
PEAK_TFLOPS_FP16 = {'T4': 65}


def peak_flops(device, dtype, override=0.0):
    """FLOP/s that this device could do at most, or None where it is not known."""
    if override:
        return override * 1e12
    if device.type != 'cuda':
        return None
    name = torch.cuda.get_device_name(device)
    table = PEAK_TFLOPS if dtype in (torch.bfloat16, torch.float16) else {}
    if dtype == torch.float16:
        table = table | PEAK_TFLOPS_FP16
    words = f' {name} '.replace('-', ' ')
    return next((t * 1e12 for known, t in table.items() if f' {known} ' in words), None)


def compile_or_eager(model, example, amp):
    """torch.compile(model), tried out on the training batch `example`; `model` if that fails."""
    try:
        compiled = torch.compile(model)
        with amp:
            _, loss = compiled(*example)
        loss.backward()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split('\n')[0][:200]
        print(f'torch.compile failed ({reason}): going on without it; '
              '--compile=false says so at once')
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


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
        finally:
            dist.destroy_process_group()

    def sum(self, tensor):
        """`tensor`, summed over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor):
        """`tensor`, averaged over the ranks, in place."""
        return self.sum(tensor).div_(self.world_size) if self.world_size > 1 else tensor

    def any(self, flag):
        """Whether `flag` is true on any rank; on the CPU side, so that nobody waits for a GPU."""
        return self.sum(torch.tensor(float(flag))).item() > 0 if self.world_size > 1 else flag


# --- files and signals


def save(path, checkpoint):
    """Write a checkpoint, atomically. Raises UserError, see `atomic_file`."""
    with atomic_file(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch reports that the file took no more bytes
            raise OSError(28, str(error).split('\n')[0]) from error


class StopSignal:
    """After Ctrl-C or SIGTERM, `received` is its number, not 0, and the run may end in good order.

    A second Ctrl-C exits at once; under torchrun, which repeats the one that the terminal has sent
    to every process already, not within the same second.
    """

    def __enter__(self):
        self.received = 0
        self.before = {}
        with contextlib.suppress(ValueError):  # signals are for the main thread only
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
        now = time.monotonic()
        repeated = 'TORCHELASTIC_RUN_ID' in os.environ and self.received and now - self.at < 1
        if self.received and number == signal.SIGINT and not repeated:
            os._exit(128 + number)
        if not self.received:
            self.received, self.at = number, now

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# --- what a run tells

# Characters that would move the cursor, or worse: a model that knows nothing yet may write them.
UNPRINTABLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], '\ufffd')

LOG_COLUMNS = (
    'iteration tokens epochs train_loss train_eval_loss val_loss learning_rate grad_norm skipped '
    'tokens_per_s mfu seconds'
).split()


class CsvLog:
    """`log.csv`: one row per logged iteration, in a file that a resumed run continues.

    Rows from iteration `start` on were written by a run that got further than its last checkpoint;
    they are dropped, and will be written again.
    """

    def __init__(self, path, columns, start):
        rows = []
        if start > 0 and os.path.exists(path):
            with open(path, newline='', encoding='utf-8', errors='replace') as file:
                rows = [row for row in csv.DictReader(file) if self.counts(row, columns, start)]
        with atomic_file(path, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, columns, extrasaction='ignore')
            writer.writeheader()
            writer.writerows(rows)
        self.seconds = float(rows[-1]['seconds']) if rows else 0.0
        self.file = open(path, 'a', newline='', encoding='utf-8')
        self.writer = csv.DictWriter(self.file, columns)

    @staticmethod
    def counts(row, columns, start):
        """Whether a row is whole, and from before iteration `start`."""
        whole = all(row.get(column) is not None for column in columns)
        return whole and row['iteration'].isdigit() and int(row['iteration']) < start

    def write(self, **row):
        try:
            self.writer.writerow(row)
            self.file.flush()
        except OSError as error:
            raise UserError(f'cannot write {self.file.name} ({error.strerror}): free some space, '
                            'then go on with --init_from=resume') from None

    def close(self):
        self.file.close()


class Monitor:
    """What a training run tells: the progress line, log.csv, wandb, and the clock behind them."""

    def __init__(self, cfg, ranks, device, dtype, model, epoch_tokens, start):
        self.cfg, self.device, self.epoch_tokens = cfg, device, epoch_tokens
        self.tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
        peak = peak_flops(device, dtype, cfg.peak_tflops)
        self.mfu_per_rate = model.flops_per_token() / (peak * ranks.world_size) if peak else None
        self.progress = Progress(cfg.max_iters, enabled=ranks.is_main)
        self.enabled = ranks.is_main
        self.log = self.wandb = None
        if self.enabled and cfg.wandb_log:
            with blame_user():
                import wandb
            self.wandb = wandb.init(
                project=cfg.wandb_project, name=cfg.wandb_run_name, config=vars(cfg)
            )
        if self.enabled:
            self.log = CsvLog(os.path.join(cfg.out_dir, 'log.csv'), LOG_COLUMNS, start)
        self.draws = self.enabled and importlib.util.find_spec('matplotlib') is not None
        self.losses = {}  # of the evaluation at this iteration, if there was one
        self.start = start
        self.began = self.since = time.perf_counter()
        self.iterations = 0  # since the last logged one
        what = f'{model.num_params():,} parameters, {self.tokens:,} tokens an iteration'
        self.progress.say(f'{cfg.dataset}: {epoch_tokens:,} train tokens; {cfg.model} of {what}; '
                          f'{device} in {str(dtype).removeprefix("torch.")}')

    @contextlib.contextmanager
    def pause(self):
        """Time spent inside is not training time."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def evaluated(self, it, losses, improved):
        self.losses = losses
        self.progress.say(
            f'step {it}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}'
            + (' (the best so far)' if improved else '')
        )

    def show(self, make_text, *args):
        """Print the text that `make_text` makes; if it fails, say so and go on."""
        try:
            text = make_text(*args)
        except Exception as error:
            text = f'(no sample: {error})'
        text = text.translate(UNPRINTABLE)
        self.progress.say(''.join(f'  | {line}\n' for line in text.split('\n')))

    def trained(self, it, loss, norm, rate, optimizer):
        """Take note of update `it`; returns whether its figures were looked at."""
        self.iterations += 1
        now = time.perf_counter()
        logged = it % self.cfg.log_interval == 0 or bool(self.losses)
        free = self.device.type == 'cpu'  # to look costs nothing: no GPU has to be waited for
        if logged or (free and self.progress.live and self.progress.due):
            loss = loss.item()
            now = time.perf_counter()
            per_iteration = (now - self.since) / self.iterations
            speed = self.tokens / per_iteration
            mfu = speed * self.mfu_per_rate if self.mfu_per_rate else None
            left = (now - self.began) / (it + 1 - self.start) * (self.cfg.max_iters - it - 1)
            epochs = it * self.tokens / self.epoch_tokens
            parts = [f'{clock(left)} left', f'{speed:,.0f} tok/s', f'epoch {epochs:.2f}']
            parts += [f'mfu {mfu:.1%}'] if mfu else []
            line = [f'iter {it}: loss {loss:.4f}', f'time {1e3 * per_iteration:.2f}ms', *parts]
            self.progress.update(
                it + 1, [f'iter {it}', f'loss {loss:.4f}', *parts],
                line=', '.join(line) if it % self.cfg.log_interval == 0 else '',
            )
        if logged:
            step = next(iter(optimizer.state.values()))['step']  # updates that were really made
            self.since, self.iterations = now, 0
            self.write(
                it, train_loss=loss, learning_rate=rate, grad_norm=norm.item(),
                skipped=it + 1 - int(step), tokens_per_s=round(speed), mfu=mfu and round(mfu, 4),
            )
        return logged or free

    def write(self, it, **figures):
        """A row of log.csv, and of wandb; if it has an evaluation, a new loss.png too."""
        if self.enabled:
            evaluation = {'train_eval_loss': 'train', 'val_loss': 'val'}
            row = {
                'iteration': it, 'tokens': it * self.tokens,
                'epochs': it * self.tokens / self.epoch_tokens, **figures,
                **{column: self.losses.get(split) for column, split in evaluation.items()},
                'seconds': round(self.log.seconds + time.perf_counter() - self.began, 3),
            }
            self.log.write(**row)
            if self.wandb:
                self.wandb.log({k: v for k, v in row.items() if v is not None}, step=it)
            if self.losses:
                self.draw()
        self.losses = {}

    def draw(self):
        """loss.png, from what log.csv has by now. If that fails, say so, once, and go on."""
        if self.draws:
            with self.pause():
                try:
                    import plot_loss  # here, since it brings matplotlib, and imports this module

                    path = os.path.join(self.cfg.out_dir, 'loss.png')
                    plot_loss.draw([self.cfg.out_dir], path)
                    gc.collect(1)  # a figure refers to itself; without this, many pile up
                except Exception as error:
                    self.draws = False
                    self.progress.say(f'(no loss.png from here on: {error})')

    def stopped(self, it):
        self.progress.say(
            f'stopped at iteration {it}; {os.path.join(self.cfg.out_dir, "ckpt.pt")} is saved: '
            'to go on, the same command with --init_from=resume'
        )

    def finished(self, it, best_val_loss):
        """The last row, and what to do next."""
        self.write(it)
        seconds = time.perf_counter() - self.began
        self.progress.say(
            f'best val loss {best_val_loss:.4f} after {clock(seconds)}, weights in '
            f'{os.path.join(self.cfg.out_dir, "best.pt")}\n'
            f'now: python sample.py --out_dir={self.cfg.out_dir}'
        )
