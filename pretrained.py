"""Models from Hugging Face: `gpt2`, `llama` and `qwen3`. export_hf.py is the way there."""

import os
import pickle
import re
from textwrap import shorten

import torch

from console import UserError, optional, user_errors
from llama import MODELS
from model import GPT

# The names of our settings in config.json; GPT2Config accepts them as aliases.
NAMES = dict(
    block_size='max_position_embeddings', vocab_size='vocab_size', n_layer='num_hidden_layers',
    n_head='num_attention_heads', n_kv_head='num_key_value_heads', n_embd='hidden_size',
    head_size='head_dim', n_hidden='intermediate_size', norm_eps='rms_norm_eps',
    rope_theta='rope_theta', tied='tie_word_embeddings',
)
GELUS = {'gelu_new': 'tanh', 'gelu': 'erf'}
# By model_type, what config.json must say: with other values the model computes something else.
LLAMA = dict(hidden_act='silu', attention_bias=False, mlp_bias=False, use_sliding_window=False,
             rope_type='default')
GPT2 = dict(tie_word_embeddings=True, layer_norm_epsilon=1e-5, scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False)
REQUIRED = {'gpt2': GPT2, 'llama': LLAMA, 'qwen3': LLAMA}


def is_pretrained(path, hub=False):
    """Whether `path` is a Hugging Face folder; hub: or a name there, if no such folder exists."""
    if hub and not os.path.exists(os.path.dirname(path) or path):
        return bool(re.fullmatch(r'gpt2(-medium|-large|-xl)?|\w[\w.-]*/[\w.-]+(?<!\.pt)', path))
    return os.path.exists(os.path.join(path, 'config.json'))


def hugging_face_weights(model):
    """Views of a model's weights by Hugging Face's names, in its form: to copy from or into."""
    weights, c = model.state_dict(), model.config
    if isinstance(model, GPT):  # Hugging Face's matrices are transposed: (in, out)
        transposed = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')
        return {name: weight.t() if name.endswith(transposed) else weight
                for name, weight in weights.items()}
    parts = {'q_proj': c.n_head, 'k_proj': c.n_kv_head, 'v_proj': c.n_kv_head}  # in heads
    for name in [name for name in weights if 'qkv_proj' in name]:  # Hugging Face has three
        rows = weights.pop(name).split([heads * c.head_size for heads in parts.values()])
        weights |= {name.replace('qkv_proj', part): own for part, own in zip(parts, rows)}
    return weights


def read_pretrained(name):
    """The model of a Hugging Face folder or name. Raises UserError. Runs no code of it."""
    optional('transformers', '4.56')
    from huggingface_hub.utils import enable_progress_bars
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading a file, which would precede an error message
    enable_progress_bars()  # of a download, which may be slow
    with user_errors(Exception, f'cannot read the model {name}',
                     'connect, get it again, or choose another folder or name'):
        kind = PretrainedConfig.get_config_dict(name)[0].get('model_type')
        if kind not in REQUIRED:
            raise UserError(f'{name} has model_type={kind!r}: choose one of {", ".join(REQUIRED)}')
        theirs = AutoConfig.from_pretrained(name, trust_remote_code=False)
        # Rotary settings have a dict of their own; before transformers 5, only those of scaling.
        rope = getattr(theirs, 'rope_parameters', None) or getattr(theirs, 'rope_scaling', None)
        theirs.update(rope or {})
    for key, value in REQUIRED[kind].items():
        if getattr(theirs, key, value) != value:
            raise UserError(f'{name} has {key}={getattr(theirs, key)!r}: it must be {value!r}')
    model_class, config_class = MODELS['gpt' if kind == 'gpt2' else 'llama']
    settings = {setting: getattr(theirs, key) for setting, key in NAMES.items()
                if hasattr(config_class, setting)}
    if kind == 'gpt2':
        settings['gelu'] = GELUS.get(theirs.activation_function, theirs.activation_function)
    else:
        settings['qk_norm'] = kind == 'qwen3'
    with user_errors((ValueError, TypeError), f'the shape of {name} is impossible', 'get it again'):
        config = config_class(**settings)
    model = model_class(config)
    with user_errors(Exception, f'the weights of {name} are damaged or do not fit its config.json',
                     'get them again'):
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
        except pickle.UnpicklingError:  # torch's message says how to run the code
            raise UserError(f'the weights of {name} contain code: use .safetensors') from None
        weights = loaded.state_dict()
        for key, weight in hugging_face_weights(model).items():
            weight.copy_(weights[key])
    if missing := sorted(report['missing_keys']):  # transformers initialized them at random
        raise UserError(f'{name} has no {shorten(", ".join(missing), 100)}: get it again')
    return model
