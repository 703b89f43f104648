"""A checkpoint as a Hugging Face folder, tokenizer included: pip install transformers

    python export_hf.py --out_dir=out-wizard-char --to=wizard-hf
    python sample.py --init_from=wizard-hf --start="Dorothy"

A GPT becomes a `gpt2`, a Llama a `llama`, or a `qwen3` if it has norms on queries and keys. What
runs these from such folders runs this one: transformers and its server, vLLM and others.
`read_pretrained` is the way back, for their models too.
"""

import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch

import console
from chat import TEMPLATE
from checkpoint import load_model
from configurator import override
from console import UsageError, UserError, optional, user_errors
from llama import Llama
from model import GPT
from pretrained import GELUS, NAMES, hugging_face_weights
from tokenizer import CharTokenizer, HuggingFaceTokenizer


@dataclass
class ExportConfig:
    out_dir: str = 'out'  # the folder that train.py wrote, or a checkpoint
    to: str = ''  # the folder to make


def hugging_face_tokenizer(tokenizer):
    """The same as a tokenizers.Tokenizer."""
    from tiktoken.load import read_file_cached
    from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer
    from tokenizers import decoders, models, pre_tokenizers

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return Tokenizer.from_str(tokenizer.json)
    if isinstance(tokenizer, CharTokenizer):
        # The token for unknown characters is itself unknown, so they are an error there as here.
        theirs = Tokenizer(models.WordLevel(
            {char: i for i, char in enumerate(tokenizer.chars)}, unk_token='<unknown>'))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        theirs.decoder = decoders.Fuse()
        return theirs
    # tiktoken made its tables of these two files, and keeps them. A line of the second is a merge.
    url = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
    vocab = json.loads(read_file_cached(url + 'encoder.json'))
    _, *merges = read_file_cached(url + 'vocab.bpe').decode().splitlines()
    theirs = ByteLevelBPETokenizer(vocab, [tuple(merge.split()) for merge in merges])
    theirs.add_special_tokens(['<|endoftext|>'])
    return Tokenizer.from_str(theirs.to_str())


@torch.no_grad()
def export(model, tokenizer, folder):
    """Write the folder. Raises UserError for a model that transformers doesn't have."""
    c, eot = model.config, tokenizer.eot
    settings = {key: getattr(c, setting) for setting, key in NAMES.items() if hasattr(c, setting)}
    if isinstance(model, GPT):
        kind = 'gpt2'
        settings |= dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout)
        settings['activation_function'] = {ours: theirs for theirs, ours in GELUS.items()}[c.gelu]
    elif isinstance(model, Llama):
        kind = 'qwen3' if c.qk_norm else 'llama'
    else:
        raise UserError(f'a {type(model).__name__} has no Hugging Face form: export a GPT')
    optional('transformers', '4.56')
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast,
    )

    fast = hugging_face_tokenizer(tokenizer)
    end = None if eot is None else fast.id_to_token(eot)
    # Where an answer is in a text; else transformers' server reads a qwen3's as Qwen writes them.
    answer = {'defaults': {'role': 'assistant'}, 'start_anchor': 'assistant\n',
              'fields': {'content': {'close': end, 'content': 'text'}}}
    PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=c.block_size, bos_token=end, eos_token=end,
        clean_up_tokenization_spaces=False, chat_template=tokenizer.chat_template,
        response_template=answer if tokenizer.chat_template == TEMPLATE else None,
    ).save_pretrained(folder)
    files = getattr(tokenizer, 'files', {})  # of a Hugging Face tokenizer: as they came
    for name, text in files.items():
        Path(folder, name).write_text(text, 'utf-8')
    special = AutoTokenizer.from_pretrained(folder)
    settings |= {f'{name}_token_id': getattr(special, f'{name}_token_id')
                 for name in ('bos', 'eos', 'pad')}
    settings['vocab_size'] = min(len(special), c.vocab_size)  # without padding
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    weights, ours = theirs.state_dict(), hugging_face_weights(model)
    for name in ours.keys() & {'transformer.wte.weight', 'model.embed_tokens.weight',
                               'lm_head.weight'}:
        ours[name] = ours[name][: settings['vocab_size']]
    for name in weights.keys() - ours.keys():
        if name.endswith('.bias') and not getattr(c, 'bias', True):
            ours[name] = torch.zeros_like(weights[name])
    shapes = [{name: weight.shape for name, weight in state.items()} for state in (ours, weights)]
    wrong = {name for name, _ in shapes[0].items() ^ shapes[1].items()}
    wrong |= vars(c).keys() - NAMES.keys() - {'dropout', 'bias', 'gelu', 'qk_norm'}
    if wrong:
        raise UserError(f'a {kind} has no counterpart to {shorten(", ".join(sorted(wrong)), 200)}: '
                        'transformers cannot run this model')
    theirs.load_state_dict(ours)
    idx = torch.arange(min(c.block_size, tokenizer.vocab_size, 64))[None]
    expected = model.eval()(idx, idx)[0][..., : settings['vocab_size']]
    if not torch.allclose(theirs(idx).logits, expected, rtol=1e-2, atol=1e-2):
        raise UserError(f'a {kind} computes something else from these weights than this model '
                        'does: transformers cannot run it')
    with user_errors(SafetensorError, f'cannot write {folder}', 'free some space'):
        theirs.save_pretrained(folder)
    if 'generation_config.json' in files:
        Path(folder, 'generation_config.json').write_text(files['generation_config.json'], 'utf-8')


def main(argv):
    cfg = override(ExportConfig(), argv, usage=__doc__)
    if not cfg.to or os.path.lexists(cfg.to):
        raise UsageError(f'--to={cfg.to} must name a folder that is not there yet')
    parent = os.path.dirname(os.path.abspath(cfg.to))
    model, tokenizer = load_model(cfg.out_dir)
    unfinished = f'{cfg.to}.{secrets.token_hex(4)}.tmp'
    with console.locked(parent), user_errors(OSError, f'cannot write {cfg.to}', 'choose another'):
        try:
            os.makedirs(unfinished)
            export(model, tokenizer, unfinished)
            for path in Path(unfinished).iterdir():  # safetensors' own are for the owner alone
                path.chmod(os.stat(unfinished).st_mode & 0o666)
            os.rename(unfinished, cfg.to)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    print(f'{cfg.to}: {", ".join(sorted(os.listdir(cfg.to)))}')


if __name__ == '__main__':
    console.run(main)
