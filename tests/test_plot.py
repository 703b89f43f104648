"""loss.png: its contents, when it is drawn, and errors.

Tests that draw are skipped if matplotlib is missing; the others run everywhere.
"""

import csv
import importlib.machinery
import os
import re
import struct
import sys
import types

import numpy as np
import pytest
from conftest import TINY, script

import plot_loss
from console import UsageError, UserError

RATE = 1e-3
LOG_COLUMNS = (
    'iteration tokens epochs train_loss train_eval_loss val_loss learning_rate grad_norm skipped '
    'tokens_per_s mfu seconds'
).split()


def make_run(folder, losses, vals, rate=RATE):
    """A folder with the log.csv of a run: its `losses`, and `vals` where it was evaluated."""
    os.makedirs(folder)
    with open(f'{folder}/log.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, LOG_COLUMNS)
        writer.writeheader()
        for it, loss in enumerate(losses):
            writer.writerow(dict(
                iteration=it, tokens=it * 1000, epochs=it / 20, seconds=it / 10, train_loss=loss,
                train_eval_loss=loss if it in vals else None, val_loss=vals.get(it),
                learning_rate=rate if loss is not None else None))


def small_run(folder='out', best=1.5):
    make_run(folder, [4, 3, 2, 1.75, None], {0: 4.125, 2: best, 4: best + 0.25})


def train_tiny(**settings):
    import train  # here, since drawing does not need it

    return train.train(train.TrainConfig(**TINY | settings))


def texts(path):
    """Every piece of text in an SVG."""
    with open(path, encoding='utf-8') as file:
        return re.findall(r'<text[^>]*> ?([^<]*)</text>', file.read())


def test_a_log_is_read_as_it_was_written(folder):
    make_run('out', [4, 3, 'nan', 1.75, None], {0: 4.125, 2: 'nan', 3: 1.75})
    with open('out/log.csv', 'a') as file:
        file.write('5,5000,0.1')  # killed while it wrote
    run = plot_loss.read_evaluations('out')
    np.testing.assert_array_equal(run['iteration'], [0, 2, 3])
    np.testing.assert_array_equal(run['tokens'], [0, 2000, 3000])
    np.testing.assert_array_equal(run['epochs'], [0, 0.1, 0.15])
    np.testing.assert_array_equal(run['train_eval_loss'], [4, float('nan'), 1.75])
    np.testing.assert_array_equal(run['val_loss'], [4.125, float('nan'), 1.75])


BROKEN = {
    'no folder named': ([], 'no run is named.*plot_loss.py out-'),
    'no such folder': (['none'], 'none/log.csv .*No such file.*leave'),
    'a file': (['picture.txt'], 'picture.txt/log.csv .*Not a dir.*leave'),
    'a folder without a log': (['data'], 'data/log.csv .*No such file.*leave'),
    'an empty log': (['empty'], 'empty/log.csv .*no evaluations.: wait'),
    'a log without rows': (['header'], 'header/log.csv .*no evaluations.: wait'),
    'no number': (['word'], "word/log.csv .*'many'.*leave"),
    'another table': (['table'], "table/log.csv .*'val_loss'.*leave"),
    'no text': (['binary'], 'binary/log.csv .*decode.*leave'),
    'one of several': (['out', 'word'], 'cannot draw word/log.csv'),
    'another x': (['out', '--x=loss'], "x='loss'.*'iteration', 'tokens', 'epochs', 'seconds'"),
    'a misspelt flag': (['out', '--ouf=loss.png'], "did you mean 'out'"),
}


@pytest.mark.parametrize('row', BROKEN)
def test_an_error_in_drawing_is_one_line(folder, row):
    small_run()
    os.mkdir('data')
    header = ','.join(LOG_COLUMNS) + '\n'
    zeros = ',0' * (len(LOG_COLUMNS) - 1)
    logs = {'empty': '', 'header': header, 'word': f'{header}0{zeros}\nmany{zeros}\n',
            'table': 'a,b\n1,2\n', 'binary': '\udcff\udcfe\n1'}
    for name, text in logs.items():
        os.makedirs(name)
        with open(f'{name}/log.csv', 'w', errors='surrogateescape') as file:
            file.write(text)
    open('picture.txt', 'w').close()
    arguments, words = BROKEN[row]
    before = sorted(os.listdir('.'))
    with pytest.raises(UserError) as error:
        plot_loss.main(arguments)
    assert re.search(words, str(error.value)) and '\n' not in str(error.value), error.value
    assert isinstance(error.value, UsageError) == any(a[0] == '-' for a in arguments or '-')
    assert sorted(os.listdir('.')) == before


def test_an_error_of_the_script_is_one_line(folder):
    result = script('plot_loss.py', 'out-*')
    assert result.returncode == 1 and result.stderr.count('\n') == 1 and not result.stdout
    assert result.stderr.startswith('error: cannot draw out-*/log.csv')


def test_without_matplotlib_it_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    small_run()
    with pytest.raises(UserError, match="pip install 'matplotlib>=3.9'$"):
        plot_loss.main(['out'])
    assert os.listdir('.') == ['out']


def test_training_without_matplotlib_says_nothing(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    train_tiny()
    assert 'loss.png' not in capsys.readouterr().out and not os.path.exists('out/loss.png')


@pytest.fixture
def installed(monkeypatch):
    """Pretend that matplotlib is installed; nothing is drawn with it."""
    module = types.ModuleType('matplotlib')
    module.__spec__ = importlib.machinery.ModuleSpec('matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib', module)


def test_training_draws_at_every_evaluation_once_something_is_saved(tiny, installed, monkeypatch):
    seen = []

    def record(folders, path):
        assert folders == ['out'] and path == os.path.join('out', 'loss.png')
        seen.append(plot_loss.read_evaluations('out')['iteration'].tolist())

    monkeypatch.setattr(plot_loss, 'draw', record)
    train_tiny(max_iters=5, eval_interval=2, log_interval=3)
    assert seen == [[0, 2], [0, 2, 4], [0, 2, 4, 5]]  # nothing is saved at iteration 0
    seen.clear()
    train_tiny(max_iters=6, eval_interval=2, init_from='resume')
    assert seen == [[0, 2, 4, 5, 6]]  # 5 is where it ended before


def test_a_picture_that_fails_is_reported_and_stops_nothing(tiny, installed, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError('no ink')

    monkeypatch.setattr(plot_loss, 'draw', fail)
    train_tiny()
    out = capsys.readouterr().out
    assert out.count('(no loss.png: no ink)') == out.count('no ink') == 2  # evaluations
    assert 'step 6:' in out


def test_a_long_log_is_drawn_at_the_end_alone(tiny, installed, monkeypatch):
    """To read all of it at each evaluation would be slow."""
    drawn = []
    monkeypatch.setattr(plot_loss, 'draw', lambda *_: drawn.append(os.path.getsize('out/log.csv')))
    monkeypatch.setattr(plot_loss, 'LONG_LOG', 1000)
    train_tiny(max_iters=12, eval_interval=2)
    assert drawn[:2] == sorted(drawn[:2]) and drawn[-2] < 1000 < drawn[-1] and len(drawn) < 6


# --- with matplotlib


@pytest.fixture
def matplotlib():
    return pytest.importorskip('matplotlib')


def test_an_svg_says_what_it_shows(folder, matplotlib):
    small_run()
    plot_loss.main(['out/', '--out=loss.svg'])
    found = texts('loss.svg')
    assert 'out, best 1.5000' in found
    assert 'with markers: validation, ★ at its best; thin: training' in found
    assert {'iteration', 'loss (nats per token)'} <= set(found)
    assert sorted(os.listdir('.')) == ['loss.svg', 'out']


@pytest.mark.filterwarnings('error')
def test_several_runs_have_different_labels(folder, matplotlib):
    """Also if names look like formulas, begin with _, or are the same in different folders."""
    names = ['a', '_b', 'c$1$ & <d>', 'é', '奥兹'] + [f'lr-{i}' for i in range(12)]
    for i, name in enumerate(names):
        small_run(name, best=1 + i / 100)
    for chosen in (names[:3], names):
        plot_loss.draw(chosen, 'loss.svg', 'tokens')
        found = texts('loss.svg')
        for i, name in enumerate(chosen):
            name = name.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
            assert found.count(f'{name}, best {1 + i / 100:.4f}') == 1, found
        assert 'tokens' in found and '4000' in found
    small_run('one/out')
    small_run('two/out')
    plot_loss.draw(['one/out', 'two/out'], 'loss.svg')
    assert {'one/out, best 1.5000', 'two/out, best 1.5000'} <= set(texts('loss.svg'))


def test_losses_that_are_not_finite_are_left_out(folder, matplotlib):
    make_run('out', [4, 3, 'nan', 'inf', 2], {0: 4, 2: 'nan', 4: 2.5})
    plot_loss.draw(['out'], 'loss.svg')
    assert 'out, best 2.5000' in texts('loss.svg')


def test_another_kind_of_picture_is_refused(folder, matplotlib):
    small_run()
    for out in ('loss.xyz', 'png'):
        with pytest.raises(UserError, match=f'out={out} must end in .png, .svg or .pdf'):
            plot_loss.main(['out', f'--out={out}'])
    assert os.listdir('.') == ['out']


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('losses, vals', [
    ([4.0], {0: 4.1}),  # the first picture of every run
    (['nan', 'nan'], {0: 'nan'}),
    ([1.0, -1.0], {0: 1.0, 1: -1.5}),  # of an edited loss
    ([None], {0: 4.0}),
    (list(np.linspace(11, 3, 5000)), {it: 11 - it / 700 for it in range(0, 5000, 10)}),
])
def test_little_and_much_can_be_drawn(folder, matplotlib, losses, vals):
    make_run('out', losses, vals)
    for x in ('iteration', 'tokens', 'epochs', 'seconds'):
        plot_loss.draw(['out'], 'loss.svg', x)
    assert os.path.getsize('loss.svg') < 100_000


def test_three_short_runs_make_a_small_svg(folder, matplotlib):
    runs = ['bigram', 'gpt', 'llama']
    for run in runs:
        make_run(run, [4 / (1 + it / 900) for it in range(1500)],
                 {it: 4.1 / (1 + it / 1000) for it in range(0, 1500, 100)})
    plot_loss.draw(runs, 'loss.svg')
    assert os.path.getsize('loss.svg') < 60_000


def test_a_png_is_one_and_replaces_the_old_one_whole(folder, matplotlib, monkeypatch):
    small_run()
    plot_loss.main(['out', '--out=new/loss.PNG'])
    with open('new/loss.PNG', 'rb') as file:
        data = file.read()
    assert data.startswith(b'\x89PNG')
    width, height = struct.unpack('>II', data[16:24])
    assert 900 < width < 1300 and 600 < height < 900

    def fails(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fails)
    with pytest.raises(UserError, match='new/loss.PNG .No space left'):
        plot_loss.main(['out', '--out=new/loss.PNG'])
    with open('new/loss.PNG', 'rb') as file:
        assert file.read() == data
    assert os.listdir('new') == ['loss.PNG']


def test_settings_and_backend_of_the_caller_stay(folder, matplotlib):
    small_run()
    matplotlib.rcParams['lines.linewidth'] = 7
    matplotlib.rcParams['text.usetex'] = True  # would need TeX, and fail
    try:
        before = dict(matplotlib.rcParams)
        plot_loss.draw(['out'], 'loss.png')
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcdefaults()
    code = ('import plot_loss, sys; plot_loss.draw(["out"], "loss.png"); '
            'sys.exit("matplotlib.pyplot" in sys.modules)')
    here = os.path.dirname(plot_loss.__file__)
    assert os.system(f'PYTHONPATH="{here}" MPLBACKEND=tkagg "{sys.executable}" -c \'{code}\'') == 0


def test_a_run_leaves_its_picture(tiny, matplotlib):
    best = train_tiny()
    assert sorted(os.listdir('out')) == ['best.pt', 'ckpt.pt', 'log.csv', 'loss.png']
    plot_loss.draw(['out'], 'loss.svg')
    assert f'out, best {best:.4f}' in texts('loss.svg')
