"""Tiny Shakespeare, split as nanoGPT does: 1,003,854 train, 111,540 val tokens of 65 characters.

    python prepare_shakespeare_char.py               # downloads 1.1 MB
    python prepare_shakespeare_char.py --input=FILE  # takes your copy

GPT-2's tokenizer makes 301,966 train and 36,059 val tokens of it: --tokenizer=gpt2.
"""

import console
from configurator import override
from prepare_text import FetchConfig, fetch, prepare, read_text

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def main(argv):
    cfg = override(FetchConfig('shakespeare_char'), argv, usage=__doc__)
    path = cfg.input or fetch(cfg.dataset, URL, lambda data: len(data) == 1_115_394)
    prepare(read_text(path), cfg.dataset, cfg.tokenizer, source=cfg.input or URL)


if __name__ == '__main__':
    console.run(main)
