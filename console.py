"""What a script shows and leaves behind: errors, whole files, signals, the progress line, the log.

Nothing here imports torch, so that scripts which only prepare text start at once.
"""

import contextlib
import csv
import errno
import importlib
import io
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from itertools import count
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace

# --- errors


class UserError(Exception):
    """A mistake that a user can fix; its one-line message: what is wrong, the value, a remedy."""


class UsageError(UserError):
    """A wrong flag or setting."""


@contextlib.contextmanager
def user_errors(kinds, failed, remedy, when=lambda error: True):
    """Context manager: report exceptions of these kinds as a UserError, "failed (why): remedy".

    Put it around one call whose failures are known, never around code that people edit: a mistake
    there needs its traceback. when: a function that says which exceptions are meant.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) or not when(error):
            raise
        why = getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'
        raise UserError(f'{failed} ({shorten(why, 160)}): {remedy}') from error


def optional(name, oldest):
    """Import an optional package. Raises UserError if it is missing, or older than was tried."""
    remedy = f"pip install '{name}>={oldest}'"
    with user_errors(ImportError, f'{name} is missing', remedy):
        module = importlib.import_module(name)
    version = getattr(module, '__version__', oldest)
    if [*map(int, re.findall(r'\d+', version)[:2])] < [*map(int, oldest.split('.'))]:
        raise UserError(f'{name} {version} is too old: {remedy}')
    return module


def run(main):
    """Call a script's `main(argv)` with UTF-8 output; a UserError is printed as one line."""
    sys.stdin = sys.stdin or open(os.devnull)  # closed by <&-
    sys.stdout = sys.stdout or open(os.devnull, 'w')
    sys.stderr = sys.stderr or open(os.devnull, 'w')
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a notebook's has no such method
            stream.reconfigure(encoding='utf-8', errors='replace')
    code, message = 0, ''
    try:
        main(sys.argv[1:])
    except UserError as error:
        code, message = 2 if isinstance(error, UsageError) else 1, f'error: {error}\n'
    except KeyboardInterrupt:
        code, Progress.on_screen = 128 + signal.SIGINT, sys.stdout.isatty()  # it shows ^C
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        discard_output()
        if error.errno != errno.EPIPE:  # that is a reader, for example `head`, that has seen enough
            code, message = 1, f'error: cannot write ({error.strerror}): free some space\n'
    finally:
        if Progress.on_screen:  # the next output begins on a line of its own
            print(flush=True)
    # Outside `except`: gloo's threads can't end while an exception refers to the model.
    sys.stderr.write(message)
    sys.exit(code)


def printable(text):
    """`text` with U+FFFD for control characters, which could garble the terminal."""
    return re.sub('[\0-\x08\x0b-\x1f\x7f-\x9f]', '\ufffd', text)


def hms(seconds):
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=int(min(seconds, 1e12))))


# --- files


def flush_to_disk(file):
    """Return when all that was written to `file` is on disk."""
    file.flush()
    os.fsync(file.fileno())


def unfinished(path):
    """A name for what becomes `path`; if its process is killed, `locked` removes it."""
    return f'{path}.{secrets.token_hex(16)}.tmp'


@contextlib.contextmanager
def atomic_file(path):
    """Context manager: a binary file that replaces `path` when it is whole and on disk.

    Raises UserError if it can't be written; then `path` stays as it was.
    """
    temporary, folder = unfinished(path), os.path.dirname(path) or '.'
    try:
        with user_errors((OSError, RuntimeError), f'cannot write {path}', 'free some space or '
                         'choose another folder; the file from before is untouched', lambda error:
                         isinstance(error, OSError) or 'inline_container' in str(error)):  # torch's
            os.makedirs(folder, exist_ok=True)
            with open(temporary, 'xb') as file:
                yield file
                flush_to_disk(file)
            os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every system can flush a folder
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)  # the rename is on disk when the folder is
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):  # after a success it no longer exists
            os.remove(temporary)


@contextlib.contextmanager
def locked(folder, wait=False):
    """Context manager: make `folder`, and let no other process write there at the same time.

    wait: for such a process to end; else raises UserError. The lock ends with this process, even
    if it is killed. A new folder that stays empty is removed.
    """
    is_new, handle = not os.path.isdir(folder), None
    with user_errors(OSError, f'cannot write into {folder}', 'choose another folder'):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    try:
        with contextlib.suppress(ImportError, OSError):  # no locks: Windows, some network drives
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            with user_errors(BlockingIOError, f'another process is writing into {folder}',
                             'wait for it, or choose another folder'):
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            for leftover in Path(folder).glob(f'*.{"[0-9a-f]" * 32}.tmp'):  # of a killed process
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(folder)


def first_free(path):
    """`path` with the first number that is free: path-1, path-2 and so on."""
    numbered = (f'{path}-{number}' for number in count(1))
    return next(path for path in numbered if not os.path.exists(path))


def files_of_run(out_dir):
    """The files of a training run in `out_dir`: checkpoints, log and picture."""
    return [path for name in ('*.pt', 'log.csv', 'loss.png') for path in Path(out_dir).glob(name)]


def move_previous_run(out_dir):
    """Move the run in `out_dir`, if there is one, to `out_dir/previous`, and say so.

    The run in `previous` moves to `previous-1`, or the next free number: nothing is deleted.
    """
    paths, previous = files_of_run(out_dir), os.path.join(out_dir, 'previous')
    if not paths:
        return
    with user_errors(OSError, f'cannot move the previous run in {out_dir} away',
                     'choose another --out_dir'):
        if os.path.exists(previous):
            os.rename(previous, first_free(previous))
        os.mkdir(previous)
        for path in paths:
            os.rename(path, os.path.join(previous, path.name))
    Progress().print_line(f'the previous run in {out_dir} is now in {previous}')


# --- log.csv


def read_rows(path):
    """The rows of a CSV file, a dict of texts each, without a last one that is half written."""
    with open(path, newline='', encoding='utf-8') as file:
        return [row for row in csv.DictReader(file)
                if None not in row and None not in row.values()]


class Log:
    """`log.csv` in out_dir, a row for each logged iteration; columns are named by the rows.

    A resumed run keeps the earlier rows, up to where it resumes. New rows wait in memory until
    `open`, so that an older log stays until there is a newer checkpoint. A disabled log does
    nothing. With cfg.wandb_log, rows go to Weights & Biases too.
    """

    def __init__(self, cfg, run, enabled=True):
        self.path, self.rows, self.columns = os.path.join(cfg.out_dir, 'log.csv'), [], None
        self.enabled, self.is_new = enabled, cfg.init_from != 'resume'
        self.wandb, self.last = None, None  # `last`: the iteration of the last row
        start, _, checkpoint = cfg.init_from.partition(':')
        former = os.path.join(os.path.dirname(checkpoint or self.path), 'log.csv')
        if enabled and start == 'resume' and os.path.exists(former):
            with user_errors((OSError, ValueError, KeyError, TypeError, csv.Error),
                             f'cannot read {former}', 'move it away, then resume again'):
                self.rows = [row for row in read_rows(former)
                             if int(row['iteration']) <= run['iter_num']]
                self.last = int(self.rows[-1]['iteration']) if self.rows else None
        if enabled and cfg.wandb_log:
            wandb = optional('wandb', '0.18')
            with user_errors(Exception, 'wandb cannot start', 'type: wandb login'):
                self.wandb = wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name,
                                        config=vars(cfg), id=run['wandb_id'], resume='allow')
            run['wandb_id'] = self.wandb.id

    def open(self):
        """Write all rows so far; from now on each row is written at once."""
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomic_file(self.path) as file:
            file.write(self.lines(dict(zip(self.columns, self.columns)), *self.rows))
        self.rows = []

    def write(self, row):
        """Add a row, a dict. A row of the same iteration as the last one completes that one."""
        if not self.enabled:
            return
        row = {name: value for name, value in row.items() if value is not None}
        if self.wandb:
            self.wandb.log(row, step=row['iteration'])
        completes, self.last = self.last == row['iteration'], row['iteration']
        if self.columns and not completes and row.keys() <= set(self.columns):
            with user_errors(OSError, f'cannot write {self.path}', 'free some space, then add '
                             '--init_from=resume'), open(self.path, 'ab') as file:
                file.write(self.lines(row))
            return
        if self.columns:
            self.rows = read_rows(self.path)
        self.rows += [self.rows.pop() | row if completes else row]
        if self.columns:
            self.open()

    def close(self):
        """Write the rows of a run that saved nothing, where they don't replace another run's."""
        if self.rows and not (self.is_new and files_of_run(os.path.dirname(self.path))):
            self.open()
        if self.wandb:
            self.wandb.finish()

    def lines(self, *rows):
        """Rows as bytes of CSV."""
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator='\n').writerows(rows)
        return text.getvalue().encode()


# --- signals and the progress line


@contextlib.contextmanager
def stop_signals(enabled, announce):
    """Context manager: Ctrl-C and the signals that end jobs only set `received` to their number.

    So a run can save before it ends. A second Ctrl-C exits at once. announce: print the first one.
    """
    stop = SimpleNamespace(received=0)

    def handle(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # exits at once, even outside Python's code
        if announce and not stop.received:
            with contextlib.suppress(OSError):  # os.write: the signal may interrupt a print
                os.write(1, b'\nfinishing this iteration, then saving; '
                            b'Ctrl-C again to quit without\n')
        stop.received = stop.received or number

    with contextlib.ExitStack() as at_end:
        # SIGHUP: the terminal was closed. SIGUSR1: Slurm's warning. Windows has neither.
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1') if enabled else ():
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                at_end.callback(signal.signal, number, signal.signal(number, handle))
        yield stop


class Progress:
    """One live line at the bottom of a terminal; in a file or a pipe, a line every ten seconds."""

    on_screen = False  # whether there is a live line now

    def __init__(self, enabled=True):
        self.enabled = enabled
        self.live = enabled and sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
        self.shown = time.perf_counter()

    def print_line(self, text, end='\n'):
        """Print lines that stay; if nobody reads them any more, continue without output."""
        if not self.enabled:
            return
        encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
        text = text.encode(encoding, 'replace').decode(encoding)
        try:
            print('\r\x1b[K' * self.live + text, end=end, flush=True)  # over the live line
        except OSError:
            discard_output()
        Progress.on_screen = not end

    def show_progress(self, fraction, text):
        """Show `text` behind a bar, of which `fraction` is full, cut to the terminal's width."""
        if time.perf_counter() - self.shown < (0.1 if self.live else 10):
            return
        self.shown = time.perf_counter()
        if not self.live:
            return self.print_line(text)
        width = shutil.get_terminal_size().columns - 3  # so that a ^C fits on the line too
        cells = min(20, width - len(text) - 1)
        bar = ('━' * round(cells * fraction)).ljust(cells, '╌')
        self.print_line(f'{bar} {text}'.strip()[:width], end='')


def print_end(cfg, run, saved_path, stopping, data, progress):
    """Print where the results are, and what to type next. saved_path: of the last save, or None."""
    if not stopping:
        script = 'sample.py' if data.splits['train'].mask is None else 'chat.py'
        script = os.path.relpath(Path(__file__).resolve().with_name(script))
        command = shlex.join([sys.orig_argv[0], script, f'--out_dir={cfg.out_dir}'])
        at_start = ' (before the first update)' * (not os.path.exists(f'{cfg.out_dir}/best.pt'))
        progress.print_line(f'best val loss {run["best_val_loss"]:.4f}{at_start} after '
                            f'{hms(run["seconds"])}, weights in {cfg.out_dir}\nnow: {command}')
        return
    result = 'nothing new to save'
    if saved_path:
        # It is in a folder stopped-N if out_dir still contains an earlier run.
        is_own = saved_path == f'{cfg.out_dir}/ckpt.pt'
        file = '' if is_own else f':{saved_path} and another --out_dir'
        result = f'{saved_path} is saved: to resume, add --init_from=resume{file}'
    progress.print_line(f'stopped at iteration {run["iter_num"]}; {result}')


def discard_output():
    """Redirect standard output to /dev/null."""
    with contextlib.suppress(OSError, ValueError):  # a notebook's output is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
