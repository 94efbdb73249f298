"""The README's figures of speed, from committed results.

    python -m bench.readme

rewrites the table between the two marks, and the pictures.
"""

from __future__ import annotations

from pathlib import Path

from . import plots, results, tables
from .suite import Row

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- python -m bench.readme: begin -->\n", "<!-- end -->\n"
# What the table shows: the batch of the lecture, at its first stage.
SHOWN = {"images": 128, "channels": 32, "side": 8}


def committed() -> Path:
    """The results that the README shows: the newest on a CPU."""
    found = [path for path in results.FOLDER.glob("*.json") if results.read(path)[0]["driver"] is None]
    if not found:
        raise results.ResultsError(f"there are no results of a CPU in {results.FOLDER}; run fastconv bench")
    return max(found, key=lambda path: results.read(path)[0]["date"])


def shown(rows: list[Row]) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in SHOWN.items())]


def section() -> str:
    """What stands between the marks."""
    path = committed()
    about, rows = results.read(path)
    pictures = [
        f"![{alt}](bench/results/{path.stem}-{suffix}.png)"
        for suffix, alt in (
            ("speedups", "Speed-ups over eager PyTorch"),
            ("batches", "Time of a block against the batch"),
        )
    ]
    return "\n\n".join([f"{tables.machine(about)}:", tables.speedups(shown(rows)), *pictures]) + "\n"


def rewritten(text: str) -> str:
    """The README with its section anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise results.ResultsError(f"{README.name} lacks the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def main() -> None:
    path = committed()
    README.write_text(rewritten(README.read_text()))
    plots.write_all(results.read(path)[1], path)


if __name__ == "__main__":
    main()
