"""Text to ids and back: single characters, or GPT-2's byte pairs.

    tokenizer = CharTokenizer.of('hello')    # e h l o are 0 1 2 3
    tokenizer.encode('hole')                 # array([1, 3, 2, 0], dtype=uint16)
    tokenizer.decode([1, 3, 2, 0])           # 'hole'

Both kinds have `encode`, `decode`, `vocab_size` and `state`; `tokenizer_from(state)` brings one
back from the plain dict that datasets (meta.json) and checkpoints carry.
"""

import codecs
import json
import os
import re
from functools import cached_property
from itertools import cycle

import numpy as np

from console import UserError

MAX_VOCAB_SIZE = 65536  # ids are stored as uint16
CHUNK = 1 << 22  # characters that are worked on at once: some tens of megabytes


def code_points(text):
    """str to its Unicode code points, (len(text),) uint32."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')


class CharTokenizer:
    """One id for each character: its position in the sorted set of characters."""

    def __init__(self, chars):
        if len(chars) > MAX_VOCAB_SIZE:
            raise UserError(
                f'the text has {len(chars):,} different characters, more than the '
                f'{MAX_VOCAB_SIZE:,} that 16-bit ids can tell apart: use --tokenizer=gpt2'
            )
        self.chars = chars
        self.vocab_size = len(chars)
        codes = code_points(chars)
        self.table = np.full(codes.max(initial=0) + 2, -1, np.int32)  # code point to id, or -1
        self.table[codes] = np.arange(len(codes))

    @classmethod
    def of(cls, text):
        """The tokenizer for all characters of `text`."""
        seen = np.zeros(0x110000, bool)  # every code point there is
        for start in range(0, len(text), CHUNK):
            seen[code_points(text[start : start + CHUNK])] = True
        return cls(''.join(map(chr, np.flatnonzero(seen))))

    def encode(self, text, advance=lambda more: None):
        """str to a (len(text),) uint16 array. Raises UserError for a character it doesn't know.

        advance: is told, now and then, how many more characters are done.
        """
        ids = np.empty(len(text), np.uint16)
        for start in range(0, len(text), CHUNK):
            codes = code_points(text[start : start + CHUNK])
            places = self.table[codes.clip(max=len(self.table) - 1)]
            if places.min() < 0:
                position = start + int(places.argmin())
                raise UserError(
                    f'the character {text[position]!r} at position {position} is not among the '
                    f'{self.vocab_size} that this model knows: {self.chars!r}'
                )
            ids[start : start + CHUNK] = places
            advance(len(places))
        return ids

    def decode(self, ids):
        """Ids to str."""
        return ''.join(self.chars[i] for i in ids)

    def decoder(self):
        """A function for one text: give it each id as it comes, get the text to print."""
        return lambda i: self.chars[i]

    def fast(self):
        """The same for Hugging Face, a tokenizers.Tokenizer: BPE that never merges."""
        from tokenizers import Tokenizer, decoders, models

        fast = Tokenizer(models.BPE({char: i for i, char in enumerate(self.chars)}, []))
        fast.decoder = decoders.Fuse()
        return fast

    def state(self):
        """What `tokenizer_from` needs, as plain types."""
        return {'type': 'char', 'vocab_size': self.vocab_size, 'chars': self.chars}


# GPT-2 first splits a text into words, numbers, signs and white space. Only white space takes a
# look ahead: of a run before a word, the last character joins the word or stands alone, and the
# others are one piece. A regex engine that can look ahead is half as fast, and it matters only for
# runs of three or more: we cut out all of those but their last character, and split the rest by
# PLAIN, which gives the same pieces.
PLAIN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"
# White space as Unicode and tiktoken have it: Python alone counts U+001C to U+001F too.
SPACES = ''.join(c for c in map(chr, range(0x3001)) if c.isspace() and not '\x1c' <= c <= '\x1f')
LONG_SPACE = re.compile(f'([{SPACES}]{{2,}})(?=[{SPACES}])')
# Most texts have no such run, and these show it faster than the regex does.
TO_SPACES = bytes.maketrans(b'\t\n\v\f\r', b'     ')
RARE_SPACES = [c for c in SPACES if not c.isascii()]


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, by tiktoken: 50,256 merges and the end-of-text token.

    Raises UserError if tiktoken can't get its files: it downloads them once, or finds them in the
    folder that the environment variable TIKTOKEN_CACHE_DIR names.
    """

    vocab_size = 50257
    eot = 50256  # <|endoftext|>

    @cached_property
    def bpe(self):
        """tiktoken's encoding, loaded when it is first needed: to train takes ids alone."""
        import tiktoken

        try:
            return tiktoken.get_encoding('gpt2')
        except Exception as error:
            raise UserError(
                f'tiktoken cannot get the GPT-2 vocabulary ({type(error).__name__}): connect '
                'once, or set TIKTOKEN_CACHE_DIR to a folder that has it'
            ) from None

    @cached_property
    def plain(self):
        """tiktoken's encoding with the pattern PLAIN: faster, for text without long runs."""
        import tiktoken

        return tiktoken.Encoding(
            'plain', pat_str=PLAIN, mergeable_ranks=self.bpe._mergeable_ranks,
            special_tokens=self.bpe._special_tokens,  # without any, it takes twice as long
        )

    def encode(self, text, advance=lambda more: None):
        """str to a uint16 array, exactly tiktoken's ids; <|endoftext|> in it is plain text.

        advance: is told, now and then, how many more characters are done.
        """
        pieces, start = [], 0
        while start < len(text):
            # A cut before the white space that ends a word never splits a token.
            end = min(start + CHUNK, len(text))
            while end < len(text) and not (text[end].isspace() and not text[end - 1].isspace()):
                end += 1
            pieces.append(self.encode_some(text[start:end]))
            advance(end - start)
            start = end
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint16)

    def encode_some(self, text):
        """The ids of a text that is short enough to be worked on at once."""
        try:
            data = text.encode()
        except UnicodeEncodeError:  # as tiktoken does: half of a surrogate pair becomes U+FFFD
            text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            data = text.encode()
        body = text.rstrip(SPACES)
        parts = [body]
        rare = not body.isascii() and any(space in body for space in RARE_SPACES)
        if rare or b'   ' in data.translate(TO_SPACES):
            parts = LONG_SPACE.split(body)  # by turns plain text and spaces
        parts.append(text[len(body) :])
        ids = [
            encoding.encode_to_numpy(part, disallowed_special=())
            for encoding, part in zip(cycle((self.plain, self.bpe)), parts) if part
        ]
        return np.concatenate(ids).astype(np.uint16) if ids else np.empty(0, np.uint16)

    def decode(self, ids):
        """Ids to str; bytes that are no whole character become U+FFFD."""
        return self.bpe.decode([int(i) for i in ids])

    def decoder(self):
        """A function for one text: give it each id as it comes, get the text to print.

        A character may be spread over tokens; its text comes with the last of them.
        """
        utf8 = codecs.getincrementaldecoder('utf-8')('replace')
        return lambda i: utf8.decode(self.bpe.decode_single_token_bytes(int(i)))

    def fast(self):
        """The same for Hugging Face, a tokenizers.Tokenizer, from tiktoken's tokens alone."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens = [self.bpe.decode_single_token_bytes(i) for i in range(self.vocab_size)]
        rank = {token: i for i, token in enumerate(tokens[: self.eot])}
        # Hugging Face writes bytes as letters: printable ones as they are, others from U+0100 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letter = {b: chr(b) for b in printable}
        letter |= {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(printable)))}
        word = lambda token: ''.join(letter[b] for b in token)  # noqa: E731
        merges = []
        for token in tokens[: self.eot]:
            parts = [bytes([b]) for b in token]
            while len(parts) > 2:  # merge as far as earlier tokens go: the last pair is this one's
                pairs = [rank.get(a + b, self.eot) for a, b in zip(parts, parts[1:])]
                i = pairs.index(min(pairs))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append((word(parts[0]), word(parts[1])))
        vocab = {word(token): i for token, i in rank.items()} | {'<|endoftext|>': self.eot}
        fast = Tokenizer(models.BPE(vocab, merges))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens([AddedToken('<|endoftext|>', special=True)])
        return fast

    def state(self):
        """What `tokenizer_from` needs, as plain types."""
        return {'type': 'gpt2', 'vocab_size': self.vocab_size}


def tokenizer_of(folder):
    """A Hugging Face folder's tokenizer: characters if its vocabulary is such, else GPT-2's."""
    path = os.path.join(folder, 'tokenizer.json')
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            model = json.load(file)['model']
        if not model.get('merges'):
            return tokenizer_from({'type': 'char', 'chars': ''.join(model['vocab'])})
    return GPT2Tokenizer()


def tokenizer_from(state):
    """The tokenizer that `state()` described. Raises UserError for a state of another kind."""
    kind = state.get('type') if isinstance(state, dict) else None
    if kind == 'char' and isinstance(state.get('chars'), str) and state['chars']:
        if list(state['chars']) == sorted(set(state['chars'])):
            return CharTokenizer(state['chars'])
    if kind == 'gpt2':
        return GPT2Tokenizer()
    raise UserError(f'no tokenizer of type {kind!r}: only whole char and gpt2 ones are known')
