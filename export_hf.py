"""A checkpoint as a Hugging Face folder, tokenizer included: pip install transformers

    python export_hf.py --out_dir=out-wizard-char --to=wizard-hf
    python sample.py --init_from=wizard-hf --start="Dorothy"

A GPT becomes a `gpt2`, a Llama a `llama`, or a `qwen3` if it has norms on queries and keys. What
runs these from such folders runs this one: transformers and its server, vLLM and others.
`read_pretrained` is the way back, for their models too.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from textwrap import shorten

import torch

import console
from checkpoint import load_model
from configurator import override
from console import UsageError, UserError
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from tokenizer import CharTokenizer, HuggingFaceTokenizer

# What config.json calls our settings; where a gpt2's has another name for one, it knows this too.
NAMES = dict(
    block_size='max_position_embeddings', vocab_size='vocab_size', n_layer='num_hidden_layers',
    n_head='num_attention_heads', n_kv_head='num_key_value_heads', n_embd='hidden_size',
    head_size='head_dim', n_hidden='intermediate_size', norm_eps='rms_norm_eps',
    rope_theta='rope_theta', tied='tie_word_embeddings',
)
GELUS = {'gelu_new': 'tanh', 'gelu': 'erf'}
# By model_type: our classes, and what config.json must say besides, since with another value the
# model would compute something else.
GPT2 = GPT, GPTConfig, dict(
    tie_word_embeddings=True, layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
)
LLAMA = Llama, LlamaConfig, dict(
    hidden_act='silu', attention_bias=False, mlp_bias=False, use_sliding_window=False,
    rope_type='default',
)
FORMS = {'gpt2': GPT2, 'llama': LLAMA, 'qwen3': LLAMA}


@dataclass
class ExportConfig:
    out_dir: str = 'out'  # the folder that train.py wrote, or a checkpoint
    to: str = ''  # the folder to make


def hugging_face_weights(model):
    """Views of a model's weights by Hugging Face's names, in its form: to copy from or into."""
    weights, c = model.state_dict(), model.config
    if isinstance(model, GPT):  # there, these matrices are transposed: (in, out)
        transposed = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')
        return {name: weight.t() if name.endswith(transposed) else weight
                for name, weight in weights.items()}
    parts = {'q_proj': c.n_head, 'k_proj': c.n_kv_head, 'v_proj': c.n_kv_head}  # in heads
    for name in [name for name in weights if 'qkv_proj' in name]:  # there, it is three matrices
        rows = weights.pop(name).split([heads * c.head_size for heads in parts.values()])
        weights |= {name.replace('qkv_proj', part): own for part, own in zip(parts, rows)}
    return weights


def read_pretrained(cls, name, dropout):
    """A `cls`, or one of its subclasses, with the weights of a folder or a name on Hugging Face.

    No code that comes with the weights is run. Raises ImportError without the package
    transformers, ValueError for another architecture, OSError when the weights can't be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
    from transformers.utils import logging
    from huggingface_hub.utils import enable_progress_bars  # this and the next come with it
    from safetensors import SafetensorError

    logging.disable_progress_bar()  # of reading: it would be on the screen before an error
    enable_progress_bars()  # of a download, which may take long
    kinds = [kind for kind, form in FORMS.items() if issubclass(form[0], cls)]
    kind = PretrainedConfig.get_config_dict(name)[0].get('model_type')
    if kind not in kinds:
        raise ValueError(f'{name} has model_type={kind!r}: it must be {" or ".join(kinds)}')
    model_class, config_class, only = FORMS[kind]
    theirs = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # Rotary settings are in a dict of their own; before transformers 5, only those of its scaling.
    rope = getattr(theirs, 'rope_parameters', None) or getattr(theirs, 'rope_scaling', None)
    theirs.update(rope or {})
    for key, value in only.items():
        if getattr(theirs, key, value) != value:
            raise ValueError(f'{name} has {key}={getattr(theirs, key)!r}: it must be {value!r}')
    settings = {setting: getattr(theirs, key) for setting, key in NAMES.items()
                if hasattr(config_class, setting)}
    if kind == 'gpt2':
        settings['gelu'] = GELUS.get(theirs.activation_function, theirs.activation_function)
    else:
        settings['qk_norm'] = kind == 'qwen3'
    model = model_class(config_class(**settings, dropout=dropout))
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
        weights = loaded.state_dict()
        for key, weight in hugging_face_weights(model).items():
            weight.copy_(weights[key])
    except (RuntimeError, SafetensorError) as error:  # a tensor of another shape; a cut file
        raise ValueError(f'the weights of {name} are damaged or do not fit its config.json: '
                         + shorten(str(error), 100)) from None
    if missing := sorted(report['missing_keys']):  # it drew them at random
        raise ValueError(f'{name} has no {shorten(", ".join(missing), 100)}: get it again')
    return model


def hugging_face_tokenizer(tokenizer):
    """The same as a tokenizers.Tokenizer."""
    from tiktoken.load import read_file_cached
    from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer
    from tokenizers import decoders, models, pre_tokenizers

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return Tokenizer.from_str(tokenizer.json)
    if isinstance(tokenizer, CharTokenizer):
        # The token for unknown characters is itself unknown, so they are an error there as here.
        theirs = Tokenizer(models.WordLevel(tokenizer.ids, unk_token='<unknown>'))
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


def export(model, tokenizer, folder):
    """Write the folder. Raises UserError for a model without such a form, ImportError."""
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
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from safetensors import SafetensorError  # it comes with transformers

    settings['vocab_size'] = tokenizer.vocab_size  # without padding
    config = AutoConfig.for_model(kind, **settings, bos_token_id=eot, eos_token_id=eot)
    theirs = AutoModelForCausalLM.from_config(config)
    weights = theirs.state_dict()  # biases that our model doesn't have are zero there
    for name, weight in hugging_face_weights(model).items():
        weights[name].copy_(weight[: len(weights[name])])
    try:
        theirs.save_pretrained(folder)
    except SafetensorError as error:  # of a full disk, say; it is no OSError
        raise UserError(f'cannot write weights ({shorten(str(error), 100)}): make room') from None
    fast = hugging_face_tokenizer(tokenizer)
    end = None if eot is None else fast.id_to_token(eot)
    PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=c.block_size, bos_token=end, eos_token=end,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def main(argv):
    cfg = override(ExportConfig(), argv, usage=__doc__)
    if not cfg.to or os.path.lexists(cfg.to):
        raise UsageError(f'--to={cfg.to} must name a folder that is not there yet')
    parent = os.path.dirname(os.path.abspath(cfg.to))
    with console.user_errors():
        model, tokenizer = load_model(cfg.out_dir)
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as unfinished:
            export(model, tokenizer, f'{unfinished}/folder')
            os.rename(f'{unfinished}/folder', cfg.to)
    print(f'{cfg.to}: {", ".join(sorted(os.listdir(cfg.to)))}')


if __name__ == '__main__':
    console.run(main)
