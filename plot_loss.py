"""Draw the loss curves of one run, or of several in one picture.

    python plot_loss.py out-wizard-char              # makes loss.png
    python plot_loss.py out-* --x=seconds --out=runs.svg

A run is a folder with train.py's log.csv; it may still be training. If validation loss rises
while training loss falls, the model overfits: it memorizes its text.
"""

import csv
import os
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle

import numpy as np

import console
from configurator import check, override
from console import UsageError, user_errors

X = ['iteration', 'tokens', 'epochs', 'seconds']
LONG_LOG = 1 << 20  # bytes; drawing more takes a second or longer
# Colors that everybody can tell apart (Okabe & Ito 2008); dashes and markers are for gray print.
COLORS = ['#0072b2', '#d55e00', '#000000', '#009e73', '#cc79a7', '#e69f00', '#56b4e9']
LINES = ['-o', '--s', '-.^', ':D']
STYLE = {
    'axes.grid': True, 'axes.grid.which': 'both', 'grid.color': '#e4e4e4', 'lines.markersize': 5,
    'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
    'svg.fonttype': 'none', 'text.parse_math': False,  # text remains text, a $ in a name a $
}


@dataclass
class PlotConfig:
    out: str = 'loss.png'  # the picture: .png, .svg or .pdf
    x: str = 'iteration'  # the horizontal axis: iteration, tokens, epochs or seconds

    def __post_init__(self):
        check(self, x=X)
        self.out = os.path.expanduser(self.out)
        if not self.out.lower().endswith(('.png', '.svg', '.pdf')):
            raise UsageError(f'out={self.out} must end in .png, .svg or .pdf')


def read_evaluations(folder):
    """X, train_eval_loss and val_loss of a run's evaluations, by name: (rows,) float64 each."""
    path = os.path.join(folder, 'log.csv')
    with user_errors((OSError, KeyError, ValueError, csv.Error), f'cannot draw {path}',
                     'wait for the first evaluation, or leave this run out'):
        rows = [row for row in console.read_rows(path) if row['val_loss']]
        if not rows:
            raise ValueError('it has no evaluations')
        return {name: np.array([float(row[name] or 'nan') for row in rows])
                for name in (*X, 'train_eval_loss', 'val_loss')}


def draw(folders, out, x='iteration'):
    """Draw the runs in `folders` into the file `out`. Raises UserError."""
    runs = [read_evaluations(folder) for folder in folders]
    console.optional('matplotlib', '3.9')
    from matplotlib import style
    from matplotlib.figure import Figure  # no pyplot: the caller's backend and settings stay

    with style.context(['default', STYLE]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # the font lacks a character of a folder's name
        figure = Figure(figsize=(8, 5), dpi=150)
        axes = figure.subplots()
        for folder, run, color, line in zip(folders, runs, cycle(COLORS), cycle(LINES)):
            val = run['val_loss']
            best = np.argmin(np.where(np.isfinite(val), val, np.inf))
            # The space: a name that begins with _ would be hidden.
            label = f' {os.path.normpath(folder)}, best {val[best]:.4f}'
            axes.plot(run[x], val, line, color=color, markevery=len(val) // 30 + 1, label=label)
            axes.plot(run[x], run['train_eval_loss'], line[:-1], color=color, lw=1, alpha=0.6)
            axes.scatter(run[x][best], val[best], 150, color, marker='*', zorder=3)
        axes.set(xlabel=x, ylabel='loss (nats per token)')
        if 0 < axes.dataLim.y0 < np.inf:
            axes.set_yscale('log', subs=[1.5, 2, 2.5, 3, 4, 5, 6, 8])
            axes.yaxis.set(major_formatter='{x:g}', minor_formatter='{x:g}')
        axes.legend(title='with markers: validation, ★ at its best; thin: training', ncols=2,
                    alignment='left', loc='lower left', bbox_to_anchor=(0, 1))  # hides no curve
        with console.atomic_file(out) as file:
            figure.savefig(file, format=out[-3:].lower(), bbox_inches='tight')


def draw_run(log, progress, at_end=False):
    """Draw loss.png beside a run's log, if matplotlib is installed; a long one only at the end."""
    if not log.columns or not find_spec('matplotlib'):
        return
    if at_end or os.path.getsize(log.path) < LONG_LOG:
        folder = os.path.dirname(log.path)
        try:
            draw([folder], os.path.join(folder, 'loss.png'))
        except Exception as error:  # no picture is worth a run
            progress.print_line(f'(no loss.png: {error})')


def main(argv):
    folders = [arg for arg in argv if not arg.startswith('-')]
    cfg = override(PlotConfig(), [arg for arg in argv if arg.startswith('-')], usage=__doc__)
    if not folders:
        raise UsageError('no run is named: type python plot_loss.py out-*')
    draw(folders, cfg.out, cfg.x)
    print(f'{cfg.out}: the curves of {", ".join(folders)}')


if __name__ == '__main__':
    console.run(main)
