"""A checkpoint as a Hugging Face folder, tokenizer included: pip install transformers

    python export_hf.py --out_dir=out-wizard-char --to=wizard-hf
    python sample.py --init_from=wizard-hf --start="Dorothy"

A GPT becomes a `gpt2`, a Llama a `llama`, or a `qwen3` if it has norms on queries and keys. Any
program that loads such folders (transformers, vLLM, ...) can load this one; so do our scripts.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import console
from chat import TEMPLATE, render
from checkpoint import load_model
from configurator import override
from console import UsageError, UserError, optional, user_errors
from llama import Llama
from model import GPT
from pretrained import GELUS, NAMES, hugging_face_weights
from tokenizer import CharTokenizer, GPT2Tokenizer, HuggingFaceTokenizer

CANNOT_RUN = 'sample.py can run this model, transformers cannot'


@dataclass
class ExportConfig:
    out_dir: str = 'out'  # the folder that train.py wrote, or a checkpoint
    to: str = ''  # the new folder


def hugging_face_tokenizer(tokenizer):
    """The tokenizers.Tokenizer that gives the same ids."""
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
    if not isinstance(tokenizer, GPT2Tokenizer):
        raise UserError(f'a {type(tokenizer).__name__} has no Hugging Face form: {CANNOT_RUN}')
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
    c = model.config
    settings = {key: getattr(c, setting) for setting, key in NAMES.items() if hasattr(c, setting)}
    if isinstance(model, GPT):
        kind = 'gpt2'
        settings |= dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout)
        settings['activation_function'] = {ours: theirs for theirs, ours in GELUS.items()}[c.gelu]
    elif isinstance(model, Llama):
        kind = 'qwen3' if c.qk_norm else 'llama'
    else:
        raise UserError(f'a {type(model).__name__} has no Hugging Face form: export a GPT')
    if extra := vars(c).keys() - NAMES.keys() - {'dropout', 'bias', 'gelu', 'qk_norm'}:
        raise UserError(f'a {kind} has no setting {", ".join(sorted(extra))}: {CANNOT_RUN}')
    optional('transformers', '4.56')
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import PreTrainedTokenizerFast

    fast = hugging_face_tokenizer(tokenizer)
    end = None if tokenizer.eot is None else fast.id_to_token(tokenizer.eot)
    PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=c.block_size, bos_token=end, eos_token=end,
        clean_up_tokenization_spaces=False, chat_template=tokenizer.chat_template,
        model_input_names=['input_ids', 'attention_mask'],
    ).save_pretrained(folder)
    files = getattr(tokenizer, 'files', {})  # of a Hugging Face tokenizer: unchanged
    for name, text in files.items():
        Path(folder, name).write_text(text, 'utf-8')
    if tokenizer.chat_template == TEMPLATE:  # ours: such files may have no end, or another
        # Where an answer is in a text; else transformers' server reads a qwen3's as Qwen writes it.
        header = render(tokenizer, [{'role': 'user', 'content': 'a'}]).rpartition(end)[2]
        answer = {'defaults': {'role': 'assistant'}, 'start_anchor': header,
                  'fields': {'content': {'close': end, 'content': 'text'}}}
        path = Path(folder, 'tokenizer_config.json')
        config = json.loads(path.read_text('utf-8')) | dict(eos_token=end, response_template=answer)
        path.write_text(json.dumps(config, indent=1), 'utf-8')
    special = AutoTokenizer.from_pretrained(folder)
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
        settings[name] = getattr(special, name)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    biases = {name: torch.zeros_like(weight) for name, weight in theirs.state_dict().items()
              if name.endswith('.bias') and not getattr(c, 'bias', True)}
    with user_errors(RuntimeError, f'a {kind} has other weights', CANNOT_RUN):
        theirs.load_state_dict(biases | hugging_face_weights(model))
    theirs.resize_token_embeddings(min(len(special), c.vocab_size))  # without padding
    idx = torch.arange(min(c.block_size, 1024))[None] % tokenizer.vocab_size
    expected = model.eval()(idx, idx)[0][..., : theirs.config.vocab_size]
    if not torch.allclose(theirs(idx).logits, expected, rtol=1e-2, atol=1e-2):
        raise UserError(f'a {kind} computes something else from these weights: {CANNOT_RUN}')
    with user_errors(SafetensorError, f'cannot write {folder}', 'free some space'):
        theirs.save_pretrained(folder)
    if 'generation_config.json' in files and tokenizer.chat_template != TEMPLATE:
        Path(folder, 'generation_config.json').write_text(files['generation_config.json'], 'utf-8')


def main(argv):
    cfg = override(ExportConfig(), argv, usage=__doc__)
    cfg.to = os.path.expanduser(cfg.to).rstrip('/')
    if not cfg.to or os.path.lexists(cfg.to):
        raise UsageError(f'--to={cfg.to} must name a folder that is not there yet')
    parent = os.path.dirname(os.path.abspath(cfg.to))
    model, tokenizer = load_model(cfg.out_dir)
    unfinished = console.unfinished(cfg.to)
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
