"""What a person meets: errors of one line, files that are whole, a progress line.

Nothing here needs torch, so that what has no use for it, preparing text say, starts at once.
"""

import contextlib
import os
import shutil
import signal
import sys
import time


class UserError(Exception):
    """Something that the user can mend: one line saying what is wrong, the value, the remedy."""

    exit_code = 1


class UsageError(UserError):
    """A wrong flag or setting."""

    exit_code = 2


def run(main):
    """Call a script's `main(argv)`: UTF-8 output everywhere, one line for what a user can mend."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding='utf-8', errors='replace')
    try:
        try:
            sys.exit(main(sys.argv[1:]))
        finally:
            if Progress.shown:  # what is said now begins below it
                print(flush=True)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        mute(sys.stdout)
        sys.exit(0)


@contextlib.contextmanager
def blame_user():
    """Inside, a ValueError, OSError or ImportError comes from what the user gave us."""
    try:
        yield
    except ImportError as error:
        raise UserError(f'{error}: pip install {error.name}') from None
    except (ValueError, OSError) as error:
        raise UserError(' '.join(str(error).split())) from None


@contextlib.contextmanager
def atomic_file(path, mode='wb', **kwargs):
    """Open a temporary file beside `path` that takes its place, on disk, when all went well.

    Whatever happens, `path` is the old file or the new one, whole. Raises UserError when the disk
    is full or the folder can't be written; then nothing is left behind.
    """
    temporary = f'{path}.tmp'
    try:
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            with open(temporary, mode, **kwargs) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        if os.name == 'posix':  # the rename is on disk when the folder is
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            with contextlib.suppress(OSError):  # not every network file system can do that
                os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise UserError(
            f'cannot write {path} ({error.strerror}): free some space or choose another folder; '
            'what was there before is untouched'
        ) from error


class Progress:
    """One live line at the bottom of a terminal; plain lines in a file, a pipe or a dumb terminal.

    It has no colors, so there is nothing that NO_COLOR would have to turn off.
    """

    shown = False  # whether there is a live line on the screen, the only one we have

    def __init__(self, total, what='', stream=None, enabled=True):
        self.total, self.what, self.done = total, what, 0
        self.stream = stream or sys.stdout
        self.enabled = enabled
        self.live = enabled and self.stream.isatty() and os.environ.get('TERM') != 'dumb'
        self.began = self.drawn = time.perf_counter()

    @property
    def due(self):
        """Whether it is time to show something new: to an eye, or in a file that will be read."""
        return time.perf_counter() - self.drawn > (0.1 if self.live else 10)

    def say(self, text=''):
        """Print lines that stay."""
        if self.enabled:
            self.write(('\r\x1b[K' if Progress.shown else '') + text + '\n')
            Progress.shown = False

    def update(self, done, parts, line=''):
        """Show how far we are: a bar and the first `parts` that fit; in a file, `line`."""
        if self.enabled and not self.live and line:
            self.write(line + '\n')
            self.drawn = time.perf_counter()
        if self.live and self.due:
            room = shutil.get_terminal_size().columns - 3  # so that a ^C fits on the line too
            while len(parts) > 1 and len(', '.join(parts)) > room - 6:
                parts = parts[:-1]
            text = ', '.join(parts)
            cells = max(0, min(20, room - len(text) - 1))
            full = round(cells * done / max(1, self.total))
            text = ('━' * full + '╌' * (cells - full) + ' ' + text).strip()
            self.write('\r' + text[:room] + '\x1b[K')
            self.drawn = time.perf_counter()
            Progress.shown = True

    def advance(self, more):
        """`more` of the total is done, in a job that has nothing to tell but how long it takes."""
        self.done += more
        if self.due:
            left = (time.perf_counter() - self.began) * (self.total / self.done - 1)
            parts = [f'{self.what} {self.done / self.total:.0%}', f'{clock(left)} left']
            self.update(self.done, parts, line=', '.join(parts))

    def write(self, text):
        """A terminal that went away, or a pipe that was closed, is no reason to stop training."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.enabled = self.live = False
            mute(self.stream)


def mute(stream):
    """Let whatever is still written to `stream` go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def clock(seconds):
    """1:02:03 or 4:05, to read."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
