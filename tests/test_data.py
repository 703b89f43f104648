"""Prepared datasets, to the byte."""

import bz2
import gzip
import io
import json
import lzma
import os
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, STORY

import console
import prepare_text
import prepare_shakespeare_char
import prepare_wizard_char
from console import UsageError, UserError
from dataset import Dataset, Split, evaluation_batches, training_batches
from tokenizer import tokenizer_from


def ids_of(name, split):
    return np.fromfile(f'data/{name}/{split}.bin', '<u2').tolist()


def contents(folder):
    return {name: open(os.path.join(folder, name), 'rb').read() for name in os.listdir(folder)}


def test_char_dataset(folder):
    text = 'abcé🦁\r\nzyx' * 10
    (folder / 'my.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    prepare_text.main(['my.txt', '--dataset=my', '--test_fraction=0.2'])
    text = text.replace('\r\n', '\n')
    chars = sorted(set(text))
    ids = [chars.index(c) for c in text]
    assert len(ids) == 90
    assert ids_of('my', 'train') == ids[:63] or ids_of('my', 'train') == ids[:62]
    assert ids_of('my', 'train') + ids_of('my', 'val') + ids_of('my', 'test') == ids
    assert len(ids_of('my', 'test')) == 18
    meta = json.load(open('data/my/meta.json'))
    assert meta['vocab_size'] == len(chars) and meta['tokenizer']['chars'] == ''.join(chars)
    assert meta['source'] == 'my.txt' and len(meta['sha256']) == 64
    assert meta['tokens']['train'] == len(ids_of('my', 'train'))
    assert sorted(os.listdir('data/my')) == ['meta.json', 'test.bin', 'train.bin', 'val.bin']


def test_running_twice_gives_the_same_bytes(folder):
    (folder / 'my.txt').write_text('once upon a time ' * 20)
    prepare_text.main(['my.txt', '--dataset=my', '--test_fraction=0.1'])
    first = contents('data/my')
    prepare_text.main(['my.txt', '--dataset=my', '--test_fraction=0.1'])
    assert contents('data/my') == first
    prepare_text.main(['my.txt', '--dataset=my'])
    assert 'test.bin' not in contents('data/my')


def test_several_files(folder):
    for name, text in [('b.txt', 'BBB'), ('a.txt', 'AAA\n'), ('z.txt', 'ZZZ')]:
        (folder / name).write_text(text)
    prepare_text.main(['z.txt', 'a.txt', 'b.txt', '--dataset=x', '--val_fraction=0.2'])
    meta = json.load(open('data/x/meta.json'))
    text = tokenizer_from(meta['tokenizer']).decode(ids_of('x', 'train') + ids_of('x', 'val'))
    assert text == 'ZZZ\nAAA\nBBB' and meta['source'] == 'z.txt a.txt b.txt'
    with pytest.raises(UserError, match="there are no text files ''"):
        prepare_text.main(['', '--dataset=x'])  # as from an unset variable


def test_folders_patterns_and_many_files(folder, capsys):
    """A folder means its .txt files; patterns are expanded where a shell doesn't."""
    for i in range(30):
        path = folder / f'd{i % 3}' / f'{i:02}.txt'
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{i:02}')
    (folder / 'd0' / 'picture.png').write_bytes(b'\x89PNG')
    prepare_text.main(['d0', 'd1/*.txt', 'd2/02.txt', '--dataset=x'])
    meta = json.load(open('data/x/meta.json'))
    assert meta['source'] == '00.txt 03.txt 06.txt and 18 more'
    assert len(capsys.readouterr().out) < 200
    text = tokenizer_from(meta['tokenizer']).decode(ids_of('x', 'train') + ids_of('x', 'val'))
    assert text.split('\n') == [f'{i:02}' for i in [*range(0, 30, 3), *range(1, 30, 3), 2]]


def test_nothing_is_left_when_writing_fails(folder, monkeypatch):
    prepare_text.prepare('old text ' * 10, 'my')
    before = contents('data/my')

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left'):
        prepare_text.prepare('something new altogether ' * 10, 'my')
    assert contents('data/my') == before


def test_two_processes_do_not_prepare_one_dataset_at_once(folder):
    with console.locked('data/my'):
        with pytest.raises(UserError, match='another process is writing into data/my'):
            prepare_text.prepare('some text ' * 10, 'my')


def test_wizard_without_a_network(folder, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError('no network here')

    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    prepare_wizard_char.main([])
    out = capsys.readouterr().out
    assert 'no network here' in out and 'retelling' in out and out.count('\n') == 2
    meta = json.load(open('data/wizard_char/meta.json'))
    assert meta['source'] == 'data/oz_retold.txt' and meta['vocab_size'] == 68
    assert meta['tokens'] == {'train': 180561, 'val': 22570, 'test': 22571}


def test_a_wrong_name_is_refused_before_a_download(folder):
    for script in (prepare_wizard_char, prepare_shakespeare_char):
        with pytest.raises(UsageError, match='--dataset'):
            script.main(['--dataset=../x'])


@pytest.mark.parametrize('encoding, bom', [
    ('utf-16', ''), ('utf-16-be', '\ufeff'), ('utf-16-le', ''), ('utf-16-be', ''),
    ('utf-32', ''), ('utf-32-le', ''), ('utf-32-be', ''), ('utf-32-be', '\ufeff'),
])
def test_utf_16_and_utf_32_are_named(folder, encoding, bom):
    """Also without a byte-order mark: read as UTF-8, every second character would be NUL."""
    (folder / 'my.txt').write_bytes((bom + 'Dorothy’s café\n' * 99).encode(encoding))
    kind = encoding[:6].upper()
    with pytest.raises(UserError, match=f'my.txt: it is {kind}, not UTF-8.*iconv -f {kind} ') as e:
        prepare_text.main(['my.txt', '--dataset=my'])
    assert '\n' not in str(e.value) and not os.path.exists('data')


@pytest.mark.parametrize('data, kind', [
    (gzip.compress(b'some text'), 'gzip'), (b'PK\3\4docx', 'zip'), (b'%PDF-1.7', 'PDF'),
    (lzma.compress(b'text'), 'xz'), (bz2.compress(b'text'), 'bzip2'),
])
def test_files_that_are_not_text_are_named(folder, data, kind):
    (folder / 'my.txt').write_bytes(data)
    with pytest.raises(UserError, match=f'it is {kind}'):
        prepare_text.read_text('my.txt', 'replace')


@pytest.mark.parametrize('data, count, position', [
    (b'caf\xe9', 1, 3), ('中文文本'.encode('gbk') * 9, 54, 0), ('naïve’'.encode()[:-1], 2, 6),
    (b'a' * 5000 + b'\xff' + b'b' * 5000, 1, 5000),
])
def test_broken_bytes_are_counted_and_may_be_replaced(folder, data, count, position):
    (folder / 'my.txt').write_bytes(data)
    with pytest.raises(UserError, match=f': {count} of its bytes are not UTF-8, the first at '
                                        f'position {position}: .*--errors=replace') as error:
        prepare_text.main(['my.txt', '--dataset=my'])
    assert '\n' not in str(error.value) and 'latin1' not in str(error.value)
    text = prepare_text.read_text('my.txt', 'replace')
    assert '\ufffd' in text and text.replace('\ufffd', '') == data.decode(errors='ignore')


def test_a_split_of_one_token_is_refused_when_prepared(folder):
    """Counted in tokens: a text of many characters may have few."""
    with pytest.raises(UserError, match='19 train, 1 val tokens: each split needs two'):
        prepare_text.prepare('abcdefghij' * 2, 'x', val_fraction=0.05)
    assert not os.path.exists('data/x')


def test_fractions_that_leave_a_split_empty_are_refused(folder):
    with pytest.raises(UserError, match='0 train, 40 val, 60 test tokens.*other fractions'):
        prepare_text.prepare('abcdefghij' * 10, 'x', val_fraction=0.6, test_fraction=0.6)
    with pytest.raises(UserError, match='100 train, 0 val tokens.*other fractions'):
        prepare_text.prepare('abcdefghij' * 10, 'x', val_fraction=0.0)
    assert not os.path.exists('data/x')


@pytest.mark.parametrize('data', [
    'Привет, мир; Dorothy said so\n'.encode('utf-16-le'), b'\x89PNG\r\n\x1a\n', b'{\\rtf1', b'PAR1',
    b'7z\xbc\xaf\x27', b'(\xb5/\xfd', b'Rar!', b'\xd0\xcf\x11\xe0',
])
def test_every_format_is_recognized(folder, data):
    (folder / 'my.txt').write_bytes(data)
    with pytest.raises(UserError, match='my.txt: it is .*, not UTF-8: convert it with'):
        prepare_text.read_text('my.txt')


def test_the_signature_of_a_format_inside_a_text_is_text(folder):
    text = 'a text on PK, %PDF, BZh, Rar! and {\\rtf\nPAR1 a\0\0b\n'
    (folder / 'my.txt').write_text(text)
    assert prepare_text.read_text('my.txt') == text


def test_too_many_characters_for_16_bits(folder):
    chars = ''.join(map(chr, range(0x20000, 0x30001)))
    with pytest.raises(UserError, match='65,537 ids.*char .*gpt2'):
        prepare_text.prepare(chars, 'x')
    meta = prepare_text.prepare(chars[:-1], 'x')
    assert meta['vocab_size'] == 65536 and ids_of('x', 'train')[-1] == 65536 * 9 // 10 - 1


def test_a_hugging_face_tokenizer(folder, capsys):
    from test_tokenizer import make_folder

    make_folder('hf')
    (folder / 'my.txt').write_text('the lion and the tin man walked on\n' * 300)
    prepare_text.main(['my.txt', '--dataset=my', '--tokenizer=hf'])
    meta = json.load(open('data/my/meta.json'))
    tokenizer = tokenizer_from(meta['tokenizer'])
    text = tokenizer.decode(ids_of('my', 'train') + ids_of('my', 'val'))
    assert meta['tokenizer']['type'] == 'huggingface' and tokenizer.eot is not None
    assert text == (folder / 'my.txt').read_text() and len(ids_of('my', 'train')) < len(text) / 2
    assert capsys.readouterr().out.count('\n') == 1


def test_a_vocabulary_beyond_16_bits_is_refused(folder):
    from test_tokenizer import make_folder

    make_folder('hf', extra=65_536)
    with pytest.raises(UserError, match='tokenizer hf are more than 65,536.*gpt2') as raised:
        prepare_text.prepare('the lion ' * 100, 'my', 'hf')
    assert '\n' not in str(raised.value) and not os.path.exists('data/my')


@pytest.mark.parametrize('name', ['bert', '', './nowhere', 'a/b/c'])
def test_an_unknown_tokenizer_is_refused(folder, name):
    with pytest.raises(UsageError, match=f"tokenizer '{name}' is not known.*gpt2"):
        prepare_text.prepare('the lion ' * 100, 'my', name)


BOOK = (
    '\ufeffThe Project Gutenberg eBook\r\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\n'
    + '“Dorothy’s dog,” she said.\r\n' * 200
    + '*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\nLicense'
)


class Answer(io.BytesIO):
    """A web server's answer."""

    url = 'https://example.org/'


def test_wizard_from_the_web_is_stripped_and_kept(folder, monkeypatch):
    calls = []

    def answer(url, timeout):
        calls.append((url, timeout))
        return Answer(BOOK.encode())

    monkeypatch.setattr(urllib.request, 'urlopen', answer)
    prepare_wizard_char.main([])
    first = contents('data/wizard_char')
    prepare_wizard_char.main([])  # from the copy that was kept
    assert contents('data/wizard_char') == first
    assert len(calls) == 1 and calls[0][0].startswith('https://') and 0 < calls[0][1] <= 30
    meta = json.loads(first['meta.json'])
    assert meta['source'].startswith('https://') and '’“”' in meta['tokenizer']['chars']
    assert '*' not in meta['tokenizer']['chars'] and '\ufeff' not in meta['tokenizer']['chars']
    assert sum(meta['tokens'].values()) == 200 * len('“Dorothy’s dog,” she said.\n')


def test_an_incomplete_book_is_not_kept(folder, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, 'urlopen',
                        lambda url, timeout: Answer(BOOK[:3000].encode()))
    prepare_wizard_char.main([])
    assert 'another text' in capsys.readouterr().out
    made = contents('data/wizard_char')
    assert 'input.txt' not in made and json.loads(made['meta.json'])['source'] == (
        'data/oz_retold.txt')


def test_the_story_that_ships_is_whole():
    import lzma

    data = open(STORY, 'rb').read()
    text = data.decode()
    assert len(data) > 100_000 and text.count('\nChapter ') == 24
    assert len(lzma.compress(data, preset=9)) > 0.3 * len(data)
    assert '\r' not in text and '"' not in text and text.count('“') == text.count('”')


ALONE = SimpleNamespace(
    rank=0, local_rank=0, world_size=1, is_main=True, any=lambda flag: flag,
    agree=lambda name, value: None,
)
CPU = torch.device('cpu')


def settings(**changes):
    return SimpleNamespace(**dict(
        seed=1, batch_size=3, block_size=16, gradient_accumulation_steps=4, eval_iters=0,
    ) | changes)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def test_batches_are_windows_of_the_file(tiny):
    split = Split('data/tiny/train.bin', 256)
    ids = ids_of('tiny', 'train')
    offsets = np.array([0, 5, len(ids) - 17])  # the last window is used too
    x, y = split.batch(offsets, 16, CPU)
    assert x.shape == y.shape == (3, 16) and x.dtype == torch.int64
    for row, offset in enumerate(offsets):
        assert x[row].tolist() == ids[offset : offset + 16]
        assert y[row].tolist() == ids[offset + 1 : offset + 17]


def test_training_batches_follow_from_seed_and_iteration(tiny):
    split, cfg = Split('data/tiny/train.bin', 256), settings()
    two = take(training_batches(split, cfg, ALONE, CPU, 0), 8)  # two iterations of four
    resumed = take(training_batches(split, cfg, ALONE, CPU, 1), 4)
    for (x, y, _), (again_x, again_y, _) in zip(two[4:], resumed):
        assert (x == again_x).all() and (y == again_y).all()
    assert (two[0][0] != two[4][0]).any()
    other = take(training_batches(split, settings(seed=2), ALONE, CPU, 0), 1)
    assert (two[0][0] != other[0][0]).any()
    ids = ids_of('tiny', 'train')
    for x, y, divisor in two:
        assert divisor == 4  # the mean of four losses
        assert (x[:, 1:] == y[:, :-1]).all()
        starts = [i for i in range(len(ids) - 16) if ids[i : i + 16] == x[0].tolist()]
        assert starts and y[0, -1] in [ids[i + 16] for i in starts]


def test_the_ranks_share_the_batches_of_one_process(tiny):
    split, cfg = Split('data/tiny/train.bin', 256), settings()
    alone = take(training_batches(split, cfg, ALONE, CPU, 3), 4)
    ranks = [SimpleNamespace(rank=rank, world_size=2) for rank in range(2)]
    both = [batch for r in ranks for batch in take(training_batches(split, cfg, r, CPU, 3), 2)]
    for (x, _, _), (shared, _, divisor) in zip(alone, both, strict=True):
        assert (x == shared).all() and divisor == 2


@pytest.mark.parametrize('world_size', [1, 3])
def test_an_evaluation_of_the_whole_split_sees_every_token_once(tiny, world_size):
    split = Split('data/tiny/val.bin', 256)
    targets, counts = [], set()
    for rank in range(world_size):
        ranks = SimpleNamespace(rank=rank, world_size=world_size)
        batches = list(evaluation_batches(split, settings(), ranks, CPU))
        targets += [int(i) for _, y, _ in batches for i in y.flatten() if i >= 0]
        counts.add(len(batches))
    assert len(counts) == 1 and sorted(targets) == sorted(ids_of('tiny', 'val')[1:])


def test_a_missing_dataset_names_its_script(folder):
    with pytest.raises(UserError, match='prepare_text.py'):
        Dataset('nowhere', ALONE)


def test_a_missing_dataset_is_made_by_its_script(folder, monkeypatch, capfd):
    monkeypatch.setattr('prepare_text.PREPARE', {'mine': f'prepare_text.py {STORY} --dataset=mine'})
    dataset = Dataset('mine', ALONE)
    assert dataset.splits['train'].tokens > 100_000 and dataset.source == 'oz_retold.txt'
    assert os.path.exists(os.path.join(ROOT, 'prepare_text.py'))
