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
from configurator import check, override
from console import UsageError, UserError, user_errors
from model import sample_from, stream
from prepare_text import read_text
from quantize import prepare_for_sampling
from tokenizer import TextStream, prompt_ids


@dataclass
class SamplingConfig:  # chat.py has these too
    init_from: str = 'resume'  # resume: out_dir; a checkpoint; or Hugging Face's: gpt2, a folder
    out_dir: str = 'out'  # the folder that train.py wrote: reads best.pt, or else ckpt.pt
    max_new_tokens: int = 500  # the most tokens that are added to a text
    temperature: float = 0.8  # 1: the model's probabilities; lower: safer; 0: the likeliest token
    top_k: int | None = 200  # keep only the k likeliest tokens; none: all
    top_p: float | None = None  # keep the likeliest tokens that together reach this probability
    seed: int = 1337  # the same seed and prompts, the same texts
    device: str = 'auto'  # the best of cuda, mps, cpu; or one by name, for example cuda:1
    dtype: str = 'auto'  # the best the hardware supports natively: bfloat16, float16 or float32
    quantize: str = ''  # int8 stores the weights in 8 bits: faster, a quarter of float32's memory

    def __post_init__(self):
        """Refuse impossible values before anything slow. Raises UsageError."""
        check(self, at_least_1='num_samples max_new_tokens', quantize=['', 'int8'])
        try:
            sample_from(torch.zeros(1, 1), self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UsageError(str(error)) from None


@dataclass
class SampleConfig(SamplingConfig):
    start: str = '\n'  # the prompt; \n alone is a line break; FILE:path: a file; -: standard input
    num_samples: int = 3  # how many texts
    stop: str = ''  # a text ends before this, which is not shown
    end: bool = True  # a text ends at the end-of-text token; false: it continues
    compile: bool = False  # torch.compile: slow to start, faster for very long texts


def read_prompt(start):
    """The prompt that the setting `start` stands for. Raises UsageError or UserError."""
    if start.startswith('FILE:'):
        return read_text(start.removeprefix('FILE:'))
    if start == '-':
        sys.stdin.reconfigure(encoding='utf-8-sig', errors='replace', newline=None)
        return sys.stdin.read().removesuffix('\n')  # which echo adds
    return start


def load_to_sample(cfg, compiled=False):
    """(model, tokenizer, random generator, context for the model's calls), as `cfg` says."""
    device, dtype = runtime.device_and_dtype(cfg)
    resume = cfg.init_from == 'resume'
    model, tokenizer = load_model(cfg.out_dir if resume else cfg.init_from, hub=not resume)
    amp = prepare_for_sampling(model, device, dtype, cfg.quantize, compiled,
                               exact=cfg.dtype != 'auto')
    return model, tokenizer, torch.Generator(device).manual_seed(cfg.seed), amp


def write(cfg, model, tokenizer, ids, texts, generator):
    """Continue `ids` in all TextStreams `texts`; yield new text of the first. Raises UserError."""
    if max(ids) >= model.config.vocab_size:
        raise UserError(f'the id {max(ids)} of {tokenizer.decode([max(ids)])!r} is beyond the '
                        f"model's {model.config.vocab_size} rows of weights: leave it out")
    idx = torch.tensor([ids], device=generator.device).repeat(len(texts), 1)
    with user_errors(RuntimeError, 'the model gives no probabilities', 'use another checkpoint',
                     lambda error: 'probability tensor' in str(error)):
        for tokens in stream(model, idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
                             generator, tokenizer.vocab_size):
            new = [text.add(token) for text, token in zip(texts, tokens.flatten().tolist())]
            yield new[0]
            if all(text.done for text in texts):
                break
    yield [text.finish() for text in texts][0]


def main(argv):
    cfg = override(SampleConfig(), argv, usage=__doc__)
    prompt = read_prompt(cfg.start)
    runtime.set_speed_options()
    with runtime.out_of_memory(f'lower --num_samples={cfg.num_samples}, or use --quantize=int8'):
        model, tokenizer, generator, amp = load_to_sample(cfg, cfg.compile)
        if cfg.compile:
            model.compile(dynamic=True)
        ids, eot = prompt_ids(tokenizer, prompt), tokenizer.eot if cfg.end else None
        if len(ids) > (block_size := model.config.block_size):
            print(f'the prompt has {len(ids)} tokens; the model reads the last {block_size}',
                  file=sys.stderr)
        texts = [TextStream(prompt, ids, tokenizer, cfg.stop, eot) for _ in range(cfg.num_samples)]
        with amp, user_errors(Exception, 'torch.compile failed', 'add --compile=false', lambda e:
                              type(e).__module__.startswith(('torch._dynamo', 'torch._inductor'))):
            for new in write(cfg, model, tokenizer, ids, texts, generator):
                print(console.printable(new), end='', flush=True)
        print()
        for text in texts[1:]:
            print(console.printable(f'---------------\n{text.text}'))


if __name__ == '__main__':
    console.run(main)
