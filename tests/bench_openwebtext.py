"""How fast prepare_openwebtext.py is, beside tiktoken alone, and how much memory it takes.

    python tests/bench_openwebtext.py --text=a.txt,b.txt              # 1 GB of text
    python tests/bench_openwebtext.py --text=a.txt --megabytes=40 --rounds=3

Shuffles the paragraphs of the texts into documents as long as OpenWebText's, packs them as it is
published, and then by turns measures tiktoken's raw limit (each core tokenizes documents that are
in memory already, and throws the ids away) and the script from its start to its end. Where others
use the machine, the figures per second of processor time say more than those per second.
"""

import io
import lzma
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, 'prepare_openwebtext.py')
sys.path.insert(0, ROOT)


@dataclass
class BenchConfig:
    text: str = os.path.join(ROOT, 'data', 'oz_retold.txt')  # the texts to shuffle
    megabytes: float = 1000.0  # of text in the corpus
    rounds: int = 1  # of raw limit and script by turns
    num_proc: int = 0  # workers; 0: one for each core
    preset: int = 1  # of xz: quick, and packs these texts as tightly as the release is
    docs_per_archive: int = 390  # as many as OpenWebText's have


def make_documents(paths, megabytes):
    """Documents, as bytes, of 4.9 kB on average; the same every time."""
    paragraphs = []
    for path in paths:
        with open(path, encoding='utf-8') as file:
            text = file.read()
        paragraphs += text.split('\n\n' if '\n\n' in text else '\n')
    paragraphs = [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]
    draw, total = random.Random(0), 0
    while total < megabytes * 1e6:
        length, document = draw.expovariate(1 / 4600), ''
        while len(document) < length:
            document += draw.choice(paragraphs) + '\n\n'
        yield document.encode()
        total += len(document.encode())


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_corpus(path, documents, preset, docs_per_archive):
    """A tar of xz archives; returns the number of bytes of text in it."""
    total, archives, batch = 0, 0, []
    with tarfile.open(path, 'w') as outer:
        def flush():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as tar:
                for i, document in enumerate(batch):
                    add(tar, f'{i:07}-{archives:032x}.txt', document)
            packed = lzma.compress(inner.getvalue(), preset=preset)
            add(outer, f'openwebtext/urlsf_subset00-{archives + 1}_data.xz', packed)
            batch.clear()

        for document in documents:
            batch.append(document)
            total += len(document)
            if len(batch) == docs_per_archive:
                flush()
                archives += 1
        if batch:
            flush()
    return total


def tokenize_raw(how, texts, barrier, results):
    """One process of the raw limit."""
    import tiktoken

    bpe = tiktoken.get_encoding('gpt2')
    encode = {
        'encode_ordinary': bpe.encode_ordinary,
        'encode_to_numpy': lambda text: bpe.encode_to_numpy(text, disallowed_special=()),
    }[how]
    barrier.wait()
    began, cpu = time.perf_counter(), time.process_time()
    for text in texts:
        encode(text)
    results.put((time.perf_counter() - began, time.process_time() - cpu))


def raw_limit(how, texts, processes):
    """MB per second, and per second of processor time, of processes that only tokenize."""
    spawn = multiprocessing.get_context('spawn')
    barrier, results = spawn.Barrier(processes), spawn.Queue()
    crowd = [spawn.Process(target=tokenize_raw, args=(how, texts, barrier, results))
             for _ in range(processes)]
    for process in crowd:
        process.start()
    walls, cpus = zip(*[results.get() for _ in crowd])
    for process in crowd:
        process.join()
    total = processes * sum(len(text.encode()) for text in texts) / 1e6
    return total / max(walls), total / sum(cpus)


def tree(pid):
    """A process and all that it started."""
    yield pid
    for task in os.listdir(f'/proc/{pid}/task'):
        with open(f'/proc/{pid}/task/{task}/children') as file:
            for child in file.read().split():
                yield from tree(int(child))


def watch_memory(pid, peak):
    """Keep in `peak` the most MB, and the most processes, that a run has had."""
    while True:
        rss = pss = count = 0
        try:
            for each in tree(pid):
                with open(f'/proc/{each}/smaps_rollup') as file:
                    sizes = {line.split()[0]: line.split()[1] for line in file if 'kB' in line}
                rss += int(sizes['Rss:']) / 1e3
                pss += int(sizes['Pss:']) / 1e3
                count += 1
        except (OSError, KeyError):  # one has just ended
            if not os.path.exists(f'/proc/{pid}/stat') or count == 0:
                return
        for name, value in ('rss', rss), ('pss', pss), ('processes', count):
            peak[name] = max(peak.get(name, 0), value)
        time.sleep(0.5)  # to look takes some milliseconds


def run_script(corpus, folder, num_proc):
    """Seconds, and seconds of processor time, of the script; and its peak of memory."""
    peak, cpu = {}, resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, f'--input={corpus}', '--dataset=bench', f'--num_proc={num_proc}'],
        cwd=folder, stdout=subprocess.DEVNULL,
    )
    watcher = threading.Thread(target=watch_memory, args=(process.pid, peak), daemon=True)
    watcher.start()
    if process.wait():
        sys.exit('the script failed')
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    return seconds, cpu, peak


def main(argv):
    from configurator import override

    cfg = override(BenchConfig(), argv, usage=__doc__)
    paths = cfg.text.split(',')
    processes = cfg.num_proc or os.cpu_count()
    folder = tempfile.mkdtemp(prefix='bench-openwebtext-')
    try:
        corpus = os.path.join(folder, 'urlsf_subset00.tar')
        total = make_corpus(
            corpus, make_documents(paths, cfg.megabytes), cfg.preset, cfg.docs_per_archive
        )
        print(f'{total / 1e6:,.0f} MB of text, {os.path.getsize(corpus) / 1e6:,.0f} MB packed')
        texts = [document.decode() for document in make_documents(paths, min(20, cfg.megabytes))]
        one = os.path.join(folder, 'one.txt')
        with open(one, 'w', encoding='utf-8') as file:
            file.write(texts[0])
        figures = {}
        for _ in range(cfg.rounds):
            for how in 'encode_ordinary', 'encode_to_numpy':
                figures.setdefault(how, []).append(raw_limit(how, texts, processes))
            *start, _ = run_script(one, folder, processes)
            *took, peak = run_script(corpus, folder, processes)
            figures.setdefault('the script', []).append([total / 1e6 / t for t in took])
            figures.setdefault('the script once it has started', []).append(
                [total / 1e6 / (t - s) for t, s in zip(took, start)]
            )
            print(', '.join(f'{how} {f[-1][0]:.1f} MB/s' for how, f in figures.items()), end='; ')
            print(', '.join(f'{name} {value:,.0f}' for name, value in peak.items()), flush=True)
        for i, per in enumerate(('second', 'second of processor time')):
            middle = {how: statistics.median(f[i] for f in fs) for how, fs in figures.items()}
            for how, speed in middle.items():
                ratio = speed / middle['encode_ordinary']
                print(f'{how}: {speed:.1f} MB per {per}, {ratio:.2f} of encode_ordinary')
    finally:
        shutil.rmtree(folder)


if __name__ == '__main__':
    main(sys.argv[1:])
