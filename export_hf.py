"""A checkpoint as a Hugging Face folder, tokenizer included: pip install transformers

    python export_hf.py --out_dir=out-wizard-char --to=wizard-hf
    python sample.py --init_from=wizard-hf --start="Dorothy"

A GPT becomes a `gpt2`, a Llama a `llama`, or a `qwen3` if it has norms on queries and keys. What
runs these from such folders runs this one: transformers and its server, vLLM and others.
"""

import json
import os
import tempfile
from dataclasses import dataclass

import console
from checkpoint import load_model
from configurator import override
from console import UsageError, UserError
from llama import Llama
from model import GPT
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
    if not isinstance(model, (GPT, Llama)):
        raise UserError(f'a {type(model).__name__} has no Hugging Face form: export a GPT')
    import transformers

    # Padding of the vocabulary is left out.
    c, eot = model.config, tokenizer.eot
    common = dict(vocab_size=tokenizer.vocab_size, bos_token_id=eot, eos_token_id=eot)
    if isinstance(model, GPT):
        config = transformers.GPT2Config(
            **common, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
            n_embd=c.n_embd, activation_function='gelu_new' if c.gelu == 'tanh' else 'gelu',
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        )
    else:
        cls = transformers.Qwen3Config if c.qk_norm else transformers.LlamaConfig
        config = cls(
            **common, max_position_embeddings=c.block_size, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, hidden_size=c.n_embd,
            head_dim=c.head_size, intermediate_size=c.n_hidden, rms_norm_eps=c.norm_eps,
            rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta},
            tie_word_embeddings=c.tied,
        )
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    weights = theirs.state_dict()  # biases that our model doesn't have are zero there
    for name, weight in model.hugging_face_weights().items():
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
    if not cfg.to or os.path.exists(cfg.to):
        raise UsageError(f'--to={cfg.to} must name a folder that is not there yet')
    parent = os.path.dirname(os.path.abspath(cfg.to))
    with console.user_errors(), tempfile.TemporaryDirectory(dir=parent) as unfinished:
        folder = os.path.join(unfinished, 'folder')
        export(*load_model(cfg.out_dir), folder)
        os.rename(folder, cfg.to)
    print(f'{cfg.to}: {", ".join(sorted(os.listdir(cfg.to)))}')


if __name__ == '__main__':
    console.run(main)
