"""What a script shows and leaves behind: errors of one line, whole files, a progress line.

Nothing here imports torch, so that scripts which only prepare text start at once.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from itertools import count
from textwrap import shorten


class UserError(Exception):
    """What a user can correct: one line with what is wrong, the value, and what to do."""


class UsageError(UserError):
    """A wrong flag or setting."""


def run(main):
    """Call a script's `main(argv)` with UTF-8 output; a UserError is printed as one line."""
    sys.stdout = sys.stdout or open(os.devnull, 'w')  # closed by >&-
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding='utf-8', errors='replace')
    try:
        try:
            sys.exit(main(sys.argv[1:]))
        finally:
            if Progress.on_screen:  # what is printed next starts on a line of its own
                print(flush=True)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        discard_output()
        # After a broken pipe the reader, `head` say, has seen enough.
        sys.exit(0 if isinstance(error, BrokenPipeError) else f'error: {error}')


@contextlib.contextmanager
def user_errors():
    """Turn a ValueError, OSError or ImportError inside into a UserError."""
    try:
        yield
    except BrokenPipeError:  # `run` handles it
        raise
    except ImportError as error:
        remedy = f': pip install {error.name}' if error.name else ''
        raise UserError(f'{error}{remedy}') from None
    except (ValueError, OSError) as error:
        raise UserError(' '.join(str(error).split())) from None


@contextlib.contextmanager
def file_errors(failed, remedy):
    """Turn what keeps files inside from being written into a UserError that ends in `remedy`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the second on a full disk
        reason = getattr(error, 'strerror', None) or shorten(str(error), 100)
        raise UserError(f'{failed} ({reason}): {remedy}') from error


@contextlib.contextmanager
def atomic_file(path):
    """Open a temporary binary file that replaces `path`, once on disk, if all goes well inside.

    So `path` is the old file or the new one, whole. Raises UserError if it can't be written.
    """
    temporary, folder = f'{path}.tmp', os.path.dirname(path) or '.'
    try:
        with file_errors(f'cannot write {path}', 'free some space or choose another folder; '
                         'what was there before is untouched'):
            os.makedirs(folder, exist_ok=True)
            with open(temporary, 'wb') as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every system can flush a folder
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)  # the rename is on disk when the folder is
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):  # after a success it is not there any more
            os.remove(temporary)


@contextlib.contextmanager
def locked(folder):
    """Make `folder`, and keep other processes from writing there. Raises UserError if one does.

    The lock ends with the process, however that ends. A new folder that stays empty is removed.
    """
    is_new, handle = not os.path.isdir(folder), None
    with file_errors(f'cannot write into {folder}', 'choose another folder'):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    try:
        with contextlib.suppress(ImportError, OSError):  # no locks: Windows, some network drives
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f'another process is writing into {folder}: wait for it, or '
                                'choose another folder') from None
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(folder)


def set_aside(out_dir):
    """Move a former run's files in `out_dir` to `out_dir/previous`; returns whether it did.

    What was `previous` is then `previous-1`, or the next free number: nothing is deleted.
    """
    names = [name for name in ('loss.png', 'log.csv', 'best.pt', 'ckpt.pt')
             if os.path.exists(os.path.join(out_dir, name))]
    if not names:
        return False
    previous = os.path.join(out_dir, 'previous')
    with file_errors(f'cannot move the former run in {out_dir} away', 'choose another --out_dir'):
        if os.path.exists(previous):
            older = (f'{previous}-{number}' for number in count(1))
            os.rename(previous, next(path for path in older if not os.path.exists(path)))
        os.mkdir(previous)
        for name in names:
            os.rename(os.path.join(out_dir, name), os.path.join(previous, name))
    return True


class Progress:
    """One live line at the bottom of a terminal; in a file or a pipe, a line every ten seconds."""

    on_screen = False  # whether there is a live line now

    def __init__(self, enabled=True):
        self.enabled = enabled
        self.live = enabled and sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
        self.shown = time.perf_counter()

    def say(self, text, end='\n'):
        """Print lines that stay. If the terminal or the pipe is closed, go on without it."""
        if self.enabled:
            try:
                print('\r\x1b[K' * self.live + text, end=end, flush=True)  # over the live line
            except OSError:
                discard_output()
            Progress.on_screen = not end

    def show(self, share, text):
        """Show a bar, `share` from 0 to 1 of it full, and `text`; cut to the terminal's width."""
        if time.perf_counter() - self.shown < (0.1 if self.live else 10):
            return
        self.shown = time.perf_counter()
        if not self.live:
            self.say(text)
            return
        room = shutil.get_terminal_size().columns - 3  # so that a ^C fits on the line too
        cells = min(20, room - len(text) - 1)
        bar = ('━' * round(cells * share)).ljust(cells, '╌')
        self.say(f'{bar} {text}'.strip()[:room], end='')


def discard_output():
    """Send what is still written to standard output nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def clock(seconds):
    """0:04:05, to read."""
    return str(timedelta(seconds=int(min(seconds, 1e12))))
