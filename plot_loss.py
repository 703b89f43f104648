"""Draw the loss curves of one run, or of several in one picture.

    python plot_loss.py out-wizard-char              # makes loss.png
    python plot_loss.py out-* --out=runs.svg         # compare runs
    python plot_loss.py out-* --x=seconds            # or tokens, to compare by what they cost

A run is a folder with the log.csv that train.py writes; it may be under way. Needs matplotlib.
"""

import csv
import os
from dataclasses import dataclass
from itertools import cycle

import numpy as np

import console
from configurator import override
from console import UsageError, UserError, atomic_file, blame_user

COLUMNS = 'iteration tokens seconds train_loss val_loss learning_rate'.split()
# Runs differ in color, brightness, dashes and markers, so that print and every eye can tell them
# apart. The colors are those of Okabe & Ito 2008, "Color Universal Design".
COLORS = ['#0072b2', '#d55e00', '#000000', '#009e73', '#cc79a7', '#e69f00', '#56b4e9']
DASHES = ['-', '--', '-.', ':']
MARKERS = ['o', 's', '^', 'D', 'v', 'P']
LOOK = {
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
    'axes.axisbelow': True, 'grid.color': '#e4e4e4', 'legend.edgecolor': 'none',
    'lines.linewidth': 1.6, 'lines.markersize': 5, 'svg.fonttype': 'none',  # text remains text
}


@dataclass
class PlotConfig:
    out: str = 'loss.png'  # the picture: its name ends in .png or .svg
    x: str = 'iteration'  # what runs to the right: iteration, tokens or seconds


def read_log(folder):
    """COLUMNS of a run's log.csv, (rows,) float64 each; nan where a cell is empty or infinite."""
    path, rows, line = os.path.join(folder, 'log.csv'), [], 1
    try:
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            for row in reader:
                line = reader.line_num
                if None not in row.values():  # a run that was killed may leave half a row
                    rows.append([float(row[column] or 'nan') for column in COLUMNS])
    except OSError as error:
        raise UserError(
            f'cannot read {path} ({error.strerror}): name folders that train.py has written'
        ) from None
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f'{path} is broken at line {line} ({type(error).__name__}: {error}): mend that line, '
            'or leave this run out'
        ) from None
    if not rows:
        raise UserError(f'{path} is empty: wait for the first evaluation, or leave this run out')
    table = np.array(rows).T
    table[~np.isfinite(table)] = np.nan
    return dict(zip(COLUMNS, table))


def smooth(values, most=200):
    """Means of neighbours, `most` of them at most; nan doesn't count. (N,) to (M,)."""
    each = -(-len(values) // most)
    padded = np.pad(values, (0, -len(values) % each), constant_values=np.nan)
    return np.ma.masked_invalid(padded.reshape(-1, each)).mean(axis=1).filled(np.nan)


def draw(folders, out, x='iteration'):
    """Draw the runs in `folders` into the file `out`. Raises UserError.

    The Figure is made without pyplot: whoever calls this keeps their backend and their settings.
    """
    ending = os.path.splitext(out)[1].lower()
    if ending not in ('.png', '.svg'):
        raise UsageError(f'out={out} ends neither in .png nor in .svg: say --out=loss.png')
    if x not in ('iteration', 'tokens', 'seconds'):
        raise UsageError(f'x={x} is not known: use iteration, tokens or seconds')
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = folders
    logs = [read_log(folder) for folder in folders]
    with blame_user():
        from matplotlib import style
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

    with style.context(['default', LOOK]):
        aside = len(logs) > 6  # the legend has to go beside the curves
        figure = Figure(figsize=(12 if aside else 8, 5.5), dpi=150)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
        figure.subplots_adjust(left=0.88 / figure.get_figwidth(), right=0.62 if aside else 0.97,
                               bottom=0.09, top=0.97, hspace=0.08)
        legend = 'validation, ★ at its best; faint: training'
        looks = zip(cycle(COLORS), cycle(DASHES), cycle(MARKERS))
        for name, log, (color, dashes, marker) in zip(names, logs, looks):
            line = dict(color=color, linestyle=dashes)
            upper.plot(smooth(log[x]), smooth(log['train_loss']), **line, alpha=0.5, linewidth=0.9)
            lower.plot(log[x], log['learning_rate'], **line, linewidth=1.2)
            skipped = log[x][np.isnan(log['train_loss']) & np.isfinite(log['learning_rate'])]
            if len(skipped):
                legend = 'validation, ★ at its best; faint: training; ×: not finite'
                upper.plot(skipped, np.ones(len(skipped)), 'x', color=color, clip_on=False,
                           transform=upper.get_xaxis_transform())  # at the top of the panel
            label = ' ' + name.replace('$', r'\$')  # $ starts a formula, _ hides it
            there = np.isfinite(log['val_loss'])
            at, val = log[x][there], log['val_loss'][there]
            if len(val):
                best = at[val.argmin()], val.min()
                label += f', best {val.min():.4f}'
                upper.plot(*best, '*', color=color, markeredgecolor='white', markersize=14,
                           zorder=3)
                if len(logs) == 1:  # of several, the figures might lie on top of each other
                    upper.annotate(f'{val.min():.4f}', best, (0, 9), textcoords='offset points',
                                   ha='center', bbox=dict(color='white', alpha=0.8, pad=1))
            upper.plot(at, val, **line, marker=marker, markevery=len(val) // 30 + 1, label=label)
        round_steps = dict(steps=[1, 2, 5, 10])
        upper.set(yscale='log', ylabel='loss (nats per token)')
        upper.yaxis.set_major_locator(MaxNLocator(9, **round_steps))
        upper.yaxis.set_major_formatter('{x:g}')
        upper.yaxis.set_minor_locator(NullLocator())
        upper.legend(title=legend, alignment='left', loc='upper left' if aside else 'upper right',
                     bbox_to_anchor=(1, 1))
        lower.set(xlabel=x, ylabel='learning rate')
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_locator(MaxNLocator(2, **round_steps))
        lower.yaxis.set_major_formatter('{x:g}')
        lower.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1, **round_steps))
        lower.xaxis.set_major_formatter(EngFormatter(sep=''))
        figure.align_ylabels()
        with atomic_file(out) as file:
            figure.savefig(file, format=ending[1:])


def main(argv):
    folders = [arg for arg in argv if not arg.startswith('-')]
    cfg = override(PlotConfig(), [arg for arg in argv if arg.startswith('-')], usage=__doc__)
    if not folders:
        raise UsageError('which runs? python plot_loss.py out-*')
    draw(folders, cfg.out, cfg.x)
    print(f'{cfg.out}: the curves of {", ".join(folders)}')


if __name__ == '__main__':
    console.run(main)
