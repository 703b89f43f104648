"""What a script shows and leaves behind: errors of one line, whole files, a progress line.

Nothing here imports torch, so that scripts which only prepare text start at once.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from datetime import timedelta


class UserError(Exception):
    """What a user can correct: one line with what is wrong, the value, and what to do."""

    exit_code = 1


class UsageError(UserError):
    """A wrong flag or setting."""

    exit_code = 2


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
        sys.exit(error.exit_code)
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
def atomic_file(path):
    """Open a temporary binary file that replaces `path`, once on disk, if all goes well inside.

    So `path` is the old file or the new one, whole. Raises UserError if it can't be written.
    """
    temporary, folder = f'{path}.tmp', os.path.dirname(path) or '.'
    try:
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
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror}): free some space or choose '
                        'another folder; what was there before is untouched') from error
    finally:
        with contextlib.suppress(OSError):  # after a success it is not there any more
            os.remove(temporary)


@contextlib.contextmanager
def locked(folder):
    """Make `folder`, and keep other processes from writing there. Raises UserError if one does.

    The lock ends with the process, however that ends. A new folder that stays empty is removed.
    """
    is_new, handle = not os.path.isdir(folder), None
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot make the folder {folder} ({error.strerror}): choose '
                        'another') from None
    if not os.access(folder, os.W_OK):
        raise UserError(f'cannot write into {folder}: choose another folder')
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


class Progress:
    """One live line at the bottom of a terminal; in a file or a pipe, a line every ten seconds."""

    on_screen = False  # whether there is a live line now

    def __init__(self, enabled=True):
        self.enabled = enabled
        self.live = enabled and sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
        self.shown = time.perf_counter()

    def say(self, text):
        """Print lines that stay."""
        self.write(('\r\x1b[K' if Progress.on_screen else '') + text + '\n')
        Progress.on_screen = False

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
        self.write('\r' + f'{bar} {text}'.strip()[:room] + '\x1b[K')
        Progress.on_screen = True

    def write(self, text):
        """Write at once. If the terminal or the pipe is closed, the work goes on without it."""
        if self.enabled:
            try:
                print(text, end='', flush=True)
            except OSError:
                discard_output()


def discard_output():
    """Send what is still written to standard output nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def clock(seconds):
    """0:04:05, to read."""
    return str(timedelta(seconds=int(seconds)))
