"""Pictures of a comparison: what accuracy costs, and how it grows with the epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, BinaryIO

from fastconv.extras import import_extra
from fastconv.training.comparison import lecture
from fastconv.training.comparison.rows import Mean, Row
from fastconv.training.comparison.tables import has_lecture

# The palette of Okabe and Ito, which colour-blind readers can tell apart, without its yellow, which is faint on
# white: https://jfly.uni-koeln.de/color. The numbers of colours and of markers have no common factor, so that rows
# share one but not both.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LECTURE_LINE = {"color": "#666666", "linestyle": "--", "linewidth": 1}
# Inches: of a picture, and the height of what is above its legend.
WIDTH, HEIGHT = 9.0, 4.0
# Characters of a legend that fit beside each other.
LEGEND_WIDTH = 110


def scatter(rows: Sequence[Row], file: BinaryIO) -> None:
    """Draw validation accuracy against seconds and against parameters, as a PNG.

    Args:
        rows: of which at least one has done an epoch.
        file: to write to.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    rows = [row for row in rows if row.validation is not None]
    figure = _figure(rows)
    by_time, by_size = figure.subplots(1, 2, sharey=True)
    for row, style in zip(rows, _styles(), strict=False):
        assert row.validation is not None
        _draw_point(by_time, row.seconds, row.validation, row.name, style)
        _draw_point(by_size, Mean(row.first.parameters, None), row.validation, row.name, style)
    if has_lecture(rows):
        for axes, x in ((by_time, lecture.SECONDS), (by_size, lecture.PARAMETERS)):
            axes.axhline(100 * lecture.VALIDATION_ACCURACY, **LECTURE_LINE)
            axes.plot(x, 100 * lecture.VALIDATION_ACCURACY, "*", markersize=11, color=LECTURE_LINE["color"])
        _label_lecture(by_size)
    for axes, label in ((by_time, "seconds of training"), (by_size, "parameters")):
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.margins(0.1)
        _label_logarithmic(axes)
        axes.grid(alpha=0.3)
    by_time.set_ylabel("validation accuracy, %")
    _finish(figure, file)


def _draw_point(axes: Any, x: Mean, accuracy: Mean, name: str, style: Mapping[str, str]) -> None:
    """Draw a row with a standard deviation to each side, if there is one."""
    y = 100 * accuracy.value
    if accuracy.deviation is not None:
        errors = {"xerr": x.deviation, "yerr": 100 * accuracy.deviation}
        axes.errorbar(x.value, y, **errors, fmt="none", capsize=3, ecolor=style["color"])
    axes.plot(x.value, y, linestyle="none", markersize=7, label=name, **style)


def curves(rows: Sequence[Row], file: BinaryIO) -> None:
    """Draw validation accuracy against the epoch, as a PNG: the mean over seeds, and a thin line for each of them.

    Args and Raises are those of `scatter`.
    """
    rows = [row for row in rows if row.validation is not None]
    figure = _figure(rows)
    axes = figure.subplots()
    for row, style in zip(rows, _styles(), strict=False):
        epochs = range(1, len(row.curve) + 1)
        # Some ten markers, however many epochs.
        every = math.ceil(len(epochs) / 10)
        axes.plot(epochs, [100 * each.value for each in row.curve], label=row.name, markevery=every, **style)
        if len(row.runs) > 1:
            for run in row.runs:
                accuracies = [100 * metrics["validation_accuracy"] for metrics in run.history]
                axes.plot(epochs, accuracies, color=style["color"], linewidth=0.6, alpha=0.5)
    if has_lecture(rows):
        axes.axhline(100 * lecture.VALIDATION_ACCURACY, **LECTURE_LINE)
        _label_lecture(axes)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy, %")
    axes.xaxis.set_major_locator(import_extra("matplotlib.ticker").MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _finish(figure, file)


def _styles() -> Any:
    return ({"color": colour, "marker": marker} for colour, marker in zip(cycle(COLOURS), cycle(MARKERS)))


def _figure(rows: Sequence[Row]) -> Any:
    """Return a figure with room for the panels and, below them, the legend."""
    lines = math.ceil(len(rows) / _legend_columns([row.name for row in rows]))
    size = (WIDTH, HEIGHT + 0.22 * lines)
    return import_extra("matplotlib.figure").Figure(figsize=size, layout="constrained")


def _legend_columns(names: Sequence[str]) -> int:
    # A marker takes about six characters.
    return max(1, LEGEND_WIDTH // (6 + max(map(len, names))))


def _label_lecture(axes: Any) -> None:
    """Name the lecture's line where nothing else is drawn: to the right of it."""
    accuracy = 100 * lecture.VALIDATION_ACCURACY
    axes.annotate(
        f"{lecture.NAME},\n{accuracy:.2f} %",
        (1, accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        verticalalignment="center",
        fontsize="small",
        color=LECTURE_LINE["color"],
    )


def _label_logarithmic(axes: Any) -> None:
    """Label a logarithmic axis with plain numbers that do not touch, whatever it spans."""
    ticker = import_extra("matplotlib.ticker")
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    if decades < 0.5:
        locator = ticker.MaxNLocator(4)
    else:
        locator = ticker.LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,))
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    )
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _finish(figure: Any, file: BinaryIO) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=_legend_columns(names), frameon=False, fontsize="small"
    )
    figure.savefig(file, format="png", dpi=100)
