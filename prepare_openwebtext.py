"""OpenWebText in GPT-2's byte pairs: 8,013,769 documents become data/openwebtext.

    python prepare_openwebtext.py                             # downloads 12 GB with curl
    python prepare_openwebtext.py --input=openwebtext.tar.xz  # reads your copy
    python prepare_openwebtext.py --input=FOLDER --dataset=fineweb_edu

Writes about 9.04 B train and 4.4 M val tokens, 18 GB. The input is a file or a folder of the
release's .tar, .tar.xz or .xz, of .tar or .tar.xz with .txt files, or of .parquet with a column
`text`, like FineWeb-Edu's (needs pyarrow). No name in an archive becomes a path on disk.

In each document, three or more line feeds in a row become two, white space at both ends is removed,
and bytes that are not UTF-8 become U+FFFD. Its ids are followed by 50256, the end of text. A hash
of its text decides its split, so equal documents are in the same one. The same command continues a
killed run. The output is the same to the byte for any --num_proc.
"""

import contextlib
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import signal
import tarfile
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import console
from configurator import override
from console import UsageError, UserError, atomic_file, flush_to_disk, hms, user_errors
from prepare_text import check_name, download, write_meta
from tokenizer import GPT2Tokenizer

URL = 'https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/'
SUBSETS = [f'urlsf_subset{i:02}.tar' for i in range(21)]
DOCUMENTS = 8_013_769  # in all of them
SUFFIXES = ('.tar', '.xz', '.parquet')
MAX_BYTES = 64 << 20  # of text in a task; an xz archive of the release has 2 MB
SAVE_SECONDS = 5  # between two writes of progress.json
TOKENIZER = GPT2Tokenizer()
END = TOKENIZER.eot.to_bytes(2, 'little')


@dataclass
class OpenWebTextConfig:
    dataset: str = 'openwebtext'  # files go to data/<dataset>
    input: str = ''  # a file or folder to use instead of downloading
    num_proc: int = 0  # worker processes of 80 MB each; 0: one per core, at most 8
    val_fraction: float = 0.0005  # fraction of the documents to validate on


def reading(name):
    """Context manager: report a file that cannot be read as a UserError."""
    kinds = (lzma.LZMAError, tarfile.TarError, EOFError, OSError, ValueError, RuntimeError)
    return user_errors(kinds, f'{name!r} is damaged or unsupported', 'replace or delete it')


def bounded(content):
    """Return `content`. Raises ValueError if it takes too much memory."""
    if len(content) > MAX_BYTES:
        raise ValueError(f'more than {MAX_BYTES:,} bytes in memory at once: split it')
    return content


class BoundedReader(io.BufferedReader):
    """A file from which tarfile cannot fill the memory, for example with a name of 3 GB."""

    def read(self, size):
        return bounded(super().read(size if 0 <= size <= MAX_BYTES else MAX_BYTES + 1))


def members(file, name, suffixes):
    """(label, [content]) of the files in a tar that have these suffixes, read as a stream."""
    with tarfile.open(fileobj=file, mode='r:') as tar:
        for member in tar:
            tar.members.clear()  # tarfile would keep all headers
            wanted = member.name.endswith(suffixes) and not member.isdir()
            if member.size < 0 or wanted and (member.issparse() or not member.isreg()):
                raise UserError(f'{member.name!r} in {name!r} is a link, sparse, or broken: pack '
                                'it again with tar -h --hard-dereference, without --sparse')
            if wanted:  # extractfile is slower
                yield f'{name}/{member.name}', [tar.fileobj.read(member.size)]
        # tarfile takes a broken header for the end, but the end has zeros. With them we also reach
        # the end of an xz file, where its check sums are.
        end = tar.fileobj.read(1 << 20)
        if not end or any(end):
            raise ValueError('the tar is broken or its end is missing')


def tasks_in(path):
    """(label, task, check sum so far, fraction of the file): always the same for the same file.

    A task is a list of documents, or of one xz archive, which the worker unpacks.
    """
    name, size, check_sum = os.path.basename(path), os.path.getsize(path) or 1, 0
    with reading(name), open(path, 'rb') as file:
        if name.endswith('.parquet'):
            console.optional('pyarrow', '18.0')
            import pyarrow.parquet

            # A row group may have gigabytes: with these options it is read a part at a time.
            table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
            if table.schema_arrow.names.count('text') != 1:
                raise UserError(f'{name!r} needs one column `text`: give its texts this name')
            tasks = ((name, rows['text'].drop_null().cast('binary').to_pylist())
                     for rows in table.iter_batches(64, columns=['text']))
        elif name.endswith(('.tar', '.tar.xz')):
            tar = BoundedReader(lzma.open(file) if name.endswith('.xz') else file)
            tasks = members(tar, name, ('.xz', '.txt'))
        else:
            tasks = [(name, [file.read(MAX_BYTES + 1)])]
        for label, task in tasks:
            check_sum = zlib.crc32(bounded(b'\0'.join([*task, b''])), check_sum)
            yield label, task, check_sum, file.tell() / size


def tokenize(label, task, val_fraction):
    """The ids of a task's documents, as bytes by split, and figures about them."""
    ids = {'train': [], 'val': []}
    if label.endswith('.xz'):
        with reading(label):
            tar = bounded(lzma.open(io.BytesIO(task[0])).read(MAX_BYTES + 1))
            task = [document for _, (document,) in members(io.BytesIO(tar), label, '.txt')]
    figures = Counter(documents=len(task), bytes=sum(map(len, task)))
    for document in task:
        text = document.decode(errors='replace')
        figures['repaired'] += '\ufffd' in text and text.encode() != document
        text = re.sub('\n\n\n+', '\n\n', text).strip()
        draw = zlib.crc32(text.encode()) / 2**32
        ids['val' if draw < val_fraction else 'train'] += [TOKENIZER.encode(text), END]
    return {split: b''.join(arrays) for split, arrays in ids.items()}, figures


def start_worker():
    """Leave Ctrl-C to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Output:
    """train.bin.part, val.bin.part, and progress.json, which records how far they are complete.

    `done` counts tokens, documents and more, and contains the position in the input: the index of
    the current file, a check sum of its tasks so far, and the fraction of the whole input.
    """

    def __init__(self, cfg, folder, inputs):
        self.settings = {'val_fraction': cfg.val_fraction, 'inputs': inputs}
        self.downloads = [] if cfg.input else inputs
        self.folder, self.path = folder, os.path.join(folder, 'progress.json')
        self.done, self.files, self.saved = Counter(), {}, time.monotonic()
        if os.path.exists(self.path):
            with reading(self.path), open(self.path, encoding='utf-8') as file:
                settings, done = json.load(file)
            if settings != self.settings:
                raise UserError(f'{self.path} was begun with {str(settings)[:150]}, which is not '
                                'the same now: restore that, or delete the file to restart')
            self.done.update(done)
        for split in ('val', 'train'):
            final, part = Path(folder, f'{split}.bin'), Path(folder, f'{split}.bin.part')
            if self.done['files'] == len(inputs) and final.exists() and not part.exists():
                os.replace(final, part)  # a run was killed while it gave the files their names
            file, size = open(part, 'a+b'), 2 * self.done[split]
            if file.tell() < size:
                raise UserError(f'{part} is shorter than {self.path} says: delete both to restart')
            file.truncate(size)  # cut off what a killed run wrote after its last save
            self.files[split] = file

    def add(self, ids, figures, position):
        """Write a task's ids, and record the position after it."""
        for split, file in self.files.items():
            file.write(ids[split])
            self.done[split] += len(ids[split]) // 2
        self.done.update(figures)
        self.done['files'], self.done['check_sum'], self.done['fraction'] = position
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            self.save()

    def save(self):
        """Write progress.json, once all that it counts is on disk."""
        for file in self.files.values():
            flush_to_disk(file)
        with atomic_file(self.path) as file:
            file.write(json.dumps([self.settings, self.done]).encode())
        self.saved = time.monotonic()
        for path in self.downloads[: self.done['files']]:  # no longer needed
            Path(path).unlink(missing_ok=True)

    def publish(self, source):
        """Give the files their names, train.bin last."""
        self.save()
        digest, tokens = hashlib.sha256(), {}
        for split in ('train', 'val'):
            self.files[split].seek(0)
            hashlib.file_digest(self.files[split], lambda: digest)
            tokens[split] = self.done[split]
        write_meta(self.folder, TOKENIZER, source, digest.hexdigest(), tokens)
        self.done['files'] = len(self.settings['inputs'])  # any .bin file is ours from here on
        self.save()
        for file in self.files.values():
            file.close()
            os.replace(file.name, Path(file.name).with_suffix(''))
        os.remove(self.path)

    def close(self):
        """Close the files, and remove them if there is nothing to continue from."""
        for file in self.files.values():
            file.close()
            if not os.path.exists(self.path):
                Path(file.name).unlink(missing_ok=True)


def files_in(path):
    """The files that we read in a folder and the folders in it, by name; or a file itself."""
    found = [path, *map(str, Path(path).rglob('[!.]*'))]  # not into links, which may loop
    return sorted(file for file in found if file.endswith(SUFFIXES) and os.path.isfile(file))


def results(cfg, pool, ahead, inputs, start, progress):
    """(future of `tokenize`, the position after it) for all tasks that come after `start`."""
    pending = deque()
    for i in range(start['files'], len(inputs)):
        if not cfg.input and not os.path.exists(inputs[i]):
            download(URL + os.path.basename(inputs[i]), inputs[i], progress.print_line)
        tasks, done = tasks_in(inputs[i]), start['check_sum'] if i == start['files'] else 0
        if done and all(check_sum != done for _, _, check_sum, _ in tasks):  # skips what is done
            raise UserError(f'{inputs[i]} is no longer the file that was begun: restore it, or '
                            f'delete data/{cfg.dataset}/progress.json to restart')
        for label, task, check_sum, fraction in tasks:
            position = i, check_sum, (i + fraction) / len(inputs)
            pending.append((pool.submit(tokenize, label, task, cfg.val_fraction), position))
            if len(pending) > ahead:
                yield pending.popleft()
    yield from pending


def main(argv):
    cfg = override(OpenWebTextConfig(), argv, usage=__doc__)
    cfg.input = os.path.expanduser(cfg.input)
    check_name(cfg.dataset)
    if not 0 < cfg.val_fraction < 1 or cfg.num_proc < 0:
        raise UsageError(f'val_fraction={cfg.val_fraction} must be above 0 and below 1, and '
                         f'num_proc={cfg.num_proc} 0, for all cores, or more')
    folder, source = os.path.join('data', cfg.dataset), cfg.input or URL
    inputs = files_in(cfg.input) if cfg.input else [os.path.join(folder, n) for n in SUBSETS]
    if not inputs:
        raise UsageError(f'input={cfg.input} is missing or has no file of {SUFFIXES}: name one')
    progress, workers = console.Progress(), cfg.num_proc or min(8, os.cpu_count() or 1)
    with (
        user_errors(BrokenExecutor, 'a worker was killed', 'a lower --num_proc needs less memory'),
        console.locked(folder),
        contextlib.closing(Output(cfg, folder, inputs)) as output,
        ProcessPoolExecutor(workers, initializer=start_worker) as pool,
    ):
        done, start, began = output.done, output.done.copy(), time.monotonic()
        if start['documents']:
            progress.print_line(f'continuing after {start["documents"]:,} documents')
        TOKENIZER.bpe  # workers that are forked share it
        for future, position in results(cfg, pool, 4 * workers, inputs, start, progress):
            output.add(*future.result(), position)
            fraction, seconds = done['fraction'], time.monotonic() - began
            left = hms(seconds * (1 - fraction) / max(1e-9, fraction - start['fraction']))
            speed = (done['bytes'] - start['bytes']) / 1e6 / seconds
            progress.show_progress(fraction, f'{fraction:.1%}, {speed:.1f} MB/s, {left} left, '
                                             f'{done["documents"]:,} documents')
        if min(done['train'], done['val']) < 2:
            raise UserError(f'{source} gives only {done["train"]} train, {done["val"]} val tokens: '
                            f'add tars of .txt, or change --val_fraction={cfg.val_fraction}')
        output.publish(source)
    progress.print_line(f'{folder}: {done["train"]:,} train, {done["val"]:,} val tokens, from '
                        f'{source}: {done["documents"]:,} documents, {done["repaired"]:,} repaired')
    if not cfg.input and done['documents'] != DOCUMENTS:
        raise UserError(f'{folder} has {done["documents"]:,} documents instead of {DOCUMENTS:,}: '
                        f'find out what changed at {URL} before you train on it')


if __name__ == '__main__':
    console.run(main)
