"""What a run looks like on a terminal, and in a file."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, TINY, flags, script

import console
import train
from console import Progress

RUN = TINY | dict(max_iters=120, eval_interval=40, sample_tokens=40)
CONTROL = r'[\x00-\x09\x0b-\x1f\x7f-\x9f]'  # all but the line feed


def in_terminal(*command, columns=80, **variables):
    """Run a Python command on a pseudo-terminal: (exit code, all that it wrote)."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    env = {k: v for k, v in os.environ.items() if k not in ('COLUMNS', 'LINES', 'NO_COLOR')}
    env |= {'TERM': 'xterm', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': ROOT} | variables
    process = subprocess.Popen([sys.executable, *command], stdin=follower, stdout=follower,
                               stderr=follower, env=env, start_new_session=True)
    os.close(follower)
    output = b''
    while True:
        try:
            data = os.read(leader, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            data = b''
        if not data:
            break
        output += data
    os.close(leader)
    return process.wait(timeout=60), output.decode()


def screen(output):
    """The lines that are to be read in the end."""
    lines, at = [''], 0
    for piece in re.findall(r'\r|\n|\x1b\[K|[^\r\n\x1b]+|\x1b', output):
        if piece == '\r':
            at = 0
        elif piece == '\n':
            lines.append('')
        elif piece == '\x1b[K':
            lines[-1] = lines[-1][:at]
        else:
            lines[-1] = lines[-1][:at].ljust(at) + piece + lines[-1][at + len(piece) :]
            at += len(piece)
    return lines


def live_lines(output):
    return re.findall(r'\r([^\r\n\x1b]+)\x1b\[K', output)


def without_times(lines):
    return [re.sub(r'after [\d:]+', '', line) for line in lines if not line.startswith('iter ')]


def test_a_terminal_shows_the_same_and_a_live_line(tiny):
    result = script('train.py', *flags(**RUN))
    assert result.returncode == 0 and not re.search(CONTROL, result.stdout + result.stderr)
    assert result.stdout.count('\niter ') == RUN['max_iters']
    for columns, more in ((80, {}), (20, {'NO_COLOR': '1'})):
        code, output = in_terminal(
            os.path.join(ROOT, 'train.py'), *flags(**RUN), columns=columns, **more)
        assert code == 0
        assert without_times(screen(output)) == without_times(result.stdout.split('\n'))
        assert re.sub(r'\r\n|\r|\n|\x1b\[K', '', output).isprintable()  # no color, nothing else
        assert live_lines(output) and all(len(line) <= columns - 3 for line in live_lines(output))


def test_a_dumb_terminal_gets_plain_lines(tiny):
    settings = RUN | dict(max_iters=3)
    code, output = in_terminal(os.path.join(ROOT, 'train.py'), *flags(**settings), TERM='dumb')
    assert code == 0 and not re.search(CONTROL, output.replace('\r\n', '\n'))
    assert re.findall(r'^(iter \d): loss [\d.]+, time [\d.]+ms, ', output, re.M) == [
        'iter 0', 'iter 1', 'iter 2']


PARTS = ['iter 123456', 'loss 1.2345', '1:02:03 left', '123,456 tok/s', 'epoch 12.34', 'mfu 12.3%']


class Terminal:
    """A stream that is a terminal."""

    def __init__(self):
        self.text = ''

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.fixture
def progress(monkeypatch):
    """A live line that always has something new to show."""
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr(Progress, 'shown', False)
    monkeypatch.setattr(Progress, 'due', True)
    return Progress(100, 'reading', stream=Terminal())


@pytest.mark.parametrize('columns, kept, cells', [
    (200, 6, 20), (99, 6, 18), (86, 6, 5), (85, 5, 15), (80, 5, 10), (62, 4, 5), (61, 3, 19),
    (40, 2, 12), (20, 1, 5), (15, 1, 0), (10, 1, 0),
])
def test_a_narrow_terminal_drops_what_matters_least(progress, monkeypatch, columns, kept, cells):
    monkeypatch.setenv('COLUMNS', str(columns))
    progress.update(50, PARTS)
    (line,) = live_lines(progress.stream.text)
    bar = '━' * round(cells / 2) + '╌' * (cells - round(cells / 2))
    assert line == f'{bar} {", ".join(PARTS[:kept])}'.strip()[: columns - 3]


@pytest.mark.parametrize('done, full', [(0, 0), (1, 0), (50, 10), (100, 20)])
def test_the_bar_fills(progress, monkeypatch, done, full):
    monkeypatch.setenv('COLUMNS', '200')
    progress.update(done, PARTS)
    assert progress.stream.text.count('━') == full and progress.stream.text.count('╌') == 20 - full


def test_a_job_tells_how_long_it_takes(progress, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setattr(console.time, 'perf_counter', lambda: progress.began + 30)
    progress.advance(20)
    progress.advance(5)
    assert [line.lstrip('━╌') for line in live_lines(progress.stream.text)] == [
        ' reading 20%, 2:00 left', ' reading 25%, 1:30 left']
    progress.say('done')
    assert screen(progress.stream.text) == ['done', '']


def test_a_job_that_is_soon_done_writes_nothing_into_a_file(capsys):
    progress = Progress(100, 'reading')
    for _ in range(100):
        progress.advance(1)
    assert capsys.readouterr().out == ''
    progress.drawn -= 11  # seconds
    progress.advance(0)
    progress.advance(0)
    assert capsys.readouterr().out == 'reading 100%, 0:00 left\n'


def test_an_error_gets_a_line_of_its_own():
    code = ('import console, time\n'
            'def main(argv):\n'
            '    progress = console.Progress(2)\n'
            '    time.sleep(0.2)\n'
            '    progress.update(1, ["half of it"])\n'
            '    raise console.UserError("that was all")\n'
            'console.run(main)')
    code, output = in_terminal('-c', code)
    assert code == 1 and screen(output) == ['━' * 10 + '╌' * 10 + ' half of it',
                                            'error: that was all', '']


def test_what_a_model_writes_cannot_move_the_cursor(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, 'sample_text', lambda *_: 'a\x1b[2Jb\rc\td\x07\x9b\n‘é🦁’')
    train.train(train.TrainConfig(**TINY | dict(max_iters=0)))
    out = capsys.readouterr().out
    assert '  | a\ufffd[2Jb\ufffdc\td\ufffd\ufffd\n  | ‘é🦁’\n' in out
