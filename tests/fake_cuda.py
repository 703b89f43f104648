"""Run the CUDA path without a GPU, on fake tensors, which have everything except numbers.

    python tests/fake_cuda.py fake_cuda.so    # the compiled fake_cuda.cpp; test_cuda.py starts it

A fake tensor has a device, a dtype and a shape. So a mixture of devices or dtypes fails as on a
GPU, and each time that the host waits for the GPU can be counted: for a number, or for a copy that
is not from pinned memory. What happens inside a kernel cannot be detected.

Each line of the input is a request, a dict in JSON: `code` to run in the folder `cwd` with the
scripts in `root`; whether on a `fake` GPU; and as rank 0 of how many `ranks`. Each line of the
output answers one:

    error    a traceback, or ''
    output   the text that was printed
    waits    how often the host waited, by the functions that were running: {'train/update': 2}
    saved    the devices of the tensors in each file that was saved: {'ckpt.pt': ['cuda:0']}
    seeded   the devices whose random state was asked for
    backend  the backends of the process group, if there is one
"""

import contextlib
import ctypes
import io
import json
import os
import sys
import threading
import traceback
import types
from collections import Counter

if __name__ == '__main__':
    ctypes.CDLL(sys.argv[1])  # before torch asks whether there is a GPU

import torch
import torch._dynamo  # now, since it does not like functions that were replaced
import torch.cuda.amp.common
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default)
NUMBERS = {torch.int64: 1, torch.bool: True}  # each number in a fake tensor; of floats 1.0


# --- what is replaced in torch; this process does nothing else, so nothing is put back


def pretend_cuda(report):
    """Replace the parts of torch.cuda that a torch without CUDA lacks."""
    def get_rng_state(device='cuda'):
        report['seeded'].append(str(device))
        return torch.zeros(16, dtype=torch.uint8)

    for name in ('_lazy_init', 'manual_seed_all', 'set_device', 'set_rng_state'):
        setattr(torch.cuda, name, lambda *_: None)
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.current_device = torch.accelerator.current_device_index
    torch.cuda._exchange_device = torch._C._accelerator_exchangeDevice
    torch.cuda._maybe_exchange_device = torch._C._accelerator_maybeExchangeDevice
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_name = lambda device=None: 'NVIDIA A100-SXM4-80GB'
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    torch.cuda.get_rng_state = get_rng_state
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.utils.weakref = types.SimpleNamespace(getweakrefs=lambda _: ())  # so that .to() works
    FakeTensor.tolist = to_list


class FakeStream:
    """A stream or an event: it has every method, and none does anything."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None


def pretend_ranks(ranks, report):
    """Make this process rank 0 of several, with torch's fake process group: no others exist."""
    from torch.distributed import device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init, make_mesh = dist.init_process_group, device_mesh.init_device_mesh

    def fake_init(backend, **_):
        report['backend'] = backend
        init('fake', store=FakeStore(), rank=0, world_size=ranks)

    def real_mesh(*args):
        with unset_fake_temporarily():  # it looks for this rank among the numbers
            return make_mesh(*args)

    os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT='1')
    dist.init_process_group, device_mesh.init_device_mesh = fake_init, real_mesh
    dist.all_gather_object = dist.broadcast_object_list = lambda *_, **__: None
    torch.Stream = torch.Event = torch.cuda.Stream = torch.cuda.Event = FakeStream
    torch.cuda.current_stream = FakeStream
    torch.cuda.stream = lambda *_: contextlib.nullcontext()


# --- the fake GPU


class FakeGPU(FakeTensorMode):
    """Context manager: all tensors are fake, and the waits of the host are counted."""

    avoid_device_init = True  # as where there is no GPU

    def __init__(self, root, waits):
        super().__init__(allow_non_fake_inputs=True)
        self.root, self.waits = root, waits

    def dispatch(self, op, types, args=(), kwargs=None):
        """Run an operation of torch; torch calls this for each of them."""
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], FakeTensor) else None
        if op is aten._local_scalar_dense.default:  # item(), bool(), float()
            return self.number(first)
        if op is aten.is_pinned.default:
            return hasattr(first, 'is_pinned_copy')
        if op is aten._pin_memory.default:
            pinned = super().dispatch(aten.clone.default, types, (first,))
            pinned.is_pinned_copy = True
            return pinned
        if op is aten._to_copy.default and first is not None:
            self.copy(first, kwargs.get('device') or first.device, kwargs.get('non_blocking'))
        elif op is aten.copy_.default and isinstance(args[1], FakeTensor):
            self.copy(args[1], first.device, kwargs.get('non_blocking') or args[2:] == (True,))
        elif op in INDEXING:
            for index in args[1]:
                if index is not None:
                    self.copy(index, first.device, False)
        elif torch.Tag.pointwise not in op.tags:  # those take one number from the CPU as well
            devices = {tensor.device.type for arg in (*args, *kwargs.values())
                       for tensor in (arg if isinstance(arg, (list, tuple)) else (arg,))
                       if isinstance(tensor, FakeTensor)}
            if len(devices) > 1:
                raise RuntimeError(f'{op} with tensors on {devices}')
        return super().dispatch(op, types, args, kwargs)

    def number(self, tensor):
        """The value of a tensor of one element."""
        if tensor.device.type == 'cuda':
            self.wait()
        elif tensor.constant is not None:
            return tensor.constant.item()
        return NUMBERS.get(tensor.dtype, 1.0)

    def copy(self, source, device, non_blocking):
        """Count a wait if a copy of `source` to `device` waits."""
        if source.device.type != torch.device(device).type:
            is_pinned = source.device.type == 'cuda' or hasattr(source, 'is_pinned_copy')
            if not (non_blocking and is_pinned):
                self.wait()
            source.constant = None  # a copy must not have known numbers on a GPU

    def wait(self):
        """Count a wait for the functions of the scripts that are running now."""
        names, frame = [], sys._getframe()
        if threading.current_thread() is not threading.main_thread():  # in a backward pass
            frame = sys._current_frames()[threading.main_thread().ident]
        while frame:
            name = frame.f_code.co_name
            if os.path.dirname(frame.f_code.co_filename) == self.root and name.isidentifier():
                names.append(name)
            frame = frame.f_back
        self.waits['/'.join(reversed(names))] += 1


def to_list(tensor):
    """FakeTensor.tolist, with one wait for all numbers."""
    if tensor.device.type == 'cuda':
        tensor.fake_mode.wait()
    elif tensor.constant is not None:
        return tensor.constant.tolist()
    numbers = NUMBERS.get(tensor.dtype, 1.0)
    for size in reversed(tensor.shape):
        numbers = [numbers] * size
    return numbers


# --- requests


def devices_in(state):
    """The devices of all tensors in a checkpoint. TypeError for what is no tensor or plain type."""
    if isinstance(state, torch.Tensor):
        return {str(state.device)}
    if isinstance(state, dict):
        state = [*state, *state.values()]
    if isinstance(state, (list, tuple)):
        return set().union(*map(devices_in, state))
    if not isinstance(state, (str, int, float, bool, type(None))):
        raise TypeError(f'a checkpoint with {state!r}')
    return set()


def use_scripts(root):
    """Let the scripts be imported from the folder `root`, and none from another."""
    if sys.path[0] == root:
        return
    for name, module in list(sys.modules.items()):
        if os.path.dirname(getattr(module, '__file__', None) or '') == sys.path[0]:
            if name != '__main__':
                del sys.modules[name]
    sys.path[0] = root


def answer(request, report):
    """Run the code of a request, and fill in the report."""
    output, real_save = io.StringIO(), torch.save
    report |= dict(error='', waits=Counter(), saved={}, seeded=[], backend='')

    def save(state, file):
        name = os.path.basename(file.name).rsplit('.', 2)[0]  # without .12345678.tmp
        report['saved'][name] = sorted(devices_in(state))
        file.write(b'fake')

    os.chdir(request['cwd'])
    use_scripts(request['root'])
    if request['ranks'] > 1 and 'RANK' not in os.environ:
        pretend_ranks(request['ranks'], report)
    gpu = FakeGPU(request['root'], report['waits']) if request['fake'] else contextlib.nullcontext()
    torch.save = save if request['fake'] else real_save
    try:
        with contextlib.redirect_stdout(output), gpu:
            exec(request['code'], {})
    except BaseException:
        report['error'] = traceback.format_exc()
    torch.save = real_save
    report['output'] = output.getvalue()
    return report


def main():
    report = {}
    pretend_cuda(report)
    torch.set_num_threads(1)
    sys.modules['matplotlib'] = None  # no pictures
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), report)), flush=True)


if __name__ == '__main__':
    main()
