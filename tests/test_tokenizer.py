"""Text to ids and back."""

import json
import os
import random
import sys

import numpy as np
import pytest
from conftest import TINY

import prepare_text
import train
from console import UsageError, UserError
from export_hf import hugging_face_tokenizer
from tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    TextStream,
    prompt_ids,
    tokenizer_from,
    tokenizer_of,
)

TEXTS = ['hello', 'Olá, coração! Não há pão à mão.', '“Oz” — 奥兹 🌪️👠🦁', 'a\n\n  b\t\r\n', '']


def stream(tokenizer, ids, prompt=()):
    """The text that sample.py shows after each of `ids`."""
    text = TextStream('', list(prompt), tokenizer)
    for i in ids:
        yield text.add(int(i))


def test_char_ids_are_positions_in_the_sorted_alphabet():
    tokenizer = CharTokenizer('hello')
    assert tokenizer.chars == 'ehlo' and tokenizer.vocab_size == 4
    assert tokenizer.encode('hole').tolist() == [1, 3, 2, 0]
    assert tokenizer.encode('hole').dtype == np.uint16


@pytest.mark.parametrize('text', TEXTS[:-1])
def test_char_round_trip(text):
    tokenizer = tokenizer_from(CharTokenizer(text).state())
    chars = sorted(set(text))
    ids = tokenizer.encode(text)
    assert ids.tolist() == [chars.index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert ''.join(stream(tokenizer, ids)) == text


@pytest.mark.parametrize('char', ['é', '\U0010ffff', '\udcff', 'i'])
def test_an_unknown_character_is_named(char):
    with pytest.raises(UserError, match='position 2'):
        CharTokenizer('hello').encode('he' + char)


@pytest.mark.parametrize('state', [None, {}, {'type': 'bert'}, {'type': 'char', 'chars': 'ba'},
                                   {'type': 'char', 'chars': ''}, {'type': 'char'},
                                   {'type': 'huggingface'}, {'type': ['gpt2']}, 'gpt2',
                                   {'type': 'huggingface', 'json': '{}', 'eot': None},
                                   {'type': 'huggingface', 'json': '', 'eot': 3}])
def test_a_broken_state_is_refused(state):
    if isinstance(state, dict) and 'json' in state:
        pytest.importorskip('tokenizers')
    with pytest.raises(UserError, match='tokenizer') as raised:
        tokenizer_from(state)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('text', TEXTS)
def test_gpt2_round_trip(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text
    assert ''.join(stream(gpt2, gpt2.encode(text))) == text


def test_gpt2_ids_are_tiktokens(gpt2):
    text = ''.join(TEXTS) * 40 + '   \n\n x<|endoftext|>don’t  y'
    assert gpt2.encode(text).tolist() == gpt2.bpe.encode_ordinary(text)
    assert gpt2.encode('Hello world').tolist() == [15496, 995] and gpt2.vocab_size == 50257
    assert gpt2.encode(text).dtype == gpt2.encode('').dtype == np.uint16


def test_gpt2_white_space_is_cut_as_tiktoken_cuts_it(gpt2):
    alphabet = [*' \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u2003\u3000\u200b\ufeff\0\ud800']
    alphabet += [*'aAéß1٣中🦁!.-\u0301', "'", "'s", "'ll", "'VE", '   ', '\n\n', "don't"]
    alphabet += ['<|endoftext|>']
    draw = random.Random(0)
    for _ in range(20_000):
        text = ''.join(draw.choices(alphabet, k=draw.randint(0, 25)))
        assert gpt2.encode(text).tolist() == gpt2.bpe.encode_ordinary(text), ascii(text)
    for run in (' ' * 3_000_000, ' \n' * 1_500_000):  # more than tiktoken's stack takes
        ids = gpt2.encode(f'x {run}y{run}')
        assert gpt2.decode(ids) == f'x {run}y{run}'
        short = run[:20_000]
        assert ids.tolist()[:3] == gpt2.bpe.encode_ordinary(f'x {short}y')[:3]
        assert ids[-1] == gpt2.bpe.encode_ordinary(run)[-1]


@pytest.mark.parametrize('start', ['x', 'x\x1c', '\x1f'])
def test_gpt2_long_white_space_is_cut_as_tiktoken_cuts_it(gpt2, start):
    class Fragile:  # tiktoken, as if its stack were smaller
        def encode_to_numpy(self, text, **kwargs):
            raise ValueError('Regex error')

        def encode_ordinary(self, text):
            assert ' ' * 20_000 not in text or text.endswith((' ', '\n'))
            return gpt2.bpe.encode_ordinary(text)

    tokenizer = GPT2Tokenizer()
    tokenizer.bpe = Fragile()
    for end in ('z', '\x1cz', '\nz', ' \x1d '):
        text = f'{start}{" " * 20_000}y{" " * 20_000}\n{end} {" " * 30_000}'
        assert tokenizer.encode(text).tolist() == gpt2.bpe.encode_ordinary(text)


def test_gpt2_never_shows_half_a_character(gpt2):
    pieces = list(stream(gpt2, gpt2.encode('🦁')))
    assert len(pieces) > 1 and pieces[-1] == '🦁' and not ''.join(pieces[:-1])


def make_folder(path, kind='bytes', extra=0, eos='<|eot|>', **files):
    """A Hugging Face folder with a small tokenizer of the usual kinds; returns it."""
    tokenizers = pytest.importorskip('tokenizers')
    from tokenizers import decoders, models, pre_tokenizers, trainers

    text = ['the lion and the tin man walked on, “quite” slowly', *TEXTS, '🦁 two spaces'] * 9
    if kind == 'bytes':  # as in GPT-2, Llama 3, Qwen
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=['<|eot|>'], show_progress=False)
    else:  # as in Llama 2: a space before each text, and bytes where there is no token
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(' ', 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=400, show_progress=False,
            special_tokens=['<unk>', '<|eot|>', *(f'<0x{i:02X}>' for i in range(256))])
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens([f'<extra{i}>' for i in range(extra)])
    tokenizer.enable_truncation(5)  # a tokenizer.json may contain it; it must have no effect
    tokenizer.enable_padding(length=7)
    os.makedirs(path, exist_ok=True)
    tokenizer.save(f'{path}/tokenizer.json')
    if eos:
        files['tokenizer_config'] = {'eos_token': eos}
    for name, content in files.items():
        with open(f'{path}/{name}.json', 'w') as file:
            json.dump(content, file)
    return tokenizer


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_a_hugging_face_tokenizer(folder, kind):
    theirs = make_folder('hf', kind)
    theirs.no_truncation()
    theirs.no_padding()
    for ours in (tokenizer_of('hf'), tokenizer_from(tokenizer_of('hf').state())):
        assert ours.vocab_size == theirs.get_vocab_size()
        assert ours.decode([ours.eot]) == '<|eot|>'
        for text in (*TEXTS, 'the lion walked on', '🌪️👠🦁 the\n\n', ' two  spaces '):
            ids = ours.encode(text).tolist()
            assert ids == theirs.encode(text, add_special_tokens=False).ids
            assert ours.decode(ids) == theirs.decode(ids)
            text = text if kind == 'bytes' else text.removeprefix(' ')  # as theirs does
            assert ours.decode(ids) == text
            pieces = list(stream(ours, ids, ours.encode('a').tolist()))  # so no space is lost
            start = ' ' if kind == 'pieces' and ids else ''
            assert ''.join(pieces) == start + text and '\ufffd' not in ''.join(pieces)
        with open('hf/tokenizer.json', encoding='utf-8') as file:
            exported = hugging_face_tokenizer(ours).to_str()
            assert json.loads(exported) == json.load(file)  # as it came


def test_a_hugging_face_stream_shows_what_decoding_gives(folder):
    make_folder('hf')
    tokenizer, draw = tokenizer_of('hf'), random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(40)] + [*tokenizer.encode('.')]
        assert ''.join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_ids_beyond_16_bits(folder):
    make_folder('hf', extra=65_536)
    tokenizer = tokenizer_of('hf')
    assert tokenizer.encode('<extra65535>').tolist() == [tokenizer.vocab_size - 1]


@pytest.mark.parametrize('files, eot', [
    (dict(eos='<|eot|>'), 0), (dict(eos={'content': '<|eot|>'}), 0), (dict(eos=None), None),
])
def test_the_end_of_text_of_a_hugging_face_folder(folder, files, eot):
    make_folder('hf', **files)
    assert tokenizer_of('hf').eot == eot and tokenizer_of('hf').state()['eot'] == eot


def test_a_template_without_a_token_that_ends_messages_is_not_used(folder):
    make_folder('hf', tokenizer_config={'chat_template': '{{ messages[0].content }}'}, eos=None)
    assert tokenizer_of('hf').chat_template is None
    text = 'the lion walked on\n' * 200
    prepare_text.prepare(text, 'lion', tokenizer='hf')
    train.train(train.TrainConfig(**TINY | dict(dataset='lion', max_iters=2, sample_tokens=4)))
    assert os.path.exists('out/ckpt.pt')


def test_only_gpt2s_vocabulary_is_taken_for_gpt2(folder, gpt2):
    pytest.importorskip('tokenizers')
    assert isinstance(tokenizer_of('gpt2-xl'), GPT2Tokenizer)
    os.mkdir('hf')
    hugging_face_tokenizer(gpt2).save('hf/tokenizer.json')
    assert isinstance(tokenizer_of('hf'), GPT2Tokenizer)
    with open('hf/tokenizer.json', encoding='utf-8') as file:
        whole = json.load(file)
    vocab = whole['model']['vocab']
    vocab['the'], vocab['Ġthe'] = vocab['Ġthe'], vocab['the']  # as many tokens, other ids
    with open('hf/tokenizer.json', 'w') as file:
        json.dump(whole, file)
    other = tokenizer_of('hf')
    assert isinstance(other, HuggingFaceTokenizer) and other.vocab_size == 50257
    assert other.encode(' the').tolist() == gpt2.encode('the').tolist()

    os.remove('hf/tokenizer.json')  # GPT-2's older form
    with open('hf/vocab.json', 'w') as file:
        json.dump(vocab, file)
    with open('hf/config.json', 'w') as file:
        json.dump({'vocab_size': 50257}, file)
    with pytest.raises(UserError, match='hf .*no tokenizer.json'):
        tokenizer_of('hf')


def test_a_folder_without_a_tokenizer(folder):
    os.mkdir('hf')
    for vocab_size in (50257, 50258, None):
        with open('hf/config.json', 'w') as file:
            json.dump({'vocab_size': vocab_size}, file)
        if vocab_size == 50257:
            assert isinstance(tokenizer_of('hf'), GPT2Tokenizer)
        else:
            with pytest.raises(UserError, match='hf .*no tokenizer.json'):
                tokenizer_of('hf')


@pytest.mark.parametrize('text', ['', '{', '{}', '[]', '{"model": 3}', '{"model": {"vocab": 3}}'])
def test_a_broken_folder_is_one_line(folder, text):
    pytest.importorskip('tokenizers')
    os.mkdir('hf')
    with open('hf/tokenizer.json', 'w') as file:
        file.write(text)
    with pytest.raises(UserError, match='tokenizer.json is broken') as raised:
        tokenizer_of('hf')
    assert '\n' not in str(raised.value)


def test_without_the_library_it_says_what_to_install(folder, monkeypatch):
    make_folder('hf')
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(UserError, match="pip install 'tokenizers>=0.22'"):
        tokenizer_of('hf')


def test_a_name_on_hugging_face_is_downloaded(folder, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    make_folder('snapshot')

    def download(name, allow_patterns):
        assert all(pattern.endswith(('.json', '.jinja')) for pattern in allow_patterns)  # no code
        if name != 'some/model':
            raise OSError('no such model,\nor no network')
        return 'snapshot'

    monkeypatch.setattr(hub, 'snapshot_download', download)
    assert tokenizer_of('some/model').state() == tokenizer_of('snapshot').state()
    with pytest.raises(UserError, match='no such model, or no network') as raised:
        tokenizer_of('other/model')
    assert '\n' not in str(raised.value)


def test_an_exported_char_tokenizer_refuses_unknown_characters(folder):
    transformers = pytest.importorskip('transformers')
    text = ''.join(TEXTS)
    tokenizer = CharTokenizer(text)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=hugging_face_tokenizer(tokenizer))
    fast.save_pretrained('t')
    fast = transformers.AutoTokenizer.from_pretrained('t')
    assert len(fast) == tokenizer.vocab_size
    assert fast(text).input_ids == tokenizer.encode(text).tolist()
    assert fast.decode(fast(text).input_ids) == text
    for unknown in ('Q', 'aQb', '\0'):
        with pytest.raises(Exception, match='UNK'):
            fast(unknown)
    assert tokenizer_of('t').state() == tokenizer.state()


def test_the_ids_to_begin_with(folder, gpt2):
    chars = CharTokenizer('hello\n')
    assert prompt_ids(chars, '\n') == [0] and prompt_ids(chars, 'he') == [2, 1]
    assert prompt_ids(CharTokenizer('hello'), '\n') == [0]  # a text without a line break
    assert prompt_ids(gpt2, '\n') == [198] and prompt_ids(gpt2, '') == [50256]
    with pytest.raises(UsageError, match='empty.*--start=TEXT'):
        prompt_ids(chars, '')
    with pytest.raises(UserError, match="'z'"):
        prompt_ids(chars, 'z')
    make_folder('hf')
    make_folder('endless', eos=None)
    assert prompt_ids(tokenizer_of('hf'), '') == [tokenizer_of('hf').eot]
    with pytest.raises(UsageError):
        prompt_ids(tokenizer_of('endless'), '')


def test_a_checkpoint_cannot_name_files_to_write():
    pytest.importorskip('tokenizers')
    from tokenizers import Tokenizer, models

    text = Tokenizer(models.WordLevel({'a': 0}, unk_token='a')).to_str()
    files = {'../x.txt': 'x', 'tokenizer_config.json': '{}'}
    tokenizer = tokenizer_from({'type': 'huggingface', 'json': text, 'eot': None, 'files': files})
    assert tokenizer.files.keys() == {'tokenizer_config.json'}
