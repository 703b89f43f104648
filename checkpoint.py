"""Checkpoints: everything that reads or writes a .pt file.

A checkpoint is a dict of tensors and plain types: reading one runs no code. It contains nanoGPT's
keys (model, optimizer, model_args, iter_num, best_val_loss, config) and ours (tokenizer, format,
optimizers, scaler, and the other numbers of a run). `out_dir/ckpt.pt` is the latest full training
state, `out_dir/best.pt` the weights with the best validation loss.
"""

import glob
import math
import os
import warnings
from dataclasses import asdict, fields, replace

import torch

import runtime
from console import (
    UserError, atomic_file, files_of_run, flush_to_disk, move_previous_run, user_errors,
)
from llama import MODELS, class_and_config
from model import Bigram
from prepare_text import read_meta
from pretrained import is_pretrained, read_pretrained
from tokenizer import gives_same_ids, tokenizer_from, tokenizer_of


def save_run(cfg, ranks, model, optimizers, scaler, tokenizer, run, log, improved, is_kept,
             is_evaluated):
    """Write ckpt.pt, the whole state of a run; if it improved, best.pt; if it is kept, ckpt-N.pt.

    With the first save of a new run, a previous run in out_dir is moved away and the log begins.
    All ranks must call it. Returns the path of the state. Raises UserError if weights are not
    finite or a file can't be written.
    """
    it, path = run['iter_num'], f'{cfg.out_dir}/ckpt.pt'
    if not runtime.gather(torch.nn.utils.get_total_norm(model.parameters())).isfinite():
        raise UserError(f'weights are not finite at iteration {it}: not saved. Try a lower '
                        '--learning_rate or a smaller --grad_clip')
    best = run | {
        'model': runtime.gather_weights(model),
        # without gelu, so that nanoGPT can load it; config contains it
        'model_args': {k: v for k, v in vars(model.config).items() if k != 'gelu'},
        'config': asdict(cfg),
        'tokenizer': tokenizer.state(),
        'format': {'name': 'ozgpt', 'version': 2},
    }
    states = [runtime.gather_state(optimizer) for optimizer in optimizers]
    state = best | {'optimizer': states[0], 'optimizers': states, 'scaler': scaler.state_dict()}
    is_first = log.columns is None
    if is_first and log.is_new and not is_evaluated and files_of_run(cfg.out_dir):
        # Stopped before its first evaluation, perhaps started by mistake: the other run stays.
        is_first, path = False, f'{cfg.out_dir}/stopped-{it}.pt'
    if ranks.is_main:
        with atomic_file(path) as file:
            torch.save(state, file)
            if is_first:
                flush_to_disk(file)  # a full disk must show before anything is moved
                if log.is_new:
                    move_previous_run(cfg.out_dir)
                log.open()
    for name, content, is_due in ('best.pt', best, improved), (f'ckpt-{it}.pt', state, is_kept):
        if ranks.is_main and is_due:
            with atomic_file(f'{cfg.out_dir}/{name}') as file:
                torch.save(content, file)
    return path


def restore(checkpoint, run, optimizers, scaler):
    """Give optimizers and scaler their state back; returns the numbers of `run` that were saved.

    Rates and other settings stay those of the command. Raises UserError.
    """
    with user_errors((KeyError, IndexError, TypeError, ValueError, AttributeError),
                     "the checkpoint's optimizer does not fit",
                     'start a new run from its weights: --init_from=OUT_DIR/ckpt.pt'):
        saved = checkpoint.get('optimizers')  # older files have two keys instead
        saved = saved or [checkpoint['optimizer'], *checkpoint.get('muon', [])]
        states = [runtime.fitting_state(*pair) for pair in zip(optimizers, saved, strict=True)]
    for optimizer, state in zip(optimizers, states):
        optimizer.load_state_dict(state)
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
    return {name: checkpoint[name] for name in run.keys() & checkpoint.keys()}


def load_checkpoint(path, mmap=False):
    """Read a checkpoint, ours or nanoGPT's, onto the CPU; with `mmap`, tensors on first use.

    path: the file, or a folder, whose best.pt or else ckpt.pt is read. Raises UserError.
    """
    if os.path.isdir(path):
        best = os.path.join(path, 'best.pt')
        path = best if os.path.exists(best) else os.path.join(path, 'ckpt.pt')
    if not os.path.exists(path):
        files = glob.glob('out*/*.pt') + glob.glob('out*/previous*/*.pt')
        found = ', '.join(sorted({os.path.dirname(file) for file in files}))
        raise UserError(f'no checkpoint {path} (found: {found or "none"}): choose one, or train '
                        'one: python train.py config/train_wizard_char.py')
    with user_errors(Exception, f'{path} is damaged, no checkpoint of a GPT, or might run code',
                     'use one that train.py wrote'):  # damage shows in many ways
        with warnings.catch_warnings(action='ignore'):  # about pickles that it will refuse
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        # nanoGPT's compiled models have the prefix _orig_mod. Our older files contain a `log`.
        checkpoint = dict(checkpoint.get('log', {})) | checkpoint | {
            'model': {name.removeprefix('_orig_mod.'): weight
                      for name, weight in checkpoint['model'].items()},
            'config': dict(checkpoint.get('config', {})),
            'iter_num': int(checkpoint['iter_num']),
            'best_val_loss': float(checkpoint['best_val_loss']),
        }
        if checkpoint['iter_num'] < 0:
            raise ValueError(f'iter_num={checkpoint["iter_num"]}')
        class_and_config(checkpoint['config'], checkpoint['model_args'])
    if not checkpoint.get('tokenizer'):  # nanoGPT keeps it with the dataset, except for GPT-2's
        folder = os.path.join('data', str(checkpoint['config'].get('dataset')))
        checkpoint['tokenizer'] = state = read_meta(folder)['tokenizer']
        rows, n_tokens = checkpoint['model_args'].get('vocab_size', 0), state['vocab_size']
        if n_tokens > rows or (state['type'] == 'char' and n_tokens < rows):
            raise UserError(f'{path} contains no tokenizer, and the one in {folder} has {n_tokens}'
                            f' tokens, not {rows}: prepare there the text it was trained on')
    return checkpoint


def load_model(path, hub=False):
    """(model, tokenizer) of a checkpoint, of its folder, or of weights from Hugging Face.

    hub: also accept a name there (gpt2, owner/name) if no such folder exists. Raises UserError.
    """
    if is_pretrained(path, hub):
        tokenizer, model = tokenizer_of(path), read_pretrained(path)
    else:
        checkpoint = load_checkpoint(path)
        cls, config = class_and_config(checkpoint['config'], checkpoint['model_args'])
        model = runtime.new_model(cls, config, checkpoint['model'], torch.device('cpu'))
        tokenizer = tokenizer_from(checkpoint['tokenizer'])
    if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
        raise UserError(f'the weights of {path} are not finite: use another checkpoint')
    return model, tokenizer


# --- where a run starts: each returns (cfg, class, config, weights, checkpoint)


def from_scratch(cfg, tokenizer):
    """A new model. Raises UserError for a setting that this model doesn't have."""
    # 50304 is a multiple of 64, which is faster on GPUs; training pushes the padding down.
    vocab_size = 50304 if tokenizer.vocab_size == 50257 else tokenizer.vocab_size
    with user_errors(ValueError, 'there can be no such model', 'change the settings'):
        cls, config = class_and_config(vars(cfg), {'vocab_size': vocab_size})
    of_models = {field.name for _, config_cls in MODELS.values() for field in fields(config_cls)}
    foreign = [f'{name}={value}' for name, value in vars(cfg).items() if name in of_models
               and not hasattr(config, name) and value != getattr(type(cfg)(), name)]
    if foreign:
        raise UserError(f'model={cfg.model} has no {", ".join(foreign)}: leave that out, or choose '
                        f'another of {", ".join(MODELS)}')
    return cfg, cls, config, None, None


def resumed(cfg, tokenizer, ranks):
    """The state of a run: out_dir/ckpt.pt, or another file by init_from='resume:FILE'.

    The checkpoint's shape and optimizer override those of the command.
    """
    own = os.path.join(cfg.out_dir, 'ckpt.pt')
    path = cfg.init_from.partition(':')[2] or own
    ranks.agree_on_file(path)
    checkpoint = load_checkpoint(path, mmap=cfg.shard and not ranks.is_main)
    if not gives_same_ids(checkpoint['tokenizer'], tokenizer.state()):
        raise UserError(f'{path} was trained on other tokens than data/{cfg.dataset} has: prepare '
                        'that as it was; or, to continue with other characters in a new run, add '
                        f'--init_from={path} and another --out_dir')
    if path != own:  # a branch: it has no best.pt yet
        checkpoint['best_val_loss'] = math.inf
    settings = checkpoint['config']
    cls, config = class_and_config(settings, checkpoint['model_args'])
    cfg = replace(
        cfg, block_size=settings.get('block_size', config.block_size),
        optimizer=settings.get('optimizer', 'adamw'),
        max_iters=max(cfg.max_iters, checkpoint['iter_num']),
    )
    return cfg, cls, config, checkpoint['model'], checkpoint


def from_weights(cfg, tokenizer, ranks):
    """Fine-tuning: the weights of another run, or of Hugging Face, and their shape.

    Learned positions are cropped to a shorter block_size. Where the dataset has another alphabet,
    the weights are adapted to it. Raises UserError.
    """
    state, weights, found = tokenizer.state(), {}, None
    if ranks.is_main or not cfg.shard:
        model, theirs = load_model(cfg.init_from, hub=True)
        weights = model.state_dict()
        found = type(model), model.config, theirs.state(), weights.get('transformer.wpe.weight')
    cls, config, theirs, wpe = ranks.from_main(found)
    if cfg.eval_only:
        cfg = replace(cfg, block_size=min(cfg.block_size, config.block_size))
    if wpe is None:
        config.block_size = max(cfg.block_size, config.block_size)
    elif cfg.block_size > config.block_size:
        raise UserError(f"block_size={cfg.block_size} exceeds the model's {config.block_size}, "
                        'whose positions are learned: use a smaller one')
    else:
        config.block_size = cfg.block_size
        weights['transformer.wpe.weight'] = wpe[: cfg.block_size]
    if not gives_same_ids(theirs, state):
        if not theirs['type'] == state['type'] == 'char' or cls is Bigram:
            name = theirs['type'].replace('huggingface', 'FOLDER')
            raise UserError(f'{cfg.init_from} was trained on {theirs["type"]} tokens, the dataset '
                            f'has other ({state["type"]}) ones: train from scratch, or prepare it '
                            f'with --tokenizer={name}')
        adapt_alphabet(weights, theirs['chars'], state['chars'])
        config.vocab_size = state['vocab_size']
    if state['vocab_size'] > config.vocab_size:
        raise UserError(f'{cfg.init_from} has {config.vocab_size} rows of weights for the '
                        f'{state["vocab_size"]} tokens of {cfg.dataset}: use other weights')
    return cfg, cls, config, weights, None


def adapt_alphabet(weights, theirs, ours):
    """Change `weights` in place from the characters `theirs` to `ours`.

    Characters that the model knows keep their rows of the embedding; rows of new ones are drawn.
    """
    old = torch.tensor([theirs.find(char) for char in ours])  # -1: a new one
    for key in weights.keys() & {'transformer.wte.weight', 'model.embed_tokens.weight',
                                 'lm_head.weight'}:
        # From the same seed for both matrices, which may be tied.
        drawn = torch.normal(0, 0.02, (len(old), weights[key].size(1)),
                             generator=torch.Generator().manual_seed(0))
        weights[key] = torch.where(old[:, None] < 0, drawn, weights[key][old])


def starting_point(cfg, tokenizer, ranks, device, dtype, progress):
    """Where `cfg` says to start: (cfg with the model's shape, the model, the checkpoint).

    The checkpoint is that of a run to resume, or None. Raises UserError.
    """
    requested = cfg
    if cfg.init_from == 'scratch':
        cfg, cls, config, weights, checkpoint = from_scratch(cfg, tokenizer)
    elif cfg.init_from.partition(':')[0] == 'resume':
        cfg, cls, config, weights, checkpoint = resumed(cfg, tokenizer, ranks)
    else:
        cfg, cls, config, weights, checkpoint = from_weights(cfg, tokenizer, ranks)
    if hasattr(config, 'dropout'):  # a checkpoint has another one's
        config.dropout = cfg.dropout
    model = runtime.new_model(cls, config, weights, device, dtype, cfg.shard, cfg.seed)
    shape = {name: value for name, value in vars(config).items()
             if hasattr(cfg, name) and name != 'block_size'}  # a window may be shorter
    shape['model'] = next(name for name, pair in MODELS.items() if pair[0] is cls)
    cfg = replace(cfg, **shape)
    if overridden := [f'{name}={value}' for name, value in vars(cfg).items()
                      if getattr(requested, name) not in (None, value)]:  # None: left to us
        progress.print_line(f'from the checkpoint: {", ".join(overridden)}')
    if checkpoint and not cfg.eval_only:
        before = checkpoint['config']
        changed = [f'{name}={value} (was {before[name]})' for name, value in vars(cfg).items()
                   if name not in ('init_from', 'out_dir') and before.get(name, value) != value]
        progress.print_line(f'resumed at iteration {checkpoint["iter_num"]} of {cfg.max_iters}'
                            + '; changed since then: ' * bool(changed) + ', '.join(changed))
    return cfg, model, checkpoint
