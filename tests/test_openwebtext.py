"""prepare_openwebtext.py, to the byte: its inputs, its output, and interruptions."""

import contextlib
import hashlib
import http.server
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import bench_openwebtext as bench
import numpy as np
import pytest
from conftest import ROOT, STORY, gpt2_tokenizer, script
from test_data import contents
from test_edges import error_of  # noqa: F401 (a fixture)

import prepare_openwebtext as owt
import prepare_text
from console import UsageError, UserError
from tokenizer import GPT2Tokenizer

SETTINGS = ['--dataset=web', '--num_proc=1', '--val_fraction=0.1']


@pytest.fixture(scope='module')
def bpe():
    return gpt2_tokenizer().bpe


@pytest.fixture(autouse=True)
def threads(request, monkeypatch):
    """Use threads as workers where processes are not tested, since they start at once."""
    if 'workers' not in request.fixturenames:
        monkeypatch.setattr(
            owt, 'ProcessPoolExecutor', lambda workers, **_: ThreadPoolExecutor(workers)
        )


def make_documents(count=120, seed=0):
    """Documents, as bytes, with all kinds of unusual contents."""
    with open(STORY, encoding='utf-8') as file:
        paragraphs = file.read().split('\n\n')
    draw = random.Random(seed)
    texts = ['', ' \n', 'a\n\n\nb\n\n\n\n\nc', '  x   y \n \n z\t\t\t.\r\n\r\n']
    texts += ['“Oz” 奥兹 🌪️<|endoftext|>', 'one\xa0 \u3000two']
    for _ in range(count):
        texts.append('\n\n\n'.join(draw.choices(paragraphs, k=draw.randint(1, 5))))
    draw.shuffle(texts)
    return [text.encode() for text in texts]


def reference(documents, val_fraction=0.1):
    """The expected splits, computed in the simplest way."""
    bpe, ids = GPT2Tokenizer().bpe, {'train': [], 'val': []}
    for document in documents:
        text = re.sub('\n{3,}', '\n\n', document.decode('utf-8', 'replace')).strip()
        place = zlib.crc32(text.encode()) / 2**32
        ids['val' if place < val_fraction else 'train'] += bpe.encode_ordinary(text) + [50256]
    return {f'{split}.bin': np.array(ids[split], '<u2').tobytes() for split in ids}


def make_tar(files):
    """The bytes of a tar with files of these (name, bytes)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w') as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def make_archives(documents, count=6, subset=0):
    """(name, bytes) of inner archives with these documents, in order."""
    share = -(-len(documents) // count)
    for i in range(count):
        some = enumerate(documents[i * share : (i + 1) * share])
        tar = make_tar([(f'{j:07}-{i:032x}.txt', document) for j, document in some])
        yield f'openwebtext/urlsf_subset{subset:02}-{i + 1}_data.xz', lzma.compress(tar, preset=0)


def write(path, data):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, 'wb') as file:
        file.write(data)


def result(dataset='web'):
    """The splits on disk. Checks that meta.json describes them and that no other files are left."""
    files = contents(f'data/{dataset}')
    meta = json.loads(files.pop('meta.json'))
    assert list(files) and set(files) == {'train.bin', 'val.bin'}
    assert meta['tokenizer'] == GPT2Tokenizer().state() and meta['vocab_size'] == 50257
    assert meta['tokens'] == {name[:-4]: len(data) // 2 for name, data in files.items()}
    both = files['train.bin'] + files['val.bin']
    assert meta['sha256'] == hashlib.sha256(both).hexdigest()
    return files


def prepare(*flags):
    owt.main([*SETTINGS, *flags])
    return result()


@pytest.mark.parametrize('workers', [1, 3])
def test_any_number_of_workers_gives_the_reference(bpe, folder, workers):
    documents = make_documents()
    write('urlsf_subset00.tar', make_tar(make_archives(documents)))
    assert prepare(f'--num_proc={workers}', '--input=urlsf_subset00.tar') == reference(documents)


def outer_tar(documents):
    half = len(documents) // 2
    write('in/urlsf_subset00.tar', make_tar(make_archives(documents[:half])))
    write('in/urlsf_subset01.tar', make_tar(make_archives(documents[half:], subset=1)))


def outer_tar_xz(documents):
    write('in/openwebtext.tar.xz', lzma.compress(make_tar(make_archives(documents)), preset=0))


def inner(documents):
    for name, data in make_archives(documents):
        write(f'in/{name}', data)


def own_tar(documents):
    files = [(f'texts/{i}.txt', document) for i, document in enumerate(documents)]
    write('in/a.tar', make_tar([*files[:40], ('texts/notes.md', b'not this')]))
    write('in/b.tar.xz', lzma.compress(make_tar(files[40:]), preset=0))


def write_parquet(path, columns, names=None, **settings):
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet

    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns, names), path, **settings)


def parquet(documents):
    texts = [document.decode() for document in documents]
    write_parquet('in/a.parquet', {'n': range(len(texts)), 'text': texts})
    write('in/notes.md', b'not this')
    write('in/.hidden.parquet', b'nor this')


@pytest.mark.parametrize('form', [outer_tar, outer_tar_xz, inner, own_tar, parquet])
def test_every_form_gives_the_same(bpe, folder, form):
    documents = make_documents()
    form(documents)
    assert prepare('--input=in') == reference(documents)


@pytest.mark.parametrize('kind', ['string', 'large_string'])
def test_fineweb_edu_as_it_is_published(bpe, folder, kind):
    """All its columns, null texts, and row groups larger than the part that is read at once."""
    pyarrow = pytest.importorskip('pyarrow')
    documents = make_documents()
    texts = [text for document in documents for text in (document.decode(), None)]
    n = len(texts)
    columns = {
        'text': pyarrow.array(texts, kind), 'id': [f'<urn:uuid:{i}>' for i in range(n)],
        'dump': ['CC-MAIN-2024-10'] * n, 'url': [f'https://example.org/{i}' for i in range(n)],
        'file_path': ['s3://commoncrawl/a.warc.gz'] * n, 'language': ['en'] * n,
        'language_score': [0.9] * n, 'token_count': range(n), 'score': [3.1] * n,
        'int_score': [3] * n,
    }
    write_parquet('in/sample/10BT/000_00000.parquet', columns, compression='zstd')
    assert prepare('--input=in') == reference(documents)


def test_parquet_without_texts_says_which_column_is_needed(bpe, folder, monkeypatch):
    for columns, words in [({'content': ['a']}, 'needs one column `text`: give its texts'),
                           ({'text': [1]}, 'is .*unsupported .*cast from int64'),
                           ({'text': [['a']]}, 'is .*unsupported .*cast from list')]:
        write_parquet('a.parquet', columns)
        with pytest.raises(UserError, match=f"^'a.parquet' {words}") as raised:
            prepare('--input=a.parquet')
        assert '\n' not in str(raised.value)
    write_parquet('a.parquet', [['a'], ['b']], names=['text', 'text'])
    with pytest.raises(UserError, match='needs one column `text`'):
        prepare('--input=a.parquet')
    monkeypatch.setattr(owt, 'MAX_BYTES', 5000)
    for texts in (['a' * 5001], ['a' * 500] * 11):
        write_parquet('a.parquet', {'text': texts})
        with pytest.raises(UserError, match="^'a.parquet' is .*more than 5,000 bytes"):
            prepare('--input=a.parquet')


@pytest.mark.parametrize('how', ['cut', 'zeroed', 'empty', 'no xz'])
def test_damaged_parquet(bpe, folder, how):
    write_parquet('a.parquet', {'text': [f'{i}' * 9 for i in range(1000)]}, compression='gzip')
    write('a.parquet', spoil(contents('.')['a.parquet'], how))
    with pytest.raises(UserError, match="^'a.parquet' is damaged .*: replace or") as raised:
        prepare('--input=a.parquet')
    assert '\n' not in str(raised.value) and not os.path.exists('data/web')


def test_parquet_without_its_package_says_what_to_install(bpe, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    write('a.parquet', b'PAR1')
    with pytest.raises(UserError, match="pyarrow is missing .*pip install 'pyarrow>="):
        prepare('--input=a.parquet')


def test_the_split_depends_on_the_text_alone(bpe, folder):
    documents = [b'number %d' % i for i in range(4000)]
    write('a.tar', make_tar(make_archives(documents)))
    write('b.tar', make_tar(make_archives([d + b'  ' for d in reversed(documents * 2)])))
    val = {}
    for name in 'ab':
        files = prepare(f'--input={name}.tar', '--val_fraction=0.01')
        text = GPT2Tokenizer().decode(np.frombuffer(files['val.bin'], '<u2'))
        val[name] = text.split('<|endoftext|>')[:-1]
    assert 20 < len(val['a']) < 60
    assert sorted(val['a'] * 2) == sorted(val['b'])


# The script, but its process group gets a signal once progress.json was written several times.
KILLED = """
import os
import signal
import prepare_openwebtext as owt
import console

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Output(owt.Output):
    left, number = map(int, os.environ['AFTER_AND_SIGNAL'].split())

    def save(self):
        super().save()
        self.left -= 1
        if not self.left:
            self.files['train'].write(b'half an archive')
            self.files['train'].flush()
            os.killpg(0, self.number)

if __name__ == '__main__':
    owt.Output, owt.SAVE_SECONDS = Output, 0
    console.run(owt.main)
"""


def killed(after, *flags, number=signal.SIGKILL, code=-signal.SIGKILL):
    """Run until `after` archives are done, then kill the process group; returns the output."""
    write('killed.py', KILLED.encode())
    process = subprocess.run(
        [sys.executable, 'killed.py', *SETTINGS, *flags], start_new_session=True, timeout=60,
        env=os.environ | {'PYTHONPATH': ROOT, 'AFTER_AND_SIGNAL': f'{after} {number:d}'},
        capture_output=True, encoding='utf-8',
    )
    assert process.returncode == code, process.stderr
    return process.stdout, process.stderr


@pytest.mark.parametrize('form', [inner, outer_tar])
def test_killed_and_continued_gives_the_same_and_repeats_nothing(bpe, folder, capsys, form):
    documents = make_documents()
    form(documents)
    write('data/web/train.bin', b'old')
    for _ in range(2):
        killed(2, '--input=in', '--num_proc=2')
        _, done = json.loads(contents('data/web')['progress.json'])
        assert done['files'] > 0 or form is outer_tar
        for path in owt.files_in('in')[: done['files']]:  # not read again
            write(path, b'x')
    assert contents('data/web')['train.bin'] == b'old'
    assert prepare('--input=in') == reference(documents)
    count = 4 * -(-len(documents) // 6) if form is inner else 44
    assert f'continuing after {count} documents' in capsys.readouterr().out


def test_ctrl_c_stops_cleanly(bpe, folder):
    documents = make_documents()
    inner(documents)
    out, err = killed(2, '--input=in', '--num_proc=2', number=signal.SIGINT, code=130)
    assert err == '' and 'Traceback' not in out
    assert prepare('--input=in') == reference(documents)


def test_parquet_is_continued_after_a_kill(bpe, folder, capsys):
    documents = make_documents()
    parquet(documents)
    killed(1, '--input=in')
    assert prepare('--input=in') == reference(documents)
    assert 'continuing after 64 documents' in capsys.readouterr().out


def test_another_input_is_not_mixed_in(bpe, folder):
    inner(make_documents())
    killed(3, '--input=in')
    with pytest.raises(UserError, match='begun with .*in/open.*not the same now.*delete'):
        write('other/a.xz', b'a')
        prepare('--input=other')
    with pytest.raises(UserError, match='progress.json was begun with .*0.1'):
        prepare('--input=in', '--val_fraction=0.2')
    write('in/a.xz', b'a')
    with pytest.raises(UserError, match='begun with .*subset00-1_data.*not the same now'):
        prepare('--input=in')


def test_files_must_keep_their_names_and_a_damaged_one_may_be_repaired(bpe, folder, monkeypatch):
    monkeypatch.setattr(owt, 'SAVE_SECONDS', 0)
    documents = make_documents()
    half = len(documents) // 2
    tars = [make_tar(make_archives(documents[i * half : (i + 1) * half], 3)) for i in range(2)]
    write('in/a.tar', tars[0])
    write('in/b.tar', tars[1][: len(tars[1]) // 2])
    with pytest.raises(UserError, match='b.tar. is damaged'):
        prepare('--input=in')
    os.rename('in/a.tar', 'in/z.tar')
    with pytest.raises(UserError, match='begun with .*in/a.tar.*not the same now'):
        prepare('--input=in')
    os.rename('in/z.tar', 'in/a.tar')
    write('in/b.tar', tars[1])
    assert prepare('--input=in') == reference(documents)


@pytest.mark.parametrize('how', ['same size', 'shorter'])
def test_a_replaced_archive_is_not_continued_in_its_middle(bpe, folder, how):
    """Another file of the same name is recognized by the check sum of the part that was read."""
    documents = make_documents()
    outer_tar(documents)
    killed(8, '--input=in')  # 6 archives of in/urlsf_subset00.tar, 2 of the next
    path = 'in/urlsf_subset01.tar'
    with open(path, 'rb') as file:
        whole = file.read()
    archives = list(make_archives(documents[len(documents) // 2 :], subset=1))
    write(path, make_tar(archives[::-1] if how == 'same size' else archives[:1]))
    assert (os.path.getsize(path) == len(whole)) == (how == 'same size')
    with pytest.raises(UserError, match=f'{path} is no longer .* delete data/web/progress'):
        prepare('--input=in')
    write(path, whole)
    assert prepare('--input=in') == reference(documents)


def test_empty_texts_are_not_done_twice(bpe, folder, monkeypatch):
    """The check sum of the input read so far tells whether an empty text was done."""
    documents = [b'', b'one two', b'', b'', b'', b'three', b''] * 5
    own = make_tar([(f'{i}.txt', document) for i, document in enumerate(documents)])
    write('a.tar', own)
    for after in (4, 12):
        killed(after, '--input=a.tar', '--val_fraction=0.5')
    assert prepare('--input=a.tar', '--val_fraction=0.5') == reference(documents, 0.5)


def test_files_that_progress_json_does_not_fit(bpe, folder):
    inner(make_documents())
    killed(3, '--input=in')
    for path, data, words in [('train.bin.part', b'short', 'part is shorter than .*delete'),
                              ('progress.json', b'{', "progress.json' is damaged")]:
        write(f'data/web/{path}', data)
        with pytest.raises(UserError, match=words):
            prepare('--input=in')


def test_the_old_dataset_stays_until_the_new_one_is_whole(bpe, folder):
    documents = make_documents()
    inner(documents)
    write('data/web/train.bin', b'old')
    write('data/web/test.bin', b'old')
    with pytest.raises(UserError, match='damaged'):
        write('in/z_data.xz', b'')
        prepare('--input=in')
    assert contents('data/web')['train.bin'] == b'old'
    os.remove('in/z_data.xz')
    assert prepare('--input=in') == reference(documents)


def spoil(data, how):
    if how == 'cut':
        return data[: len(data) // 2]
    if how == 'flipped':
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    if how == 'zeroed':
        return data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :]
    if how == 'header':  # sound xz, but the tar in it is broken near its end
        tar = bytearray(lzma.decompress(data))
        start = tar.rindex(b'ustar') - 257
        tar[start : start + 3] = b'???'
        return lzma.compress(bytes(tar))
    return {'empty': b'', 'no xz': b'<html>', 'no tar': lzma.compress(b'text ' * 300)}[how]


@pytest.mark.parametrize('how', ['cut', 'flipped', 'header', 'empty', 'no xz', 'no tar'])
def test_a_damaged_archive(bpe, folder, how):
    documents = make_documents()
    archives = list(make_archives(documents))
    archives[2] = (archives[2][0], spoil(archives[2][1], how))
    write('urlsf_subset00.tar', make_tar(archives))
    with pytest.raises(UserError, match="subset00-3_data.xz' is damaged"):
        prepare('--input=urlsf_subset00.tar')
    assert not os.path.exists('data/web')


def test_a_linked_folder_is_not_read_twice(folder):
    os.makedirs('in/a')
    write('in/a/b.tar', b'')
    os.symlink('..', 'in/a/loop')
    os.symlink('in', 'linked')
    assert owt.files_in('in') == ['in/a/b.tar'] and owt.files_in('linked') == ['linked/a/b.tar']


def test_a_damaged_tar(bpe, folder):
    tar = make_tar(make_archives(make_documents()))
    starts = [member.offset for member in tarfile.open(fileobj=io.BytesIO(tar))]
    broken = tar[: starts[3]] + b'?' + tar[starts[3] + 1 :]
    for data in (tar[: len(tar) // 2], tar[: starts[3]], broken):
        write('urlsf_subset00.tar', data)
        with pytest.raises(UserError, match="subset00.tar.*' is damaged"):
            prepare('--input=urlsf_subset00.tar')


def test_too_large_for_memory_is_refused(bpe, folder, monkeypatch):
    monkeypatch.setattr(owt, 'MAX_BYTES', 100_000)
    for documents in ([b'a' * 100_001], [b'a' * 40_000] * 3):
        write('a.tar', make_tar(make_archives(documents, 1)))
        with pytest.raises(UserError, match="^'a.tar/open.*_data.xz' is .*more than 100,000"):
            prepare('--input=a.tar')
    write('b.xz', b'a' * 100_001)
    for name in ('b.xz', 'b.txt'):
        write('b.tar', make_tar([(name, b'a' * 100_001)]))
        with pytest.raises(UserError, match="^'b.tar' is .*more than 100,000 bytes.*split it"):
            prepare('--input=b.tar')
    with pytest.raises(UserError, match="^'b.xz' is .*more than 100,000 bytes.*split it"):
        prepare('--input=b.xz')
    documents = [b'%d ' % i * 5_000 for i in range(40)]
    write('c.tar', make_tar([(f'{i}.txt', document) for i, document in enumerate(documents)]))
    assert prepare('--input=c.tar') == reference(documents)


@pytest.mark.parametrize('form', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_huge_name_is_not_read(bpe, folder, monkeypatch, form):
    monkeypatch.setattr(owt, 'MAX_BYTES', 100_000)
    tar = tarfile.TarInfo('x' * 150_000 + '.txt').tobuf(form) + bytes(1024)
    write('a.tar', tar)
    write('b.xz', lzma.compress(tar))
    for name in ('a.tar', 'b.xz'):
        with pytest.raises(UserError, match=f"^'{name}' is .*more than 100,000 bytes") as raised:
            prepare(f'--input={name}')
        assert len(str(raised.value)) < 300


def test_a_negative_size_is_no_endless_loop(bpe, folder):
    member = tarfile.TarInfo('a.md')
    member.pax_headers = {'size': '-1536'}  # the next header is then this one again
    write('a.tar', member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="^'a.md' in 'a.tar' is .*broken"):
        prepare('--input=a.tar')


def test_invalid_utf8_is_repaired_and_counted(bpe, folder, capsys):
    documents = [b'good', b'caf\xe9 \xff', b'\xe2\x80', 'gut für'.encode()]
    write('a.tar', make_tar(make_archives(documents, 2)))
    assert prepare('--input=a.tar', '--val_fraction=0.5') == reference(documents, 0.5)
    assert '2 repaired' in capsys.readouterr().out


def test_names_in_archives_are_no_paths(bpe, folder):
    names = ['../../escape.txt', '/tmp/escape-from-tar.txt', 'a\n\x1b[31m.txt', 'x' * 300 + '.txt']
    data = io.BytesIO(make_tar([(name, name[:5].encode()) for name in names]))
    with tarfile.open(fileobj=data, mode='a') as tar:
        for name, kind in [('a.txt', tarfile.DIRTYPE), ('link', tarfile.SYMTYPE),
                           ('link', tarfile.LNKTYPE), ('device', tarfile.CHRTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, '/etc/passwd'
            tar.addfile(member)
    archives = [('../../../escape_data.xz', lzma.compress(data.getvalue()))]
    write('here/a.tar', make_tar(archives))
    before = sorted(os.listdir('..')), sorted(os.listdir('.'))
    expected = reference([name[:5].encode() for name in names], 0.7)
    assert prepare('--input=here/a.tar', '--val_fraction=0.7') == expected
    assert (sorted(os.listdir('..')), sorted([*before[1], 'data'])) == (
        before[0], sorted(os.listdir('.')))
    assert not os.path.exists('/tmp/escape-from-tar.txt')
    write('here/a.tar', make_tar([('../\n.xz', b'')]))
    with pytest.raises(UserError, match=r"^'a.tar/../\\n.xz' is damaged"):
        prepare('--input=here/a.tar')


def sparse_gnu():
    """Two members of a tar, one sparse in GNU's old format: 1 MB of zeros, then 'end'."""
    member = tarfile.TarInfo('b.txt')
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 3
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b'%011o\0%011o\0' % (1 << 20, 3)  # the map of what is stored
    header[483:495] = b'%011o\0' % ((1 << 20) + 3)
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    return bytes(header) + b'end'.ljust(512, b'\0')


def sparse_pax():
    """The same in the format of today's GNU tar with --format=pax --sparse."""
    member, content = tarfile.TarInfo('GNUSparseFile.0/b.txt'), b'1\n1048576\n3\n'.ljust(512, b'\0')
    member.size, member.pax_headers = len(content) + 3, {
        'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.name': 'b.txt',
        'GNU.sparse.realsize': '1048579'}
    return member.tobuf(tarfile.PAX_FORMAT) + content + b'end'.ljust(512, b'\0')


def hard_link(kind=tarfile.LNKTYPE):
    member = tarfile.TarInfo('b.txt')
    member.type, member.linkname = kind, 'a.txt'
    return member.tobuf()


def symbolic_link():
    return hard_link(tarfile.SYMTYPE)


def pipe():
    return hard_link(tarfile.FIFOTYPE)


def unknown():
    member = tarfile.TarInfo('b.txt')
    member.type, member.size = b'M', 3  # continued from another volume
    return member.tobuf() + b'end'.ljust(512, b'\0')


@pytest.mark.parametrize('kind', [sparse_gnu, sparse_pax, hard_link, symbolic_link,
                                  pipe, unknown])
def test_texts_that_are_no_plain_files_are_refused_by_name(bpe, folder, kind):
    tar = make_tar([('a.txt', b'a text')])[:1024] + kind() + bytes(1024)
    write('own.tar', tar)
    write('a.xz', lzma.compress(tar))
    for name in ('own.tar', 'a.xz'):
        with pytest.raises(UserError, match=f"^'b.txt' in '{name}' is a link, .*: pack") as raised:
            prepare(f'--input={name}')
        assert '\n' not in str(raised.value)
    assert not os.path.exists('data/web')


def test_a_split_that_is_too_short_to_use_is_refused(bpe, folder):
    """The remedy works, although a stopped run must keep its val_fraction."""
    documents = [b'number %d' % i for i in range(50)]
    write('a.tar', make_tar(make_archives(documents)))
    write('data/web/train.bin', b'old')
    for flags, words in [
            ([], 'gives only 150 train, 0 val tokens: .* change --val_fraction=0.0005'),
            (['--val_fraction=0.9999'], 'gives only 0 train, 150 val tokens: .*=0.9999')]:
        with pytest.raises(UserError, match=words) as raised:
            owt.main(['--dataset=web', '--num_proc=1', '--input=a.tar', *flags])
        assert '\n' not in str(raised.value) and contents('data/web') == {'train.bin': b'old'}
    assert prepare('--input=a.tar') == reference(documents)
    write('a.tar', make_tar([('a.txt', b'one'), ('b.txt', b'')]))
    with pytest.raises(UserError, match='gives only 2 train, 1 val tokens: add'):
        prepare('--input=a.tar')


def test_errors_are_one_line(bpe, folder):
    write('a.zip', b'PK')
    os.mkdir('empty')
    for flags, kind, words in [
        (['--input=nowhere'], UsageError, 'input=nowhere is missing or has'),
        (['--input=a.zip'], UsageError, 'a.zip is missing or has .*.tar'),
        (['--input=empty'], UsageError, 'empty is missing or has'),
        (['--num_proc=-1'], UsageError, 'num_proc=-1'),
        (['--val_fraction=1'], UsageError, 'val_fraction=1.0'),
        (['--val_fraction=0'], UsageError, 'val_fraction=0.0 must be above 0'),
        (['--dataset=a/b'], UsageError, "dataset='a/b'"),
    ]:
        with pytest.raises(kind, match=words) as raised:
            owt.main(flags)
        assert '\n' not in str(raised.value)
    write('z.tar', make_tar([('a.md', b'text')]))
    done = script('prepare_openwebtext.py', '--input=z.tar', '--num_proc=1')
    assert done.returncode == 1 and done.stdout == ''
    assert re.fullmatch('error: z.tar gives only 0 train, 0 val tokens: add tars of .txt.*\n',
                        done.stderr)
    assert not os.path.exists('data/openwebtext')


def test_a_full_disk_is_one_line_and_continues(bpe, folder, monkeypatch, error_of):
    monkeypatch.setattr(owt, 'SAVE_SECONDS', 0)
    documents = make_documents()
    inner(documents)
    fsync, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) >= stop:
            raise OSError(28, 'No space left on device')
        fsync(fd)

    for stop in (1, 9, 11):  # a .part file, or progress.json
        with monkeypatch.context() as patch:
            patch.setattr(os, 'fsync', full)
            calls.clear()
            error = error_of(owt.main, *SETTINGS, '--input=in')
        assert re.search('cannot write .*No space left on device.: free some space', error)
    assert prepare('--input=in') == reference(documents)


class FullDisk(io.FileIO):
    """A file on a disk that is full after `left` bytes."""

    left = 0

    def write(self, data):
        FullDisk.left -= len(data)
        if FullDisk.left < 0:
            raise OSError(28, 'No space left on device')
        return super().write(data)


@pytest.mark.parametrize('source', ['own', 'published'])
def test_a_disk_that_is_full_at_any_byte(bpe, folder, monkeypatch, source, error_of):
    documents = make_documents()
    web = Web(monkeypatch, published(documents, monkeypatch))
    flags = []
    if source == 'own':
        inner(documents)
        flags = ['--input=in']
    for FullDisk.left in range(0, 40_000, 8_000):
        with monkeypatch.context() as patch:
            for module in (owt, prepare_text):
                patch.setattr(module, 'open', lambda path, *args, **more: io.BufferedRandom(
                    FullDisk(path, 'a+')) if 'a' in args[0] else open(path, *args, **more),
                    raising=False)
            error = error_of(owt.main, *SETTINGS, *flags)
        assert re.search('cannot write .*No space left on device.: free some space', error)
    assert prepare(*flags) == reference(documents) and (flags or web.asked)


def test_a_mistake_in_the_code_keeps_its_traceback(bpe, folder, monkeypatch):
    inner(make_documents(10))

    def slip(text):
        raise ValueError('a slip')

    monkeypatch.setattr(owt.TOKENIZER, 'encode', slip)
    with pytest.raises(ValueError, match='^a slip$'):
        prepare('--input=in')


def test_two_at_once_are_refused(bpe, folder):
    fcntl = pytest.importorskip('fcntl')
    inner(make_documents(20))
    os.makedirs('data/web')
    handle = os.open('data/web', os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='another process is writing'):
        prepare('--input=in')
    os.close(handle)


class Web:
    """Replaces curl: serves `files`, at most `limit` bytes at a time."""

    def __init__(self, monkeypatch, files, limit=None):
        self.files, self.limit, self.asked, self.fail = files, limit, [], set()
        monkeypatch.setattr(shutil, 'which', lambda name: name)
        monkeypatch.setattr(subprocess, 'Popen', self.open)
        monkeypatch.setattr(time, 'sleep', lambda seconds: None)

    @contextlib.contextmanager
    def open(self, command, stdout):
        *curl, start, url = command
        assert curl == prepare_text.CURL and url.startswith(owt.URL) and stdout == subprocess.PIPE
        name, start = url.removeprefix(owt.URL), int(start)
        self.asked.append((name, start))
        rest = b'' if name in self.fail else self.files[name][start:]
        answer = rest[: self.limit]
        code = 6 if name in self.fail else 22 if not rest else 18 if answer != rest else 0
        yield SimpleNamespace(stdout=io.BytesIO(answer), returncode=code)


def published(documents, monkeypatch):
    """The documents as three published tars."""
    monkeypatch.setattr(owt, 'SUBSETS', owt.SUBSETS[:3])
    monkeypatch.setattr(owt, 'DOCUMENTS', len(documents))
    share = -(-len(documents) // 3)
    return {
        name: make_tar(make_archives(documents[i * share : (i + 1) * share], 3, subset=i))
        for i, name in enumerate(owt.SUBSETS)
    }


def test_the_published_tars_are_downloaded_in_pieces(bpe, folder, monkeypatch, capsys):
    assert len(owt.SUBSETS) == 21 and owt.DOCUMENTS == 8_013_769
    assert owt.URL.startswith('https://')
    documents = make_documents()
    web = Web(monkeypatch, published(documents, monkeypatch), limit=6_000)
    assert prepare() == reference(documents)
    starts = [start for name, start in web.asked if name == owt.SUBSETS[0]]
    assert starts == [max(0, i * 6_000 - i) for i in range(len(starts))] and len(starts) > 2
    assert json.loads(contents('data/web')['meta.json'])['source'] == owt.URL
    assert capsys.readouterr().out.count('fetching https://') == len(web.asked)


def test_a_tar_is_removed_once_it_is_done(bpe, folder, monkeypatch):
    monkeypatch.setattr(owt, 'SAVE_SECONDS', 0)
    documents, save, seen = make_documents(), owt.Output.save, []
    Web(monkeypatch, published(documents, monkeypatch))
    spy = lambda self: (save(self), seen.append({*os.listdir('data/web')}))  # noqa: E731
    monkeypatch.setattr(owt.Output, 'save', spy)
    assert prepare() == reference(documents)
    assert [len(names & {*owt.SUBSETS}) for names in seen[-8:]] == [2, 2, 2, 1, 1, 1, 1, 0]


def test_a_download_with_other_documents_is_reported(bpe, folder, monkeypatch):
    documents = make_documents()
    Web(monkeypatch, published(documents, monkeypatch))
    monkeypatch.setattr(owt, 'DOCUMENTS', 8_013_769)
    with pytest.raises(UserError, match='has 126 documents instead of 8,013,769') as raised:
        prepare()
    assert '\n' not in str(raised.value) and result() == reference(documents)


def test_a_download_that_fails_is_continued_by_the_next_run(bpe, folder, monkeypatch, capsys):
    monkeypatch.setattr(owt, 'SAVE_SECONDS', 0)
    documents = make_documents()
    web = Web(monkeypatch, published(documents, monkeypatch))
    web.fail = {owt.SUBSETS[2]}
    with pytest.raises(UserError, match='subset02.tar .exit code 6.*the same command continues'):
        prepare()
    assert len([name for name, _ in web.asked if name == owt.SUBSETS[2]]) == 8
    data = web.files[owt.SUBSETS[2]]
    for had in (data[:5000], data):  # whole, but for its name
        write(f'data/web/{owt.SUBSETS[2]}.part', had)
        web.fail, web.asked = set(), []
        before = contents('data/web')
        assert prepare() == reference(documents)
        assert web.asked == [(owt.SUBSETS[2], len(had) - 1)]
        assert 'continuing after' in capsys.readouterr().out
        for name, content in before.items():
            write(f'data/web/{name}', content)
        os.remove('data/web/train.bin')
        os.remove('data/web/val.bin')


def test_curl_continues_where_a_file_ended(folder, monkeypatch):
    data, asked = bytes(range(256)) * 1000, []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
            asked.append(start)
            self.send_response(206 if start else 200)
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
            self.send_header('Content-Length', len(data) - start)
            self.end_headers()
            self.wfile.write(data[start:][:100_000])  # then the connection ends

        def log_message(self, *_):
            pass

    if not shutil.which('curl'):
        pytest.skip('there is no curl here')
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    with http.server.HTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/a.tar'
        with pytest.raises(UserError, match='exit code 1 of curl'):  # HTTPS alone
            prepare_text.download(url, 'a.tar', print)
        assert not asked
        command = [word.replace('=https', '=http') for word in prepare_text.CURL]
        monkeypatch.setattr(prepare_text, 'CURL', command)
        prepare_text.download(url, 'a.tar', print)
        server.shutdown()
    assert asked == [0, 99_999, 199_998] and contents('.') == {'a.tar': data}


def test_without_curl_it_says_so(bpe, folder, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.raises(UserError, match='curl fetches https://.*install it, or .*--input'):
        prepare()


def test_progress_where_there_is_no_terminal(bpe, folder, monkeypatch, capsys):
    show = lambda self, fraction, text: self.print_line(text)  # noqa: E731
    monkeypatch.setattr(owt.console.Progress, 'show_progress', show)
    documents = make_documents()
    inner(documents)
    prepare('--input=in')
    lines = capsys.readouterr().out.splitlines()
    pattern = r'[\d.]+%, [\d.]+ MB/s, [\d:]+ left, [\d,]+ documents'
    assert [line for line in lines if re.fullmatch(pattern, line)]
    assert '126 documents' in lines[-1] and 'data/web: ' in lines[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_gigabyte_takes_constant_memory(bpe, folder):
    archives = list(make_archives(list(bench.make_documents([STORY], 25)), 13))
    with tarfile.open('urlsf_subset00.tar', 'w') as tar:
        for i in range(40):
            for name, data in archives:
                bench.add(tar, f'{i}/{name}', data)
    _, _, peak = bench.run_script('urlsf_subset00.tar', '.', num_proc=2)
    assert peak['processes'] >= 3 and peak['rss'] < 1000
    assert 1.8e8 < json.loads(contents('data/bench')['meta.json'])['tokens']['train'] < 2.7e8


class Killed(BaseException):
    """The end of a process: no code handles this exception."""


@pytest.mark.parametrize('deleted', [None, 'train.bin.part', 'val.bin.part'])
def test_killed_at_any_step_of_publishing(bpe, folder, monkeypatch, deleted):
    """The same command gives the new dataset or an error, never files of the old one."""
    documents = make_documents(10)
    inner(documents)
    calls = {name: getattr(os, name) for name in ('replace', 'remove', 'unlink')}

    def until_it_is_killed(name):
        def call(*paths):
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise Killed
            calls[name](*paths)
        return call

    results, limit = [], 0
    while 'published' not in results:
        limit, steps = limit + 1, limit
        for name in ('train.bin', 'val.bin', 'test.bin', 'meta.json'):
            write(f'data/web/{name}', b'old' * 1000)
        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, until_it_is_killed(name))
            with contextlib.suppress(Killed):
                prepare('--input=in')
                results.append('published')
        with contextlib.suppress(FileNotFoundError):
            os.remove(f'data/web/{deleted}')
        try:
            assert prepare('--input=in') == reference(documents)
        except UserError as error:
            assert deleted and f'{deleted} is shorter than' in str(error)
            shutil.rmtree('data/web')
    assert limit > 10


def test_an_old_dataset_is_not_mixed_with_a_stopped_new_one(bpe, folder):
    inner(make_documents(seed=2))
    for name in ('train.bin', 'val.bin'):
        write(f'data/web/{name}', b'old' * 100_000)
    killed(3, '--input=in')
    os.remove('data/web/train.bin.part')
    with pytest.raises(UserError, match='train.bin.part is shorter than .*progress.json'):
        prepare('--input=in')
    assert contents('data/web')['train.bin'] == b'old' * 100_000
