"""What a compiled kernel is made of, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import triton

# A line of NVIDIA's disassembly, perhaps with a predicate: `/*0a70*/  @!P3 LDG.E.128 R28, ... ;`. A branch names
# the address that it leads to.
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_GLOBAL = {"LDG", "STG", "LDGSTS"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL"}
_SPILLS = {"LDL", "STL"}
_MEMORY = _GLOBAL | _SHARED | _SPILLS
_TENSOR = {"HMMA", "HGMMA", "UTCHMMA"}


class MachineCode(NamedTuple):
    registers: int
    # Bytes that each thread stores to local memory or loads from it.
    spills: int
    instructions: int
    # Instructions of each kind: HMMA by a warp, HGMMA by four, UTCHMMA by one thread, MFMA by a wave of AMD's.
    tensor: dict[str, int]
    # Accesses of global memory by 128 bits, and by less.
    wide_accesses: int
    narrow_accesses: int
    # Cycles for which the instructions of one warp occupy the path to memory, 128 bytes wide.
    memory_cycles: int = 0
    # How many of these instructions, and of these cycles, are within a loop.
    looped_instructions: int = 0
    looped_memory_cycles: int = 0


# The same kernel serves several operations.
@cache
def read(compiled: Any) -> MachineCode:
    """The machine code of a CompiledKernel of Triton."""
    return read_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _read_amd(compiled.asm["amdgcn"])


def read_cubin(binary: bytes) -> MachineCode:
    """NVIDIA's machine code, as a cubin holds it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        registers = re.search(r"\bREG:(\d+)", cuobjdump("--dump-resource-usage", file.name))
        lines = _INSTRUCTION.findall(cuobjdump("-sass", file.name))
    code_at = {int(address, 16): opcode for address, opcode, _ in lines if opcode != "NOP"}
    opcodes = list(code_at.values())
    if registers is None or not opcodes:
        raise RuntimeError("cuobjdump prints something else than it used to: no registers, or no instructions")
    names = Counter(code.split(".")[0] for code in opcodes)
    accesses = [code for code in opcodes if code.split(".")[0] in _GLOBAL]
    spills = [code for code in opcodes if code.split(".")[0] in _SPILLS]
    loops = [
        range(int(target[1], 16), int(address, 16) + 1)
        for address, opcode, operands in lines
        if opcode.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", operands))
    ]
    looped = [code for address, code in code_at.items() if any(address in loop for loop in loops)]
    return MachineCode(
        registers=int(registers[1]),
        spills=sum(map(_width, spills)),
        instructions=len(opcodes),
        tensor={name: names[name] for name in sorted(_TENSOR & names.keys())},
        wide_accesses=sum(_width(code) == 16 for code in accesses),
        narrow_accesses=sum(_width(code) < 16 for code in accesses),
        memory_cycles=_memory_cycles(opcodes),
        looped_instructions=len(looped),
        looped_memory_cycles=_memory_cycles(looped),
    )


def _memory_cycles(opcodes: list[str]) -> int:
    return sum(max(1, _width(code) // 4) for code in opcodes if code.split(".")[0] in _MEMORY)


def cuobjdump(option: str, file: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _width(opcode: str) -> int:
    """Bytes of each thread: 4 unless the opcode says otherwise, as in LDG.E.128, STS.U16 or LDSM.16.M88.4."""
    if opcode.startswith(("LDSM", "STSM")):
        return 4 * int(opcode[-1]) if opcode[-2:] in (".2", ".4") else 4
    bits = re.search(r"\.[US]?(8|16|64|128)\b", opcode)
    return int(bits[1]) // 8 if bits else 4


def _read_amd(assembly: str) -> MachineCode:
    opcodes = re.findall(r"^\t((?:[sv]|ds|buffer|flat|global|scratch)_\w+)", assembly, re.MULTILINE)
    accesses = [code for code in opcodes if code.startswith(("buffer_", "flat_", "global_"))]
    products = sum(code.startswith("v_mfma_") for code in opcodes)

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    return MachineCode(
        registers=field("vgpr_count"),
        spills=field("private_segment_fixed_size"),
        instructions=len(opcodes),
        tensor={"MFMA": products} if products else {},
        wide_accesses=sum("dwordx4" in code for code in accesses),
        narrow_accesses=sum("dwordx4" not in code for code in accesses),
    )
