"""Which of our kernels Triton found in its cache, and which it compiled, in all processes of a stage.

Every process appends lines of JSON to a file of its own, in the folder that the environment variable
FASTCONV_COMPILATIONS names.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import triton

VARIABLE = "FASTCONV_COMPILATIONS"
_OURS = "fastconv.kernels"


def count() -> None:
    """Note from now on what this process finds or compiles; nothing without the environment variable."""
    if folder := os.environ.get(VARIABLE):
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = Path(folder, str(os.getpid()))

        def listener(src: Any, metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
            # PyTorch's compiler uses Triton too.
            if src.fn.__module__.startswith(_OURS):
                line = {
                    "kernel": src.name,
                    "hit": cache_hit,
                    "entry": Path(next(iter(metadata_group.values()))).parent.name,
                    "signature": list(src.signature.values()),
                    "constants": {
                        src.fn.arg_names[place]: str(value) for (place,), value in src.constants.items()
                    },
                }
                with file.open("a") as lines:
                    print(json.dumps(line), file=lines)

        triton.knobs.compilation.listener = listener


def found(folder: Path) -> list[dict[str, Any]]:
    """What all processes noted."""
    return [json.loads(line) for path in sorted(folder.glob("*")) for line in path.read_text().splitlines()]


def report(folder: Path) -> str:
    """How often a kernel was found, and which ones were not, in a line."""
    lines = found(folder)
    misses = Counter(line["kernel"] for line in lines if not line["hit"])
    named = ", ".join(f"{count} {name}" for name, count in misses.most_common(8))
    hits = len(lines) - misses.total()
    return f"kernels: {hits} found in the cache, {misses.total()} compiled" + (f": {named}" if named else "")
