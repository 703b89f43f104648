"""Train a GPT.

    python train.py config/train_wizard_char.py                    # three minutes on a laptop
    python train.py config/train_wizard_char.py --max_iters=3000   # flags override files
    python train.py config/train_wizard_char.py --init_from=resume # go on where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

`TrainConfig` lists every setting; `train` reads from top to bottom.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import console
import runtime
from configurator import override
from console import UsageError, UserError
from model import (
    GPT, MODEL_SIZES, Bigram, GPTConfig, build_model, checkpoint_file, is_pretrained,
    load_checkpoint,
)
from runtime import Monitor, Ranks, StopSignal
from tokenizer import tokenizer_from, tokenizer_of

REMEDIES = 'Remedies: a lower --learning_rate, --dtype=float32, a smaller --grad_clip'


@dataclass
class TrainConfig:
    # what comes out
    out_dir: str = 'out'  # for ckpt.pt (to resume), best.pt (to use), log.csv and loss.png
    eval_interval: int = 2000  # evaluate, save and show a sample every so many iterations
    log_interval: int = 1  # a line and a row of log.csv every so many iterations
    eval_iters: int = 200  # batches per evaluation, the same each time; 0 takes the whole split
    eval_only: bool = False  # evaluate every split, with perplexity, and stop
    always_save_checkpoint: bool = True  # false: ckpt.pt only if val improved, and at the end
    sample_tokens: int = 200  # length of the sample shown at each evaluation; 0 shows none
    sample_start: str = '\n'  # what the sample begins with
    wandb_log: bool = False  # log to Weights & Biases too: pip install wandb
    wandb_project: str = 'owt'  # the project there
    wandb_run_name: str = 'gpt2'  # the run's name there
    # data
    dataset: str = 'openwebtext'  # the folder data/<dataset> with train.bin and val.bin
    prepare: str = ''  # the script that makes the dataset, run when it is missing
    gradient_accumulation_steps: int = 40  # micro-batches per update, over all processes together
    batch_size: int = 12  # texts per micro-batch: as many as memory allows
    block_size: int = 1024  # tokens of context: attention costs its square
    # model
    init_from: str = 'scratch'  # scratch, resume, a checkpoint or its folder, or gpt2 ... gpt2-xl
    model: str = 'gpt'  # gpt, or bigram: the baseline to beat
    model_size: str = ''  # a name from model.py's table, instead of the three below
    n_layer: int = 12  # depth: how many blocks, one after the other
    n_head: int = 12  # attention heads; n_embd must divide by it
    n_embd: int = 768  # width: numbers that stand for a token in each block
    dropout: float = 0.0  # 0 for pretraining; 0.1 or 0.2 when the text is small
    bias: bool = False  # biases in Linear and LayerNorm: GPT-2 has them, without is a bit better
    gelu: str = 'erf'  # the exact GELU; tanh is the form of OpenAI's GPT-2 weights
    # optimizer
    learning_rate: float = 6e-4  # the peak; small models like more: 1e-3 to 8e-3
    max_iters: int = 600000  # updates in all
    weight_decay: float = 0.1  # on matrices; never on biases and norms
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # and of its square; 0.99 when a batch has few tokens
    grad_clip: float = 1.0  # longest gradient, as a norm; 0 doesn't clip
    decay_lr: bool = True  # false keeps the learning rate at its peak after the warm-up
    warmup_iters: int = 2000  # iterations to rise to the peak in
    lr_decay_iters: int | None = None  # iterations to fall to min_lr in; none means max_iters
    min_lr: float = 6e-5  # a tenth of the peak is usual
    # machine
    backend: str = 'auto'  # for several processes: nccl on GPUs, gloo on CPU
    device: str = 'auto'  # the best there is of cuda, mps, cpu; or one by name, say cuda:1
    dtype: str = 'auto'  # what the hardware does natively of bfloat16, float16, float32
    compile: bool | None = None  # torch.compile; none means on CUDA only, elsewhere it pays late
    peak_tflops: float = 0.0  # the device's peak, to know MFU by; 0 looks it up
    seed: int = 1337  # everything random follows from it

    def __post_init__(self):
        """Refuse what cannot be, before anything slow. Raises UsageError."""
        if self.model_size:
            if self.model_size not in MODEL_SIZES:
                known = ', '.join(MODEL_SIZES)
                raise UsageError(f'model_size={self.model_size!r} is not one of {known}')
            self.n_layer, self.n_head, self.n_embd = MODEL_SIZES[self.model_size]
        if self.model not in ('gpt', 'bigram'):
            raise UsageError(f"model={self.model!r} is not a model: it must be 'gpt' or 'bigram'")
        at_least = {
            1: 'eval_interval log_interval gradient_accumulation_steps batch_size block_size '
               'n_layer n_head n_embd',
            0: 'eval_iters sample_tokens max_iters warmup_iters lr_decay_iters learning_rate '
               'min_lr weight_decay grad_clip beta1 beta2 dropout peak_tflops seed',
        }
        for least, names in at_least.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not value >= least:  # so that NaN is refused as well
                    raise UsageError(f'{name} is {value}: it must be at least {least}')
        for name in ('beta1', 'beta2', 'dropout'):
            if getattr(self, name) >= 1:
                raise UsageError(f'{name} is {getattr(self, name)}: it must be below 1')


class Split:
    """One .bin file of a dataset: little-endian uint16 ids, read where they are needed.

    Plain reads rather than a memory map: what a map has touched counts as this process's memory.
    """

    def __init__(self, path, vocab_size):
        self.path, self.vocab_size = path, vocab_size
        size = os.path.getsize(path)
        if size % 2:
            raise UserError(
                f'{path} has {size} bytes, an odd number for 16-bit ids: prepare it again'
            )
        self.tokens = size // 2
        self.file = open(path, 'rb', buffering=0)
        if size <= 64 << 20:  # small enough to look at every id now; batches are checked anyway
            self.read(np.array([0]), self.tokens)

    def read(self, offsets, length):
        """`length` ids from each of `offsets` on: (B,) to (B, length) int64, if all are known."""
        rows = np.empty((len(offsets), length), '<u2')
        for row, offset in zip(rows, offsets):
            self.file.seek(2 * int(offset))
            self.file.readinto(row)
        if rows.size and rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise UserError(
                f'{self.path} has the id {rows[row, column]} at position {offsets[row] + column}, '
                f'but the vocabulary ends at {self.vocab_size - 1}: the dataset was made with '
                "another tokenizer than the model's; prepare it again or choose another dataset"
            )
        return rows.astype(np.int64)

    def batch(self, offsets, block_size, device):
        """Inputs and targets, each (B, block_size) int64 on `device`: y is x one token later."""
        rows = torch.from_numpy(self.read(offsets, block_size + 1))
        if device.type == 'cuda':  # pinned, so that the copy doesn't wait for the GPU's work
            rows = rows.pin_memory().to(device, non_blocking=True)
        else:
            rows = rows.to(device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def random_offsets(self, key, count, block_size):
        """`count` places to read from, a pure function of `key` (a tuple of whole numbers)."""
        return np.random.default_rng(key).integers(self.tokens - block_size, size=count)


class Dataset:
    """The splits of data/<name> and the tokenizer that made them."""

    def __init__(self, cfg, ranks):
        folder = os.path.join('data', cfg.dataset)
        for leader in (ranks.is_main, ranks.local_rank == 0):  # then machines with their own disk
            missing = not os.path.exists(os.path.join(folder, 'train.bin'))
            if missing and leader:
                self.make(cfg, folder)
            ranks.any(missing)  # the others wait here
        self.meta = self.read_meta(folder)
        self.tokenizer = tokenizer_from(self.meta['tokenizer'])
        self.splits = {}
        for name in ('train', 'val', 'test'):
            path = os.path.join(folder, f'{name}.bin')
            if not os.path.exists(path):
                if name == 'test':
                    continue
                raise UserError(f'{path} is missing: prepare the dataset again')
            split = Split(path, self.tokenizer.vocab_size)
            if split.tokens <= cfg.block_size:
                raise UserError(
                    f'{path} has {split.tokens} tokens, too few for block_size={cfg.block_size}: '
                    'take a smaller block_size or a longer text'
                )
            self.splits[name] = split

    @staticmethod
    def make(cfg, folder):
        """Run the script that `prepare` names."""
        if not cfg.prepare:
            raise UserError(
                f'the dataset {folder} is missing: run the prepare script that makes it, or '
                f'python prepare_text.py your.txt --dataset={cfg.dataset}'
            )
        script, *args = shlex.split(cfg.prepare)
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
        if subprocess.run([sys.executable, script, *args]).returncode:
            raise UserError(f'{cfg.prepare} could not make {folder}: run it by hand to see why')

    @staticmethod
    def read_meta(folder):
        """meta.json; for a dataset of raw GPT-2 ids, which nanoGPT leaves without it, its like."""
        path = os.path.join(folder, 'meta.json')
        try:
            with open(path, encoding='utf-8') as file:
                meta = json.load(file)
            meta['tokenizer']['type']
            return meta
        except FileNotFoundError:
            if os.path.exists(os.path.join(folder, 'meta.pkl')):
                raise UserError(
                    f'{folder} has a meta.pkl, a pickle, which could run code and is not read: '
                    'make a meta.json with python prepare_text.py TEXT --dataset='
                    + os.path.basename(folder)
                ) from None
            return {'tokenizer': {'type': 'gpt2', 'vocab_size': 50257}}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f'{path} is broken ({error}): prepare the dataset again') from None


def learning_rate(cfg, it):
    """The rate for update `it`: a linear rise, then half a cosine down to min_lr.

    Loshchilov & Hutter 2016, arXiv:1608.03983, without the restarts.
    """
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if not cfg.decay_lr:
        return cfg.learning_rate
    decay_iters = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    if it >= decay_iters:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (decay_iters - cfg.warmup_iters)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model, cfg):
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101): weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {'params': matrices, 'weight_decay': cfg.weight_decay},
        {'params': vectors, 'weight_decay': 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True
    )


def restore(optimizer, state):
    """Load a saved state: its moments and step counts, under the settings of this run."""
    for theirs, ours in zip(state['param_groups'], optimizer.param_groups):
        theirs.update({name: value for name, value in ours.items() if name != 'params'})
    optimizer.load_state_dict(state)


def share_of_batch(cfg, ranks):
    """How many of the micro-batches of an update fall to each process."""
    total, world_size = cfg.gradient_accumulation_steps, ranks.world_size
    if total % world_size:
        nearest = max(1, round(total / world_size)) * world_size
        raise UsageError(
            f'gradient_accumulation_steps={total} cannot be shared among {world_size} processes: '
            f'{nearest} can'
        )
    return total // world_size


def seed_of(*key):
    """One 64-bit seed for a tuple of whole numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def micro_batches(split, cfg, ranks, device, start):
    """Yield this process's (x, y), micro-batch after micro-batch, from iteration `start` on.

    The offsets of the whole global batch follow from (seed, iteration), and each rank takes its
    share: so a resumed run goes on with the data where it stopped, on any number of processes.
    """
    count, it = share_of_batch(cfg, ranks), start
    while True:
        offsets = split.random_offsets(
            (cfg.seed, it), cfg.gradient_accumulation_steps * cfg.batch_size, cfg.block_size
        )
        mine = offsets.reshape(ranks.world_size, count, cfg.batch_size)[ranks.rank]
        for row in mine:
            yield split.batch(row, cfg.block_size, device)
        it += 1


def evaluation_batches(split, cfg, ranks, device):
    """Yield this process's share of `eval_iters` fixed random batches, or of the whole split."""
    B, T = cfg.batch_size, cfg.block_size
    if cfg.eval_iters:
        offsets = split.random_offsets((cfg.seed, 0, 0), cfg.eval_iters * B, T)
    else:
        offsets = np.arange(0, split.tokens - T, T)
    chunks = [offsets[i : i + B] for i in range(0, len(offsets), B)]
    for chunk in chunks[ranks.rank :: ranks.world_size]:
        yield split.batch(chunk, T, device)
    rest = (split.tokens - 1) % T
    if not cfg.eval_iters and rest and ranks.is_main:
        yield split.batch([split.tokens - 1 - rest], rest, device)


@torch.no_grad()
def evaluate(model, split, cfg, ranks, device, amp):
    """Mean cross-entropy per token over `split`, in nats, the same on every rank."""
    model.eval()
    losses, counts = [torch.zeros((), device=device)], [0]
    for x, y in evaluation_batches(split, cfg, ranks, device):
        with amp:
            _, loss = model(x, y)
        losses.append(loss)
        counts.append(y.numel())
    model.train()
    counts = torch.tensor(counts, dtype=torch.float64)
    total = torch.stack(losses).cpu().double() @ counts
    total, count = ranks.sum(torch.stack([total, counts.sum()])).tolist()
    return total / count


def report_all_splits(model, data, cfg, ranks, device, amp):
    """Print what `eval_only` asks for."""
    unit = 'character' if data.tokenizer.state()['type'] == 'char' else 'token'
    for name, split in data.splits.items():
        loss = evaluate(model, split, cfg, ranks, device, amp)
        if ranks.is_main:
            print(
                f'{name}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}, '
                f'{loss / math.log(2):.4f} bits per {unit}'
            )


def sample_text(model, tokenizer, cfg, device, amp):
    """A short text by the model as it is now, for whoever watches."""
    prompt = torch.from_numpy(tokenizer.encode(cfg.sample_start).astype(np.int64))
    generator = torch.Generator(device).manual_seed(cfg.seed)
    with amp:
        ids = model.generate(
            prompt[None].to(device), cfg.sample_tokens, 0.8, top_p=0.95, generator=generator
        )
    return tokenizer.decode(ids[0].tolist()).strip('\n')


def starting_point(cfg, data):
    """The model to begin with, and the checkpoint to resume, or None.

    What comes from a checkpoint has that checkpoint's shape; only its dropout, and a shorter
    block_size, are ours to choose.
    """
    state = data.tokenizer.state()
    vocab_size = state['vocab_size']
    padded = 50304 if vocab_size == 50257 else vocab_size  # a multiple of 64 is faster on GPUs
    if cfg.init_from == 'scratch':
        shape = {name: getattr(cfg, name) for name in
                 ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'gelu')}
        config = GPTConfig(vocab_size=padded, real_vocab_size=vocab_size, **shape)
        return (Bigram if cfg.model == 'bigram' else GPT)(config), None
    if is_pretrained(cfg.init_from):
        theirs = tokenizer_of(cfg.init_from).state()
        if theirs != state:
            raise ValueError(
                f'{cfg.init_from} was trained on {theirs["type"]} tokens, {cfg.dataset} has other '
                f'({state["type"]}) ones: prepare it with --tokenizer={theirs["type"]}'
            )
        model = GPT.from_pretrained(cfg.init_from, cfg.dropout, padded)
    else:
        resume = cfg.init_from == 'resume'
        path = os.path.join(cfg.out_dir, 'ckpt.pt') if resume else checkpoint_file(cfg.init_from)
        checkpoint = load_checkpoint(path)
        if resume:
            refuse_to_resume(cfg, checkpoint, path)
        adopt_tokenizer(checkpoint, state, path)
        model = build_model(checkpoint, dropout=cfg.dropout)
        if resume:
            return model, checkpoint
    if isinstance(model, GPT) and cfg.block_size != model.config.block_size:
        model.crop_block_size(cfg.block_size)
    return model, None


def refuse_to_resume(cfg, checkpoint, path):
    """Raise ValueError unless `checkpoint` is a state of the run that `cfg` describes."""
    for key in ('optimizer', 'iter_num', 'best_val_loss', 'config'):
        if key not in checkpoint:
            raise ValueError(f'{path} has weights but no {key!r}, so no run can go on from it: '
                             f'begin a new one from the weights with --init_from={path}')
    if checkpoint['iter_num'] > cfg.max_iters:
        raise ValueError(f'{path} is at iteration {checkpoint["iter_num"]} already, past '
                         f'max_iters={cfg.max_iters}: give a larger --max_iters')
    was = checkpoint['model_args'] | {'model': checkpoint['config'].get('model', 'gpt')}
    for name in ('model', 'n_layer', 'n_head', 'n_embd', 'block_size', 'bias'):
        if was.get(name) != getattr(cfg, name):
            raise ValueError(
                f'{name} is {getattr(cfg, name)} here but {was.get(name)} in {path}: give the '
                'settings that the run began with, or start afresh in another out_dir'
            )


def schedule_note(cfg, was, it):
    """What becomes of the learning rate if a run goes on with another schedule than before."""
    before = replace(cfg, **{name: was.get(name, getattr(cfg, name)) for name in
                             ('learning_rate', 'min_lr', 'max_iters', 'warmup_iters',
                              'lr_decay_iters', 'decay_lr')})
    old, new = learning_rate(before, it), learning_rate(cfg, it)
    note = f'resumed at iteration {it} of {cfg.max_iters}'
    if before.max_iters != cfg.max_iters or old != new:
        end = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
        note += f', which were to be {before.max_iters}: the learning rate goes on from {new:.3g} '
        note += f'(it would have been {old:.3g})'
        if not cfg.decay_lr:
            note += ' and stays'
        elif it < end:
            note += f' and falls to min_lr={cfg.min_lr:.3g} at iteration {end}'
        else:
            note += f' and stays, since lr_decay_iters={end} has passed'
    return note


def adopt_tokenizer(checkpoint, state, path):
    """Fit a checkpoint to the dataset's tokenizer.

    Another alphabet is welcome: characters that the model knows keep their rows of the embedding,
    new ones start like an untrained model's. Raises ValueError where letters would meet byte
    pairs.
    """
    theirs = checkpoint.get('tokenizer')
    if theirs is None:
        # nanoGPT's checkpoints keep it elsewhere: all that can be asked is whether the ids fit.
        if state['vocab_size'] > checkpoint['model_args']['vocab_size']:
            raise ValueError(
                f'{path} knows {checkpoint["model_args"]["vocab_size"]} tokens, the dataset has '
                f'{state["vocab_size"]}: choose the dataset that it was trained on'
            )
        checkpoint['tokenizer'] = state
    elif theirs['type'] != state['type']:
        raise ValueError(
            f'{path} was trained on {theirs["type"]} tokens, the dataset has {state["type"]} '
            f'ones: prepare it with --tokenizer={theirs["type"]}'
        )
    elif theirs != state and 'transformer.wte.weight' not in checkpoint['model']:
        raise ValueError(f'{path} is a bigram of another alphabet: train one from scratch')
    elif theirs != state:
        known = {char: row for row, char in enumerate(theirs['chars'])}
        for key, old in list(checkpoint['model'].items()):
            if key in ('transformer.wte.weight', 'lm_head.weight'):
                new = torch.normal(0, 0.02, (state['vocab_size'], old.size(1)))
                for row, char in enumerate(state['chars']):
                    if char in known:
                        new[row] = old[known[char]]
                checkpoint['model'][key] = new
        checkpoint['model']['lm_head.weight'] = checkpoint['model']['transformer.wte.weight']
        checkpoint['model_args']['vocab_size'] = state['vocab_size']
        checkpoint['tokenizer'] = state


def train(cfg):
    """Train as `cfg` says; returns the best validation loss, or None for `eval_only`.

    Raises UserError for what the user can mend. After Ctrl-C or SIGTERM it saves and ends the
    process.
    """
    ranks = Ranks.from_environment()
    micro_steps = share_of_batch(cfg, ranks)
    device, dtype = runtime.prepare_machine(cfg, ranks)
    amp = runtime.autocast(device, dtype)
    with ranks.joined(device, cfg.backend), StopSignal() as stop:
        # ---- set up: data, model, optimizer, and where in the run they stand
        torch.manual_seed(cfg.seed)
        data = Dataset(cfg, ranks)
        with console.blame_user():
            raw, checkpoint = starting_point(cfg, data)
        raw.to(device)
        raw.loss_only = True  # nobody here looks at logits
        cfg = replace(cfg, gelu=raw.config.gelu)
        optimizer = make_optimizer(raw, cfg)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        start, best_val_loss, note = 0, math.inf, ''
        if checkpoint:
            start, best_val_loss = checkpoint['iter_num'], float(checkpoint['best_val_loss'])
            restore(optimizer, checkpoint['optimizer'])
            if 'scaler' in checkpoint:
                scaler.load_state_dict(checkpoint['scaler'])
            note = schedule_note(cfg, checkpoint['config'], start)
            del checkpoint  # a second copy of everything

        weights = list(raw.parameters())
        # What to seed for dropout. torch.manual_seed would visit every other backend too, which
        # on a CPU takes 2 % of a small model's iteration.
        randomness = torch.default_generator if device.type == 'cpu' else torch
        batches = micro_batches(data.splits['train'], cfg, ranks, device, start)
        x, y = next(batches)
        net = raw  # raw keeps its own name: its state dict has no wrapper's prefix
        if cfg.compile or (cfg.compile is None and device.type == 'cuda'):
            net = runtime.compile_or_eager(raw, (x, y), amp)
        if cfg.eval_only:
            return report_all_splits(net, data, cfg, ranks, device, amp)
        model = net
        if ranks.world_size > 1:
            model = DistributedDataParallel(net, gradient_as_bucket_view=True)
        monitor = Monitor(cfg, ranks, device, dtype, raw, data.splits['train'].tokens, start)
        if note:
            monitor.progress.say(note)

        def save(name):
            """The state before update `it`: the weights in best.pt, all of it in ckpt.pt."""
            if not all(p.isfinite().all() for p in weights):
                raise UserError(f'weights are not finite at iteration {it}: not saved. {REMEDIES}')
            state = {
                'model': raw.state_dict(), 'model_args': raw.config.model_args(), 'iter_num': it,
                'best_val_loss': best_val_loss, 'config': asdict(cfg),
                'tokenizer': data.tokenizer.state(), 'format': {'name': 'ozgpt', 'version': 1},
            }
            if name == 'ckpt.pt':
                state |= {'optimizer': optimizer.state_dict()}
                state |= {'scaler': scaler.state_dict()} if scaler.is_enabled() else {}
            if ranks.is_main:
                runtime.save(os.path.join(cfg.out_dir, name), state)

        bad_in_a_row = torch.zeros((), device=device)
        for it in range(start, cfg.max_iters + 1):
            last = it == cfg.max_iters
            if ranks.any(stop.received):
                save('ckpt.pt')
                monitor.stopped(it)
                sys.exit(128 + (stop.received or signal.SIGTERM))

            if it % cfg.eval_interval == 0 or last:
                with monitor.pause():
                    try:
                        losses = {name: evaluate(net, data.splits[name], cfg, ranks, device, amp)
                                  for name in ('train', 'val')}
                    except Exception:
                        save('ckpt.pt')  # whatever went wrong there, the training isn't lost
                        raise
                    improved = losses['val'] < best_val_loss
                    if improved:
                        best_val_loss = losses['val']
                        save('best.pt')
                    if improved or last or cfg.always_save_checkpoint:
                        save('ckpt.pt')
                    monitor.evaluated(it, losses, improved)
                    if cfg.sample_tokens and ranks.is_main:
                        monitor.show(sample_text, raw, data.tokenizer, cfg, device, amp)
            if last:
                monitor.finished(it, best_val_loss)
                return best_val_loss

            # ---- TRAINING: all that moves the weights is from here ...
            randomness.manual_seed(seed_of(cfg.seed, it, ranks.rank))
            rate = learning_rate(cfg, it)
            for group in optimizer.param_groups:
                group['lr'] = rate
            mean_loss = torch.zeros((), device=device)
            for micro_step in range(micro_steps):
                if ranks.world_size > 1:  # gradients travel once, with the last micro-batch
                    model.require_backward_grad_sync = micro_step == micro_steps - 1
                with amp:
                    _, loss = model(x, y)
                    loss = loss / micro_steps
                scaler.scale(loss).backward()
                x, y = next(batches)  # read while the GPU is at work
                mean_loss += loss.detach()
            scaler.unscale_(optimizer)
            # A rare long gradient must not undo many steps: Pascanu et al. 2012, arXiv:1211.5063.
            norm = torch.nn.utils.clip_grad_norm_(weights, cfg.grad_clip or math.inf)
            mean_loss = ranks.mean(mean_loss)
            # One bad batch must not spoil the weights. The fused optimizer leaves an update out
            # where found_inf is 1, on the device, so that nobody waits for a GPU to ask. On a CPU
            # we can ask, which spares 2 % of a small model's iteration.
            bad = ~(norm + mean_loss).isfinite()
            optimizer.found_inf = bad.float() if device.type != 'cpu' or bad else None
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            bad_in_a_row = (bad_in_a_row + 1) * bad
            # ---- ... to here

            if monitor.trained(it, mean_loss, norm, rate, optimizer) and bad_in_a_row >= 10:
                raise UserError(
                    'loss or gradient were not finite ten times in a row, up to iteration '
                    f'{it} (loss {mean_loss.item()}): {cfg.out_dir}/ckpt.pt is still good. '
                    f'{REMEDIES}'
                )


def main(argv):
    cfg = override(TrainConfig(), argv, usage=__doc__)
    train(cfg)


if __name__ == '__main__':
    console.run(main)
