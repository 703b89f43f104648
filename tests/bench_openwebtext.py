"""Measure the speed of prepare_openwebtext.py, compared with tiktoken alone, and its memory.

    python tests/bench_openwebtext.py --text=a.txt,b.txt              # 1 GB of text
    python tests/bench_openwebtext.py --text=a.txt --megabytes=60 --rounds=3

Shuffles the paragraphs of the texts into documents as long as OpenWebText's, packs them as it is
published, and then by turns measures tiktoken's raw limit (each core runs encode_ordinary on
documents that are in memory already, and throws the ids away), the script's start-up (some short
documents), and the script from its start to its end. If others use the machine, the figures per
second of processor time are more reliable than those per second.
"""

import io
import lzma
import multiprocessing
import os
import random
import resource
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


def make_corpus(path, documents, per_archive=390):
    """A tar of xz archives with as many documents as OpenWebText's have; returns MB of text."""
    documents, total = list(documents), 0
    with tarfile.open(path, 'w') as outer:
        for i in range(0, len(documents), per_archive):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode='w') as tar:
                for j, document in enumerate(documents[i : i + per_archive]):
                    add(tar, f'{j:07}-{i:032x}.txt', document)
                    total += len(document)
            # Preset 1 is quick, and packs these texts as tightly as the release is.
            packed = lzma.compress(inner.getvalue(), preset=1)
            add(outer, f'openwebtext/urlsf_subset00-{i // per_archive + 1}_data.xz', packed)
    return total / 1e6


def tokenize_raw(texts, barrier, results):
    """One process of the raw limit."""
    import tiktoken

    bpe = tiktoken.get_encoding('gpt2')
    barrier.wait()
    began, cpu = time.perf_counter(), time.process_time()
    for text in texts:
        bpe.encode_ordinary(text)
    results.put((time.perf_counter() - began, time.process_time() - cpu))


def raw_limit(texts, processes):
    """MB per second, and per second of processor time, of processes that only tokenize."""
    spawn = multiprocessing.get_context('spawn')
    barrier, results = spawn.Barrier(processes), spawn.Queue()
    crowd = [spawn.Process(target=tokenize_raw, args=(texts, barrier, results), daemon=True)
             for _ in range(processes)]
    for process in crowd:
        process.start()
    walls, cpus = zip(*[results.get(timeout=600) for _ in crowd])
    total = processes * sum(len(text.encode()) for text in texts) / 1e6
    return total / max(walls), total / sum(cpus)


def tree(pid):
    """A process and all processes that it started."""
    yield pid
    for task in os.listdir(f'/proc/{pid}/task'):
        with open(f'/proc/{pid}/task/{task}/children') as file:
            for child in file.read().split():
                yield from tree(int(child))


def watch_memory(pid, peak):
    """Keep in `peak` the most MB, and the most processes, that a run has had."""
    while os.path.exists(f'/proc/{pid}/smaps_rollup'):
        rss = count = 0
        try:
            for each in tree(pid):
                with open(f'/proc/{each}/smaps_rollup') as file:
                    rss += sum(int(line.split()[1]) for line in file if line.startswith('Rss:'))
                count += 1
        except OSError:  # one has just ended
            if not count:
                return
        peak['rss'] = max(peak.get('rss', 0), rss / 1e3)
        peak['processes'] = max(peak.get('processes', 0), count)
        time.sleep(0.5)  # each look takes some milliseconds


def run_script(corpus, folder, num_proc):
    """Seconds, and seconds of processor time, of the script; and its peak of memory."""
    peak, before = {}, resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, f'--input={corpus}', '--dataset=bench', f'--num_proc={num_proc}',
         '--val_fraction=0.1'], cwd=folder, stdout=subprocess.DEVNULL,
    )
    threading.Thread(target=watch_memory, args=(process.pid, peak), daemon=True).start()
    if process.wait():
        sys.exit('the script failed')
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, sum(after[:2]) - sum(before[:2]), peak


def main(argv):
    from configurator import override

    cfg = override(BenchConfig(), argv, usage=__doc__)
    paths, processes = cfg.text.split(','), cfg.num_proc or os.cpu_count()
    with tempfile.TemporaryDirectory(prefix='bench-openwebtext-') as folder:
        corpus, short = (os.path.join(folder, name) for name in ('corpus.tar', 'short.tar'))
        total = make_corpus(corpus, make_documents(paths, cfg.megabytes))
        # Some documents for each worker.
        make_corpus(short, [b'%d' % i for i in range(50 * processes)], 1)
        print(f'{total:,.0f} MB of text, {os.path.getsize(corpus) / 1e6:,.0f} MB packed')
        texts = [document.decode() for document in make_documents(paths, min(20, cfg.megabytes))]
        ratios = []
        for _ in range(cfg.rounds):
            raw = raw_limit(texts, processes)
            *start, _ = run_script(short, folder, processes)
            *took, peak = run_script(corpus, folder, processes)
            for i, per in enumerate(('second', 'second of processor time')):
                whole, running = total / took[i], total / (took[i] - start[i])
                ratios.append((whole / raw[i], running / raw[i]))
                print(f'MB per {per}: tiktoken {raw[i]:.1f}, the script {whole:.1f}, once it has '
                      f'started {running:.1f}; at most {peak["rss"]:.0f} MB', flush=True)
        for i, per in enumerate(('second', 'second of processor time')):
            whole, running = map(statistics.median, zip(*ratios[i::2]))
            print(f'per {per}: {whole:.2f} of tiktoken, {running:.2f} once it has started')


if __name__ == '__main__':
    main(sys.argv[1:])
