"""Compile the kernels of all stages without a GPU, and pack them for the machine that has one.

    python3 -m fastconv.bench.tools.visit.fill

takes the interpreter's own versions of PyTorch and Triton, and of Python for the launchers: they should be those
of the GPU's machine. What an earlier call compiled is compiled again only if it changed. It prints which kernels
have long machine code, or spill registers.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import machine_code
from . import compilations, kernel_cache, parts
from .programs import PROGRAMS

FOLDER = parts.ROOT / ".visit"
CACHE = FOLDER / "triton"
# Above these a kernel is to have a reason.
MOST_INSTRUCTIONS, MOST_SPILLS = 4000, 64
INSTRUCTION_BYTES = 16
# More than any of them takes.
SECONDS = 7200


def main() -> None:
    noted = FOLDER / "compilations"
    shutil.rmtree(noted, ignore_errors=True)
    os.environ |= {
        "TRITON_CACHE_DIR": str(CACHE),
        "TRITON_STORE_BINARY_ONLY": "1",
        "FASTCONV_SELFTEST": "0",
        "OMP_NUM_THREADS": "1",
        compilations.VARIABLE: str(noted),
    }
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        fill_for_tests(processes, Path(scratch))
        parts.run([parts.program("programs", name, name=name) for name in PROGRAMS], SECONDS, FOLDER)
    found = compilations.found(noted)
    print(compilations.report(noted))
    in_use = {line["entry"] for line in found}
    # Launchers, which are C, belong to no single kernel.
    launchers = {path.parent.name for path in CACHE.glob("*/*.so")}
    archive = FOLDER / "luggage/kernels.tar.xz"
    count = kernel_cache.pack(CACHE, archive, without=kernel_cache.entries(CACHE) - in_use - launchers)
    print(f"{archive.relative_to(parts.ROOT)}: {count} entries, {archive.stat().st_size / 1e6:.1f} MB")
    for line in heavy(found):
        print(line, flush=True)


def fill_for_tests(processes: int, scratch: Path) -> None:
    """Run the tests that a GPU runs, with assertions that Python and pytest leave out."""
    tests = parts.pytest_part(
        "tests", scratch / "outcomes.jsonl", processes, "--assert=plain", "-m", parts.GPU_TESTS, *parts.SUITE
    )
    plugin = {"PYTEST_PLUGINS": f"{parts.MODULES}.pytest_kernels", "PYTHONOPTIMIZE": "1"}
    parts.run([tests._replace(environment={**tests.environment, **plugin})], SECONDS, FOLDER)


def heavy(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The kernels whose machine code is long or spills registers, and what they were compiled for."""
    kernels = {line["entry"]: line for line in found}
    for entry, line in kernels.items():
        (path,) = (CACHE / entry).glob("*.cubin")
        # Disassembling takes a second: most are too short for it, and have no stack to spill to.
        if path.stat().st_size < INSTRUCTION_BYTES * MOST_INSTRUCTIONS and not stack_bytes(path):
            continue
        code = machine_code.read_cubin(path.read_bytes())
        if code.instructions > MOST_INSTRUCTIONS or code.spills > MOST_SPILLS:
            what = f"{line['kernel']} {line['constants']}"
            yield f"{code.instructions} instructions, {code.spills} bytes of spills: {what}"


def stack_bytes(cubin: Path) -> int:
    usage = machine_code.cuobjdump("--dump-resource-usage", str(cubin))
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


if __name__ == "__main__":
    main()
