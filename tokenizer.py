"""Text to ids and back: single characters, GPT-2's byte pairs, or a Hugging Face tokenizer.

    tokenizer = CharTokenizer('hello')       # e h l o are 0 1 2 3
    tokenizer.encode('hole')                 # array([1, 3, 2, 0], dtype=uint16)
    tokenizer.decode([1, 3, 2, 0])           # 'hole'

`eot` is the id that ends a text, or None; `front` are the ids that begin one; for `chat_template`
see chat.py. meta.json and checkpoints contain `state()`; `tokenizer_from(state)` is the same
tokenizer.
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
# The files of a Hugging Face folder that concern its tokenizer.
FILES = ['tokenizer.json', 'config.json', 'tokenizer_config.json', 'vocab.json',
         'special_tokens_map.json', 'generation_config.json', 'chat_template.jinja']
# The sha256 of GPT-2's `rules_of`, as JSON.
GPT2_SHA256 = 'dbbe2f82ad259ed5f19545f0f93cce1ce00ec6961774b91f3caf6f426b86fa1d'
PIECE = 1 << 20  # characters that are encoded at once
END = '␃'  # the character that ends a text of characters, if it has one


class Tokenizer:
    """Base class: how long texts and prompts are encoded."""

    eot, front, chat_template = None, (), None

    def encode_pieces(self, text):
        """Yield (ids, where they end in `text`), a million characters or so at a time."""
        begin = 0
        while begin < len(text):
            # Between two lines without spaces around the break: no token reaches over that.
            end = re.compile(r'(?<=\S\n)(?=\S)|\Z').search(text, begin + PIECE).start()
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
            at, start = unknown[0], max(0, unknown[0] - 20)
            raise UserError(f'the character {text[at]!r} at position {at - start} of '
                            f'{text[start : at + 20]!r} is not among these: {self.chars[:200]!r}, '
                            'so leave it out')
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
        parts = [np.append(self.encode(part), self.eot) for part in text.split('<|endoftext|>')]
        return np.concatenate(parts)[:-1]

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])

    def state(self):
        return dict(type='gpt2', vocab_size=self.vocab_size, chat_template=self.chat_template)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, whose text is `json`, read by the library tokenizers.

    Special tokens in a text are recognized. files: its folder's other `FILES`, exported unchanged.
    """

    def __init__(self, json, eot=None, files=None):
        library = optional('tokenizers', '0.22')
        self.json, self.eot = json, eot
        # By the known names alone: a checkpoint may be a stranger's, and these become paths.
        self.files = {name: text for name, text in (files or {}).items() if name in FILES}
        with user_errors(Exception, 'the tokenizer.json is broken', 'get it again'):
            self.wrapped = library.Tokenizer.from_str(json)  # the library raises plain Exceptions
        self.wrapped.no_truncation()
        self.wrapped.no_padding()
        self.vocab_size = max(self.wrapped.get_vocab().values(), default=0) + 1
        with suppress(Exception):  # it may not know the letter
            letter = self.wrapped.encode('a')  # with special tokens, for example <s> in front
            self.front = letter.ids[: letter.special_tokens_mask.index(0)]

    def encode(self, text):
        return np.concatenate([ids for ids, _ in self.encode_pieces(text)])

    def encode_pieces(self, text, margin=1024):
        """As `Tokenizer.encode_pieces`: the library takes 150 times the memory of its text.

        A piece is read with a margin on both sides. It ends where a token begins, if the library
        finds the same beginning when it reads only the margins around it.
        """
        def read(start, end):
            start = max(0, start)
            with user_errors(Exception, 'the tokenizer cannot encode this text', 'use another'):
                piece = self.wrapped.encode(text[start:end], add_special_tokens=False)
            return np.array(piece.ids, int), np.array([start + s for s, _ in piece.offsets], int)

        text = text.encode('utf-8', 'replace').decode()  # without half surrogates
        begin, size = 0, PIECE
        while begin + size + margin < len(text):
            ids, starts = read(begin - margin, begin + size + margin)
            first, last = np.searchsorted(starts, (begin, begin + size))
            end = starts[last] if last < len(starts) else len(text)
            if end in read(end - margin, end + margin)[1]:
                yield ids[first:last], end
                begin, size = end, PIECE
            else:
                size += PIECE
        ids, starts = read(begin - margin, len(text))
        yield ids[starts >= begin], len(text)

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


def read_json(text):
    """The values of a JSON text, without those that are null, false or ''."""
    return json.loads(text, object_hook=lambda part: {
        name: value for name, value in part.items()
        if value not in (None, '') and value is not False})


def rules_of(text):
    """The parts of a tokenizer.json that decide ids, in one form whatever version wrote it."""
    state = read_json(HuggingFaceTokenizer(text).wrapped.to_str())
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
    rules['model'].pop('unk_token', None)  # these have no unknown tokens
    vocab, added = dict(rules['model']['vocab']), rules.pop('added_tokens', [])
    plain = {'id', 'content', 'special', 'normalized'}
    if not all(token.keys() <= plain and token['content'] in vocab for token in added):
        return None
    chars = sorted(''.join(vocab))
    model = {'type': 'WordLevel', 'vocab': {char: i for i, char in enumerate(chars)}}
    split = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated'}
    if rules == {'model': model, 'pre_tokenizer': split}:
        return CharTokenizer(''.join(chars))
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    return GPT2Tokenizer() if digest == GPT2_SHA256 and len(added) < 2 else None


def tokenizer_of(name):
    """The tokenizer of a Hugging Face folder, or of a model there. Runs no code of it."""
    folder, is_folder = name, os.path.isdir(name)
    if name in OPENAI and not is_folder:
        return GPT2Tokenizer()
    if not is_folder and not re.fullmatch(r'(?!data/)\w[\w.-]*/[\w.-]+', name):
        raise UsageError(f'tokenizer {name!r} is not known: it must be char, gpt2, data/NAME, or a '
                         'Hugging Face folder or name, like HuggingFaceTB/SmolLM2-135M')
    with user_errors((OSError, ValueError, TypeError, ImportError),
                     f'cannot read the tokenizer {name}', 'connect, or choose another'):
        if not is_folder:
            from huggingface_hub import snapshot_download

            folder = snapshot_download(name, allow_patterns=FILES)
        paths = [Path(folder, file) for file in FILES]
        texts = {path.name: path.read_text('utf-8') for path in paths if path.exists()}
        config = dict(read_json(texts.pop('config.json', '{}')))
        ends = {}  # where several files name the end of a text, the last of these counts
        for file in ('generation_config.json', 'special_tokens_map.json', 'tokenizer_config.json'):
            ends |= read_json(texts.get(file, '{}'))
    if not texts.keys() & {'tokenizer.json', 'vocab.json'} and config.get('vocab_size') == 50257:
        return GPT2Tokenizer()  # a folder of GPT-2's weights alone
    if 'tokenizer.json' not in texts:
        raise UserError(f'{name} has no tokenizer.json: add the one that transformers saves')
    tokenizer = HuggingFaceTokenizer(texts.pop('tokenizer.json'), files=texts)
    template = texts.get('chat_template.jinja', ends.get('chat_template', ''))
    ids = np.atleast_1d(ends.get('eos_token_id', [])).tolist()
    match ends:
        case {'eos_token': str(token) | {'content': str(token)}}:
            ids.insert(0, tokenizer.wrapped.token_to_id(token))
    names = {i: token for token, i in tokenizer.wrapped.get_vocab().items()}
    # If several tokens end a text: the one that the template writes, or else the first.
    tokenizer.eot = max((eot for eot in ids if eot in names), default=None,
                        key=lambda eot: 'eos_token' not in template and names[eot] in template)
    tokenizer = own_form(tokenizer.json) or tokenizer
    match ends:
        case {'bos_token': str(token) | {'content': str(token)}} if 'bos_token' in template:
            template = f'{{% set bos_token = {token!r} %}}\n{template}'
    if template and isinstance(template, str) and tokenizer.eot is not None:  # some have several
        tokenizer.chat_template = template
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
        new = self.new_text()
        if new.endswith('\ufffd') and not self.are_whole:  # a part of a character
            return ''
        self.text, self.last, self.waiting = self.text + new, self.waiting, []
        if self.stop and self.stop in self.text[self.start :]:
            self.text = self.text[: self.text.index(self.stop, self.start)]
            return self.finish()
        # The last characters may begin the stop string.
        return self.show(max(len(self.text) - len(self.stop) + 1, self.start))

    def finish(self):
        """End the text; return the rest of it."""
        self.text, self.waiting, self.done = self.text + self.new_text(), [], True
        return self.show(len(self.text))

    def new_text(self):
        # Some tokenizers drop a leading space, so decode together with the previous tokens.
        return self.decode(self.last + self.waiting).removeprefix(self.decode(self.last))

    def show(self, end):
        new = self.text[self.shown : end]
        self.shown += len(new)
        return new
