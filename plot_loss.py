"""Draw the loss curves of one run, or of several in one picture.

    python plot_loss.py out-wizard-char              # makes loss.png
    python plot_loss.py out-* --x=seconds --out=runs.svg

A run is a folder with a log.csv from train.py, which may still write to it. Where validation
loss rises while training loss falls, the model overfits: it learns its text by heart.
"""

import csv
import os
from dataclasses import dataclass
from itertools import cycle

import numpy as np

import console
from configurator import override
from console import UsageError, UserError

X = ['iteration', 'tokens', 'epochs', 'seconds']
COLUMNS = X + ['train_eval_loss', 'val_loss', 'learning_rate']
# Colors that everybody can tell apart (Okabe & Ito 2008); dashes and markers are for gray print.
COLORS = ['#0072b2', '#d55e00', '#000000', '#009e73', '#cc79a7', '#e69f00', '#56b4e9']
LINES = [('-', 'o'), ('--', 's'), ('-.', '^'), (':', 'D')]
STYLE = {
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'lines.markersize': 5,
    'grid.color': '#e4e4e4', 'legend.frameon': False, 'svg.fonttype': 'none',  # text remains text
    'text.parse_math': False,  # a $ in a name is a $
}


@dataclass
class PlotConfig:
    out: str = 'loss.png'  # the picture: .png, .svg or .pdf
    x: str = 'iteration'  # the horizontal axis: iteration, tokens, epochs or seconds


def read_log(folder):
    """COLUMNS of a run's log.csv, (rows,) float64 each; nan where a cell is empty."""
    path = os.path.join(folder, 'log.csv')
    try:
        with open(path, newline='', encoding='utf-8') as file:
            rows = [[float(row[name] or 'nan') for name in COLUMNS] for row in csv.DictReader(file)
                    if None not in row.values()]  # the last may be half written
        if not rows:
            raise ValueError('it has no rows')
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise UserError(f'cannot draw {path} ({error}): wait for the first evaluation, or leave '
                        'this run out') from None
    return dict(zip(COLUMNS, np.array(rows).T))


def draw(folders, out, x='iteration'):
    """Draw the runs in `folders` into the file `out`. Raises UserError."""
    if x not in X:
        raise UsageError(f'x={x} must be one of {", ".join(X)}')
    logs = [read_log(folder) for folder in folders]
    with console.user_errors():  # without pyplot, so the caller's backend and settings stay
        from matplotlib import style, ticker
        from matplotlib.figure import Figure
    with style.context(['default', STYLE]):
        figure = Figure(figsize=(8, 5), dpi=150)
        upper, lower = figure.subplots(2, sharex=True, height_ratios=[4, 1])
        for folder, log, color, (dash, marker) in zip(folders, logs, cycle(COLORS), cycle(LINES)):
            line = dict(color=color, linestyle=dash)
            label = ' ' + os.path.normpath(folder)  # a name that began with _ would be hidden
            known = np.isfinite(log['val_loss'])
            at, train, val = (log[name][known] for name in (x, 'train_eval_loss', 'val_loss'))
            if len(val):
                label += f', best {val.min():.4f}'
                upper.scatter(at[val.argmin()], val.min(), 150, color, marker='*', zorder=3)
            upper.plot(at, val, **line, marker=marker, markevery=len(val) // 30 + 1, label=label)
            upper.plot(at, train, **line, linewidth=1, alpha=0.6)
            lower.plot(log[x], log['learning_rate'], **line)
        upper.set(yscale='log', ylabel='loss (nats per token)')
        upper.minorticks_off()
        ticks = ticker.LogLocator(subs=[1, 1.5, 2, 2.5, 3, 4, 5, 6, 8])  # of each power of ten
        upper.yaxis.set(major_locator=ticks, major_formatter='{x:g}')
        upper.legend(title='with markers: validation, ★ at its best; thin: training', ncols=2,
                     alignment='left', loc='lower left', bbox_to_anchor=(0, 1))  # hides no curve
        lower.set(xlabel=x, ylabel='learning rate', ylim=(0, None))
        figure.align_ylabels()
        with console.user_errors(), console.atomic_file(out) as file:
            figure.savefig(file, format=os.path.splitext(out)[1][1:], bbox_inches='tight')


def main(argv):
    folders = [arg for arg in argv if not arg.startswith('-')]
    cfg = override(PlotConfig(), [arg for arg in argv if arg.startswith('-')], usage=__doc__)
    if not folders:
        raise UsageError('no run is named: write python plot_loss.py out-*')
    draw(folders, cfg.out, cfg.x)
    print(f'{cfg.out}: the curves of {", ".join(folders)}')


if __name__ == '__main__':
    console.run(main)
