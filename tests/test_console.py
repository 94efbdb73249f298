"""What people read is printed as it is: names may hold what Rich takes for markup."""

import io

from rich.table import Table

from fastconv.console import console
from fastconv.progress import progress
from fastconv.swapping.report import Candidate, SwapReport

# A tag, one that closes nothing, at which Rich raises, and an emoji.
ODD = "[red]a[/x] :smile:"


def test_strings_and_cells_of_tables():
    file = io.StringIO()
    printed = console(file=file, width=80)
    printed.print(ODD)
    printed.print(ODD, style="red")
    table = Table(ODD)
    table.add_row(ODD)
    printed.print(table)
    assert file.getvalue().count(ODD) == 4


def test_a_progress_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with progress(console(file=file, width=80), 2) as advanced:
        advanced(ODD)
    assert ODD in file.getvalue()


def test_a_notebook_gets_text(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    file = io.StringIO()
    console(file=file).print(ODD)
    assert file.getvalue() == f"{ODD}\n"


def test_a_report_of_swap():
    assert ODD in str(SwapReport((Candidate(ODD, "Block", "block", False, ODD),)))
