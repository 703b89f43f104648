"""Several processes are one training run, up to rounding."""

import csv
import os
import subprocess
import sys

import pytest
from conftest import ROOT, STORY, TINY, flags, free_port, script, steps, train_together

import prepare_text
import train
from checkpoint import load_checkpoint
from console import UserError

RUN = TINY | dict(gradient_accumulation_steps=4, max_iters=20, eval_interval=10, sample_tokens=0)


def losses(folder):
    with open(f'{folder}/log.csv', newline='') as file:
        return [(float(r['train_loss'] or 0), float(r['val_loss'] or 0))
                for r in csv.DictReader(file)]


@pytest.mark.parametrize('processes', [2, 4])
def test_many_processes_equal_one(tiny, capfd, processes):
    train.train(train.TrainConfig(**RUN | dict(out_dir='alone')))
    capfd.readouterr()
    train_together(train.TrainConfig(**RUN | dict(out_dir='many')), processes)
    out, err = capfd.readouterr()
    assert out.count('step 20:') == 1  # only one process prints
    assert [it for it, *_ in steps(out)] == [0, 10, 20]
    for one, many in zip(losses('alone'), losses('many'), strict=True):
        assert many == pytest.approx(one, rel=1e-5)
    assert load_checkpoint('many/ckpt.pt')['model'].keys() == (
        load_checkpoint('alone/ckpt.pt')['model'].keys())


def test_a_batch_that_cannot_be_divided_is_refused(tiny, monkeypatch):
    for name, value in zip(('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'),
                           ('0', '0', '2', 'localhost', '1')):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='steps=3 must be a multiple of the 2 processes: try 4'):
        train.train(train.TrainConfig(**RUN | dict(gradient_accumulation_steps=3)))


def two_nodes(arguments):
    """Run train.py as two nodes of one process: (exit codes, outputs)."""
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', f'--node_rank={rank}',
             '--nproc_per_node=1', '--master_addr=127.0.0.1', f'--master_port={port}',
             os.path.join(ROOT, 'train.py'), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=60) for node in nodes]
    except subprocess.TimeoutExpired:  # the two did not find each other
        outputs = [(node.kill(), node.communicate())[1] for node in nodes]
    return [node.returncode for node in nodes], outputs


def test_two_nodes_equal_one(tiny):
    """The two-node command, with both nodes on this machine."""
    for _ in range(3):  # another program may take the free port before torchrun does
        codes, outputs = two_nodes(flags(**RUN | dict(out_dir='nodes')))
        if codes == [0, 0]:
            break
    assert codes == [0, 0], outputs
    assert sum(out.count('step 20:') for out, _ in outputs) == 1
    train.train(train.TrainConfig(**RUN | dict(out_dir='alone')))
    for one, many in zip(losses('alone'), losses('nodes'), strict=True):
        assert many == pytest.approx(one, rel=1e-5)


def test_a_missing_dataset_is_made_once(tiny, monkeypatch, capfd):
    """By the first process, with the script that PREPARE names, while the others wait."""
    monkeypatch.setitem(prepare_text.PREPARE, 'story',
                        f'prepare_text.py {tiny}/story.txt --dataset=story')
    with open(STORY, encoding='utf-8') as file:
        (tiny / 'story.txt').write_text(file.read(20_000), encoding='utf-8')
    train_together(train.TrainConfig(**RUN | dict(dataset='story', max_iters=2)), 4)
    out, err = capfd.readouterr()
    assert out.count('data/story: ') == 1 and out.count('step 2:') == 1, err


def test_a_rank_that_fails_ends_the_run_with_its_reason(tiny):
    (tiny / 'failing.py').write_text(f'''
import os, sys
sys.path.insert(0, {ROOT!r})
import console, model, train
forward, calls = model.GPT.forward, []
def failing(self, *args, **kwargs):
    calls.append(1)
    if os.environ['RANK'] == '1' and len(calls) == 30:
        raise console.UserError('the memory of rank 1 is full: use a smaller one')
    return forward(self, *args, **kwargs)
model.GPT.forward = failing
console.run(train.main)
''')
    result = script(str(tiny / 'failing.py'), *flags(**RUN), processes=2, timeout=60)
    assert result.returncode != 0
    assert 'error: the memory of rank 1 is full: use a smaller one' in result.stderr
    assert 'step 0:' in result.stdout and 'step 20:' not in result.stdout
