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

# What config.json calls the settings of our configs ...
GPT2_NAMES = dict(
    block_size='n_positions', vocab_size='vocab_size', n_layer='n_layer', n_head='n_head',
    n_embd='n_embd', gelu='activation_function',
)
LLAMA_NAMES = dict(
    block_size='max_position_embeddings', vocab_size='vocab_size', n_layer='num_hidden_layers',
    n_head='num_attention_heads', n_kv_head='num_key_value_heads', n_embd='hidden_size',
    head_size='head_dim', n_hidden='intermediate_size', norm_eps='rms_norm_eps',
    rope_theta='rope_theta', tied='tie_word_embeddings',
)
GELUS = {'gelu_new': 'tanh', 'gelu': 'erf'}
# ... and what else it must say, since with another value the model would compute something else.
GPT2_ONLY = dict(
    tie_word_embeddings=True, layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
)
LLAMA_ONLY = dict(
    hidden_act='silu', attention_bias=False, mlp_bias=False, use_sliding_window=False,
    rope_scaling=False, rope_type='default',
)
FORMS = {  # by model_type
    'gpt2': (GPT, GPTConfig, GPT2_NAMES, GPT2_ONLY),
    'llama': (Llama, LlamaConfig, LLAMA_NAMES, LLAMA_ONLY),
    'qwen3': (Llama, LlamaConfig, LLAMA_NAMES, LLAMA_ONLY),
}


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
        weights |= {name.replace('qkv_proj', part): w for part, w in zip(parts, rows)}
    return weights


@torch.no_grad()
def read_pretrained(cls, name, dropout):
    """A `cls`, or one of its subclasses, with the weights of a folder or a name on Hugging Face.

    No code that comes with the weights is run. Raises ImportError without the package
    transformers, ValueError for another architecture, OSError when the weights can't be had.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    kinds = [kind for kind, form in FORMS.items() if issubclass(form[0], cls)]
    kind = PretrainedConfig.get_config_dict(name)[0].get('model_type')
    if kind not in kinds:
        raise ValueError(f'{name} has model_type={kind!r}: it must be {" or ".join(kinds)}')
    model_class, config_class, names, only = FORMS[kind]
    theirs = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    # transformers 5 keeps rotary settings in a dict of their own, before it they stood here.
    theirs = {'rope_type': 'default'} | theirs | (theirs.get('rope_parameters') or {})
    for key, value in only.items():
        if (theirs.get(key) or False) != value:
            raise ValueError(f'{name} has {key}={theirs.get(key)!r}: it must be {value!r}')
    settings = {setting: theirs.get(key) for setting, key in names.items()}
    if kind == 'gpt2':
        settings['gelu'] = GELUS.get(settings['gelu'], settings['gelu'])
    else:
        settings['qk_norm'] = kind == 'qwen3'
    model = model_class(config_class(**settings, dropout=dropout))
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
    except RuntimeError as error:
        raise ValueError(f'the weights of {name} do not fit its config.json: '
                         + shorten(str(error), 100)) from None
    if missing := sorted(report['missing_keys']):  # it drew them at random
        raise ValueError(f'{name} has no {shorten(", ".join(missing), 100)}: get it again')
    weights = loaded.state_dict()
    for key, weight in hugging_face_weights(model).items():
        if weight.shape != weights[key].shape:
            raise ValueError(f'{key} is {tuple(weights[key].shape)}, which is another '
                             f'architecture: it must be {tuple(weight.shape)}')
        weight.copy_(weights[key])
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
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        theirs = Tokenizer(models.WordLevel(vocab, unk_token='<unknown>'))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
        theirs.decoder = decoders.Fuse()
        return theirs
    # tiktoken made its tables of these two files, and keeps them. A line of the second is a merge.
    vocab, merges = (
        read_file_cached(f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}')
        for name in ('encoder.json', 'vocab.bpe')
    )
    merges = [tuple(line.split()) for line in merges.decode().splitlines()[1:]]
    theirs = ByteLevelBPETokenizer(json.loads(vocab), merges)
    theirs.add_special_tokens(['<|endoftext|>'])
    return Tokenizer.from_str(theirs.to_str())


def export(model, tokenizer, folder):
    """Write the folder. Raises UserError for a model without such a form, ImportError."""
    c, eot = model.config, tokenizer.eot
    if isinstance(model, GPT):
        kind, names = 'gpt2', GPT2_NAMES
        own = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout)
        own['activation_function'] = {ours: theirs for theirs, ours in GELUS.items()}[c.gelu]
    elif isinstance(model, Llama):
        kind, names, own = 'qwen3' if c.qk_norm else 'llama', LLAMA_NAMES, {}
    else:
        raise UserError(f'a {type(model).__name__} has no Hugging Face form: export a GPT')
    import transformers

    settings = {key: getattr(c, setting) for setting, key in names.items()} | own
    settings['vocab_size'] = tokenizer.vocab_size  # without padding
    config = transformers.AutoConfig.for_model(
        kind, **settings, bos_token_id=eot, eos_token_id=eot)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    weights = theirs.state_dict()  # biases that our model doesn't have are zero there
    for name, weight in hugging_face_weights(model).items():
        weights[name].copy_(weight[: len(weights[name])])
    theirs.save_pretrained(folder)
    fast = hugging_face_tokenizer(tokenizer)
    end = None if eot is None else fast.id_to_token(eot)
    transformers.PreTrainedTokenizerFast(
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
            folder = os.path.join(unfinished, 'folder')
            export(model, tokenizer, folder)
            os.rename(folder, cfg.to)
    print(f'{cfg.to}: {", ".join(sorted(os.listdir(cfg.to)))}')


if __name__ == '__main__':
    console.run(main)
