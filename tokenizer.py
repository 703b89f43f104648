"""Text to ids and back: single characters, GPT-2's byte pairs, or a Hugging Face tokenizer.

    tokenizer = CharTokenizer('hello')       # e h l o are 0 1 2 3
    tokenizer.encode('hole')                 # array([1, 3, 2, 0], dtype=uint16)
    tokenizer.decode([1, 3, 2, 0])           # 'hole'

`eot` is the id that ends a text, or None; `front` are the ids that begin one; `chat_template` is
explained in chat.py. meta.json and checkpoints contain `state()`, and `tokenizer_from(state)` is the
same tokenizer.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from console import UsageError, UserError, optional, user_errors

OPENAI = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'
# sha256 of GPT-2's tokens in the order of their ids, then its merges, each on a line
GPT2_SHA256 = '9e52e2d09323136cf31fca11e3a80463fe013e9ccfa1c04ac36c8bb825af904d'

PIECE = 1 << 20  # characters that are encoded at once
END = '␃'  # the character that ends a text of characters, if it has one


class Tokenizer:
    """Base class: how long texts and prompts are encoded."""

    front, chat_template = (), None

    def encode_pieces(self, text):
        """Yield (ids, where they end in `text`), a million characters or so at a time."""
        begin = 0
        while begin < len(text):
            # Between two lines without spaces around the break: no token reaches over that.
            cut = re.compile(r'(?<=\S\n)(?=\S)').search(text, begin + PIECE)
            end = cut.start() if cut else len(text)
            yield self.encode(text[begin:end]), end
            begin = end

    def encode_special(self, text):
        """As `encode`, but special tokens in the text are recognized."""
        return self.encode(text)

    def encode_prompt(self, text):
        """The ids of a text to continue."""
        return np.concatenate([np.array(self.front, int), self.encode_special(text)])


class CharTokenizer(Tokenizer):
    """An id for each character of a text: its position in the sorted set of them."""

    def __init__(self, text):
        self.chars = ''.join(sorted(set(text)))
        self.vocab_size = len(self.chars)
        self.eot = self.chars.index(END) if END in self.chars else None
        codes = np.frombuffer(self.chars.encode('utf-32-le', 'surrogatepass'), '<u4')
        self.ids = np.full(codes.max(initial=0) + 2, self.vocab_size)  # by code point
        self.ids[codes] = np.arange(self.vocab_size)

    def encode(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')
        ids = self.ids[codes.clip(max=len(self.ids) - 1)]
        unknown = np.flatnonzero(ids == self.vocab_size)
        if len(unknown):
            raise UserError(f'the character {text[unknown[0]]!r} at position {unknown[0]} is not '
                            f'among these: {self.chars[:200]!r}, so leave it out')
        return ids.astype(np.uint16)

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids)

    def state(self):
        return dict(type='char', vocab_size=self.vocab_size, chars=self.chars,
                    chat_template=self.chat_template)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, by tiktoken: 256 bytes, 50,000 merges and the end-of-text token."""

    vocab_size, eot = 50257, 50256  # eot is <|endoftext|>
    failure = ''

    @cached_property
    def bpe(self):
        """tiktoken's encoding, loaded when it is first needed: training never needs it."""
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

    def encode_special(self, text):
        """As `encode`, but <|endoftext|> is the token, as in nanoGPT's prompts."""
        first, *others = (self.encode(part) for part in text.split('<|endoftext|>'))
        return np.concatenate([first, *(part for ids in others for part in ([self.eot], ids))])

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])

    def state(self):
        return dict(type='gpt2', vocab_size=self.vocab_size, chat_template=self.chat_template)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, by the library tokenizers; `json` is its text.

    Special tokens in a text are recognized. files: the texts of the other files that belong to it,
    by name, which are exported as they came.
    """

    def __init__(self, json, eot=None, files=None):
        library = optional('tokenizers', '0.22')
        self.json, self.eot, self.files = json, eot, files or {}
        with user_errors(Exception, 'the tokenizer.json is broken', 'get it again'):
            self.wrapped = library.Tokenizer.from_str(json)  # the library raises plain Exceptions
        self.wrapped.no_truncation()
        self.wrapped.no_padding()
        self.vocab_size = max(self.wrapped.get_vocab().values(), default=0) + 1
        with suppress(Exception):  # it may not know the letter
            # What its post-processor puts in front of a text, for example <s>.
            plain, whole = (self.wrapped.encode('a', add_special_tokens=special).ids
                            for special in (False, True))
            self.front = whole[: whole.index(plain[0])]

    def encode(self, text):
        return np.concatenate([ids for ids, _ in self.encode_pieces(text)])

    def encode_pieces(self, text, margin=1024):
        """As `Tokenizer.encode_pieces`: all at once, a text takes 150 times its memory.

        A piece is read with a margin around it, and ends where a token begins, whether the library
        has read what is before it or only the margin.
        """
        def read(start, end):
            with user_errors(Exception, 'the tokenizer cannot encode this text', 'use another'):
                piece = self.wrapped.encode(text[max(0, start) : end], add_special_tokens=False)
            begins = [begin for begin, _ in piece.offsets]
            return np.array(piece.ids, int), np.array(begins, int) + max(0, start)

        text = text.encode('utf-8', 'replace').decode()  # without half surrogates
        cut, size = 0, PIECE
        while True:
            ids, begins = read(cut - margin, cut + size + margin)
            first, last = np.searchsorted(begins, (cut, cut + size))
            if cut + size + margin >= len(text):
                yield ids[first:], len(text)
                return
            end = begins[last] if last < len(begins) else None
            if end is None or end not in read(end - margin, end + margin)[1]:
                size += PIECE
                continue
            yield ids[first:last], end
            cut, size = end, PIECE

    def decode(self, ids):
        return self.wrapped.decode([int(i) for i in ids], skip_special_tokens=False)

    def state(self):
        return dict(type='huggingface', vocab_size=self.vocab_size, json=self.json, eot=self.eot,
                    files=self.files, chat_template=self.chat_template)


def tokenizer_from(state):
    """The tokenizer that `state()` described. Raises UserError for a state of another kind."""
    match state:
        case {'type': 'char', 'chars': str(chars)} if chars and [*chars] == sorted(set(chars)):
            tokenizer = CharTokenizer(chars)
        case {'type': 'gpt2'}:
            tokenizer = GPT2Tokenizer()
        case {'type': 'huggingface', 'json': str(text), 'eot': eot}:
            tokenizer = HuggingFaceTokenizer(text, eot, state.get('files'))
        case _:
            raise UserError(f'the tokenizer {str(state)[:60]!r} is none of char, gpt2 and '
                            'huggingface')
    tokenizer.chat_template = state.get('chat_template')
    return tokenizer


def rules_of(text):
    """The parts of a tokenizer.json that decide ids, in one form whatever version wrote it."""
    def only_set(part):
        return {name: value for name, value in part.items()
                if value is not None and value is not False and value != ''}

    state = json.loads(HuggingFaceTokenizer(text).wrapped.to_str(), object_hook=only_set)
    names = 'model', 'normalizer', 'pre_tokenizer', 'added_tokens'
    return {name: state[name] for name in names if state.get(name)}


def gives_same_ids(state, other):
    """Whether the tokenizers of two states give the same ids."""
    if state['type'] == other['type'] == 'huggingface':
        return rules_of(state['json']) == rules_of(other['json'])
    return {**state, 'chat_template': None} == {**other, 'chat_template': None}


def own_form(text):
    """The CharTokenizer or GPT2Tokenizer that gives the same ids as a tokenizer.json, or None."""
    rules = rules_of(text)
    model, split, added = (rules.pop(name, {}) for name in ('model', 'pre_tokenizer',
                                                            'added_tokens'))
    vocab, merges = dict(model.pop('vocab')), [' '.join(pair) for pair in model.pop('merges', ())]
    plain = all(token.keys() <= {'id', 'content', 'special', 'normalized'} for token in added)
    words = sorted(vocab, key=vocab.get)
    if rules or not plain or not {token['content'] for token in added} <= set(words):
        return None
    if model['type'] == 'WordLevel' and words == sorted(''.join(words)) and split == {
            'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated'}:
        return CharTokenizer(''.join(words))
    digest = hashlib.sha256('\n'.join(words + merges).encode()).hexdigest()
    if digest == GPT2_SHA256 and model == {'type': 'BPE'} and len(added) < 2 and split == {
            'type': 'ByteLevel', 'trim_offsets': True, 'use_regex': True}:
        return GPT2Tokenizer()
    return None


def tokenizer_of(name):
    """The tokenizer of a Hugging Face folder, or of a model there. Runs no code of it."""
    folder, files = name, ['tokenizer.json', 'config.json', 'tokenizer_config.json', 'vocab.json',
                           'special_tokens_map.json', 'generation_config.json',
                           'chat_template.jinja']
    if name in OPENAI and not os.path.isdir(name):
        return GPT2Tokenizer()
    if not os.path.isdir(name) and not re.fullmatch(r'\w[\w.-]*/[\w.-]+', name):
        raise UsageError(f'tokenizer {name!r} is not known: it must be char, gpt2, or a Hugging '
                         'Face folder or name, like HuggingFaceTB/SmolLM2-135M')
    with user_errors((OSError, ValueError, ImportError), f'cannot read the tokenizer {name}',
                     'connect, or choose another folder or name'):
        if not os.path.isdir(name):
            from huggingface_hub import snapshot_download

            folder = snapshot_download(name, allow_patterns=files)
        paths = [Path(folder, file) for file in files]
        texts = {path.name: path.read_text('utf-8') for path in paths if path.exists()}
        config, settings, tokens, generation = parts = [
            json.loads(texts.get(f'{file}.json', '{}')) for file in (
                'config', 'tokenizer_config', 'special_tokens_map', 'generation_config')]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError('a .json file is no object')
    if 'tokenizer.json' not in texts:
        if 'vocab.json' not in texts and config.get('vocab_size') == 50257:
            return GPT2Tokenizer()  # a folder of GPT-2's weights alone
        raise UserError(f'{name} has no tokenizer.json: add the one that transformers saves')
    text = texts.pop('tokenizer.json')
    texts.pop('config.json', None)
    bos, eos = (token['content'] if isinstance(token, dict) else token for token in (
        settings.get(name) or tokens.get(name) for name in ('bos_token', 'eos_token')))
    tokenizer = own_form(text)
    if tokenizer is None:
        tokenizer = HuggingFaceTokenizer(text, files=texts)
        ids = generation.get('eos_token_id')
        tokenizer.eot = (tokenizer.wrapped.token_to_id(eos) if isinstance(eos, str) else
                         ids[0] if isinstance(ids, list) else ids)
    template = texts.get('chat_template.jinja', settings.get('chat_template'))
    if isinstance(template, str):  # a few have several, by name
        begin = f'{{% set bos_token = {bos!r} %}}' if 'bos_token' in template and bos else ''
        tokenizer.chat_template = begin + template
    return tokenizer


def prompt_ids(tokenizer, text):
    """The ids to begin writing with, at least one. Raises UserError if there are none."""
    if text == '\n' and isinstance(tokenizer, CharTokenizer) and text not in tokenizer.chars:
        text = tokenizer.chars[0]  # it is the default, but not every text has line breaks
    ids = tokenizer.encode_prompt(text).tolist()
    if not ids and tokenizer.eot is None:
        raise UsageError('the prompt is empty: give at least one character, as in --start=TEXT')
    return ids or [tokenizer.eot]


class TextStream:
    """One text that grows token by token, to its end: the token eot, or the stop string."""

    def __init__(self, prompt, ids, tokenizer, stop='', eot=None):
        self.text, self.start, self.shown, self.done = prompt, len(prompt), 0, False
        self.decode, self.stop, self.eot = tokenizer.decode, stop, eot
        self.are_whole = isinstance(tokenizer, CharTokenizer)
        self.last, self.waiting = ids, []  # the ids that `text` ends with, and those not in it yet

    def add(self, token):
        """Take one more id; return what can be shown since the last call."""
        if self.done or token == self.eot:
            return self.finish()
        self.waiting.append(token)
        # Some tokenizers drop a leading space, so decode together with the previous tokens.
        new = self.decode(self.last + self.waiting).removeprefix(self.decode(self.last))
        if new.endswith('\ufffd') and not self.are_whole:  # a part of a character
            return ''
        self.text, self.last, self.waiting = self.text + new, self.waiting, []
        end = len(self.text) - len(self.stop) + 1  # what follows may begin the stop string
        if self.stop and self.stop in self.text[self.start :]:
            end, self.done = self.text.index(self.stop, self.start), True
            self.text = self.text[:end]
        return self.show(max(end, self.start))

    def finish(self):
        """End the text; return the rest of it."""
        if not self.done:
            self.done = True
            self.text += self.decode(self.last + self.waiting).removeprefix(self.decode(self.last))
        return self.show(len(self.text))

    def show(self, end):
        new = self.text[self.shown : end]
        self.shown += len(new)
        return new
