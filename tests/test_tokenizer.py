"""Text to ids and back."""

import random

import numpy as np
import pytest

from console import UserError
from tokenizer import CharTokenizer, GPT2Tokenizer, tokenizer_from

TEXTS = ['hello', 'Olá, coração! Não há pão à mão.', '“Oz” — 奥兹 🌪️👠🦁', 'a\n\n  b\t\r\n', '']


@pytest.fixture(scope='module')
def gpt2():
    tokenizer = GPT2Tokenizer()
    try:
        tokenizer.bpe
    except UserError:
        pytest.skip('tiktoken has no GPT-2 files here and cannot fetch them')
    return tokenizer


def test_char_ids_are_places_in_the_sorted_set():
    tokenizer = CharTokenizer.of('hello')
    assert tokenizer.chars == 'ehlo' and tokenizer.vocab_size == 4
    assert tokenizer.encode('hole').tolist() == [1, 3, 2, 0]
    assert tokenizer.encode('hole').dtype == np.uint16


@pytest.mark.parametrize('text', TEXTS[:-1])
def test_char_round_trip(text):
    tokenizer = tokenizer_from(CharTokenizer.of(text).state())
    chars = sorted(set(text))
    ids = tokenizer.encode(text)
    assert ids.tolist() == [chars.index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert ''.join(map(tokenizer.decoder(), ids)) == text


def test_char_encoding_of_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr('tokenizer.CHUNK', 7)
    text = TEXTS[1] * 5
    tokenizer = CharTokenizer.of(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError, match="'z' at position 30"):
        tokenizer.encode(text[:30] + 'z')


@pytest.mark.parametrize('char', ['é', '\U0010ffff', '\udcff', 'i'])
def test_an_unknown_character_is_named(char):
    with pytest.raises(UserError, match='position 2'):
        CharTokenizer.of('hello').encode('he' + char)


def test_too_many_characters_for_16_bits():
    CharTokenizer.of(''.join(map(chr, range(0x20000, 0x30000))))
    with pytest.raises(UserError, match='65,537 different characters'):
        CharTokenizer.of(''.join(map(chr, range(0x20000, 0x30001))))


@pytest.mark.parametrize('state', [None, {}, {'type': 'bert'}, {'type': 'char', 'chars': 'ba'},
                                   {'type': 'char', 'chars': ''}, {'type': 'char'}])
def test_a_broken_state_is_refused(state):
    with pytest.raises(UserError, match='tokenizer'):
        tokenizer_from(state)


@pytest.mark.parametrize('text', TEXTS)
def test_gpt2_round_trip(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text
    decode = gpt2.decoder()
    assert ''.join(decode(i) for i in gpt2.encode(text)) == text


def test_gpt2_ids_are_tiktokens(gpt2, monkeypatch):
    text = ''.join(TEXTS) * 40 + '   \n\n x<|endoftext|>don’t  y'
    whole = gpt2.bpe.encode_ordinary(text)
    for size in (1, 5, 64, 1 << 20):
        monkeypatch.setattr('tokenizer.CHUNK', size)
        assert gpt2.encode(text).tolist() == whole
    assert gpt2.encode('Hello world').tolist() == [15496, 995] and gpt2.vocab_size == 50257


def test_gpt2_white_space_is_cut_as_tiktoken_cuts_it(gpt2):
    alphabet = [*' \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u3000\u200b\ufeff\0\ud800']
    alphabet += [*'aAéß1٣中🦁!.-\u0301', "'", "'s", "'ll", "'VE", '   ', '\n\n', "don't"]
    alphabet += ['<|endoftext|>']
    draw = random.Random(0)
    for _ in range(20_000):
        text = ''.join(draw.choices(alphabet, k=draw.randint(0, 25)))
        assert gpt2.encode(text).tolist() == gpt2.bpe.encode_ordinary(text), ascii(text)
    assert len(gpt2.encode('x' + ' ' * 3_000_000 + 'y')) > 4  # more than tiktoken's stack takes


def test_gpt2_never_shows_half_a_character(gpt2):
    decode = gpt2.decoder()
    pieces = [decode(i) for i in gpt2.encode('🦁')]
    assert len(pieces) > 1 and pieces[-1] == '🦁' and not ''.join(pieces[:-1])
