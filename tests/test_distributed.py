"""Several processes are one training run, up to rounding."""

import csv

import pytest
from conftest import TINY, flags, script, steps

from model import load_checkpoint

RUN = TINY | dict(gradient_accumulation_steps=4, max_iters=20, eval_interval=10)


def losses(folder):
    with open(f'{folder}/log.csv', newline='') as file:
        return [(float(r['train_loss'] or 0), float(r['val_loss'] or 0)) for r in csv.DictReader(file)]


@pytest.mark.parametrize('processes', [2, 4])
def test_many_processes_equal_one(tiny, processes):
    alone = script('train.py', *flags(**RUN | dict(out_dir='alone')))
    together = script('train.py', *flags(**RUN | dict(out_dir='many')), processes=processes)
    assert alone.returncode == together.returncode == 0, together.stderr
    assert together.stdout.count('step 20:') == 1  # one process speaks
    assert [it for it, *_ in steps(together.stdout)] == [0, 10, 20]
    for one, many in zip(losses('alone'), losses('many'), strict=True):
        assert many == pytest.approx(one, rel=1e-5)
    assert load_checkpoint('many/ckpt.pt')['model'].keys() == (
        load_checkpoint('alone/ckpt.pt')['model'].keys())


def test_a_batch_that_cannot_be_shared_is_refused(tiny):
    result = script('train.py', *flags(**RUN | dict(gradient_accumulation_steps=3)), processes=2)
    assert result.returncode == 1
    assert 'gradient_accumulation_steps=3' in result.stderr and '4 can' in result.stderr
