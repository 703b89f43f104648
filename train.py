"""Train a GPT.

    python train.py config/train_wizard_char.py                     # about a minute on a laptop
    python train.py config/train_wizard_char.py --max_iters=3000    # the last setting wins
    python train.py config/train_wizard_char.py --init_from=resume  # continue where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

`TrainConfig` lists every setting. `update` is the algorithm; `training_run` has the loop around it.
"""

import math
import os
import signal
import sys
import time
from collections import defaultdict, deque
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np
import torch

import console
import plot_loss
import runtime
from chat import question_ids
from checkpoint import load_checkpoint, restore, save_run
from configurator import check, override
from console import Log, Progress, UsageError, UserError, hms
from dataset import Dataset, evaluation_batches, training_batches
from llama import MODELS
from model import MODEL_SIZES
from muon import Muon
from runtime import Ranks, is_matrix
from start import starting_point
from tokenizer import prompt_ids


@dataclass
class TrainConfig:
    # results
    out_dir: str = 'out'  # for ckpt.pt (to resume), best.pt (to use), log.csv and loss.png
    eval_interval: int = 2000  # evaluate, save and show a sample every N iterations
    log_interval: int = 1  # a line and a row of log.csv every N iterations
    eval_iters: int = 200  # batches per evaluation, the same each time; 0: the whole split
    eval_only: bool = False  # only evaluate, every split, with perplexity
    always_save_checkpoint: bool = True  # false: ckpt.pt only if val improved, or if interrupted
    keep_interval: int = 0  # also keep a checkpoint, ckpt-N.pt, every N iterations; 0: none
    sample_tokens: int = 200  # length of the sample shown at each evaluation; 0: none
    sample_start: str = '\n'  # how the sample begins; of a chat model, the question
    wandb_log: bool = False  # log to Weights & Biases too: pip install wandb
    wandb_project: str = 'owt'  # the project there
    wandb_run_name: str = 'gpt2'  # the run's name there
    # data
    dataset: str = 'openwebtext'  # the folder data/<dataset> with train.bin and val.bin
    gradient_accumulation_steps: int = 40  # micro-batches per update, over all processes together
    batch_size: int = 12  # sequences per micro-batch: as many as memory allows
    block_size: int = 1024  # tokens of context; the cost of attention grows with its square
    # model
    init_from: str = 'scratch'  # scratch; resume; resume:FILE; a checkpoint; or Hugging Face's
    model: str = 'gpt'  # gpt; llama: today's architecture; bigram: the baseline to beat
    model_size: str = field(  # sets the next three, for example gpt2-medium; see model.py
        default='gpt2', metadata={'resets': ('n_layer', 'n_head', 'n_embd')})
    n_layer: int | None = None  # depth: number of blocks, one after another
    n_head: int | None = None  # attention heads; must divide n_embd
    n_embd: int | None = None  # width: length of the vector that represents a token
    dropout: float = 0.0  # 0 for pretraining; 0.1 or 0.2 when the text is small
    bias: bool = False  # gpt: biases in Linear and LayerNorm, as in GPT-2; false is slightly faster
    gelu: str = 'erf'  # gpt: erf is the exact GELU; tanh the approximation that OpenAI's GPT-2 uses
    n_kv_head: int | None = None  # llama: heads of keys and values; none: n_head
    qk_norm: bool = True  # llama: normalize queries and keys; more stable, and a lower loss
    tied: bool = True  # llama: one matrix reads and predicts tokens; false suits small alphabets
    # optimizer
    optimizer: str = 'adamw'  # adamw; muon for the matrices inside blocks, AdamW for the rest
    muon_lr: float = 0.02  # Muon's peak rate; it follows the same schedule
    muon_momentum: float = 0.95  # Muon's decay of the gradient's running mean
    muon_weight_decay: float = 0.1  # Muon's; matters more than AdamW's: Muon's updates are larger
    muon_steps: int = 3  # orthogonalization steps per update; 2 are faster but learn less
    learning_rate: float = 6e-4  # the peak (0 stops Muon too); small models like 1e-3 to 8e-3
    max_iters: int = 600000  # number of updates
    weight_decay: float = 0.1  # on matrices; never on biases and norms
    beta1: float = 0.9  # AdamW's decay of the gradient's running mean
    beta2: float = 0.95  # the same of the squared gradient's mean; 0.99 for batches of few tokens
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    schedule: str = 'cosine'  # how the rate falls from peak to min_lr: cosine, linear, or plateau
    decay_lr: bool = True  # false: constant rate, and no warmup
    warmup_iters: int = 2000  # iterations of linear rise to the peak
    lr_decay_iters: int | None = None  # iteration at which min_lr is reached; none: max_iters
    min_lr: float = 6e-5  # the rate at the end; a tenth of the peak is usual
    # machine
    backend: str = 'auto'  # for several processes: nccl on GPUs, gloo on CPU
    device: str = 'auto'  # the best of cuda, mps, cpu; or one by name, for example cuda:1
    dtype: str = 'auto'  # the best the hardware supports natively: bfloat16, float16 or float32
    shard: bool = False  # each process keeps only a part of weights, gradients and optimizer state
    recompute: bool = False  # compute activations again for gradients: less memory, more time
    compile: bool | None = None  # torch.compile; none: on CUDA only, where it soon saves time
    peak_tflops: float = 0.0  # the device's peak; MFU is the fraction in use; 0: look it up
    seed: int = 1337  # seed of initialization, batches and dropout

    def __post_init__(self):
        """Fill in the sizes. Raises UsageError for impossible values, before anything slow."""
        check(self, at_least_1='eval_interval log_interval gradient_accumulation_steps batch_size '
              'block_size max_iters muon_steps n_kv_head', below_1='beta1 beta2 muon_momentum',
              model=MODELS, model_size=MODEL_SIZES, optimizer=OPTIMIZERS, schedule=SCHEDULES,
              backend=['auto', 'nccl', 'gloo'])
        for name, size in zip(('n_layer', 'n_head', 'n_embd'), MODEL_SIZES[self.model_size]):
            if getattr(self, name) is None:
                setattr(self, name, size)
        self.out_dir = os.path.expanduser(self.out_dir)
        if self.eval_only and self.init_from == 'scratch':
            raise UsageError('eval_only needs a trained model: add --init_from=OUT_DIR')

    @property
    def update_tokens(self):
        """Tokens in the batch of an update, over all processes."""
        return self.gradient_accumulation_steps * self.batch_size * self.block_size


# After the warmup, the rate's way from 1 (the peak) to 0 (min_lr) while `done` goes from 0 to 1.
# Cosine: Loshchilov & Hutter 2016, arXiv:1608.03983. Plateau: Haegele et al. 2024,
# arXiv:2405.18392. Add your own here.
SCHEDULES = {
    'cosine': lambda done: (1 + math.cos(math.pi * done)) / 2,
    'linear': lambda done: 1 - done,
    'plateau': lambda done: min(1, (1 - done) / 0.2),
}


def learning_rate(cfg, it):
    """The rate for update `it`: a linear rise to the peak, then down to min_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    decay_iters = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    if it >= decay_iters:
        return cfg.min_lr
    done = (it - cfg.warmup_iters) / (decay_iters - cfg.warmup_iters)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * SCHEDULES[cfg.schedule](done)


def adamw(model, cfg, dtype, params=None):
    """[AdamW] for `params`, or all weights: Loshchilov & Hutter 2017, arXiv:1711.05101."""
    params = list(model.parameters() if params is None else params)
    return [torch.optim.AdamW(
        [{'params': [p for p in params if is_matrix(p)], 'weight_decay': cfg.weight_decay},
         {'params': [p for p in params if not is_matrix(p)], 'weight_decay': 0.0}],
        lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)]


def muon(model, cfg, dtype):
    """[AdamW, Muon]: Muon for the matrices inside blocks, AdamW for the rest.

    `self.optimizer = 'adamw'` in a module, for example a router of experts, keeps it out of Muon.
    """
    left_out = {p for module in model.modules() if getattr(module, 'optimizer', None) == 'adamw'
                for p in module.parameters()}
    hidden = {p: None for block in model.blocks for p in block.parameters()  # an ordered set
              if is_matrix(p) and p not in left_out}
    if not hidden:
        raise UsageError('optimizer=muon needs a model with blocks: a gpt or a llama')
    rest = [p for p in model.parameters() if p not in hidden]
    return adamw(model, cfg, dtype, rest) + [Muon(
        hidden, cfg.muon_lr, cfg.muon_momentum, cfg.muon_weight_decay, cfg.muon_steps,
        bf16=dtype == torch.bfloat16)]


# By the setting `optimizer`: functions that return a list of optimizers, each with its peak rate,
# which the schedule scales. Add your own here.
OPTIMIZERS = {'adamw': adamw, 'muon': muon}


def training_loss(model, x, y):
    """The loss that an update lowers, and parts of it for the log: scalar tensors, by new names.

    Add a second loss here, for example the balance of experts. Evaluations don't include it.
    """
    _, loss = model(x, y, loss_only=True)
    return loss, {}


def update(model, batches, cfg, optimizers, scaler, amp, ranks):
    """One update of the weights by this rank's next batches: forward, backward, clip, step.

    Returns the loss, the norm of the gradient, and the named parts of the loss: means, as floats.
    """
    means, micro_steps = defaultdict(float), cfg.gradient_accumulation_steps // ranks.world_size
    for micro_step in range(micro_steps):
        x, y, divisor = next(batches)  # divisor: see training_batches in dataset.py
        runtime.sync_gradients(model, micro_step == micro_steps - 1)  # only after the last one
        with amp:
            loss, parts = training_loss(model, x, y)
        scaler.scale(loss / divisor).backward()  # gradients add up, and ranks are averaged
        for name, value in dict(loss=loss, **parts).items():
            means[name] += value.detach() / divisor
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    # Clip: one very large gradient must not undo many steps: Pascanu et al. 2012, arXiv:1211.5063.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    norm = runtime.gather(norm)  # the same on all ranks, and so is its mean
    averaged = ranks.sum(torch.stack([*means.values(), norm])) / ranks.world_size
    loss, *part_means, norm = averaged.tolist()  # here the host waits for the GPU
    if math.isfinite(loss + norm):  # else skip the update: a bad batch must not spoil the weights
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    model.zero_grad()
    runtime.sync_buffers(model)
    return loss, norm, dict(zip([*means][1:], part_means))  # the first one is the loss


@torch.no_grad()
def evaluate(model, splits, cfg, ranks, device, amp, stop, progress):
    """A dict by name: each split's mean cross-entropy per token, in nats; the same on every rank.

    Empty if a signal came to stop the run. Raises UserError if a split has no target.
    """
    losses = {}
    model.eval()
    for name, split in splits.items():
        total, count = 0.0, 0
        for x, y, done in evaluation_batches(split, cfg, ranks, device):
            if ranks.any(stop.received):
                return {}
            progress.show_progress(done, f'evaluating {name}: {done:.0%}')
            with amp:
                _, loss = model(x, y, loss_only=True)
            counted = (y != -1).sum().item()
            total, count = total + loss.item() * counted, count + counted
        total, count = ranks.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
        if not count:
            raise UserError(f'no answer in {split.path} begins within block_size='
                            f'{cfg.block_size} tokens: use a larger one')
        losses[name] = total / count
    model.train()
    return losses


def measure_best_again(run, model, cfg, data, measure, ranks, progress):
    """Note in `run` how val is measured; if that has changed, measure best.pt again."""
    windows = cfg.eval_iters * cfg.batch_size
    measured_on = dict(sha256=data.sha256, tokens=data.splits['val'].tokens, windows=windows,
                       block_size=cfg.block_size, seed=cfg.seed if windows else None)
    path = f'{cfg.out_dir}/best.pt'
    if run['measured_on'] == measured_on:
        return
    run |= {'measured_on': measured_on, 'best_val_loss': math.inf}
    if cfg.init_from == 'resume' and ranks.agree_on_file(path):
        current = {name: w.clone() for name, w in runtime.gather_weights(model).items()}
        runtime.load_weights(model, load_checkpoint(path)['model'])
        losses = measure(model, {'val': data.splits['val']})
        runtime.load_weights(model, current)
        if losses:  # else a signal came
            run['best_val_loss'] = losses['val']
            progress.print_line('the validation data, or the way to measure, have changed: now '
                                f'{path} has a loss of {losses["val"]:.4f}')


def sample_text(model, data, cfg, ranks, device, amp):
    """A short sample of the current model, or its answer to sample_start, to print."""
    tokenizer, mask = data.tokenizer, data.splits['train'].mask
    encode = prompt_ids if mask is None or not tokenizer.chat_template else question_ids
    failure = ''
    try:
        ids = encode(tokenizer, cfg.sample_start)
    except UserError as error:  # the alphabet lacks a character, or tiktoken's files are missing
        failure = f'(no sample for --sample_start={cfg.sample_start!r}: {error})'
    if ranks.any(bool(failure)):  # perhaps of one machine; a sharded model needs all ranks
        return failure or '(no sample: another process cannot encode sample_start)'
    generator, prompt = torch.Generator(device).manual_seed(cfg.seed), torch.tensor([ids])
    with amp:
        written = model.generate(prompt.to(device), cfg.sample_tokens, 0.8, top_p=0.95,
                              generator=generator, vocab_size=tokenizer.vocab_size)[0].tolist()
    shown = tokenizer.decode(written)
    if encode is question_ids:  # the answer alone, to its end
        answer = tokenizer.decode(written[len(ids) :]).split(tokenizer.decode([tokenizer.eot]))[0]
        shown = f'{cfg.sample_start}\n{answer}'
    return ''.join(f'  | {line}\n' for line in console.printable(shown.strip('\n')).split('\n'))


def train(cfg, catch_signals=False):
    """Train as `cfg` says; returns the best validation loss, or None for `eval_only`.

    catch_signals: save and exit after Ctrl-C and the signals that end jobs. Nothing else in the
    process is changed. Raises UserError.
    """
    ranks = Ranks()
    cfg = replace(cfg, shard=cfg.shard and ranks.world_size > 1)  # one process has nothing to shard
    micro_batches = cfg.gradient_accumulation_steps
    if micro_batches % ranks.world_size and not cfg.eval_only:
        raise UsageError(f'gradient_accumulation_steps={micro_batches} must be a multiple of the '
                         f'{ranks.world_size} processes: try '
                         f'{micro_batches + -micro_batches % ranks.world_size}')
    device, dtype = runtime.device_and_dtype(cfg)
    progress = Progress(enabled=ranks.is_main)
    writes = ranks.is_main and not cfg.eval_only
    remedy = (f'lower --batch_size={cfg.batch_size} (with --gradient_accumulation_steps='
              f'{micro_batches} raised to keep the update), --block_size={cfg.block_size}, or the '
              "model's size")
    with (
        console.locked(cfg.out_dir) if writes else nullcontext(),
        torch.accelerator.device_index(device.index),
        # the state of this device alone: to read that of others would start CUDA on each of them
        torch.random.fork_rng([] if device.type == 'cpu' else [device], device_type=device.type),
        ranks.joined(device, cfg.backend), runtime.out_of_memory(remedy),
    ):
        data = Dataset(cfg.dataset, ranks)
        with console.stop_signals(catch_signals, announce=writes) as stop:
            best_val_loss = training_run(cfg, data, ranks, device, dtype, stop, progress)
    if stop.received:  # only here, when all processes have left the group
        sys.exit(128 + stop.received)  # as a shell reports a process that a signal ended
    return best_val_loss


def set_up(cfg, data, ranks, device, dtype, progress):
    """Make or load what a run consists of: (cfg, model, optimizers, scaler, run)."""
    cfg, model, checkpoint = starting_point(cfg, data.tokenizer, ranks, device, dtype, progress)
    optimizers = OPTIMIZERS[cfg.optimizer](model, cfg, dtype)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group['lr_scale'] = group['lr'] / (cfg.learning_rate or 1)  # Muon's peak is another one
    # In float16 small gradients underflow, so the loss is scaled up during backward.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # The numbers that a checkpoint keeps for a resumed run. Add your own here.
    run = dict(iter_num=0, best_val_loss=math.inf, measured_on=None, tokens=0, skipped=0,
               seconds=0.0, wandb_id=None)
    if checkpoint and not cfg.eval_only:
        run |= restore(checkpoint, run, optimizers, scaler)
    split = data.splits['train']
    progress.print_line(
        f'data/{cfg.dataset} ({data.source}): {split.tokens:,} train tokens, {cfg.update_tokens:,} '
        f'an update; {cfg.model} of {model.num_params():,} parameters on {device} in '
        + str(dtype)[6:] + f'; results in {os.path.abspath(cfg.out_dir)}' * (not cfg.eval_only))
    longer = 0 if split.mask is None else (np.diff(split.borders) > cfg.block_size + 1).sum()
    if longer and not cfg.eval_only:
        progress.print_line(f'{longer:,} conversations are longer than block_size={cfg.block_size}:'
                            ' only their beginnings are learned')
    return cfg, model, optimizers, scaler, run


def training_run(cfg, data, ranks, device, dtype, stop, progress):
    """Look, learn and tell, in turn, until max_iters. Returns the best validation loss."""
    cfg, raw, optimizers, scaler, run = set_up(cfg, data, ranks, device, dtype, progress)
    # Matrix products are in `dtype`; operations that need more precision stay in float32.
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    measure = partial(evaluate, cfg=cfg, ranks=ranks, device=device, amp=amp, stop=stop,
                      progress=progress)
    if cfg.eval_only:
        for name, loss in measure(raw, data.splits).items():
            progress.print_line(f'{name}: loss {loss:.4f}, {loss / math.log(2):.4f} bits per token'
                                f', perplexity {math.inf if loss > 700 else math.exp(loss):.5g}')
        return None
    measure_best_again(run, raw, cfg, data, measure, ranks, progress)
    splits = {name: data.splits[name] for name in ('val', 'train')}  # test: for eval_only
    batches = training_batches(splits['train'], cfg, ranks, device, run['iter_num'])
    model = runtime.wrap(raw, cfg, ranks, device, amp, splits['train'])
    peak_speed = runtime.peak_speed(raw, cfg, ranks, device, dtype)
    log = Log(cfg, run, ranks.is_main)
    saved_path, bad_in_a_row, eval_seconds, times = None, 0, 0.0, deque(maxlen=20)  # s per update
    began = time.perf_counter() - run['seconds']

    for it in range(run['iter_num'], cfg.max_iters + 1):  # the last turn only evaluates
        # --- look: evaluate, save, sample
        before, losses, improved, is_last = time.perf_counter(), {}, False, it == cfg.max_iters
        if it % cfg.eval_interval == 0 or is_last:
            losses = measure(model, splits)
        if losses:
            # <=, not <: after a crash between two saves, the same loss must count as the best again
            improved = it > 0 and losses['val'] <= run['best_val_loss']
            if improved or (it == 0 and cfg.init_from != 'scratch'):  # fine-tuning must beat this
                run['best_val_loss'] = losses['val']
            progress.print_line(f'step {it}: train loss {losses["train"]:.4f}, val loss '
                                f'{losses["val"]:.4f}' + ' (the best so far)' * improved)
        run |= {'iter_num': it, 'seconds': time.perf_counter() - began}
        row = {'iteration': it, 'tokens': run['tokens'], 'seconds': round(run['seconds'], 3),
               'epochs': run['tokens'] / splits['train'].tokens,
               'train_eval_loss': losses.get('train'), 'val_loss': losses.get('val')}
        if is_last:
            log.write(row)  # before the checkpoint: a crash after that must not lose the row
        stopping = ranks.any(stop.received)
        is_kept = cfg.keep_interval and it % cfg.keep_interval == 0
        if improved or (times and (stopping or is_kept or losses and cfg.always_save_checkpoint)):
            saved_path = save_run(cfg, ranks, raw, optimizers, scaler, data.tokenizer, run, log,
                                  improved, is_kept, is_evaluated=bool(losses))
        if losses:
            if cfg.sample_tokens and math.isfinite(losses['val']):
                progress.print_line(sample_text(raw, data, cfg, ranks, device, amp))
            eval_seconds = time.perf_counter() - before
        if is_last or stopping:
            break

        # --- learn: one update
        seed = np.random.SeedSequence((cfg.seed, it, ranks.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))  # for dropout: the same if resumed, another on each rank
        rate, before = learning_rate(cfg, it), time.perf_counter()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = rate * group['lr_scale']
        loss, norm, parts = update(model, batches, cfg, optimizers, scaler, amp, ranks)

        # --- tell: progress line, log
        times.append(time.perf_counter() - before)
        seconds = median(times)
        speed, is_finite = cfg.update_tokens / seconds, math.isfinite(loss + norm)
        mfu = round(speed / peak_speed, 4) if peak_speed else None
        left = hms((seconds + eval_seconds / cfg.eval_interval) * (cfg.max_iters - it - 1))
        line = (f'iter {it}: loss {loss:.4f}, time {1e3 * seconds:.2f}ms, {left} left, '
                f'{speed:,.0f} tok/s, epoch {row["epochs"]:.2f}'
                + (f', mfu {mfu:.1%}' if mfu else ''))
        if progress.live:
            progress.show_progress((it + 1) / cfg.max_iters, line)
        elif it % cfg.log_interval == 0:
            progress.print_line(line)
        run['tokens'] += cfg.update_tokens
        run['skipped'] += not is_finite
        if it % cfg.log_interval == 0 or losses:
            log.write(row | {'train_loss': loss, **parts, 'learning_rate': rate, 'grad_norm': norm,
                             'skipped': run['skipped'], 'tokens_per_s': round(speed), 'mfu': mfu})
        if losses:
            plot_loss.draw_run(log, progress)
        bad_in_a_row = 0 if is_finite else bad_in_a_row + 1
        if bad_in_a_row == 10:
            raise UserError(f'loss ({loss}) or gradient not finite ten times in a row, up to '
                            f'iteration {it}: resume from a good checkpoint in {cfg.out_dir}, with '
                            'a lower --learning_rate or --grad_clip, or with --dtype=float32')

    log.close()
    plot_loss.draw_run(log, progress, at_end=True)
    stop.received = stop.received or stopping * signal.SIGTERM  # if only another process got one
    console.print_end(cfg, run, saved_path, stopping, data, progress)
    return run['best_val_loss']


def main(argv):
    cfg = override(TrainConfig(), argv, usage=__doc__)
    runtime.set_speed_options(cfg.shard)
    train(cfg, catch_signals=True)


if __name__ == '__main__':
    console.run(main)
