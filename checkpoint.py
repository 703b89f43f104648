"""Checkpoints: how .pt files are written and read; train.py composes what they hold.

A checkpoint is a dict of tensors and plain types, so reading one never runs code. Its keys are
nanoGPT's (model, optimizer, model_args, iter_num, best_val_loss, config) and ours (tokenizer,
format, log, scaler, muon). `out_dir/ckpt.pt` is the latest full training state, `out_dir/best.pt`
the weights with the best validation loss.
"""

import glob
import os
import re
import warnings
from dataclasses import fields, replace
from textwrap import shorten

import torch

from console import UserError, atomic_file
from dataset import read_meta
from llama import Llama, LlamaConfig
from model import GPT, Bigram, GPTConfig, LanguageModel
from runtime import build, placed_like
from tokenizer import tokenizer_from, tokenizer_of

MODELS = {'gpt': (GPT, GPTConfig), 'llama': (Llama, LlamaConfig), 'bigram': (Bigram, GPTConfig)}


def save(path, checkpoint):
    """Write a checkpoint, whole or not at all. Raises UserError, see `atomic_file`."""
    with atomic_file(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path, mmap=False):
    """Read a checkpoint, ours or nanoGPT's, onto the CPU; with `mmap`, tensors on first use.

    path: the file, or a folder, of which best.pt or else ckpt.pt is taken. Raises, in one line,
    FileNotFoundError, ValueError for what is no checkpoint, UserError if no tokenizer fits it.
    """
    if os.path.isdir(path):
        best = os.path.join(path, 'best.pt')
        path = best if os.path.exists(best) else os.path.join(path, 'ckpt.pt')
    if not os.path.exists(path):
        found = ', '.join(sorted({os.path.dirname(file) for file in glob.glob('out*/*.pt')}))
        raise FileNotFoundError(f'no checkpoint {path} (found: {found or "none"}): name one, or '
                                'train one, say by python train.py config/train_wizard_char.py')
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
        raise ValueError(f'{path} is damaged, no checkpoint of a GPT, or might run code '
                         f'({shorten(repr(error), 120)}): take one that train.py wrote') from None
    if not checkpoint.get('tokenizer'):  # nanoGPT keeps it with the dataset, but for GPT-2's
        folder = os.path.join('data', str(checkpoint['config'].get('dataset')))
        checkpoint['tokenizer'] = state = read_meta(folder)['tokenizer']
        rows, known = checkpoint['model_args'].get('vocab_size', 0), state['vocab_size']
        if known > rows or (state['type'] == 'char' and known < rows):
            raise UserError(f'{path} has no tokenizer, and {folder} none of {rows} tokens: '
                            'prepare there the text that it was trained on')
    return checkpoint


def class_and_config(settings, model_args):
    """The class and the config of a model: `model_args`, and what they lack from the settings."""
    cls, config_cls = MODELS.get(settings.get('model'), MODELS['gpt'])
    names = [field.name for field in fields(config_cls) if field.name in settings]
    return cls, config_cls(**{name: settings[name] for name in names} | model_args)


def load_model(path, hub=False):
    """(model, tokenizer) of a checkpoint, of its folder, or of weights from Hugging Face.

    hub: whether `path` may be a name there, gpt2 ... gpt2-xl or owner/name, if no folder has it.
    """
    is_name = re.fullmatch(r'gpt2(-medium|-large|-xl)?|\w[\w.-]*/[\w.-]+(?<!\.pt)', path)
    on_hub = hub and is_name and not os.path.exists(os.path.dirname(path) or path)
    if on_hub or os.path.exists(os.path.join(path, 'config.json')):
        return LanguageModel.from_pretrained(path), tokenizer_of(path)
    checkpoint = load_checkpoint(path)
    cls, config = class_and_config(checkpoint['config'], checkpoint['model_args'])
    model = build(cls, config, checkpoint['model'], torch.device('cpu'))
    return model, tokenizer_from(checkpoint['tokenizer'])


def starting_point(cfg, tokenizer, ranks, device):
    """Where to begin: `cfg` with the model's shape, the model, the checkpoint if it is to resume.

    A checkpoint's shape holds, but for dropout and, in fine-tuning, a shorter block_size or
    another alphabet. Raises ValueError, OSError or UserError, in one line.
    """
    state, weights, checkpoint = tokenizer.state(), None, None
    reads = ranks.is_main or not cfg.shard  # of a sharded run, rank 0 reads the weights for all
    if cfg.init_from == 'scratch':
        # 50304 is a multiple of 64, which is faster on GPUs; training pushes the padding down.
        vocab_size = 50304 if tokenizer.vocab_size == 50257 else tokenizer.vocab_size
        cls, config = class_and_config(vars(cfg), {'vocab_size': vocab_size})
    elif cfg.init_from == 'resume':
        path = os.path.join(cfg.out_dir, 'ckpt.pt')
        checkpoint = load_checkpoint(path, mmap=not reads)
        if checkpoint['tokenizer'] != state:
            raise ValueError(f'{path} was trained on other tokens than data/{cfg.dataset} has: '
                             'prepare that as it was; or, to go on with other characters in a new '
                             f'run, give --init_from={path} and another --out_dir')
        cfg = replace(cfg, optimizer=checkpoint['config'].get('optimizer', 'adamw'),
                      max_iters=max(cfg.max_iters, checkpoint['iter_num']))
        weights, model_args = checkpoint['model'], checkpoint['model_args']
        cls, config = class_and_config(checkpoint['config'], model_args | {'dropout': cfg.dropout})
    else:
        model, theirs = load_model(cfg.init_from, hub=True) if reads else (None, None)
        found = [reads and (type(model), model.config, theirs.state())]
        if cfg.shard:
            torch.distributed.broadcast_object_list(found)  # from rank 0
        cls, config, theirs = found[0]
        if cls is not Bigram and cfg.block_size > config.block_size:
            raise UserError(f"block_size={cfg.block_size} exceeds the model's {config.block_size}")
        weights = model.state_dict() if reads else {}
        if 'transformer.wpe.weight' in weights:
            weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:cfg.block_size]
        if theirs != state:
            adapt_alphabet(weights, theirs, state, cfg.init_from)
            config.vocab_size = state['vocab_size']
        if state['vocab_size'] > config.vocab_size:
            raise ValueError(f'{cfg.init_from} has {config.vocab_size} rows of weights for the '
                             f'{state["vocab_size"]} tokens of {cfg.dataset}: take other weights')
        config = replace(config, block_size=cfg.block_size, dropout=cfg.dropout)
    actual = {name: value for name, value in vars(config).items() if hasattr(cfg, name)}
    actual['model'] = next(name for name, pair in MODELS.items() if pair[0] is cls)
    model = build(cls, config, weights if reads else None, device, cfg.shard, cfg.seed)
    return replace(cfg, **actual), model, checkpoint


def adapt_alphabet(weights, theirs, state, path):
    """Give `weights`, in place, the rows for another alphabet than `theirs`: that of `state`.

    Characters that the model knows keep their rows of the embedding, rows of new ones are drawn.
    Raises ValueError for other kinds of tokens.
    """
    if not theirs['type'] == state['type'] == 'char' or 'table.weight' in weights:  # a Bigram's
        tokenizer = theirs['type'].replace('huggingface', 'FOLDER')
        raise ValueError(f'{path} was trained on {theirs["type"]} tokens, the dataset has other '
                         f'({state["type"]}) ones: train from scratch, or prepare it with '
                         f'--tokenizer={tokenizer}')
    old = torch.tensor([theirs['chars'].find(char) for char in state['chars']])  # -1: a new one
    for key in weights.keys() & {'transformer.wte.weight', 'model.embed_tokens.weight',
                                 'lm_head.weight'}:
        # From the same seed for both matrices, which may be tied.
        drawn = torch.normal(0, 0.02, (len(old), weights[key].size(1)),
                             generator=torch.Generator().manual_seed(0))
        weights[key] = torch.where(old[:, None] < 0, drawn, weights[key][old])


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
        raise ValueError(f"the checkpoint's optimizer does not fit ({shorten(repr(error), 120)}): "
                         'start a new run by --init_from=OUT_DIR/ckpt.pt') from None
