"""Draw the loss curves of one run, or of several in one picture.

    python plot_loss.py out-wizard-char              # makes loss.png
    python plot_loss.py out-* --x=seconds --out=runs.svg

A run is a folder with a log.csv from train.py, which may still write to it. Where validation
loss rises while training loss falls, the model overfits: it learns its text by heart.
"""

import csv
import os
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle

import numpy as np

import console
from configurator import override
from console import UsageError, user_errors

X = ['iteration', 'tokens', 'epochs', 'seconds']
# Colors that everybody can tell apart (Okabe & Ito 2008); dashes and markers are for gray print.
COLORS = ['#0072b2', '#d55e00', '#000000', '#009e73', '#cc79a7', '#e69f00', '#56b4e9']
LINES = [('-', 'o'), ('--', 's'), ('-.', '^'), (':', 'D')]
STYLE = {
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'lines.markersize': 5,
    'grid.color': '#e4e4e4', 'legend.frameon': False, 'svg.fonttype': 'none',  # text remains text
    'text.parse_math': False,  # a $ in a name is a $
}


LONG_LOG = 1 << 20  # bytes; to draw all of it takes a second or more


@dataclass
class PlotConfig:
    out: str = 'loss.png'  # the picture: .png, .svg or .pdf
    x: str = 'iteration'  # the horizontal axis: iteration, tokens, epochs or seconds

    def __post_init__(self):
        if self.x not in X:
            raise UsageError(f'x={self.x} must be one of {", ".join(X)}')
        if not self.out.lower().endswith(('.png', '.svg', '.pdf')):
            raise UsageError(f'out={self.out} must end in .png, .svg or .pdf')


def read_evaluations(folder):
    """X, train_eval_loss and val_loss of a run's evaluations, by name: (rows,) float64 each."""
    path = os.path.join(folder, 'log.csv')
    names = [*X, 'train_eval_loss', 'val_loss']
    with user_errors((OSError, KeyError, ValueError, csv.Error), f'cannot draw {path}',
                     'wait for the first evaluation, or leave this run out'):
        rows = [[float(row[name] or 'nan') for name in names] for row in console.read_rows(path)
                if row['val_loss']]
        if not rows:
            raise ValueError('it has no evaluations')
        return dict(zip(names, np.array(rows).T))


def draw(folders, out, x='iteration'):
    """Draw the runs in `folders` into the file `out`. Raises UserError."""
    runs = [read_evaluations(folder) for folder in folders]
    console.optional('matplotlib', '3.9')
    from matplotlib import style, ticker  # no pyplot: the caller's backend and settings stay
    from matplotlib.figure import Figure

    with style.context(['default', STYLE]), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # which its font lacks, in a folder's name
        figure = Figure(figsize=(8, 5), dpi=150)
        axes = figure.subplots()
        for folder, run, color, (dash, marker) in zip(folders, runs, cycle(COLORS), cycle(LINES)):
            line = dict(color=color, linestyle=dash)
            label = ' ' + os.path.normpath(folder)  # a name that began with _ would be hidden
            val = run['val_loss']
            if np.isfinite(val).any():
                best = np.nanargmin(np.where(np.isfinite(val), val, np.nan))
                label += f', best {val[best]:.4f}'
                axes.scatter(run[x][best], val[best], 150, color, marker='*', zorder=3)
            axes.plot(run[x], val, **line, marker=marker, markevery=len(val) // 30 + 1, label=label)
            axes.plot(run[x], run['train_eval_loss'], **line, linewidth=1, alpha=0.6)
        axes.set(xlabel=x, ylabel='loss (nats per token)')
        if all((run[name] > 0).all() for run in runs for name in ('val_loss', 'train_eval_loss')):
            axes.set_yscale('log')
            axes.minorticks_off()
            ticks = ticker.LogLocator(subs=[1, 1.5, 2, 2.5, 3, 4, 5, 6, 8])  # of each power of ten
            axes.yaxis.set(major_locator=ticks, major_formatter='{x:g}')
        axes.legend(title='with markers: validation, ★ at its best; thin: training', ncols=2,
                    alignment='left', loc='lower left', bbox_to_anchor=(0, 1))  # hides no curve
        with console.atomic_file(out) as file:
            figure.savefig(file, format=out[-3:].lower(), bbox_inches='tight')


def draw_run(log, progress, at_end=False):
    """Draw loss.png beside a run's log, if matplotlib is installed; a long one only at the end."""
    if not (log.columns and find_spec('matplotlib')):
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
