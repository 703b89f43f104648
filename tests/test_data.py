"""Prepared datasets, to the byte."""

import io
import json
import os
import urllib.request

import numpy as np
import pytest
from conftest import ROOT, STORY

import prepare_text
import prepare_wizard_char
import train
from console import UserError


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


def test_several_files_and_folders(folder):
    os.mkdir('texts')
    for name, text in [('b.txt', 'BBB'), ('a.txt', 'AAA\n'), ('c.md', 'CCC')]:
        (folder / 'texts' / name).write_text(text)
    (folder / 'z.txt').write_text('ZZZ')
    assert prepare_text.read_text(['z.txt', 'texts']) == 'ZZZ\nAAA\nBBB'


def test_nothing_is_left_when_writing_fails(folder, monkeypatch):
    prepare_text.prepare('old text ' * 10, 'my')
    before = contents('data/my')

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left'):
        prepare_text.prepare('something new altogether ' * 10, 'my')
    after = contents('data/my')
    # the old dataset, or none: never a mixture, never a piece
    assert not [name for name in after if name.endswith('.tmp')]
    assert after == before or 'train.bin' not in after


def test_wizard_without_a_network(folder, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError('no network here')

    monkeypatch.setattr(urllib.request.OpenerDirector, 'open', refuse)
    prepare_wizard_char.main([])
    out = capsys.readouterr().out
    assert 'no network here' in out and 'retelling' in out and out.count('\n') == 2
    meta = json.load(open('data/wizard_char/meta.json'))
    assert meta['source'] == 'data/oz_retold.txt' and meta['vocab_size'] == 68
    assert meta['tokens'] == {'train': 180561, 'val': 22570, 'test': 22571}


BOOK = (
    '\ufeffThe Project Gutenberg eBook\r\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\r\n\r\n'
    + '“Dorothy’s dog,” she said.\r\n' * 200
    + '*** END OF THE PROJECT GUTENBERG EBOOK X ***\r\nLicense'
)


class Answer(io.BytesIO):
    """What a web server sends."""


def test_wizard_from_the_web_is_stripped_and_kept(folder, monkeypatch):
    calls = []

    def answer(self, request, timeout):
        calls.append((request.full_url, timeout))
        return Answer(BOOK.encode())

    monkeypatch.setattr(urllib.request.OpenerDirector, 'open', answer)
    prepare_wizard_char.main([])
    first = contents('data/wizard_char')
    prepare_wizard_char.main([])  # from the copy that was kept
    assert contents('data/wizard_char') == first
    assert len(calls) == 1 and calls[0][0].startswith('https://') and 0 < calls[0][1] <= 30
    meta = json.loads(first['meta.json'])
    assert meta['source'].startswith('https://') and '’“”' in meta['tokenizer']['chars']
    assert '*' not in meta['tokenizer']['chars'] and '\ufeff' not in meta['tokenizer']['chars']
    assert sum(meta['tokens'].values()) == 200 * len('“Dorothy’s dog,” she said.\n')


def test_the_story_that_ships_is_whole():
    import lzma

    data = open(STORY, 'rb').read()
    text = data.decode()
    assert len(data) > 100_000 and text.count('\nChapter ') == 24
    assert len(lzma.compress(data, preset=9)) > 0.3 * len(data)
    assert '\r' not in text and '"' not in text and text.count('“') == text.count('”')


def test_batches_are_windows_of_the_file(tiny):
    split = train.Split('data/tiny/train.bin', 256)
    ids = ids_of('tiny', 'train')
    offsets = split.random_offsets((1, 2), 50, 16)
    x, y = split.batch(offsets, 16, train.torch.device('cpu'))
    for row, offset in enumerate(offsets):
        assert x[row].tolist() == ids[offset : offset + 16]
        assert y[row].tolist() == ids[offset + 1 : offset + 17]
    assert (split.random_offsets((1, 2), 50, 16) == offsets).all()
    assert (split.random_offsets((1, 3), 50, 16) != offsets).any()
    every = split.random_offsets((0, 0), 300_000, 16)
    assert every.min() == 0 and every.max() == len(ids) - 17  # the last window is used too


def test_a_missing_dataset_names_its_script(folder):
    with pytest.raises(UserError, match='prepare_text.py'):
        train.Dataset(train.TrainConfig(dataset='nowhere'), train.Ranks())


def test_a_missing_dataset_is_made_by_its_script(folder, capfd):
    cfg = train.TrainConfig(
        dataset='mine', block_size=8, prepare=f'prepare_text.py {STORY} --dataset=mine'
    )
    assert train.Dataset(cfg, train.Ranks()).splits['train'].tokens > 100_000
    assert os.path.exists(os.path.join(ROOT, 'prepare_text.py'))
