"""What a run looks like on a terminal, and in a file."""

import os
import pty
import re
import sys
import termios

import pytest
from conftest import TINY, flags, forked, script

import console
import train
from console import Progress

RUN = TINY | dict(max_iters=60, eval_interval=30, sample_tokens=40)
CONTROL = r'[\x00-\x09\x0b-\x1f\x7f-\x9f]'  # all but the line feed


def in_terminal(name, *args, columns=80):
    """Run a script on a pseudo-terminal: (exit code, all that it wrote)."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    with pytest.MonkeyPatch.context() as patch, open(follower, 'wb', buffering=0) as terminal:
        for variable in ('COLUMNS', 'LINES', 'NO_COLOR'):
            patch.delenv(variable, raising=False)
        patch.setenv('TERM', 'xterm')
        process = forked(name, args, [terminal] * 3)
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
    process.join(60)
    return process.exitcode, output.decode()


def screen(output):
    """The lines that stay visible in the end."""
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
    return re.findall(r'\r\x1b\[K([^\r\n\x1b]+)(?=\r(?!\n)|\Z)', output)


def without_times(lines):
    lines = [re.sub(r'after [\d:]+|in \w+$|now: .*/', '', line) for line in lines]
    return [line for line in lines if not line.startswith('iter ')]


def test_a_terminal_shows_the_same_and_a_live_line(tiny, capsys):
    train.train(train.TrainConfig(**RUN | dict(out_dir='plain')))
    plain = capsys.readouterr().out
    assert not re.search(CONTROL, plain) and plain.count('\niter ') == RUN['max_iters']
    code, output = in_terminal('train.py', *flags(**RUN), columns=20)
    assert code == 0
    plain = plain.replace('/plain', '/out').replace('plain/', 'out/').replace('=plain', '=out')
    assert without_times(screen(output)) == without_times(plain.split('\n'))
    assert re.sub(r'\r\n|\r|\n|\x1b\[K', '', output).isprintable()  # no color, nothing else
    assert live_lines(output) and all(len(line) <= 17 for line in live_lines(output))


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


def test_a_dumb_terminal_gets_plain_lines(tiny, monkeypatch):
    monkeypatch.setenv('TERM', 'dumb')
    monkeypatch.setattr(sys, 'stdout', Terminal())
    train.train(train.TrainConfig(**RUN | dict(max_iters=3)))
    output = sys.stdout.text
    assert not re.search(CONTROL, output)
    assert re.findall(r'^(iter \d): loss [\d.]+, time [\d.]+ms, ', output, re.M) == [
        'iter 0', 'iter 1', 'iter 2']


class Clock:
    """Replaces the module time; a test sets the time."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(console, 'time', Clock())
    monkeypatch.setattr(Progress, 'on_screen', False)
    return console.time


@pytest.fixture
def progress(clock):
    """A live line that may be updated at once."""
    progress = Progress()
    progress.live, clock.now = True, 1
    return progress


TEXT = 'iter 123456: loss 1.2345, time 12.34ms, 1:02:03 left, 12,345'  # 60 characters


@pytest.mark.parametrize('columns, cells', [
    (200, 20), (84, 20), (83, 19), (80, 16), (65, 1), (64, 0), (63, 0), (40, 0), (10, 0),
])
def test_a_narrow_terminal_cuts_the_bar_and_then_the_text(
    progress, monkeypatch, capsys, columns, cells,
):
    monkeypatch.setenv('COLUMNS', str(columns))
    progress.show_progress(0.5, TEXT)
    (line,) = live_lines(capsys.readouterr().out)
    bar = '━' * round(cells / 2) + '╌' * (cells - round(cells / 2))
    assert line == f'{bar} {TEXT}'.strip()[: columns - 3]


@pytest.mark.parametrize('fraction, full', [(0, 0), (0.01, 0), (0.5, 10), (1, 20)])
def test_the_bar_fills(progress, monkeypatch, capsys, fraction, full):
    monkeypatch.setenv('COLUMNS', '200')
    progress.show_progress(fraction, TEXT)
    out = capsys.readouterr().out
    assert out.count('━') == full and out.count('╌') == 20 - full


def test_a_live_line_is_drawn_ten_times_a_second_at_most(progress, clock, capsys):
    for n in range(1000):
        clock.now = 1 + n / 1000
        progress.show_progress(n / 1000, f'part {n}')
    progress.print_line('done')
    out = capsys.readouterr().out
    assert 9 <= len(live_lines(out)) <= 10 and screen(out) == ['done', '']


def test_a_job_that_is_soon_done_writes_nothing_into_a_file(clock, capsys):
    progress = Progress()
    for n in range(100):
        progress.show_progress(n / 100, f'reading {n}%')
    assert capsys.readouterr().out == ''
    clock.now = 11
    progress.show_progress(1, 'reading 100%')
    progress.show_progress(1, 'reading 100%')
    assert capsys.readouterr().out == 'reading 100%\n'


def test_a_disabled_progress_writes_nothing(clock, capsys):
    progress = Progress(enabled=False)
    clock.now = 11
    progress.show_progress(0.5, 'reading')
    progress.print_line('done')
    assert capsys.readouterr().out == ''


def test_an_error_gets_a_line_of_its_own(folder):
    (folder / 'fails.py').write_text("""
import console, time
def main(argv):
    progress = console.Progress()
    time.sleep(0.2)
    progress.show_progress(0.5, 'half of it')
    raise console.UserError('that was all')
console.run(main)
""")
    code, output = in_terminal(folder / 'fails.py')
    assert code == 1 and screen(output) == ['━' * 10 + '╌' * 10 + ' half of it',
                                            'error: that was all', '']


def test_ctrl_c_leaves_the_shells_prompt_a_line_of_its_own(folder):
    (folder / 'stopped.py').write_text("""
import console
def main(argv):
    print('half an answ', end='')
    raise KeyboardInterrupt
console.run(main)
""")
    code, output = in_terminal(folder / 'stopped.py')
    assert code == 130 and screen(output) == ['half an answ', '']
    assert script(folder / 'stopped.py').stdout == 'half an answ'


@pytest.mark.parametrize('name', ['stdout', 'stderr'])
def test_a_closed_output_is_no_error(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        console.run(lambda argv: print('nobody reads this'))
    assert not ended.value.code


def test_a_full_disk_behind_the_output_is_one_line(folder):
    (folder / 'fails.py').write_text("""
import console
console.run(lambda argv: open('/dev/full', 'w').write('x' * 100_000))
""")
    result = script(folder / 'fails.py')
    assert result.returncode == 1 and result.stderr.startswith('error: cannot write (No space left')
    assert result.stderr.count('\n') == 1


def test_what_a_model_writes_cannot_move_the_cursor(tiny, monkeypatch, capsys):
    text = 'a\x1b[2Jb\rc\td\x07\x9b\n‘é🦁’'
    monkeypatch.setattr('tokenizer.CharTokenizer.decode', lambda *_: text)
    train.train(train.TrainConfig(**TINY | dict(max_iters=1)))
    out = capsys.readouterr().out
    assert '  | a\ufffd[2Jb\ufffdc\td\ufffd\ufffd\n  | ‘é🦁’\n' in out
