"""OpenWebText in GPT-2's byte pairs: 8,013,769 documents become data/openwebtext.

    python prepare_openwebtext.py                             # downloads 12 GB
    python prepare_openwebtext.py --input=openwebtext.tar.xz  # takes your copy
    python prepare_openwebtext.py --input=folder --dataset=my_web --val_fraction=0.01

Gives about 9.04 B train and 4.4 M val tokens, 18 GB. The input is a file, or a folder with its
folders, of: the release's urlsf_subsetNN.tar, openwebtext.tar.xz or urlsf_subsetNN-M_data.xz; or
.txt files, each a document; or .jsonl, .jsonl.gz, .jsonl.xz and .parquet (needs pyarrow) with
documents in `text`. It is read as a stream: nothing is unpacked, no name in an archive is a path.

In a document, runs of three or more line feeds become two, white space at its ends goes, and what
is not UTF-8 becomes U+FFFD. Its ids are followed by 50256, the end of text. A hash of its text
decides whether it is to validate on, so equal documents are on the same side.

Killed, it goes on after the last archive that was finished, with the same command. The output is
the same to the byte for any --num_proc. meta.json has the sha256 of train.bin and val.bin joined.
"""

import contextlib
import gzip
import hashlib
import heapq
import http.client
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import signal
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Callable, Iterator, NamedTuple

import console
from configurator import override
from console import UsageError, UserError
from prepare_text import HttpsOnly, check_name, describe
from tokenizer import GPT2Tokenizer

URL = 'https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/'
SUBSETS = [f'urlsf_subset{i:02}.tar' for i in range(21)]
SUFFIXES = ('.tar', '.xz', '.txt', '.jsonl', '.jsonl.gz', '.parquet')
CHUNK = 2 << 20  # bytes of documents that are one worker's task
LARGE = 8 << 20  # an inner archive above this, compressed, is many tasks; the release's are 0.6 MB
WAITS = (1, 2, 4, 8, 16)  # seconds before a download that got stuck is tried again


@dataclass
class OpenWebTextConfig:
    dataset: str = 'openwebtext'  # files go to data/<dataset>
    input: str = ''  # a file or folder to use instead of downloading
    num_proc: int = 0  # workers, each takes 80 MB; 0: one for each core, at most 8
    val_fraction: float = 0.0005  # share of the documents to validate on
    skip_damaged: bool = False  # leave out an archive that can't be read, instead of stopping


class Damaged(Exception):
    """Why an archive can't be read."""


def guarded(stream):
    """What `stream` yields; if it can't be read, Damaged."""
    try:
        yield from stream
    except (
        lzma.LZMAError, zlib.error, tarfile.TarError, EOFError, OSError, ValueError, RuntimeError
    ) as error:
        raise Damaged(' '.join(str(error).split()) or type(error).__name__) from None


# --- from files to documents, which are bytes


class StrictTarInfo(tarfile.TarInfo):
    """A broken header is an error here; tarfile by itself takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f'{error} in a tar') from None


def members(file, suffix):
    """The files in a tar whose names end in `suffix`: headers, and what to read them from."""
    with tarfile.open(fileobj=file, mode='r|', tarinfo=StrictTarInfo) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # or it would remember them all
            if member.isreg() and member.name.endswith(suffix):
                yield member, tar.extractfile(member)
    while file.read(1 << 20):  # to its end, where xz keeps its check sums
        pass


def xz_documents(file):
    with lzma.open(file) as tar:
        for _, document in members(tar, '.txt'):
            yield document.read()


def json_document(line):
    row = json.loads(line.decode('utf-8', 'surrogateescape'))
    text = row.get('text') if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"no 'text' in the line {line[:40]!r}")
    try:
        return text.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return text.encode('utf-8', 'surrogatepass')


def file_documents(paths):
    for path in paths:
        with open(path, 'rb') as file:
            yield file.read()


def parquet_documents(file):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError('a .parquet file needs pyarrow: pip install pyarrow') from None
    table = pyarrow.parquet.ParquetFile(file)
    if 'text' not in table.schema_arrow.names:
        raise ValueError("no column 'text'")
    for rows in table.iter_batches(256, columns=['text']):
        documents = rows.column(0).cast('binary').to_pylist()
        if None in documents:
            raise ValueError("a row without 'text'")
        yield from documents


# --- from documents to ids: what the workers do

TOKENIZER = GPT2Tokenizer()  # each process loads its vocabulary when it first encodes
END = GPT2Tokenizer.eot.to_bytes(2, 'little')

DOCUMENTS = {
    'xz': lambda data: xz_documents(io.BytesIO(data)),
    'jsonl': lambda data: (json_document(line) for line in data.split(b'\n') if line.strip()),
    'paths': file_documents,
    'documents': iter,
}


def clean(text):
    """A document as OpenWebText's loader gives it."""
    return re.sub('\n\n\n+', '\n\n', text).strip()


@dataclass
class Part:
    """The ids of some documents, and figures about them."""

    train: bytearray = field(default_factory=bytearray)
    val: bytearray = field(default_factory=bytearray)
    documents: int = 0
    repaired: int = 0
    bytes: int = 0


def tokenize(kind, data, val_fraction):
    """A worker's task: the Part that `data` makes, by the reader for its kind. Raises Damaged."""
    part = Part()
    for document in guarded(DOCUMENTS[kind](data)):
        try:
            text = document.decode()
        except UnicodeDecodeError:
            text = document.decode(errors='replace')
            part.repaired += 1
        text = clean(text)
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64
        ids = part.val if place < val_fraction else part.train
        ids += TOKENIZER.encode(text).astype('<u2').tobytes() + END
        part.documents += 1
        part.bytes += len(document)
    return part


def start_worker():
    """Let a worker end with its parent, even with one that was killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# --- from the input to archives


class Archive(NamedTuple):
    """What is kept, left out or done anew as a whole."""

    name: str
    size: int
    chunks: Iterator  # of (kind, data) for the workers; raises Damaged
    share: Callable  # of the whole input that has been read by now
    used: str = ''  # a download that is no longer needed after this


def batches(items, size):
    """Lists of some of the items, of about CHUNK bytes."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= CHUNK or len(batch) == 1000:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def chunks(file, ending, size):
    """(kind, data) for the workers, out of an archive whose name ends in `ending`."""
    if ending.endswith(('.jsonl', '.jsonl.gz', '.jsonl.xz')):
        opener = {'.gz': gzip.open, '.xz': lzma.open}.get(ending[-3:])
        file = opener(file) if opener else file
        while lines := file.readlines(CHUNK):
            yield 'jsonl', b''.join(lines)
    elif ending.endswith('.xz') and size <= LARGE:
        yield 'xz', file.read()
    else:
        documents = (xz_documents if ending.endswith('.xz') else parquet_documents)(file)
        for batch in batches(documents, len):
            yield 'documents', batch


def failing(error):
    """A stream that can't be read."""
    raise error
    yield  # makes it a generator


def archives_in(path, name, share):
    """The archives in a file, or the one that it is.

    share: a function from the share of this file that was read to the share of the whole input.
    """
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        def now():
            return share(file.tell() / size if size else 1.0)

        if not path.endswith(('.tar', '.tar.xz')):
            yield Archive(name, size, guarded(chunks(file, path, size)), now)
            return
        found = False
        try:
            tar = lzma.open(file) if path.endswith('.xz') else file
            for member, inner in guarded(members(tar, '.xz')):
                found = True
                cut = guarded(chunks(inner, '.xz', member.size))
                yield Archive(f'{name}/{member.name}', member.size, cut, now)
            if not found:
                raise Damaged('there is no .xz archive in it')
            if tar is file:  # xz knows if it was cut, a tar must end in zeros
                file.seek(-1024, os.SEEK_END)
                if any(file.read()):
                    raise Damaged('its end is missing')
        except Damaged as error:
            yield Archive(name, size, failing(error), now)


def files_in(path, limit=100_000):
    """The files that we read in a folder and the folders in it, by name; or a file itself.

    It takes `limit` names at a time: there may be millions.
    """
    if os.path.isfile(path):
        yield path
        return
    last = ''
    while True:
        with os.scandir(path) as entries:
            rest = (e for e in entries if e.name > last and not e.name.startswith('.'))
            found = heapq.nsmallest(limit, rest, key=attrgetter('name'))
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from files_in(entry.path, limit)
            elif entry.name.endswith(SUFFIXES) and entry.is_file():
                yield entry.path
        if len(found) < limit:
            return
        last = found[-1].name


def local_archives(path):
    """The archives in a file or folder; some hundred .txt files count as one."""
    size = os.path.getsize
    total = sum(map(size, files_in(path)))
    if not total:
        raise UserError(f'input={path} holds no text: put in {", ".join(SUFFIXES)}')
    root, done = path if os.path.isdir(path) else os.path.dirname(path), 0
    for text, files in itertools.groupby(files_in(path), lambda file: file.endswith('.txt')):
        for batch in batches(files, size) if text else ([file] for file in files):
            name = os.path.relpath(batch[0], root or '.')
            before, here = done, sum(map(size, batch))
            done += here
            if text:
                name += f' and {len(batch) - 1} more' if len(batch) > 1 else ''
                yield Archive(name, here, iter([('paths', batch)]), lambda: done / total)
            else:
                yield from archives_in(
                    batch[0], name, lambda part: (before + part * here) / total
                )


class Download(threading.Thread):
    """A file from the web that arrives in the background.

    Until it is whole it is called path.part, and is continued after a broken connection or a kill.
    """

    def __init__(self, url, path):
        super().__init__(name=os.path.basename(path), daemon=True)
        self.url, self.path = url, path
        self.got, self.size, self.trouble, self.error = 0, 0, '', None

    def run(self):
        try:
            if not os.path.exists(self.path):
                self.fetch()
                os.replace(f'{self.path}.part', self.path)
        except Exception as error:  # for the thread that waits
            self.error = error

    def fetch(self):
        """Get all of it, with as many requests as it takes while every one gets something."""
        furthest = tries = 0
        while True:
            try:
                if self.request():
                    return
                self.trouble = 'it ended early'
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.trouble = str(getattr(error, 'reason', error)) or type(error).__name__
            tries = 0 if self.got > furthest else tries + 1
            furthest = max(furthest, self.got)
            if tries > len(WAITS):
                raise UserError(
                    f'cannot fetch {self.url} ({self.trouble}): the same command goes on '
                    'from here, or give a copy with --input=FOLDER'
                )
            time.sleep(WAITS[max(0, tries - 1)])

    def request(self):
        """Ask for what is missing; returns whether it is all here."""
        with open(f'{self.path}.part', 'ab') as file:
            self.got = file.tell()
            headers = {'User-Agent': 'ozgpt', 'Range': f'bytes={self.got}-'}
            request = urllib.request.Request(self.url, headers=headers)
            try:
                response = urllib.request.build_opener(HttpsOnly).open(request, timeout=30)
            except urllib.error.HTTPError as error:
                if error.code == 416:  # there is no such range: the end, or another file
                    if error.headers.get('Content-Range', '') == f'bytes */{self.got}':
                        return True
                    self.got = file.truncate(0)
                raise
            with response:
                if response.status != 206:  # it sends all of it, from the start
                    self.got = file.truncate(0)
                if 'Content-Length' not in response.headers:
                    raise OSError('the server does not tell its size')
                self.size = self.got + int(response.headers['Content-Length'])
                while data := response.read(1 << 20):
                    self.got += file.write(data)
        return self.got == self.size

    def wait(self, progress):
        """Come back when it is there. Raises UserError."""
        trouble = ''
        while self.is_alive():
            self.join(0.2)
            if self.trouble != trouble:
                trouble = self.trouble
                progress.say(f'{self.name}: {trouble}; trying again')
            if self.size and progress.due:
                share = self.got / self.size
                text = f'waiting for {self.name}: {share:.1%} of {self.size / 1e6:,.0f} MB'
                progress.update(share, [text], line=text)
        if self.error:
            raise self.error


def web_archives(folder, ended, progress):
    """The archives in the published tars, without those `ended`. One is read, the next arrives."""
    for name in ended:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    names = [name for name in SUBSETS if name not in ended]
    downloads = [Download(URL + name, os.path.join(folder, name)) for name in names]
    if downloads:
        downloads[0].start()
    for i, (name, download) in enumerate(zip(names, downloads)):
        download.wait(progress)
        if i + 1 < len(downloads):
            downloads[i + 1].start()

        def share(part):
            return (len(SUBSETS) - len(names) + i + part) / len(SUBSETS)

        yield from archives_in(download.path, name, share)
        yield Archive(name, 0, iter(()), lambda: share(1), used=download.path)


# --- from ids to files


class Output:
    """train.bin and val.bin as they grow, and the journal that says how much of them is good.

    Until all is done they are train.bin.part and val.bin.part. The journal, progress.jsonl, has a
    line with what the run was begun with, then one for each archive that is finished, with the
    counts up to there. What a killed run has written after that is cut off.
    """

    def __init__(self, folder, begun_with):
        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        self.counts = dict(train=0, val=0, documents=0, repaired=0, bytes=0, damaged=0)
        self.finished = deque()  # (name, size) of the archives in the journal
        self.ended = set()  # the downloads of which nothing is needed any more
        self.journal_path = os.path.join(folder, 'progress.jsonl')
        self.journal = open(self.journal_path, 'a+b')
        self.lock()
        begun = self.read_journal()
        if begun not in (None, begun_with):
            said = [', '.join(f'{k}={v}' for k, v in b.items()) for b in (begun, begun_with)]
            self.refuse(f'was begun with {said[0]}, but now it is {said[1]}')
        self.files = {split: self.open_part(split, begun is None) for split in ('train', 'val')}
        if begun is None:
            self.note(begun_with)
        self.good = dict(self.counts)

    def part(self, split):
        return os.path.join(self.folder, f'{split}.bin.part')

    def refuse(self, what):
        raise UserError(f'{self.journal_path} {what}: mend that, or delete it to begin anew')

    def lock(self):
        """Refuse to write where another process does."""
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl

            try:
                fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f'another process writes {self.folder}: wait for it') from None

    def read_journal(self):
        """Take note of what is finished; returns the first line, None if there is none."""
        self.journal.seek(0)
        begun, good = None, 0
        for line in self.journal:
            try:
                row = json.loads(line) if line.endswith(b'\n') else None
            except ValueError:
                row = None
            if row is None:  # a line that was cut
                break
            good += len(line)
            if begun is None:
                begun = row
                continue
            self.counts = {key: row[key] for key in self.counts}
            if row['ended']:
                self.finished.clear()
                self.ended.add(row['name'])
            else:
                self.finished.append((row['name'], row['size']))
        self.journal.truncate(good)
        return begun

    def open_part(self, split, new):
        """A .part file, as long as the journal says."""
        path = self.part(split)
        if new:
            return open(path, 'wb')
        finished = path.removesuffix('.part')
        if not os.path.exists(path) and os.path.exists(finished):  # killed in `publish`
            os.replace(finished, path)
        file, size = open(path, 'ab'), 2 * self.counts[split]
        if file.tell() < size:
            self.refuse(f'says that {path} has {size:,} bytes, but it has {file.tell():,}')
        file.truncate(size)
        return file

    def note(self, row):
        """Write a line in the journal, when what it speaks of is on disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.journal.write(json.dumps(row).encode() + b'\n')
        self.journal.flush()
        os.fsync(self.journal.fileno())

    def add(self, part):
        for split, file in self.files.items():
            ids = getattr(part, split)
            file.write(ids)
            self.counts[split] += len(ids) // 2
        for name in ('documents', 'repaired', 'bytes'):
            self.counts[name] += getattr(part, name)

    def drop(self):
        """Forget what came since the last archive that was finished."""
        self.counts = dict(self.good)
        for split, file in self.files.items():
            file.truncate(2 * self.good[split])
            file.seek(0, os.SEEK_END)

    def finish(self, archive):
        """Now all of the archive is here, or left out."""
        row = dict(name=archive.name, size=archive.size, ended=bool(archive.used))
        self.note(row | self.counts)
        self.good = dict(self.counts)
        if archive.used:
            os.remove(archive.used)

    def publish(self, source):
        """Give the files their names, train.bin last; returns what meta.json says."""
        self.close()
        digest = hashlib.sha256()
        for split in self.files:
            with open(self.part(split), 'rb') as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        tokens = {split: self.counts[split] for split in self.files}
        meta = describe(self.folder, TOKENIZER, source, digest.hexdigest(), tokens)
        for split in ('val', 'train'):
            os.replace(self.part(split), os.path.join(self.folder, f'{split}.bin'))
        os.remove(self.journal_path)
        return meta

    def close(self):
        """Close the files, and remove them if nothing is in them to go on from."""
        for file in [*self.files.values(), self.journal]:
            file.close()
        if not any(self.good.values()):
            for path in [*map(self.part, self.files), self.journal_path]:
                os.remove(path)
            with contextlib.suppress(OSError):  # something else is in it
                os.rmdir(self.folder)


# --- all together


def tasks(pool, archives, output, val_fraction):
    """(archive, future Part, share of the input) per chunk, (archive, None, share) at its end.

    Skips the archives that are in the journal. Raises UserError if the input begins with others.
    """
    finished = deque(output.finished)
    for archive in archives:
        if finished:
            name, size = finished.popleft()
            if (name, size) != (archive.name, archive.size):
                output.refuse(
                    f'has {shown(name)} of {size:,} bytes where the input now has '
                    f'{shown(archive.name)} of {archive.size:,}'
                )
            continue
        try:
            for kind, data in archive.chunks:
                future = pool.submit(tokenize, kind, data, val_fraction)
                yield archive, future, archive.share()
        except Damaged as error:
            future = Future()
            future.set_exception(error)
            yield archive, future, archive.share()
        yield archive, None, archive.share()
    if finished:
        output.refuse(f'has {shown(finished[0][0])}, which the input no longer has')


def in_order(tasks, ahead):
    """The tasks as they come, but always `ahead` of them under way."""
    pending = deque()
    for task in tasks:
        pending.append(task)
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


def shown(name):
    """A name out of an archive, to print."""
    return name if name.isprintable() else ascii(name)


class Pace:
    """The progress line."""

    def __init__(self, progress):
        self.progress, self.first = progress, None

    def show(self, counts, share):
        """Show it if it is time to. share: of the input that was read."""
        if self.first is None:  # from here on, without the start-up, the speed is measured
            self.first = share, counts['bytes'], time.monotonic()
        first, size, began = self.first
        if share > first and self.progress.due:
            seconds = time.monotonic() - began
            rate = (counts['bytes'] - size) / 1e6 / seconds
            left = seconds * (1 - share) / (share - first)
            parts = [
                f'{share:.1%}', f'{rate:.1f} MB/s', f'{console.clock(left)} left',
                f'{counts["documents"]:,} documents',
                f'{counts["train"] + counts["val"]:,} tokens',
            ]
            self.progress.update(share, parts, line=', '.join(parts))


def prepare(cfg):
    """Write the dataset; returns what meta.json says. Raises UserError."""
    began = time.monotonic()
    folder = os.path.join('data', cfg.dataset)
    workers = cfg.num_proc or min(8, os.cpu_count() or 1)
    source = cfg.input or URL
    progress = console.Progress(1.0)
    spawn = multiprocessing.get_context('spawn')
    begun_with = {'input': source, 'val_fraction': cfg.val_fraction}
    with (
        contextlib.closing(Output(folder, begun_with)) as output,
        ProcessPoolExecutor(workers, spawn, start_worker) as pool,
    ):
        pace = Pace(progress)
        if output.counts['documents']:
            progress.say(f'going on after {output.counts["documents"]:,} documents that are done')
        if cfg.input:
            archives = local_archives(cfg.input)
        else:
            archives = web_archives(folder, output.ended, progress)
        try:
            # Ctrl-C is not for the workers, who start now and inherit this.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            for _ in range(workers):
                pool.submit(int)
            signal.signal(signal.SIGINT, handler)
            TOKENIZER.bpe  # so that one process gets tiktoken's files, and may complain
            damaged = None
            for archive, future, share in in_order(
                tasks(pool, archives, output, cfg.val_fraction), 4 * workers
            ):
                if future is None:
                    output.finish(archive)
                elif archive is not damaged:
                    try:
                        output.add(future.result())
                    except Damaged as error:
                        what = f'{shown(archive.name)} is damaged ({error})'
                        if not cfg.skip_damaged:
                            raise UserError(
                                f'{what}: put a whole one there, or delete it if it was '
                                'downloaded, and run this again; --skip-damaged leaves it out'
                            ) from None
                        progress.say(f'{what}: left out')
                        output.drop()
                        output.counts['damaged'] += 1
                        damaged = archive
                pace.show(output.counts, share)
        except KeyboardInterrupt:
            progress.say('stopped: the same command goes on after the last finished archive')
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        counts = output.counts
        if not counts['documents']:
            raise UserError(f'{source} has no documents: see --help for what can be in it')
        meta = output.publish(source)
    tokens = ', '.join(f'{count:,} {split}' for split, count in meta['tokens'].items())
    seconds = time.monotonic() - began
    progress.say(
        f'{folder}: {tokens} tokens, {meta["vocab_size"]:,} ids, from {source}: '
        f'{counts["documents"]:,} documents ({counts["repaired"]:,} repaired, '
        f'{counts["damaged"]:,} archives left out) in {console.clock(seconds)}'
    )
    if not counts['val']:
        print('no document is for validation: so few need a larger --val_fraction')
    return meta


def main(argv):
    cfg = override(OpenWebTextConfig(), argv, usage=__doc__)
    check_name(cfg.dataset)
    if not 0 <= cfg.val_fraction < 1:
        raise UsageError(f'val_fraction={cfg.val_fraction} is no share: use 0 or more, below 1')
    if cfg.input and not os.path.exists(cfg.input):
        raise UsageError(f'input={cfg.input} does not exist: name a file or a folder')
    if os.path.isfile(cfg.input) and not cfg.input.endswith(SUFFIXES):
        raise UsageError(f'input={cfg.input} is none of {", ".join(SUFFIXES)}: use one of them')
    if cfg.num_proc < 0:
        raise UsageError(f'num_proc={cfg.num_proc} is no number of workers: use 0 for all cores')
    try:
        prepare(cfg)
    except BrokenProcessPool:
        raise UserError(
            'a worker was killed, for want of memory perhaps: the same command goes on; a lower '
            '--num_proc takes less'
        ) from None
    except OSError as error:
        where = error.filename or f'data/{cfg.dataset}'
        raise UserError(
            f'cannot go on with {where} ({error.strerror}): mend that, and the same command goes '
            'on from here'
        ) from None


if __name__ == '__main__':
    console.run(main)
