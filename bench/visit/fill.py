"""Compile the kernels of all stages without a GPU, and pack them for the machine that has one.

    python3 -m fastconv.bench.visit.fill

takes the interpreter's own versions of PyTorch and Triton, and of Python for the launchers: they should be those
of the GPU's machine. What an earlier call compiled is compiled again only if it changed. It prints which kernels
have long machine code, or spill registers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import machine_code
from . import compilations, kernel_cache, parts
from .programs import PROGRAMS

FOLDER = parts.ROOT / ".visit"
CACHE = FOLDER / "triton"
# Above these a kernel is to have a reason.
MOST_INSTRUCTIONS, MOST_SPILLS = 4000, 64
SUITE = ("test_gpu.py", "test_triton.py", "test_stencil.py", "test_swapped_networks.py")
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
    print("\n".join(heavy(found)))


def fill_for_tests(processes: int, scratch: Path) -> None:
    """Run the tests that a GPU runs, with assertions that Python and pytest leave out."""
    suite = [parts.ROOT / "tests" / file for file in SUITE]
    tests = parts.pytest_part(
        "tests", scratch / "outcomes.jsonl", processes, "--assert=plain", "-m", parts.GPU_TESTS, *suite
    )
    plugin = {"PYTEST_PLUGINS": f"{parts.MODULES}.pytest_kernels", "PYTHONOPTIMIZE": "1"}
    parts.run([tests._replace(environment={**tests.environment, **plugin})], SECONDS, FOLDER)


def heavy(found: Iterable[dict[str, Any]]) -> list[str]:
    """The kernels whose machine code is long or spills registers, by what they were compiled for."""
    kernels = {line["entry"]: line for line in found}
    with ThreadPoolExecutor() as pool:
        codes = pool.map(machine_code.read_cubin, [read(line) for line in kernels.values()])
    return [
        f"{code.instructions} instructions, {code.spills} bytes of spills: {line['kernel']} {line['constants']}"
        for code, line in zip(codes, kernels.values(), strict=True)
        if code.instructions > MOST_INSTRUCTIONS or code.spills > MOST_SPILLS
    ]


def read(line: dict[str, Any]) -> bytes:
    return next((CACHE / line["entry"]).glob("*.cubin")).read_bytes()


if __name__ == "__main__":
    main()
