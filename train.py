"""Train a GPT.

    python train.py config/train_wizard_char.py                    # a minute or two on a laptop
    python train.py config/train_wizard_char.py --max_iters=3000   # what comes later wins
    python train.py config/train_wizard_char.py --init_from=resume # go on where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

`TrainConfig` lists every setting; `training_run` has the loop, to be read from top to bottom.
"""

import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

import console
import runtime
from checkpoint import MODELS, restore, save, starting_point
from configurator import override
from console import Progress, UsageError, UserError, clock
from dataset import Dataset, evaluation_batches, training_batches
from llama import Muon
from model import MODEL_SIZES
from runtime import Log, Ranks, stop_signal
from tokenizer import prompt_ids

REMEDIES = 'Remedies: a lower --learning_rate, --dtype=float32, a smaller --grad_clip'


@dataclass
class TrainConfig:
    # results
    out_dir: str = 'out'  # for ckpt.pt (to resume), best.pt (to use), log.csv and loss.png
    eval_interval: int = 2000  # evaluate, save and show a sample every so many iterations
    log_interval: int = 1  # a line and a row of log.csv every so many iterations
    eval_iters: int = 200  # batches per evaluation, the same each time; 0 takes the whole split
    eval_only: bool = False  # evaluate every split, with perplexity, and stop
    always_save_checkpoint: bool = True  # false: ckpt.pt only if val improved, or if interrupted
    sample_tokens: int = 200  # length of the sample shown at each evaluation; 0 shows none
    sample_start: str = '\n'  # what the sample begins with
    wandb_log: bool = False  # log to Weights & Biases too: pip install wandb
    wandb_project: str = 'owt'  # the project there
    wandb_run_name: str = 'gpt2'  # the run's name there
    # data
    dataset: str = 'openwebtext'  # the folder data/<dataset> with train.bin and val.bin
    gradient_accumulation_steps: int = 40  # micro-batches per update, over all processes together
    batch_size: int = 12  # sequences per micro-batch: as many as memory allows
    block_size: int = 1024  # tokens of context: attention costs its square
    # model
    init_from: str = 'scratch'  # scratch, resume, a checkpoint, or Hugging Face's: gpt2, a folder
    model: str = 'gpt'  # gpt; llama: today's architecture; bigram: the baseline to beat
    model_size: str = ''  # a name in model.py's table; it replaces the defaults of the three below
    n_layer: int = 12  # depth: how many blocks, one after the other
    n_head: int = 12  # attention heads; n_embd must divide by it
    n_embd: int = 768  # width: numbers that stand for a token in each block
    dropout: float = 0.0  # 0 for pretraining; 0.1 or 0.2 when the text is small
    bias: bool = False  # biases in Linear and LayerNorm: GPT-2 has them, without is a bit faster
    gelu: str = 'erf'  # the exact GELU; tanh is the form of OpenAI's GPT-2 weights
    n_kv_head: int | None = None  # llama: heads of keys and values; none means n_head
    qk_norm: bool = True  # llama: norms on queries and keys; steadier, and a lower loss
    tied: bool = True  # llama: one matrix reads and predicts tokens; false suits small alphabets
    # optimizer
    optimizer: str = 'adamw'  # adamw; muon for the matrices inside blocks, AdamW for the rest
    muon_lr: float = 0.02  # Muon's peak rate; it follows the same schedule
    muon_momentum: float = 0.95  # Muon's decay of the gradient's running mean
    muon_weight_decay: float = 0.1  # Muon's; its updates are large, so this one matters
    muon_steps: int = 3  # to make an update orthogonal; 2 take less time, but learn less
    learning_rate: float = 6e-4  # the peak; small models like more: 1e-3 to 8e-3
    max_iters: int = 600000  # updates in all
    weight_decay: float = 0.1  # on matrices; never on biases and norms
    beta1: float = 0.9  # AdamW's decay of the gradient's running mean
    beta2: float = 0.95  # and of its square's; 0.99 when a batch has few tokens
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    decay_lr: bool = True  # false keeps the learning rate constant, from the first update on
    warmup_iters: int = 2000  # iterations of linear rise to the peak
    lr_decay_iters: int | None = None  # iteration at which min_lr is reached; none means max_iters
    min_lr: float = 6e-5  # a tenth of the peak is usual; above the peak, the rate rises to it
    # machine
    backend: str = 'auto'  # for several processes: nccl on GPUs, gloo on CPU
    device: str = 'auto'  # the best there is of cuda, mps, cpu; or one by name, say cuda:1
    dtype: str = 'auto'  # what the hardware does natively of bfloat16, float16, float32
    shard: bool = False  # keep only a part of weights, gradients and moments on each process
    compile: bool | None = None  # torch.compile; none means on CUDA only, where it soon pays
    peak_tflops: float = 0.0  # the device's peak, to know MFU by; 0 looks it up
    seed: int = 1337  # all that is drawn in training follows from it

    def __post_init__(self):
        """Refuse what is impossible, before anything slow. Raises UsageError."""
        if self.eval_only and self.init_from == 'scratch':
            raise UsageError('eval_only needs a trained model: add --init_from=OUT_DIR')
        counts = ('eval_interval', 'log_interval', 'gradient_accumulation_steps', 'batch_size',
                  'block_size', 'max_iters', 'muon_steps', 'n_kv_head')
        choices = dict(model=[*MODELS], optimizer=['adamw', 'muon'], model_size=['', *MODEL_SIZES],
                       backend=['auto', 'nccl', 'gloo'])
        for name, value in vars(self).items():
            if name in choices and value not in choices[name]:
                raise UsageError(f'{name}={value!r} must be one of {choices[name]}')
            least = 1 if name in counts else 0
            if isinstance(value, (int, float)) and not value >= least:  # so NaN is refused as well
                raise UsageError(f'{name} is {value}: it must be at least {least}')
            if name in ('beta1', 'beta2', 'muon_momentum') and value >= 1:
                raise UsageError(f'{name} is {value}: it must be below 1')
        if self.optimizer == 'muon' and (self.model == 'bigram' or self.shard):
            raise UsageError('optimizer=muon needs a gpt or a llama, without --shard')
        if self.model_size:
            for name, value in zip(('n_layer', 'n_head', 'n_embd'), MODEL_SIZES[self.model_size]):
                if getattr(self, name) == getattr(TrainConfig, name):  # its default
                    setattr(self, name, value)
            self.model_size = ''  # or `replace` would undo a checkpoint's shape


def learning_rate(cfg, it):
    """The rate for update `it`: a linear rise, then half a cosine down to min_lr.

    Loshchilov & Hutter 2016, arXiv:1608.03983, without the restarts.
    """
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    decay_iters = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    if it >= decay_iters:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (decay_iters - cfg.warmup_iters)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizers(model, cfg, dtype):
    """AdamW for all weights; or Muon for the matrices inside blocks and AdamW for the rest.

    AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101, with weight decay on matrices only.
    """
    blocks = model.blocks if cfg.optimizer == 'muon' else ()
    hidden = [p for block in blocks for p in block.parameters() if p.dim() >= 2]
    inside = set(hidden)
    rest = [p for p in model.parameters() if p not in inside]
    adamw = torch.optim.AdamW(
        [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': cfg.weight_decay},
         {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}],
        lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True,
    )
    if not hidden:
        return [adamw]
    return [adamw, Muon(hidden, dict(
        lr=cfg.muon_lr, momentum=cfg.muon_momentum, weight_decay=cfg.muon_weight_decay,
        ns_steps=cfg.muon_steps, bf16=dtype == torch.bfloat16))]


@torch.no_grad()
def evaluate(model, splits, cfg, ranks, device, amp, stop, progress):
    """Mean cross-entropy per token of each split, in nats, by its name; the same on every rank.

    Empty if a signal came to stop the run.
    """
    losses = {}
    model.eval()
    for name, split in splits.items():
        total, count = 0.0, 0
        for x, y, done in evaluation_batches(split, cfg, ranks, device):
            if ranks.any(stop.received):
                return {}
            progress.show(done, f'evaluating {name}: {done:.0%}')
            with amp:
                _, loss = model(x, y, loss_only=True)
            counted = (y != -1).sum().item()
            total, count = total + loss.item() * counted, count + counted
        total, count = ranks.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
        losses[name] = total / count
    model.train()
    return losses


def sample_text(model, tokenizer, cfg, device, amp):
    """A short text by the model as it is now, for whoever watches."""
    start = cfg.sample_start.replace('\\n', '\n')  # a shell passes \n as two characters
    prompt = torch.tensor([prompt_ids(tokenizer, start)], device=device)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    with amp:
        ids = model.generate(prompt, cfg.sample_tokens, 0.8, top_p=0.95, generator=generator,
                             vocab_size=tokenizer.vocab_size)
    text = tokenizer.decode(ids[0].tolist()).strip('\n')
    # What would move the cursor, or worse: a model that knows nothing yet may write it.
    return re.sub('[\0-\x08\x0b-\x1f\x7f-\x9f]', '\ufffd', text)


def train(cfg):
    """Train as `cfg` says; returns the best validation loss, or None for `eval_only`.

    Raises UserError for what the user can mend. After Ctrl-C or SIGTERM it saves and exits.
    """
    ranks = Ranks()
    cfg = replace(cfg, shard=cfg.shard and ranks.world_size > 1)  # one process has all anyway
    micro_batches = cfg.gradient_accumulation_steps
    if micro_batches % ranks.world_size:
        nearest = math.ceil(micro_batches / ranks.world_size) * ranks.world_size
        batch_size, rest = divmod(micro_batches * cfg.batch_size, nearest)
        keep = '' if rest else f', and batch_size={batch_size} keeps the size of an update'
        raise UsageError(f'gradient_accumulation_steps={micro_batches} cannot be shared among '
                         f'{ranks.world_size} processes: {nearest} can{keep}')
    device, dtype = runtime.device_and_dtype(cfg)
    progress = Progress(enabled=ranks.is_main)
    if warning := runtime.tune(device, cfg.shard):
        progress.say(warning)
    remedy = (f'lower --batch_size={cfg.batch_size} (with --gradient_accumulation_steps='
              f'{micro_batches} raised to keep the update) or --block_size={cfg.block_size}')
    with (
        console.locked(cfg.out_dir) if ranks.is_main and not cfg.eval_only else nullcontext(),
        ranks.joined(device, cfg.backend), runtime.out_of_memory(remedy),
    ):
        with console.user_errors():
            data = Dataset(cfg.dataset, ranks)
        with stop_signal(ranks.is_main and not cfg.eval_only) as stop:
            return training_run(cfg, data, ranks, device, dtype, stop, progress)


def training_run(cfg, data, ranks, device, dtype, stop, progress):
    """What `train` does, once there is a device, a process group, and a lock on out_dir."""
    # Matrix products inside are in `dtype`; what needs the digits stays in float32.
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with console.user_errors():
        asked = cfg
        cfg, raw, checkpoint = starting_point(asked, data.tokenizer, ranks, device)
        optimizers = make_optimizers(raw, cfg, dtype)
        # Small gradients would be 0 in float16: they are scaled up for the time of backward.
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        start, best_val_loss, log_position, former_max_iters = 0, math.inf, None, None
        if checkpoint and not cfg.eval_only:
            restore(optimizers, scaler, checkpoint)
            start, log_position = checkpoint['iter_num'], checkpoint['log']
            if checkpoint['config'].get('dataset') == cfg.dataset:  # else no loss is comparable
                best_val_loss = checkpoint['best_val_loss']
            # A finished run's last row came after ckpt.pt: extended, it evaluates there again.
            former_max_iters = checkpoint['config'].get('max_iters')
            progress.say(f'resumed at iteration {start} of {cfg.max_iters}; the learning rate '
                         f'goes on from {learning_rate(cfg, start):.3g}')
        if overridden := [f'{name}={value}' for name, value in vars(cfg).items()
                          if getattr(asked, name) not in (None, value)]:  # None: it was open
            progress.say(f'from the checkpoint: {", ".join(overridden)}')
    del checkpoint  # a second copy of everything

    if cfg.eval_only:
        unit = 'character' if data.tokenizer.state()['type'] == 'char' else 'token'
        losses = evaluate(raw, data.splits, cfg, ranks, device, amp, stop, progress)
        if not losses:
            sys.exit(128 + (stop.received or signal.SIGTERM))
        for name, loss in losses.items():
            perplexity = math.exp(loss) if loss < 700 else math.inf
            progress.say(f'{name}: loss {loss:.4f}, perplexity {perplexity:.3f}, '
                         f'{loss / math.log(2):.4f} bits per {unit}')
        return None

    batches = training_batches(data.splits['train'], cfg, ranks, device, start)
    x, y = next(batches)
    model = runtime.wrap(raw, cfg, ranks, device, amp, (x, y))  # perhaps compiled, or one of many
    log = Log(cfg, ranks, log_position)
    micro_steps = cfg.gradient_accumulation_steps // ranks.world_size
    update_tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    epoch_tokens = data.splits['train'].tokens
    peak_flops = runtime.peak_flops(device, dtype, cfg.peak_tflops) * ranks.world_size
    flops_per_token = raw.flops_per_token()
    progress.say(f'data/{cfg.dataset} ({data.source}): {epoch_tokens:,} train tokens; {cfg.model} '
                 f'of {raw.num_params():,} parameters, {update_tokens:,} tokens an update; '
                 f'{device} in {str(dtype).removeprefix("torch.")}; results in '
                 f'{os.path.abspath(cfg.out_dir)}')
    # How the model's text begins, for the hint at the end; not if the model can't read it.
    start_flag = [f'--start={cfg.sample_start}'] if cfg.sample_start != '\n' else []
    bad_in_a_row, skipped, evaluation_seconds = 0, (log_position or {}).get('skipped', 0), 0.0
    tokens = (log_position or {}).get('tokens', start * update_tokens)  # seen so far
    since, updates = time.perf_counter(), 0  # since the log's last row

    for it in range(start, cfg.max_iters + 1):  # evaluate and save if due, then update
        last, improved, losses = it == cfg.max_iters, False, {}
        began = time.perf_counter()
        if it % cfg.eval_interval == 0 or last or it == start == former_max_iters:
            splits = {name: data.splits[name] for name in ('val', 'train')}  # the shorter first
            losses = evaluate(model, splits, cfg, ranks, device, amp, stop, progress)
        if losses:
            # Equal is enough: a run killed before it saved best.pt finds the same loss again.
            improved = it > 0 and losses['val'] <= best_val_loss
            best_val_loss = losses['val'] if improved else best_val_loss
            progress.say(f'step {it}: train loss {losses["train"]:.4f}, '
                         f'val loss {losses["val"]:.4f}' + ' (the best so far)' * improved)

        stopping = ranks.any(stop.received)
        # Nothing is saved at iteration 0: there is nothing yet that a user could lose.
        if it > 0 and (stopping or improved or (losses and cfg.always_save_checkpoint)):
            if not runtime.gathered(torch.nn.utils.get_total_norm(raw.parameters())).isfinite():
                raise UserError(f'weights are not finite at iteration {it}: not saved. {REMEDIES}')
            if ranks.is_main and not log.is_open and console.set_aside(cfg.out_dir):
                progress.say(f'the former run in {cfg.out_dir} is now in {cfg.out_dir}/previous')
            best = {
                'model': runtime.gathered(raw.state_dict(keep_vars=True)),
                # without gelu, so that nanoGPT can load it; config has it
                'model_args': {k: v for k, v in vars(raw.config).items() if k != 'gelu'},
                'iter_num': it,  # the next update
                'best_val_loss': best_val_loss,
                'config': asdict(cfg),
                'tokenizer': data.tokenizer.state(),
                'format': {'name': 'ozgpt', 'version': 1},
            }
            state = best | {
                'optimizer': runtime.gathered(optimizers[0].state_dict()),
                'muon': [optimizer.state_dict() for optimizer in optimizers[1:]],
                'scaler': scaler.state_dict(),
                'log': log.position() | {'skipped': skipped, 'tokens': tokens},
            }
            if ranks.is_main:
                save(f'{cfg.out_dir}/ckpt.pt', state)
                log.open()
            if ranks.is_main and improved:
                save(f'{cfg.out_dir}/best.pt', best)
            ranks.any(False)  # all wait, or else torchrun soon ends rank 0, which still saves
            del best, state  # whole copies, if the model is sharded
        if stopping:
            saved = f'{cfg.out_dir}/ckpt.pt is saved: to go on, add --init_from=resume'
            progress.say(f'stopped at iteration {it}; {saved if it else "nothing to save yet"}')
            if log.wandb:
                log.wandb.finish()
            sys.exit(128 + (stop.received or signal.SIGTERM))
        if losses and cfg.sample_tokens:  # on all ranks, since each may have a part of the model
            try:
                text = sample_text(raw, data.tokenizer, cfg, device, amp)
            except Exception as error:
                text, start_flag = f'(no sample: {error})', []
            progress.say(''.join(f'  | {line}\n' for line in text.split('\n')))
        if losses:
            evaluation_seconds = time.perf_counter() - began
            since += evaluation_seconds  # which doesn't count as training time
        row = {'iteration': it, 'tokens': tokens, 'epochs': tokens / epoch_tokens,
               'train_eval_loss': losses.get('train'), 'val_loss': losses.get('val')}
        if last:
            break

        # ---- TRAINING: all that moves the weights is from here ...
        seed = np.random.SeedSequence((cfg.seed, it, ranks.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))  # for dropout: as before if resumed, another on each rank
        rate = learning_rate(cfg, it)
        muon_rate = cfg.muon_lr * rate / (cfg.learning_rate or 1)  # not 0 / 0
        for optimizer, its_rate in zip(optimizers, (rate, muon_rate)):
            for group in optimizer.param_groups:
                group['lr'] = its_rate
        mean_loss = torch.zeros((), device=device)
        for micro_step in range(micro_steps):
            runtime.sync_gradients(model, micro_step == micro_steps - 1)
            with amp:
                _, loss = model(x, y, loss_only=True)
            scaler.scale(loss / micro_steps).backward()  # the ranks' gradients are averaged
            x, y = next(batches)  # read while the GPU is at work
            mean_loss += loss.detach() / cfg.gradient_accumulation_steps
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        # A rare long gradient must not undo many steps: Pascanu et al. 2012, arXiv:1211.5063.
        norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip or math.inf)
        loss, norm = ranks.sum(mean_loss).item(), runtime.gathered(norm).item()
        is_finite = math.isfinite(loss + norm)
        if is_finite:  # one bad batch must not spoil the weights
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        raw.zero_grad()
        # ---- ... to here

        bad_in_a_row = 0 if is_finite else bad_in_a_row + 1
        skipped += not is_finite
        if bad_in_a_row == 10:
            raise UserError(f'loss ({loss}) or gradient not finite ten times in a row, up to '
                            f'iteration {it}: {cfg.out_dir}/ckpt.pt, if any, is good. {REMEDIES}')
        updates, tokens = updates + 1, tokens + update_tokens
        seconds = (time.perf_counter() - since) / updates
        speed = update_tokens / seconds
        mfu = speed * flops_per_token / peak_flops if peak_flops else None
        status = f'iter {it}: loss {loss:.4f}, time {1e3 * seconds:.2f}ms'
        if it - start >= 5:  # the first updates take longer than those to come
            to_come = (cfg.max_iters - 1) // cfg.eval_interval - it // cfg.eval_interval + 1
            left = seconds * (cfg.max_iters - it - 1) + evaluation_seconds * to_come
            status += f', {clock(left)} left'
            if it - start == 5 and left > 1800 and device.type == 'cpu':
                progress.say(f'this will take about {clock(left)} here; made for a CPU are '
                             'config/train_wizard_char.py and train_shakespeare_char_cpu.py')
        status += f', {speed:,.0f} tok/s, epoch {row["epochs"]:.2f}'
        status += f', mfu {mfu:.1%}' if mfu else ''
        if progress.live:
            progress.show((it + 1) / cfg.max_iters, status)
        elif it % cfg.log_interval == 0:
            progress.say(status)
        if it % cfg.log_interval == 0 or losses:
            log.write(row | {
                'train_loss': loss, 'learning_rate': rate, 'grad_norm': norm, 'skipped': skipped,
                'tokens_per_s': round(speed), 'mfu': mfu and round(mfu, 4),
            })
            since, updates = time.perf_counter(), 0

    log.write(row)
    script = os.path.join(os.path.dirname(sys.argv[0]), 'sample.py')
    command = [sys.orig_argv[0], script, f'--out_dir={cfg.out_dir}', *start_flag]
    took = clock(time.perf_counter() - log.began)
    progress.say(f'best val loss {best_val_loss:.4f} after {took}, weights in {cfg.out_dir}\n'
                 f'now: {shlex.join(command)}')
    return best_val_loss


def main(argv):
    train(override(TrainConfig(), argv, usage=__doc__))


if __name__ == '__main__':
    console.run(main)
