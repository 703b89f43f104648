"""Sample from a model.

    python sample.py --out_dir=out-wizard-char --start="Dorothy"
    python sample.py --out_dir=out-wizard-char --start=FILE:a.txt --num_samples=1 --temperature=0.5
    echo "The Lion" | python sample.py --out_dir=out-wizard-char --start=-

The samples are generated together; the first one is shown as it comes.
"""

import sys
from dataclasses import dataclass

import torch

import console
import runtime
from checkpoint import load_model
from configurator import override
from console import UsageError, UserError
from model import stream
from quantize import ready
from tokenizer import prompt_ids


@dataclass
class SampleConfig:
    init_from: str = 'resume'  # resume: out_dir; a checkpoint; or Hugging Face's: gpt2, a folder
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
        for name in ('num_samples', 'max_new_tokens'):
            if getattr(self, name) < 1:
                raise UsageError(f'{name} is {getattr(self, name)}: it must be at least 1')


def read_prompt(start):
    """The text that the setting `start` stands for."""
    if start != '-' and not start.startswith('FILE:'):
        return start.replace('\\n', '\n')  # a shell passes \n as two characters
    source = 'standard input' if start == '-' else start.removeprefix('FILE:')
    try:
        if start == '-':
            sys.stdin.reconfigure(encoding='utf-8-sig', newline=None)
            return sys.stdin.read().removesuffix('\n')  # which echo adds
        with open(source, encoding='utf-8-sig') as file:
            return file.read()
    except OSError as error:
        raise UserError(f'cannot read the prompt {source} ({error.strerror}): give another '
                        'with --start=FILE:PATH') from None
    except UnicodeDecodeError as error:
        raise UserError(f'{source} is not UTF-8 at byte {error.start}: convert it first') from None


class Text:
    """One text that grows token by token, up to the stop string if there is one."""

    def __init__(self, prompt, ids, decode, stop):
        self.text, self.decode, self.stop = prompt, decode, stop
        self.last, self.waiting = ids, []  # the ids that `text` ends with, and those not in it yet
        self.start, self.shown, self.done = len(prompt), 0, False

    def add(self, token):
        """Take one more id."""
        if self.done:
            return
        # A token may lose its space at the beginning of a text, so the last ones come before it.
        self.waiting.append(token)
        new = self.decode(self.last + self.waiting).removeprefix(self.decode(self.last))
        if new.endswith('\ufffd'):  # a part of a character: its rest is to come
            return
        self.text, self.last, self.waiting = self.text + new, self.waiting, []
        end = self.text.find(self.stop, self.start) if self.stop else -1
        if end >= 0:
            self.text, self.done = self.text[:end], True

    def new(self):
        """What has come since the last call; what may begin the stop string has to wait."""
        end = len(self.text) if self.done else len(self.text) - len(self.stop) + 1
        new = self.text[self.shown : max(end, self.start)]
        self.shown += len(new)
        return new


def print_samples(cfg, prompt):
    """Print `num_samples` texts that go on from `prompt`."""
    device, dtype = runtime.device_and_dtype(cfg)
    runtime.tune(device)
    if cfg.init_from == 'resume':
        model, tokenizer = load_model(cfg.out_dir)
    else:
        model, tokenizer = load_model(cfg.init_from, hub=True)
    ready(model, device, dtype, cfg.quantize, cfg.compile)
    if cfg.compile:
        model.compile(dynamic=True)
    ids = prompt_ids(tokenizer, prompt)
    block_size = model.config.block_size
    if len(ids) > block_size:
        print(f'the prompt has {len(ids)} tokens; the model reads the last {block_size}',
              file=sys.stderr)
    idx = torch.tensor([ids], device=device).repeat(cfg.num_samples, 1)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    stop = cfg.stop.replace('\\n', '\n')
    texts = [Text(prompt, ids, tokenizer.decode, stop) for _ in range(cfg.num_samples)]
    for tokens in stream(
        model, idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, generator,
        tokenizer.vocab_size,
    ):
        for text, token in zip(texts, tokens.flatten().tolist()):
            text.add(token)
        print(texts[0].new(), end='', flush=True)
        if all(text.done for text in texts):
            break
    print(texts[0].text[texts[0].shown :])
    for text in texts[1:]:
        print('---------------')
        print(text.text)


def main(argv):
    cfg = override(SampleConfig(), argv, usage=__doc__)
    remedy = f'lower --num_samples={cfg.num_samples}, or use --quantize=int8'
    with console.user_errors(), runtime.out_of_memory(remedy):
        print_samples(cfg, read_prompt(cfg.start))


if __name__ == '__main__':
    console.run(main)
