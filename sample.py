"""Let a model write.

    python sample.py --out_dir=out-wizard-char --start="Dorothy"
    python sample.py --out_dir=out-wizard-char --start=FILE:a.txt --num_samples=1 --temperature=0.5
    echo "The Lion" | python sample.py --out_dir=out-wizard-char --start=-

The samples are written side by side; the first one is shown as it comes.
"""

import json
import os
import sys
from dataclasses import dataclass

import torch

import console
import runtime
from configurator import override
from console import UsageError, UserError
from model import GPT, build_model, is_pretrained, load_checkpoint
from quantize import quantize_int8
from tokenizer import GPT2Tokenizer, tokenizer_from, tokenizer_of


@dataclass
class SampleConfig:
    init_from: str = 'resume'  # resume: out_dir; or a checkpoint, its folder, gpt2 ... gpt2-xl
    out_dir: str = 'out'  # the folder that train.py wrote: best.pt, else ckpt.pt is taken
    start: str = '\n'  # the prompt; FILE:path reads a file, - reads standard input
    num_samples: int = 3  # how many texts
    max_new_tokens: int = 500  # tokens added to each
    temperature: float = 0.8  # 1 as the model believes, less is safer, 0 the likeliest token
    top_k: int | None = 200  # only the k likeliest tokens count; none for all
    top_p: float | None = None  # only the likeliest tokens that reach this probability together
    stop: str = ''  # a text ends where this comes up
    seed: int = 1337  # the same seed, the same texts
    device: str = 'auto'  # the best there is of cuda, mps, cpu
    dtype: str = 'auto'  # what the hardware does natively of bfloat16, float16, float32
    quantize: str = ''  # int8 stores the weights in 8 bits: faster, a quarter of float32's memory
    compile: bool = False  # torch.compile: slow to start, faster for very long texts

    def __post_init__(self):
        for name in ('num_samples', 'max_new_tokens', 'top_k'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f'{name} is {value}: it must be at least 1')
        if self.quantize not in ('', 'int8'):
            raise UsageError(f'quantize={self.quantize!r} is not known: use int8, or leave it out')
        if not self.temperature >= 0:
            raise UsageError(f'temperature is {self.temperature}: it must be 0 (greedy) or above')
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f'top_p is {self.top_p}: it must be above 0 and at most 1')


def load(cfg):
    """The model and the tokenizer that `cfg` asks for."""
    source = cfg.out_dir if cfg.init_from == 'resume' else cfg.init_from
    with console.blame_user():
        if is_pretrained(source):
            return GPT.from_pretrained(source), tokenizer_of(source)
        checkpoint = load_checkpoint(source)
        if not checkpoint.get('tokenizer'):
            checkpoint['tokenizer'] = tokenizer_elsewhere(checkpoint, source)
        return build_model(checkpoint), tokenizer_from(checkpoint['tokenizer'])


def tokenizer_elsewhere(checkpoint, source):
    """nanoGPT's checkpoints hold no tokenizer: take the dataset's, or GPT-2's if the size is."""
    dataset = checkpoint.get('config', {}).get('dataset', '')
    meta = os.path.join('data', dataset, 'meta.json')
    if os.path.exists(meta):
        with open(meta, encoding='utf-8') as file:
            return json.load(file)['tokenizer']
    if checkpoint['model_args']['vocab_size'] >= GPT2Tokenizer.vocab_size:
        return GPT2Tokenizer().state()
    raise UserError(
        f'{source} holds no tokenizer and there is no {meta}: prepare that dataset first'
    )


def ready(model, device, dtype, quantize='', pack=True):
    """Bring a model, in place, into the form that writes fastest on `device`; returns it."""
    model.to(device, dtype).eval()
    if quantize == 'int8':
        quantize_int8(model)
    elif pack and device.type == 'cpu' and dtype == torch.bfloat16:
        runtime.pack_linears(model)
    return model


def read_prompt(start):
    """The text that the setting `start` stands for."""
    if start == '-':
        data, source = sys.stdin.buffer.read(), 'standard input'
    elif start.startswith('FILE:'):
        source = start.removeprefix('FILE:')
        try:
            with open(source, 'rb') as file:
                data = file.read()
        except OSError as error:
            raise UserError(f'cannot read the prompt {source} ({error.strerror})') from None
    else:
        return start
    try:
        return data.decode('utf-8-sig').replace('\r\n', '\n')
    except UnicodeDecodeError as error:
        raise UserError(f'{source} is not UTF-8 at byte {error.start}: convert it first') from None


class Text:
    """One text that grows token by token, up to the stop string if there is one."""

    def __init__(self, start, decoder, stop):
        self.text = start
        self.decoder, self.stop = decoder, stop
        self.searched = self.shown = len(start)
        self.done = False

    def add(self, token):
        """Take one more id."""
        if self.done:
            return
        self.text += self.decoder(token)
        if self.stop:
            end = self.text.find(self.stop, self.searched)
            if end >= 0:
                self.text, self.done = self.text[:end], True
            # what could be the beginning of the stop string has to wait
            self.searched = max(self.searched, len(self.text) - len(self.stop) + 1)

    def new(self, final=False):
        """What has come since the last call and is sure to stay."""
        end = len(self.text) if final or self.done or not self.stop else self.searched
        new, self.shown = self.text[self.shown : end], max(end, self.shown)
        return new


def main(argv):
    cfg = override(SampleConfig(), argv, usage=__doc__)
    device = runtime.pick_device(cfg.device)
    dtype = runtime.pick_dtype(cfg.dtype, device)
    runtime.tune(device)
    prompt = read_prompt(cfg.start)
    model, tokenizer = load(cfg)
    # torch.compile cannot look into packed matrices, and arranges them itself.
    ready(model, device, dtype, cfg.quantize, pack=not cfg.compile)
    if cfg.compile:
        model.compile(dynamic=True)

    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        if not isinstance(tokenizer, GPT2Tokenizer):
            raise UsageError('the prompt is empty: give at least one character with --start=TEXT')
        ids = [tokenizer.eot]
    if len(ids) > model.config.block_size:
        print(f'the prompt has {len(ids)} tokens; '
              f'the model reads the last {model.config.block_size}', file=sys.stderr)
    idx = torch.tensor([ids], device=device).repeat(cfg.num_samples, 1)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    texts = [Text(prompt, tokenizer.decoder(), cfg.stop) for _ in range(cfg.num_samples)]
    print(prompt, end='', flush=True)
    for tokens in model.stream(
        idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, generator
    ):
        for text, token in zip(texts, tokens.flatten().tolist()):
            text.add(token)
        print(texts[0].new(), end='', flush=True)
        if all(text.done for text in texts):
            break
    print(texts[0].new(final=True))
    for text in texts[1:]:
        print('---------------')
        print(text.text)


if __name__ == '__main__':
    console.run(main)
