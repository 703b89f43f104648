"""OpenWebText in GPT-2's byte pairs: 8,013,769 documents become data/openwebtext.

    python prepare_openwebtext.py                             # downloads 12 GB with curl
    python prepare_openwebtext.py --input=openwebtext.tar.xz  # takes your copy

Gives about 9.04 B train and 4.4 M val tokens, 18 GB. The input is a file, or a folder, of the
release's urlsf_subsetNN.tar, openwebtext.tar.xz or urlsf_subsetNN-M_data.xz, or of .parquet (needs
pyarrow) with a column `text`. Nothing is unpacked to disk, no name in an archive is a path.

In a document, runs of three or more line feeds become two, white space at its ends goes, and what
is not UTF-8 becomes U+FFFD. Its ids are followed by 50256, the end of text. A hash of its text
decides whether it is to validate on, so equal documents are on the same side.

Killed, the same command goes on where it was seconds before. The output is the same to the byte
for any --num_proc. meta.json has the sha256 of train.bin and val.bin joined.
"""

import contextlib
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import console
from configurator import override
from console import UsageError, UserError, atomic_file, flush_to_disk, hms, user_errors
from prepare_text import check_name, write_meta
from tokenizer import GPT2Tokenizer

URL = 'https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/'
SUBSETS = [f'urlsf_subset{i:02}.tar' for i in range(21)]
DOCUMENTS = 8_013_769  # in all of them
# From a given byte on, over HTTPS alone; a connection that is still for 30 s counts as broken.
CURL = 'curl --fail -L --proto =https --connect-timeout 30 --speed-time 30 --continue-at'.split()
SUFFIXES = ('.tar', '.xz', '.parquet')
MAX_BYTES = 64 << 20  # of an xz archive or a document; the release's archives have 0.6 MB
SAVE_SECONDS = 5  # between two writes of progress.json


@dataclass
class OpenWebTextConfig:
    dataset: str = 'openwebtext'  # files go to data/<dataset>
    input: str = ''  # a file or folder to use instead of downloading
    num_proc: int = 0  # workers, each takes 80 MB; 0: one for each core, at most 8
    val_fraction: float = 0.0005  # share of the documents to validate on


@contextlib.contextmanager
def reading(name):
    """Inside, whatever can't be read is a UserError that names the archive."""
    try:
        yield
    except (lzma.LZMAError, tarfile.TarError, EOFError, OSError, ValueError, LookupError,
            NotImplementedError) as why:  # the last is pyarrow's, for columns of numbers
        raise UserError(f'{name!r} is damaged ({" ".join(str(why).split())}): put a whole one '
                        'there, or delete it if it was downloaded, and run this again') from None


def members(file, suffix):
    """(name, content) of the files in a tar whose names end in `suffix`, read as a stream."""
    with tarfile.open(fileobj=file, mode='r:') as tar:
        for member in tar:
            if member.isreg() and member.name.endswith(suffix):
                if member.size > MAX_BYTES:
                    raise ValueError(f'{member.name!r} is too large')
                yield member.name, tar.fileobj.read(member.size)  # extractfile takes longer
        # tarfile takes a broken header for the end, but the end has zeros. With them we also reach
        # the end of an xz file, where its check sums are.
        end = tar.fileobj.read(1 << 20)
        if not end or any(end):
            raise ValueError('the tar is broken or its end is missing')


def tasks_in(path):
    """(name, task, share of the file that has been read): always the same for the same file.

    A task is an xz archive, for the worker to unpack, or a list of documents.
    """
    name, size = os.path.basename(path), os.path.getsize(path) or 1
    with open(path, 'rb') as file, reading(name):
        if path.endswith('.parquet'):
            with user_errors(ImportError, 'pyarrow is missing', 'pip install pyarrow'):
                import pyarrow.parquet

            # A row group may have gigabytes: with these options it is read a part at a time.
            table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            tasks = ((name, rows['text'].drop_null().cast('binary').to_pylist())
                     for rows in table.iter_batches(500, columns=['text']))
        elif path.endswith(('.tar', '.tar.xz')):
            tar = lzma.open(file) if path.endswith('.xz') else file
            tasks = ((f'{name}/{inner}', archive) for inner, archive in members(tar, '.xz'))
        else:
            tasks = [(name, file.read(MAX_BYTES))]
        for inner, task in tasks:
            yield inner, task, file.tell() / size


TOKENIZER = GPT2Tokenizer()
END = TOKENIZER.eot.to_bytes(2, 'little')


def tokenize(name, task, val_fraction):
    """The ids of a task's documents, as bytes by split, and figures about them."""
    ids, figures = {'train': [], 'val': []}, Counter()
    with reading(name):
        if isinstance(task, bytes):
            task = [document for _, document in members(lzma.open(io.BytesIO(task)), '.txt')]
        for document in task:
            text = document.decode(errors='replace')
            figures['documents'] += 1
            figures['bytes'] += len(document)
            figures['repaired'] += '\ufffd' in text and text.encode() != document
            text = re.sub('\n\n\n+', '\n\n', text).strip()
            tokens = [TOKENIZER.encode(text), END]  # text keeps its UTF-8 from now on
            draw = zlib.crc32(text.encode()) / 2**32
            ids['val' if draw < val_fraction else 'train'] += tokens
    return {split: b''.join(arrays) for split, arrays in ids.items()}, figures


def start_worker():
    """Leave Ctrl-C to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def identity(path):
    """The size of a file and a hash of its first and last MB, by which we notice another one."""
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        digest = hashlib.sha256(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return [size, digest.hexdigest()]


class Output:
    """train.bin.part, val.bin.part, and progress.json, which records how far they are complete.

    `done` counts tokens, documents and more, and contains the position in the input: files that
    are done, tasks that are done in the next file, and the fraction of it all. On a restart,
    everything that was written later is cut off. So is the next file's part, if that file is no
    longer the same one (`identity`): `file_start` is what `done` was at its beginning.
    """

    def __init__(self, cfg, folder, inputs):
        self.settings = {'val_fraction': cfg.val_fraction, 'files': inputs}
        self.inputs, self.is_download = inputs, not cfg.input
        self.folder, self.path = folder, os.path.join(folder, 'progress.json')
        self.done, self.file_start, self.identity = Counter(), {}, None
        self.files, self.saved = {}, time.monotonic()
        if os.path.exists(self.path):
            with open(self.path, encoding='utf-8') as file, reading(self.path):
                settings, done, self.file_start, self.identity = json.load(file)
            self.done.update(done)
            if settings != self.settings or cfg.input and self.done['input_bytes'] != sum(
                    map(os.path.getsize, inputs[: self.done['files']])):
                raise UserError(f'{self.path} was begun with {shorten(str(settings), 150)}; these, '
                                'or the sizes of files that were read, are not the same now: '
                                'restore them, or delete it to start again')
            path = inputs[self.done['files']] if self.done['tasks'] else ''
            if os.path.exists(path) and identity(path) != self.identity:
                self.done = Counter(self.file_start)
        for split in ('val', 'train'):
            final, size = os.path.join(folder, f'{split}.bin'), 2 * self.done[split]
            path = f'{final}.part'
            if self.done['publishing'] and not os.path.exists(path) and os.path.exists(final):
                os.replace(final, path)  # a run was killed while it gave the files their names
            file = self.files[split] = open(path, 'a+b')
            if file.tell() < size:
                raise UserError(f'{path} is shorter than {self.path} says: delete both to restart')
            file.truncate(size)

    def add(self, ids, figures, position):
        """Write a task's ids, and record the position in the input after it."""
        files, tasks, fraction = position
        if tasks == 1:
            self.file_start = dict(self.done)
            self.identity = identity(self.inputs[files])
        with user_errors(OSError, f'cannot write into {self.folder}',
                         'free some space, then type the same command again'):
            for split, file in self.files.items():
                file.write(ids[split])
        for split in self.files:
            self.done[split] += len(ids[split]) // 2
        self.done.update(figures)
        self.done['input_bytes'] += sum(
            map(os.path.getsize, self.inputs[self.done['files'] : files]))
        self.done['files'], self.done['tasks'], self.done['fraction'] = position
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            self.save()

    def save(self):
        """Write progress.json, once what it speaks of is on disk."""
        with user_errors(OSError, f'cannot write into {self.folder}',
                         'free some space, then type the same command again'):
            for file in self.files.values():
                flush_to_disk(file)
        with atomic_file(self.path) as file:
            file.write(json.dumps([self.settings, self.done, self.file_start, self.identity]).encode())
        self.saved = time.monotonic()
        for path in self.inputs[: self.done['files']] * self.is_download:  # no longer needed
            if os.path.exists(path):
                os.remove(path)

    def publish(self, source):
        """Give the files their names, train.bin last."""
        self.save()
        digest = hashlib.sha256()
        for split in ('train', 'val'):
            self.files[split].seek(0)
            hashlib.file_digest(self.files[split], lambda: digest)
        tokens = {split: self.done[split] for split in ('train', 'val')}
        write_meta(self.folder, TOKENIZER, source, digest.hexdigest(), tokens)
        Path(self.folder, 'val.bin').unlink(missing_ok=True)
        self.done['publishing'] = 1  # the old files are gone: from here on, a .bin file is ours
        self.save()
        for file in self.files.values():
            file.close()
            os.replace(file.name, file.name.removesuffix('.part'))
        os.remove(self.path)

    def close(self):
        """Close the files, and remove them if there is nothing to go on from."""
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk, which was said already
                file.close()
            if not os.path.exists(self.path) and os.path.exists(file.name):
                os.remove(file.name)


def download(path, progress):
    """Get a subset; path.part, which a broken connection or a kill has left, is gone on with."""
    url = URL + os.path.basename(path)
    if not shutil.which(CURL[0]):
        raise UserError(f'curl fetches {url}: install it, or give a copy with --input=FOLDER')
    for wait in (0, 1, 2, 4, 8, 16, 32, 64):  # seconds before each try
        time.sleep(wait)
        progress.print_line(f'fetching {url}')
        with open(f'{path}.part', 'ab') as file:
            start = file.truncate(max(0, file.tell() - 1))  # to ask for no byte is an error
            # Through a pipe, which breaks if we are killed: so curl never outlives us.
            with subprocess.Popen([*CURL, str(start), url], stdout=subprocess.PIPE) as curl:
                shutil.copyfileobj(curl.stdout, file, 1 << 20)
        if curl.returncode == 0:
            return os.replace(f'{path}.part', path)
    raise UserError(f'cannot fetch {url} (exit code {curl.returncode} of curl): the same command '
                    'goes on from here, or give a copy with --input=FOLDER')


def files_in(path):
    """The files that we read in a folder and the folders in it, by name; or a file itself."""
    found = [path, *map(str, Path(path).rglob('[!.]*'))]  # not into links, which may loop
    return sorted(file for file in found if file.endswith(SUFFIXES) and os.path.isfile(file))


def results(cfg, pool, ahead, inputs, start, progress):
    """(future of `tokenize`, (files, tasks, fraction) done with it) for all tasks after `start`."""
    pending = deque()
    for i in range(start['files'], len(inputs)):
        if not cfg.input and not os.path.exists(inputs[i]):
            download(inputs[i], progress)
        for count, (name, task, fraction) in enumerate(tasks_in(inputs[i]), 1):
            if (i, count) > (start['files'], start['tasks']):
                position = i, count, (i + fraction) / len(inputs)
                pending.append((pool.submit(tokenize, name, task, cfg.val_fraction), position))
            if len(pending) > ahead:
                yield pending.popleft()
        if pending:  # with the last task, the file is done
            pending[-1] = pending[-1][0], (i + 1, 0, (i + 1) / len(inputs))
    yield from pending


def prepare(cfg):
    """Write the dataset. Raises UserError."""
    folder, source = os.path.join('data', cfg.dataset), cfg.input or URL
    inputs = files_in(cfg.input) if cfg.input else [os.path.join(folder, n) for n in SUBSETS]
    if not inputs:
        raise UsageError(f'input={cfg.input} is missing or has no {", ".join(SUFFIXES)} file: '
                         'name the archives that you have, or their folder')
    progress, workers = console.Progress(), cfg.num_proc or min(8, os.cpu_count() or 1)
    with (
        console.locked(folder),
        contextlib.closing(Output(cfg, folder, inputs)) as output,
        ProcessPoolExecutor(workers, initializer=start_worker) as pool,
    ):
        done, start, began = output.done, output.done.copy(), time.monotonic()
        if start['documents']:
            progress.print_line(f'continuing after {start["documents"]:,} documents that are done')
        try:
            TOKENIZER.bpe  # workers that are forked share it
            for future, place in results(cfg, pool, 4 * workers, inputs, start, progress):
                output.add(*future.result(), place)
                fraction, seconds = done['fraction'], time.monotonic() - began
                left = hms(seconds * (1 - fraction) / max(1e-9, fraction - start['fraction']))
                speed = (done['bytes'] - start['bytes']) / 1e6 / seconds
                progress.show(fraction, f'{fraction:.1%}, {speed:.1f} MB/s, {left} left, '
                                     f'{done["documents"]:,} documents')
        except BrokenExecutor:
            raise UserError('a worker was killed, perhaps for lack of memory: the same command '
                            'goes on; a lower --num_proc takes less') from None
        if not done['documents']:
            raise UserError(f'{source} has no documents: put some in')
        output.publish(source)
    progress.print_line(
        f'{folder}: {done["train"]:,} train, {done["val"]:,} val tokens, from {source}: '
        f'{done["documents"]:,} documents ({done["repaired"]:,} repaired)')
    if not cfg.input and done['documents'] != DOCUMENTS:
        raise UserError(f'{folder} has {done["documents"]:,} documents instead of {DOCUMENTS:,}: '
                        f'find out what changed at {URL} before you train on it')


def main(argv):
    cfg = override(OpenWebTextConfig(), argv, usage=__doc__)
    check_name(cfg.dataset)
    if not 0 <= cfg.val_fraction < 1 or cfg.num_proc < 0:
        raise UsageError(f'val_fraction={cfg.val_fraction} must be 0 or more and below 1, and '
                         f'num_proc={cfg.num_proc} 0, for all cores, or more')
    prepare(cfg)


if __name__ == '__main__':
    console.run(main)
