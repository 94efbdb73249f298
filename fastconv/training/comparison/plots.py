"""Pictures of a comparison: what accuracy costs, and how it grows with the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any, BinaryIO

from fastconv.extras import import_extra
from fastconv.training.comparison import lecture
from fastconv.training.comparison.rows import Row
from fastconv.training.comparison.tables import has_lecture

# The palette of Okabe and Ito, which colour-blind readers can tell apart, without its yellow, which is faint on
# white: https://jfly.uni-koeln.de/color. The numbers of colours and of markers have no common factor, so that rows
# share one but not both.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
WIDTH = 9.0
PANELS = 4.0
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
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ("seconds of training", "parameters"), strict=True):
        for row, style in zip(rows, _styles(), strict=False):
            accuracy = row.validation
            assert accuracy is not None
            by_time = label.startswith("seconds")
            x = row.seconds if by_time else None
            axes.errorbar(
                row.first.parameters if x is None else x.value,
                100 * accuracy.value,
                xerr=None if x is None else x.deviation,
                yerr=None if accuracy.deviation is None else 100 * accuracy.deviation,
                linestyle="none",
                capsize=3,
                markersize=7,
                label=row.name,
                **style,
            )
        if has_lecture(rows):
            of_lecture = lecture.SECONDS if label.startswith("seconds") else lecture.PARAMETERS
            _draw_lecture(axes)
            axes.plot(of_lecture, 100 * lecture.VALIDATION_ACCURACY, "*", markersize=11, color="#666666")
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.margins(0.1)
        _readable_ticks(axes)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation accuracy, %")
    _finish(figure, file)


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
        _draw_lecture(axes)
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
    size = (WIDTH, PANELS + 0.22 * lines)
    return import_extra("matplotlib.figure").Figure(figsize=size, layout="constrained")


def _legend_columns(names: Sequence[str]) -> int:
    # A marker takes about six characters.
    return max(1, LEGEND_WIDTH // (6 + max(map(len, names))))


def _draw_lecture(axes: Any) -> None:
    accuracy = 100 * lecture.VALIDATION_ACCURACY
    axes.axhline(accuracy, color="#666666", linestyle="--", linewidth=1)
    axes.annotate(
        f"{lecture.NAME}: {accuracy:.2f} %",
        # In the left corner above the line.
        (0, accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize="small",
        color="#444444",
    )


def _readable_ticks(axes: Any) -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade."""
    ticker = import_extra("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _finish(figure: Any, file: BinaryIO) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=_legend_columns(names), frameon=False, fontsize="small"
    )
    figure.savefig(file, format="png", dpi=100)
