"""Prepare The Wonderful Wizard of Oz, by characters: 80 % train, 10 % val, 10 % test.

    python prepare_wizard_char.py               # L. Frank Baum's book, from Project Gutenberg
    python prepare_wizard_char.py --input=FILE  # your copy of it

Without a network it takes data/oz_retold.txt, a retelling that comes with ozGPT: 180,561 train,
22,570 val and 22,571 test tokens of 68 characters. meta.json contains the source.
"""

import os

import console
from configurator import override
from prepare_text import FetchConfig, check_name, fetch, prepare, read_text

URL = 'https://www.gutenberg.org/cache/epub/55/pg55.txt'
RETOLD = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data', 'oz_retold.txt')


def strip_gutenberg(text):
    """The book itself, without Project Gutenberg's header and footer."""
    book = text.partition('*** START OF TH')[2].partition('\n')[2] or text
    return book.partition('*** END OF TH')[0].strip() + '\n'


def main(argv):
    cfg = override(FetchConfig('wizard_char'), argv, usage=__doc__)
    check_name(cfg.dataset)
    try:
        path = cfg.input or fetch(cfg.dataset, URL, lambda data: b'*** END OF TH' in data)
        source = cfg.input or URL
    except console.UserError as error:
        print(f'{error}; until then, the retelling that comes with ozGPT')
        path, source = RETOLD, 'data/oz_retold.txt'
    text = strip_gutenberg(read_text(path))
    prepare(text, cfg.dataset, cfg.tokenizer, test_fraction=0.1, source=source)


if __name__ == '__main__':
    console.run(main)
