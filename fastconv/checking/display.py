"""What `fastconv check` shows: a row for each operation with its options in each precision, then the losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastconv import machine
from fastconv.accuracy import worst
from fastconv.checking.divergence import FLOOR, MARGIN, STEPS, Divergence
from fastconv.checking.report import VERDICTS, Graphs, Report, Result, Training
from fastconv.console import console as plain_console

STYLES = {"right": "green", "wrong": "bold red", "skipped": "dim"}
# The least width of a terminal, in characters, for all columns.
WIDE = 130
SHOWN_STEPS = (1, *range(10, STEPS + 1, 10))


def show(report: Report, console: Console) -> None:
    if not console.is_terminal:
        # A file or a pipe has no width: nothing is wrapped or cut.
        console = plain_console(file=console.file, width=200)
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    console.print(f"{report.device}; {versions}")
    groups = [list(group) for _, group in groupby(report.results, key=kind)]
    console.print(errors_table(groups, narrow=console.width < WIDE))
    show_reasons(report, groups, console)
    if report.training.divergence is not None:
        console.print(losses_table(report.training.divergence))
        show_divergence(report.training.divergence, console)
    if report.graphs.verdict == "right":
        console.print("Steps in CUDA graphs give the same losses and weights, bit for bit.")
    console.print(summary(report))


def kind(result: Result) -> tuple[str, str, str]:
    """What the cases in a row of the table have in common."""
    return result.case.subject, ", ".join(result.case.options.values()), result.case.precision


def worst_of(group: Sequence[Result]) -> Result:
    """A case that raised an error; if none did, the one whose error is farthest beyond or closest to its bound."""
    return max(
        group, key=lambda r: (r.verdict == "wrong", worst(r.errors)[1].excess if r.errors else float("inf"))
    )


def errors_table(groups: Sequence[Sequence[Result]], narrow: bool) -> Table:
    """The worst of each group; if `narrow`, in 80 characters, without the names of input and tensor."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0 if narrow else (0, 1))
    which = [] if narrow else ["on", "worst of", "input", "tensor"]
    for name in ("tried", "with", "in", *which, "error", "PyTorch's", "ratio", "verdict"):
        numbers = name in ("worst of", "error", "PyTorch's", "ratio")
        table.add_column(name, justify="right" if numbers else "left")
    previous = ""
    for group in groups:
        tried = [result for result in group if result.verdict != "skipped"]
        if not tried:
            continue
        subject, options, precision = kind(group[0])
        if previous and subject != previous:
            table.add_section()
        shown = worst_of(tried)
        name, figures = "-", ["-", "-", "-"]
        if shown.errors:
            name, error = worst(shown.errors)
            ratio = f"{error.ours / error.pytorch:.2f}" if error.pytorch else "-"
            figures = [f"{error.ours:.1e}", f"{error.pytorch:.1e}", ratio]
        which = [] if narrow else [shown.backend or "", str(len(tried)), shown.case.given, name]
        cells = [options, precision, *which, *figures]
        table.add_row("" if subject == previous else subject, *cells, Text(shown.verdict, STYLES[shown.verdict]))
        previous = subject
    return table


def show_reasons(report: Report, groups: Sequence[Sequence[Result]], console: Console) -> None:
    """Print why cases were skipped, and the worst of what is wrong in each row of the table."""
    skipped = Counter(result.reason for result in report.all_results if result.verdict == "skipped")
    for reason, count in skipped.items():
        console.print(f"skipped {count}: {reason}", style=STYLES["skipped"])
    for group in groups:
        wrong = [result for result in group if result.verdict == "wrong"]
        if wrong:
            shown = worst_of(wrong)
            text = f"WRONG {shown.case}: {shown.reason}"
            if len(wrong) > 1:
                text += f"; and {len(wrong) - 1} other inputs"
            console.print(Text(text, STYLES["wrong"]))
    trained: dict[str, Training | Graphs] = {"training": report.training, "CUDA graphs": report.graphs}
    for name, found in trained.items():
        if found.verdict == "wrong":
            console.print(Text(f"WRONG {name}: {found.reason}", STYLES["wrong"]))


def losses_table(found: Divergence) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("loss at step")
    for step in SHOWN_STEPS:
        table.add_column(str(step), justify="right")
    for name in ("reference", "fused"):
        losses = getattr(found, name)
        table.add_row(name, *(f"{losses[step - 1]:.6f}" for step in SHOWN_STEPS))
    return table


def show_divergence(found: Divergence, console: Console) -> None:
    console.print(
        f"Fused and reference losses differ by at most {found.difference:.1e} of the loss; right is up to "
        f"{found.bound:.1e}:\n{MARGIN:.0f} times what the reference's change if each initial weight moves to a "
        f"neighbouring float, at least {FLOOR:.0e}."
    )


def summary(report: Report) -> Text:
    counts = ", ".join(f"{report.count(verdict)} {verdict}" for verdict in VERDICTS)
    outcome = f"{counts} in {report.seconds:.0f} s"
    if report.right:
        return Text(f"fastconv check: {outcome}", STYLES["right"])
    return Text(f"fastconv check: WRONG: {outcome}", STYLES["wrong"])
