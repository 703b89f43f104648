"""Where a training run starts: a new model, a run to resume, or other weights to fine-tune.

`from_scratch`, `resumed` and `from_weights` each return (cfg, class, config, weights, checkpoint);
`starting_point` chooses one of them and makes the model.
"""

import math
import os
from dataclasses import fields, replace

import torch

import runtime
from checkpoint import load_checkpoint, load_model
from console import UserError, user_errors
from llama import MODELS, class_and_config
from model import Bigram
from tokenizer import gives_same_ids


def from_scratch(cfg, tokenizer):
    """A new model. Raises UserError for a setting that this model doesn't have."""
    # A multiple of 64 is faster on GPUs; training makes the 47 ids of padding unlikely.
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
    """The state of a run: out_dir/ckpt.pt, or another file with init_from='resume:FILE'.

    The checkpoint's shape, block_size and optimizer override those of the command. Raises
    UserError.
    """
    own = os.path.join(cfg.out_dir, 'ckpt.pt')
    path = os.path.expanduser(cfg.init_from.partition(':')[2]) or own
    ranks.agree_on_file(path)
    # If sharded, only rank 0 needs the tensors: mmap, so that the others don't read them.
    checkpoint = load_checkpoint(path, mmap=cfg.shard and not ranks.is_main)
    if not gives_same_ids(checkpoint['tokenizer'], tokenizer.state()):
        raise UserError(f'{path} was trained on other tokens than data/{cfg.dataset} has: prepare '
                        'it as before; or, to continue with other characters in a new run, add '
                        f'--init_from={path} and another --out_dir')
    if cfg.init_from != 'resume':  # a branch: it has no best.pt yet
        checkpoint |= {'best_val_loss': math.inf, 'wandb_id': None}
    settings = checkpoint['config']  # a setting that is newer than the checkpoint: the command's
    cls, config = class_and_config(vars(cfg) | {'model': 'gpt'} | settings,
                                   checkpoint['model_args'])
    cfg = replace(
        cfg, block_size=settings.get('block_size', config.block_size),
        optimizer=settings.get('optimizer', 'adamw'),
        max_iters=max(cfg.max_iters, checkpoint['iter_num']),  # its updates are done already
    )
    return cfg, cls, config, checkpoint['model'], checkpoint


def from_weights(cfg, tokenizer, ranks):
    """Fine-tuning: the weights of another run, or from Hugging Face, and their shape.

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
    if wpe is None:  # positions that are not learned: no limit
        config.block_size = max(cfg.block_size, config.block_size)
    elif cfg.block_size > config.block_size:
        raise UserError(f"block_size={cfg.block_size} exceeds the model's {config.block_size}, "
                        'whose positions are learned: use a smaller one')
    else:
        config.block_size = cfg.block_size
        weights['transformer.wpe.weight'] = wpe[: cfg.block_size]
    if not gives_same_ids(theirs, state):
        if not theirs['type'] == state['type'] == 'char' or cls is Bigram:
            known = {'gpt2': 'gpt2', 'char': 'data/NAME, where NAME is its own dataset'}
            raise UserError(f'{cfg.init_from} was trained on {theirs["type"]} tokens, the dataset '
                            f'has other ({state["type"]}) ones: train from scratch, or prepare it '
                            f'with --tokenizer={known.get(theirs["type"], "FOLDER")}')
        adapt_alphabet(weights, cls, config, theirs['chars'], state['chars'])
        config.vocab_size = state['vocab_size']
    if state['vocab_size'] > config.vocab_size:
        raise UserError(f'{cfg.init_from} has {config.vocab_size} rows of weights for the '
                        f'{state["vocab_size"]} tokens of {cfg.dataset}: use other weights')
    return cfg, cls, config, weights, None


def adapt_alphabet(weights, cls, config, theirs, ours):
    """Change the weights of a `cls(config)` in place from the characters `theirs` to `ours`.

    Characters of both keep their rows; rows of new ones are initialized.
    """
    old = torch.tensor([theirs.find(char) for char in ours])  # -1: a new one
    with torch.device('meta'):  # shapes alone: one more character shows which have rows for them
        larger = cls(replace(config, vocab_size=config.vocab_size + 1)).state_dict()
    for name, weight in weights.items():
        if weight.shape[:1] != larger[name].shape[:1]:
            weights[name] = rows = weight[old]
            # The same seed for all: an embedding and its head may be tied.
            generator = torch.Generator().manual_seed(0)
            rows[old < 0] = torch.normal(0, 0.02, rows.shape, generator=generator)[old < 0]


def starting_point(cfg, tokenizer, ranks, device, dtype, progress):
    """Start as `cfg.init_from` says: (cfg with the model's shape, the model, the checkpoint).

    The checkpoint is that of a run to resume, or None. Raises UserError.
    """
    requested = cfg
    if cfg.init_from == 'scratch':
        cfg, cls, config, weights, checkpoint = from_scratch(cfg, tokenizer)
    elif cfg.init_from.partition(':')[0] == 'resume':
        cfg, cls, config, weights, checkpoint = resumed(cfg, tokenizer, ranks)
    else:
        cfg, cls, config, weights, checkpoint = from_weights(cfg, tokenizer, ranks)
    if hasattr(config, 'dropout'):  # the command's, not the checkpoint's
        config.dropout = cfg.dropout
    model = runtime.new_model(cls, config, weights, device, dtype, cfg.shard, cfg.seed)
    shape = {name: value for name, value in vars(config).items()
             if hasattr(cfg, name) and name != 'block_size'}  # cfg's windows may be shorter
    shape['model'] = next(name for name, pair in MODELS.items() if pair == (cls, type(config)))
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
