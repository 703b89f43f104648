"""Text to ids and back: single characters, GPT-2's byte pairs, or a Hugging Face tokenizer.

    tokenizer = CharTokenizer('hello')       # e h l o are 0 1 2 3
    tokenizer.encode('hole')                 # array([1, 3, 2, 0], dtype=uint16)
    tokenizer.decode([1, 3, 2, 0])           # 'hole'

`eot` is the id that ends a text, or None. `tokenizer_from(state())` is the same tokenizer:
meta.json and checkpoints have the state.
"""

import hashlib
import json
import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from console import UsageError, UserError, user_errors

# sha256 of the tokens in GPT-2's vocab.json, in the order of their ids, each on a line
GPT2_WORDS = 'e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f'


class CharTokenizer:
    """An id for each character of a text: its position in the sorted set of them."""

    def __init__(self, text):
        self.chars, self.eot = ''.join(sorted(set(text))), None
        self.vocab_size = len(self.chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text):
        try:
            return np.fromiter((self.ids[char] for char in text), np.uint16, len(text))
        except KeyError as unknown:
            char, = unknown.args
            raise UserError(f'the character {char!r} at position {text.index(char)} is not among '
                            f'these: {self.chars[:200]!r}, so leave it out') from None

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids)

    def state(self):
        return {'type': 'char', 'vocab_size': self.vocab_size, 'chars': self.chars}


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, by tiktoken: 256 bytes, 50,000 merges and the end-of-text token."""

    vocab_size, eot = 50257, 50256  # eot is <|endoftext|>
    failure = ''

    @cached_property
    def bpe(self):
        """tiktoken's encoding, loaded when it is first needed: training takes ids alone."""
        import tiktoken

        if not self.failure:  # not again at each evaluation: it may take a minute to fail
            try:
                return tiktoken.get_encoding('gpt2')
            except Exception as error:
                self.failure = type(error).__name__
        raise UserError(f'tiktoken cannot get the GPT-2 vocabulary ({self.failure}): connect once, '
                        'or set TIKTOKEN_CACHE_DIR to its folder')

    def encode(self, text):
        """Exactly tiktoken's ids; <|endoftext|> in the text is plain text."""
        try:
            ids = self.bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # It fails at half a surrogate pair, which encode_ordinary makes U+FFFD, and at a
            # million spaces before a word. The last space is the word's, so we cut before it.
            # (U+001C to U+001F are spaces for Python, but not for tiktoken.)
            parts = re.split(r'(?=[^\S\x1c-\x1f][\S\x1c-\x1f])(?<=\s{9999})', text)
            ids = np.array([i for part in parts for i in self.bpe.encode_ordinary(part)])
        return ids.astype(np.uint16)

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])

    def state(self):
        return {'type': 'gpt2', 'vocab_size': self.vocab_size}


class HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json, by the library tokenizers; `json` is its text.

    Special tokens that are written in a text count as such; none are added.
    """

    def __init__(self, json, eot=None):
        with user_errors(ImportError, 'tokenizers is missing', 'pip install tokenizers'):
            from tokenizers import Tokenizer
        self.json, self.eot = json, eot
        try:
            self.wrapped = Tokenizer.from_str(json)
        except Exception as error:  # the library has no type of its own for it
            raise UserError(f'the tokenizer.json is broken ({error}): get it again') from None
        self.wrapped.no_truncation()
        self.wrapped.no_padding()
        self.vocab_size = max(self.wrapped.get_vocab().values(), default=0) + 1

    def encode(self, text):
        return np.array(self.wrapped.encode(text, add_special_tokens=False).ids, dtype=int)

    def decode(self, ids):
        return self.wrapped.decode([int(i) for i in ids], skip_special_tokens=False)

    def state(self):
        return dict(type='huggingface', vocab_size=self.vocab_size, json=self.json, eot=self.eot)


def tokenizer_from(state):
    """The tokenizer that `state()` described. Raises UserError for a state of another kind."""
    match state:
        case {'type': 'char', 'chars': str(chars)} if chars and [*chars] == sorted(set(chars)):
            return CharTokenizer(chars)
        case {'type': 'gpt2'}:
            return GPT2Tokenizer()
        case {'type': 'huggingface', 'json': str(json), 'eot': eot}:
            return HuggingFaceTokenizer(json, eot)
    raise UserError(f'the tokenizer {str(state)[:60]!r} is none of char, gpt2 and huggingface')


def tokenizer_of(name):
    """The tokenizer of a Hugging Face folder, or of a model there. Runs no code of it."""
    folder, files = name, ['tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'config.json']
    with user_errors((OSError, ValueError, ImportError), f'cannot read the tokenizer {name}',
                     'connect, or choose another folder or name'):
        if not os.path.isdir(name):
            if name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
                return GPT2Tokenizer()
            if not re.fullmatch(r'\w[\w.-]*/[\w.-]+', name):
                raise UsageError(f'tokenizer {name!r} is not known: it must be char, gpt2, or a '
                                 'Hugging Face folder or name, like HuggingFaceTB/SmolLM2-135M')
            from huggingface_hub import snapshot_download

            folder = snapshot_download(name, allow_patterns=files)
        paths = [Path(folder, file) for file in files]
        texts = {path.name: path.read_text('utf-8') for path in paths if path.exists()}
        special, config = (json.loads(texts.get(file, '{}')) for file in files[1::2])
    if 'tokenizer.json' not in texts:
        if 'vocab.json' not in texts and config.get('vocab_size') == 50257:
            return GPT2Tokenizer()  # a folder of GPT-2's weights alone
        raise UserError(f'{name} has no tokenizer.json: add the one that transformers saves')
    tokenizer = HuggingFaceTokenizer(texts['tokenizer.json'])
    vocab = tokenizer.wrapped.get_vocab()
    words = sorted(vocab, key=vocab.get)
    if hashlib.sha256('\n'.join(words).encode()).hexdigest() == GPT2_WORDS:
        return GPT2Tokenizer()
    if type(tokenizer.wrapped.model).__name__ == 'WordLevel' and words == sorted(''.join(words)):
        return CharTokenizer(''.join(words))
    token = special.get('eos_token')
    tokenizer.eot = vocab.get(token['content'] if isinstance(token, dict) else token)
    return tokenizer


def prompt_ids(tokenizer, text):
    """The ids to begin writing with, at least one. Raises UserError if there are none."""
    if text == '\n' and isinstance(tokenizer, CharTokenizer) and text not in tokenizer.chars:
        text = tokenizer.chars[0]  # it is the default, but not every text has line breaks
    ids = tokenizer.encode(text).tolist()
    if not ids and tokenizer.eot is None:
        raise UsageError('the prompt is empty: give at least one character, as in --start=TEXT')
    return ids or [tokenizer.eot]


class TextStream:
    """One text that grows token by token, up to the stop string if there is one."""

    def __init__(self, prompt, ids, decode, stop):
        self.text, self.start, self.shown, self.done = prompt, len(prompt), 0, False
        self.decode, self.stop = decode, stop
        self.last, self.waiting = ids, []  # the ids that `text` ends with, and those not in it yet

    def add(self, token):
        """Take one more id; return what can be shown since the last call."""
        if self.done:
            return ''
        # A token may lose its space at the beginning of a text, so the last ones come before it.
        self.waiting.append(token)
        new = self.decode(self.last + self.waiting).removeprefix(self.decode(self.last))
        if new.endswith('\ufffd'):  # a part of a character: its rest is to come
            return ''
        self.text, self.last, self.waiting = self.text + new, self.waiting, []
        end = len(self.text) - len(self.stop) + 1  # what follows may begin the stop string
        if self.stop and self.stop in self.text[self.start :]:
            end, self.done = self.text.index(self.stop, self.start), True
            self.text = self.text[:end]
        new = self.text[self.shown : max(end, self.start)]
        self.shown += len(new)
        return new
