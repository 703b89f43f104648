"""Checkpoints: how .pt files are written and read; train.py composes what they hold.

A checkpoint is a dict of tensors and plain types, so reading one never runs code. Its keys are
nanoGPT's (model, optimizer, model_args, iter_num, best_val_loss, config) and ours (tokenizer,
format, log, scaler, muon). `out_dir/ckpt.pt` is the latest full training state, `out_dir/best.pt`
the weights with the best validation loss.
"""

import errno
import glob
import os
import warnings
from dataclasses import fields, replace
from itertools import count
from textwrap import shorten

import torch

from console import UserError, atomic_file
from dataset import read_meta
from llama import Llama, LlamaConfig
from model import GPT, MODEL_SIZES, Bigram, GPTConfig, LanguageModel
from runtime import build, placed_like
from tokenizer import tokenizer_from, tokenizer_of

MODELS = {
    'gpt': (GPT, GPTConfig), 'llama': (Llama, LlamaConfig), 'bigram': (Bigram, GPTConfig),
}


# --- files


def save(path, checkpoint):
    """Write a checkpoint, whole or not at all. Raises UserError, see `atomic_file`."""
    with atomic_file(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how torch reports that the file took no more bytes
            raise OSError(errno.ENOSPC, shorten(str(error), 100)) from error


def set_aside(out_dir):
    """Move a former run's files in `out_dir` to `out_dir/previous`; returns whether it did.

    What was `previous` is then `previous-1`, or the next free number: nothing is deleted.
    """
    names = [name for name in ('loss.png', 'log.csv', 'best.pt', 'ckpt.pt')
             if os.path.exists(os.path.join(out_dir, name))]
    if not {'ckpt.pt', 'best.pt'} & {*names}:
        return False  # a run that saved nothing must not displace one that did
    previous = os.path.join(out_dir, 'previous')
    try:
        if os.path.exists(previous):
            older = (f'{previous}-{number}' for number in count(1))
            os.rename(previous, next(path for path in older if not os.path.exists(path)))
        os.mkdir(previous)
        for name in names:
            os.rename(os.path.join(out_dir, name), os.path.join(previous, name))
    except OSError as error:
        raise UserError(f'cannot move the former run in {out_dir} away ({error.strerror}): choose '
                        'another --out_dir') from None
    return True


def load_checkpoint(path, mmap=False):
    """Read a checkpoint, ours or nanoGPT's, onto the CPU; with `mmap`, tensors on first use.

    path: the file, or a folder, of which best.pt or else ckpt.pt is taken. Raises
    FileNotFoundError or ValueError, in one line, for a file that is missing, damaged or no
    checkpoint, UserError where there is no tokenizer for it.
    """
    if os.path.isdir(path):
        best, latest = os.path.join(path, 'best.pt'), os.path.join(path, 'ckpt.pt')
        path = best if os.path.exists(best) else latest
    if not os.path.exists(path):
        found = ', '.join(sorted({os.path.dirname(file) for file in glob.glob('out*/*.pt')}))
        raise FileNotFoundError(f'no checkpoint {path}: ' + (
            f'there are some in {found}' if found else
            'train one first, say by python train.py config/train_wizard_char.py'))
    try:
        with warnings.catch_warnings(action='ignore'):  # about pickles that it will refuse
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        # nanoGPT saves compiled models under their wrapper's name, and once saved masks.
        weights = {name.removeprefix('_orig_mod.'): weight
                   for name, weight in checkpoint['model'].items()
                   if not name.endswith('.attn.bias')}
        checkpoint |= {
            'model': weights,
            'config': dict(checkpoint.get('config', {})),
            'log': dict(checkpoint.get('log', {})),
            'iter_num': int(checkpoint['iter_num']),
            'best_val_loss': float(checkpoint['best_val_loss']),
        }
        class_and_config(checkpoint['config'], checkpoint['model_args'])  # raises if impossible
    except Exception as error:  # damage shows in many ways, and so does code in a pickle
        raise ValueError(
            f'{path} is damaged, no checkpoint of a GPT, or might run code '
            f'({shorten(repr(error), 120)}): take a .pt file that train.py wrote, or an older copy'
        ) from None
    if not checkpoint.get('tokenizer'):  # nanoGPT keeps it with the dataset, but for GPT-2's
        folder = os.path.join('data', str(checkpoint['config'].get('dataset')))
        rows = checkpoint['model_args'].get('vocab_size', 0)
        if rows < 50257 and not os.path.exists(os.path.join(folder, 'meta.json')):
            raise UserError(f'{path} holds no tokenizer and there is no {folder}/meta.json: '
                            'prepare that dataset first')
        checkpoint['tokenizer'] = state = read_meta(folder)['tokenizer']
        known = state['vocab_size']
        if known > rows or (state['type'] == 'char' and known < rows):
            raise UserError(f'{path} is for {rows} tokens, but {folder} has {known}: prepare the '
                            'text there that it was trained on')
    return checkpoint


# --- from checkpoints to models


def class_and_config(settings, model_args):
    """The class and the config of a model: `model_args`, and what they lack from the settings."""
    cls, config_cls = MODELS.get(settings.get('model'), MODELS['gpt'])
    names = [field.name for field in fields(config_cls) if field.name in settings]
    return cls, config_cls(**{name: settings[name] for name in names} | model_args)


def is_pretrained(name):
    """Whether `name` means weights from Hugging Face: a folder, gpt2 ... gpt2-xl, owner/name."""
    if os.path.exists(name):
        return os.path.exists(os.path.join(name, 'config.json'))
    owner, slash, rest = name.partition('/')
    on_the_hub = slash and not (os.path.exists(owner) or '/' in rest or rest.endswith('.pt'))
    return bool(on_the_hub) or (name in MODEL_SIZES and name.startswith('gpt2'))


def load_model(path, hub=False):
    """(model, tokenizer) of a checkpoint, of its folder, or of weights from Hugging Face.

    hub: whether a `path` that is not there may be a name on Hugging Face's hub.
    """
    if (hub or os.path.exists(path)) and is_pretrained(path):
        return LanguageModel.from_pretrained(path), tokenizer_of(path)
    checkpoint = load_checkpoint(path)
    cls, config = class_and_config(checkpoint['config'], checkpoint['model_args'])
    model = build(cls, config, checkpoint['model'], torch.device('cpu'))
    return model, tokenizer_from(checkpoint['tokenizer'])


# --- where a training run begins


def starting_point(cfg, tokenizer, ranks, device):
    """Where to begin: `cfg` with the model's shape, the model, the checkpoint if it is to resume.

    What comes from a checkpoint has that checkpoint's shape; only its dropout, and a shorter
    block_size for fine-tuning, are `cfg`'s to choose. Raises ValueError or OSError, in one line.
    """
    state, resume = tokenizer.state(), cfg.init_from == 'resume'
    from_rank_0 = cfg.shard and not ranks.is_main  # which reads the weights for all
    weights = checkpoint = None
    if cfg.init_from == 'scratch':
        # 50304 is a multiple of 64, which is faster on GPUs; training pushes the padding down.
        vocab_size = 50304 if tokenizer.vocab_size == 50257 else tokenizer.vocab_size
        cls, config = class_and_config(vars(cfg), {'vocab_size': vocab_size})
    elif is_pretrained(cfg.init_from):
        theirs = tokenizer_of(cfg.init_from).state()
        refuse_other_tokens(cfg.init_from, theirs, state, cfg.init_from)
        model = None if from_rank_0 else LanguageModel.from_pretrained(cfg.init_from, cfg.dropout)
        cls, config = ranks.from_main(model and (type(model), model.config))
        weights = model and model.state_dict()
    else:
        path = os.path.join(cfg.out_dir, 'ckpt.pt') if resume else cfg.init_from
        checkpoint = load_checkpoint(path, mmap=from_rank_0)
        if resume and checkpoint['tokenizer'] != state:
            raise ValueError(f'{path} was trained on other tokens than {cfg.dataset} has now: for '
                             f'a new run from it, give --init_from={path} and another --out_dir')
        optimizer = checkpoint['config'].get('optimizer', 'adamw')
        if resume and not cfg.eval_only and optimizer != cfg.optimizer:
            raise ValueError(f'{path} was trained with {optimizer}, not {cfg.optimizer}: add '
                             f'--optimizer={optimizer}')
        if resume and not cfg.eval_only and checkpoint['iter_num'] > cfg.max_iters:
            raise ValueError(f'{path} is at iteration {checkpoint["iter_num"]} already, past '
                             f'max_iters={cfg.max_iters}: give a larger --max_iters')
        adapt_alphabet(checkpoint, state, path)
        model_args, weights = checkpoint['model_args'], checkpoint['model']
        cls, config = class_and_config(checkpoint['config'], model_args | {'dropout': cfg.dropout})
    if cfg.init_from not in ('scratch', 'resume'):
        if cls is not Bigram and cfg.block_size > config.block_size:
            raise ValueError(f'block_size={cfg.block_size} is longer than the {config.block_size} '
                             'positions that the model has learnt: give a --block_size up to that')
        config.block_size = cfg.block_size
        if cls is GPT and weights:
            weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:cfg.block_size]
    actual = {name: value for name, value in vars(config).items() if hasattr(cfg, name)}
    actual['model'] = next(name for name, pair in MODELS.items() if pair[0] is cls)
    model = build(cls, config, weights, device, cfg.shard, cfg.seed)
    return replace(cfg, **actual), model, checkpoint if resume else None


def refuse_other_tokens(path, theirs, state, tokenizer):
    """Raise ValueError unless the weights of `path` are for the dataset's tokens."""
    if theirs != state:
        raise ValueError(f'{path} was trained on {theirs["type"]} tokens, the dataset has other '
                         f'({state["type"]}) ones: prepare it with --tokenizer={tokenizer}')


def adapt_alphabet(checkpoint, state, path):
    """Fit a checkpoint, in place, to the dataset's tokenizer.

    Another alphabet is welcome: characters that the model knows keep their rows of the embedding,
    rows of new ones are drawn. Raises ValueError for any other difference.
    """
    weights, theirs = checkpoint['model'], checkpoint['tokenizer']
    if not theirs['type'] == state['type'] == 'char' or theirs == state:
        tokenizer = theirs['type'].replace('huggingface', 'FOLDER')
        return refuse_other_tokens(path, theirs, state, tokenizer)
    if 'table.weight' in weights:
        raise ValueError(f'{path} is a bigram of another alphabet: train one from scratch')
    common = [char for char in state['chars'] if char in theirs['chars']]
    new, old = ([alphabet['chars'].index(char) for char in common] for alphabet in (state, theirs))
    for key in weights.keys() & {'transformer.wte.weight', 'model.embed_tokens.weight',
                                 'lm_head.weight'}:
        shape = state['vocab_size'], weights[key].size(1)
        # From the same seed for both matrices, which may be tied.
        rows = torch.normal(0, 0.02, shape, generator=torch.Generator().manual_seed(0))
        rows[new] = weights[key][old]
        weights[key] = rows
    checkpoint['model_args']['vocab_size'] = state['vocab_size']


def restore(optimizers, scaler, checkpoint):
    """Give the optimizers the moments and step counts of a checkpoint; settings stay their own.

    Raises ValueError, in one line, where they are not those of the parameters.
    """
    try:
        states = [checkpoint['optimizer'], *checkpoint.get('muon', [])]
        for optimizer, saved in zip(optimizers, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group['params']]
            moments = {i: {name: value if name == 'step' else placed_like(value, params[i])
                           for name, value in state.items()}
                       for i, state in saved['state'].items()}
            groups = [own | {'params': theirs['params']} for own, theirs
                      in zip(optimizer.param_groups, saved['param_groups'], strict=True)]
            optimizer.load_state_dict({'state': moments, 'param_groups': groups})
        if checkpoint.get('scaler'):
            scaler.load_state_dict(checkpoint['scaler'])
    except Exception as error:
        raise ValueError(
            f"the checkpoint's optimizer does not fit its model ({shorten(repr(error), 120)}): "
            'for a new run from it, give --init_from=OUT_DIR/ckpt.pt and another --out_dir'
        ) from None
