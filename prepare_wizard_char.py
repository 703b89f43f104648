"""The Wonderful Wizard of Oz, by characters: 80 % train, 10 % val, 10 % test.

    python prepare_wizard_char.py              # fetches L. Frank Baum's book, Project Gutenberg 55
    python prepare_wizard_char.py --input=FILE # takes your copy

Without a network it takes data/oz_retold.txt, a retelling in new words that comes with ozGPT:
180,561 train, 22,570 val and 22,571 test tokens of 68 characters. meta.json says which it was.
"""

import os
from dataclasses import dataclass

import console
from configurator import override
from prepare_text import check_name, fetch, prepare, read_text

URL = 'https://www.gutenberg.org/cache/epub/55/pg55.txt'
RETOLD = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'oz_retold.txt')


@dataclass
class WizardConfig:
    dataset: str = 'wizard_char'  # files go to data/<dataset>
    tokenizer: str = 'char'  # or gpt2
    input: str = ''  # a file to use instead of downloading


def strip_gutenberg(text):
    """The book itself: what stands between Project Gutenberg's header and footer, if any."""
    if '*** START OF TH' in text:
        text = text.partition('*** START OF TH')[2].partition('\n')[2]
        text = text.partition('*** END OF TH')[0]
    return text.strip() + '\n'


def main(argv):
    cfg = override(WizardConfig(), argv, usage=__doc__)
    check_name(cfg.dataset)
    source = cfg.input or URL
    try:
        path = cfg.input or fetch(cfg.dataset, URL, lambda data: b'*** END OF TH' in data)
    except console.UserError as error:
        print(f'{error}; until then, the retelling that comes with ozGPT')
        source, path = 'data/oz_retold.txt', RETOLD
    text = strip_gutenberg(read_text(path))
    prepare(text, cfg.dataset, cfg.tokenizer, test_fraction=0.1, source=source)


if __name__ == '__main__':
    console.run(main)
