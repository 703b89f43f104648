"""Checkpoints: everything that reads or writes a .pt file.

A checkpoint is a dict of tensors and plain types: reading one runs no code. It contains nanoGPT's
keys (model, optimizer, model_args, iter_num, best_val_loss, config) and ours (tokenizer, format,
optimizers, scaler, and the other numbers of a run). `out_dir/ckpt.pt` is the latest full training
state, `out_dir/best.pt` the weights with the best validation loss.
"""

import glob
import os
import warnings
from dataclasses import asdict

import torch

import console
import runtime
from console import UserError, atomic_file, files_of_run, flush_to_disk, user_errors
from llama import class_and_config
from prepare_text import read_meta
from pretrained import is_pretrained, read_pretrained
from tokenizer import tokenizer_from, tokenizer_of


def save_run(cfg, ranks, model, optimizers, scaler, tokenizer, run, log, improved, is_kept,
             is_evaluated):
    """Write ckpt.pt, the whole state of a run; if improved, best.pt; if is_kept, ckpt-N.pt.

    The first save of a new run moves a previous run in out_dir away and opens the log. All ranks
    must call it. is_evaluated: whether val was measured now. Returns the path of the state. Raises
    UserError if weights are not finite or a file can't be written.
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
    others = {'best.pt': best} if improved else {}
    others |= {f'ckpt-{it}.pt': state} if is_kept else {}
    is_first = log.columns is None  # the log is not open yet
    if is_first and log.is_new and not (is_evaluated or is_kept) and files_of_run(cfg.out_dir):
        # Stopped before its first evaluation, perhaps a mistake: the previous run stays in place.
        folder = console.first_free(f'{cfg.out_dir}/stopped')
        path, log.path, log.is_new = f'{folder}/ckpt.pt', f'{folder}/log.csv', False
    if ranks.is_main:
        with atomic_file(path) as file:
            torch.save(state, file)
            flush_to_disk(file)  # a full disk must show before anything is moved
            if is_first:
                if log.is_new:
                    console.move_previous_run(cfg.out_dir)
                log.open()
            # Before ckpt.pt gets its name: after a crash in between, a resumed run repeats these.
            for name, content in others.items():
                with atomic_file(f'{cfg.out_dir}/{name}') as other:
                    torch.save(content, other)
    ranks.wait()  # rank 0 is still writing; torchrun would end it if the others left
    return path


def restore(checkpoint, run, optimizers, scaler):
    """Restore optimizers and scaler; returns the numbers of `run` that the checkpoint contains.

    Learning rates and other settings stay those of the command. Raises UserError.
    """
    with user_errors((KeyError, IndexError, TypeError, ValueError, AttributeError),
                     "the checkpoint's optimizer does not fit",
                     'start a new run from its weights: --init_from=OUT_DIR/ckpt.pt'):
        saved = checkpoint.get('optimizers')  # older files and nanoGPT's have other keys
        saved = saved or [checkpoint['optimizer'], *checkpoint.get('muon', [])]
        states = [runtime.fitting_state(*pair) for pair in zip(optimizers, saved, strict=True)]
    for optimizer, state in zip(optimizers, states):
        runtime.load_state(optimizer, state)
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
    return {name: checkpoint[name] for name in run.keys() & checkpoint.keys()}


def load_checkpoint(path, mmap=False):
    """A checkpoint of ours or nanoGPT's, a dict with tensors on the CPU. Raises UserError.

    path: the file, or a folder with best.pt or ckpt.pt. mmap: read a tensor when it is used.
    """
    if os.path.isdir(path):
        best = os.path.join(path, 'best.pt')
        path = best if os.path.exists(best) else os.path.join(path, 'ckpt.pt')
    if not os.path.exists(path):
        files = glob.glob('out*/*.pt') + glob.glob('out*/*/*.pt')  # such as previous/
        found = ', '.join(sorted({os.path.dirname(file) for file in files}))
        raise UserError(f'no checkpoint {path} (found: {found or "none"}): choose one, or train '
                        'one: python train.py config/train_wizard_char.py')
    with user_errors(Exception, f'{path} is damaged, no checkpoint of a GPT, or might run code',
                     'use one that train.py wrote',  # damage causes many kinds of errors
                     lambda error: not runtime.is_out_of_memory(error)):
        with warnings.catch_warnings(action='ignore'):  # about files that it refuses anyway
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
    with user_errors((ValueError, KeyError, TypeError), f'{path} fits no model',
                     'use another checkpoint'):
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
    """(model, tokenizer) of a checkpoint, its folder, or a Hugging Face folder.

    hub: also accept a name on Hugging Face (gpt2, owner/name). Raises UserError.
    """
    path = os.path.expanduser(path)
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
