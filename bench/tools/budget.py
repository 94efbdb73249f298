"""What every kernel costs on each GPU, from its machine code alone: no GPU is needed, and none is used.

    python -m bench.tools.budget

compiles the kernels of all operations at the lecture's shapes, those that a planned step of its training has
besides, and those of two stages of ConvNeXt-T, and prints a table; `--json` prints its rows. `--write` puts them
into bench/tools/budget.json, with which the tests compare, and leaves the rows of other GPUs and precisions there
as they are.

Times are a model, not a measurement. The estimate is the longest of: issuing all instructions, moving what they
access between registers and L1 or shared memory, and multiplying, each on the multiprocessor with most programs to
run; and moving every tensor that the kernel is given once, as if none were in the L2 cache. The loops of stencils,
of the norm's backward and of sums count as often as they run, but of other kernels each instruction once, though
they loop over channels and over partial sums; and latencies, bank conflicts, what L1 takes from L2, and the launch
itself count for nothing. A kernel takes longer than its estimate, which compares versions of one kernel, not
kernels. The floor is the longer of moving the tensors and multiplying, were the work spread evenly.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import ceil
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastconv.checking import inputs
from fastconv.checking.inputs import Sizes
from fastconv.kernels import operations
from fastconv.kernels.classifier.plan import Plan
from fastconv.kernels.common.values import Convolution, Norm

from . import machine_code
from .dry_run import TARGETS, Launch, dry_run
from .planned import PlannedSteps

TABLE = Path(__file__).with_name("budget.json")

KERNEL = (7, 7)

# How often a kernel's loop runs, by its arguments.
ROUNDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "stencil": lambda arguments: arguments["KERNEL_HEIGHT"],
    "stencil_channel_norm": lambda arguments: arguments["KERNEL_HEIGHT"],
    "stencil_backward_taps": lambda arguments: arguments["rounds"],
    "channel_norm_backward": lambda arguments: arguments["rounds"],
    "sum_columns": lambda arguments: ceil(arguments["rows"] / arguments["BLOCK_ROWS"]),
}

Row = dict[str, Any]
# What identifies a row; the rest is what the launch costs.
LABELS = ("operation", "shape", "kernel", "dtype", "architecture")


class Gpu(NamedTuple):
    """Approximate figures from the vendor's data sheets."""

    multiprocessors: int
    gigahertz: float
    terabytes_per_second: float
    # For dense products in bf16 or fp16; half of it for tf32.
    teraflops: float


# A100 80 GB, H100 and B200, all SXM.
GPUS = {
    "sm_80": Gpu(108, 1.41, 2.0, 312),
    "sm_90": Gpu(132, 1.83, 3.35, 989),
    "sm_100": Gpu(148, 1.85, 8.0, 2250),
}


class Precision(NamedTuple):
    dtype: torch.dtype
    # The argument of `torch.set_float32_matmul_precision`.
    float32: str
    # How many products of bf16 take the time of one product.
    cost: int


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, "highest", 1),
    "fp16": Precision(torch.float16, "highest", 1),
    "fp32 medium": Precision(torch.float32, "medium", 1),
    "fp32 high": Precision(torch.float32, "high", 2),
    "fp32 highest": Precision(torch.float32, "highest", 6),
}


class Inputs(NamedTuple):
    """What operations are called with: the tensors of `operation`, and a block's `h`, its normalised maps."""

    operation: str
    sizes: Sizes
    affine: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        _, channels, height, width, multiplier, _ = self.sizes
        factor = f"x{multiplier}" if multiplier > 1 else ""
        return f"{channels}{factor}, {height}x{width}"

    def tensors(self, dtype: torch.dtype) -> dict[str, Any]:
        images, channels, height, width, multiplier, _ = self.sizes
        shapes = inputs.shapes(self.operation, self.sizes, self.affine)
        if self.operation == "convnext_block":
            shapes["h"] = (images, channels * multiplier, height, width)
        tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items() if shape is not None}
        if self.channels_last:
            tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def flops(self, kernel: str) -> int:
        """Operations of the products of one kernel; a stencil has none.

        Toeplitz matrices count in full, though on 8x8 maps half of them is 0.
        """
        images, channels, height, width, multiplier, _ = self.sizes
        pixels, outputs = height * width, channels * multiplier
        toeplitz = 2 * images * outputs * pixels**2
        pointwise = 2 * images * pixels * channels * (outputs + channels)
        alone = 2 * images * pixels * channels * outputs
        return {
            "depthwise_forward": toeplitz,
            "depthwise_backward": 2 * toeplitz,
            "norm_mlp_residual": pointwise,
            "norm_mlp_residual_backward": 2 * pointwise,
            "pointwise_gelu": alone,
            "pointwise_gelu_backward_x": alone,
            "pointwise_gelu_backward_weight": alone,
        }.get(kernel, 0)


def block_of(channels: int, side: int) -> Inputs:
    """A block of the lecture, with its batch of images."""
    return Inputs("convnext_block", Sizes(128, channels, side, side, 4, KERNEL))


def stage(channels: int, side: int) -> Inputs:
    """A stage of a ConvNeXt for images of 224x224, in the layout that its blocks keep."""
    sizes = Sizes(64, channels, side, side, 1, KERNEL)
    return Inputs("depthwise_conv_layer_norm", sizes, affine=True, channels_last=True)


LECTURE = [block_of(32, 8), block_of(64, 4)]

Call = Callable[[dict[str, Any]], Tensor]

NORM = Norm("tensor", 1e-5, None, None)


def convolution(tensors: dict[str, Any], prefix: str = "") -> Convolution:
    return Convolution(tensors[f"{prefix}weight"], tensors[f"{prefix}bias"])


def convnext_block(tensors: dict[str, Any]) -> Tensor:
    convolutions = [convolution(tensors, f"{name}_") for name in ("depthwise", "pointwise", "projection")]
    return operations.convnext_block(tensors["x"], *convolutions, NORM, "none")


def depthwise_conv_layer_norm(tensors: dict[str, Any]) -> Tensor:
    return operations.depthwise_conv_layer_norm(tensors["x"], convolution(tensors, "depthwise_"), NORM)


def depthwise_conv_channel_norm(tensors: dict[str, Any]) -> Tensor:
    norm = Norm("channel", 1e-6, tensors["norm_weight"], tensors["norm_bias"])
    return operations.depthwise_conv_layer_norm(tensors["x"], convolution(tensors), norm)


def pointwise_conv_gelu(tensors: dict[str, Any]) -> Tensor:
    return operations.pointwise_conv_gelu(tensors["h"], convolution(tensors, "pointwise_"), "none")


def layer_norm(tensors: dict[str, Any]) -> Tensor:
    return operations.layer_norm(tensors["x"], NORM)


def sample_norm(tensors: dict[str, Any]) -> Tensor:
    return operations.layer_norm(tensors["x"], NORM._replace(over="sample"))


# What one process compiles. The kernels of a stage take as long as all others together.
PARTS: dict[str, list[tuple[Call, Inputs]]] = {
    "lecture": [
        *((convnext_block, shape) for shape in LECTURE),
        *((call, LECTURE[0]) for call in (depthwise_conv_layer_norm, pointwise_conv_gelu, layer_norm)),
        # An awkward number of pixels, and a norm of each image by itself.
        (sample_norm, Inputs("layer_norm", Sizes(3, 5, 7, 11, 1, KERNEL))),
    ],
    "widest block": [(convnext_block, block_of(128, 4))],
    "first stage": [(depthwise_conv_channel_norm, stage(96, 56))],
    "last stage": [(depthwise_conv_channel_norm, stage(768, 7))],
}
# The part of a planned step, and how its plans are made.
STEP = "planned step"
STEPS: dict[str, Callable[[PlannedSteps], Plan]] = {
    "training_step": PlannedSteps.training,
    "evaluation_step": PlannedSteps.evaluation,
}
# Most launches of a step, and all in the table as the block's.
OF_BLOCKS = ("depthwise_forward", "norm_mlp_residual", "norm_mlp_residual_backward", "depthwise_backward")

# One stage in each precision: they differ in how channels and rows are divided, and both would take twice as long.
STAGE_OF = {"bf16": "first stage", "fp32 highest": "last stage"}
# The table's GPUs and precisions. Turing's tensor cores take neither bfloat16 nor tf32.
IN_TABLE = {
    "sm_75": ("fp16", "fp32 highest"),
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"), ("bf16", "fp32 highest")),
}
WITH_STAGES = ("sm_80", "sm_90", "sm_100", "gfx942")


def measure(architecture: str, precision_name: str, part: str) -> list[Row]:
    """A row for each launch of a part."""
    precision = PRECISIONS[precision_name]
    torch.set_float32_matmul_precision(precision.float32)
    launched = launches_of_steps if part == STEP else partial(launches_of_operations, PARTS[part])
    rows = []
    for operation, shape, launch, flops in launched(architecture, precision.dtype):
        values = operation, shape, launch.kernel, precision_name, architecture
        row = dict(zip(LABELS, values, strict=True)) | describe(launch, architecture, flops * precision.cost)
        rows.append(row)
    return rows


# An operation, its shape, one of its launches, and the operations of that one's products.
Launched = Iterator[tuple[str, str, Launch, int]]


def launches_of_operations(
    operations: list[tuple[Call, Inputs]], architecture: str, dtype: torch.dtype
) -> Launched:
    """Those of each operation, forward and backward."""
    for call, shape in operations:
        with dry_run(architecture) as launches:
            tensors = shape.tensors(dtype)
            y = call(tensors)
            torch.autograd.grad(y, list(tensors.values()), torch.empty_like(y), allow_unused=True)
        for launch in launches:
            yield call.__name__, str(shape), launch, shape.flops(launch.kernel)


def launches_of_steps(architecture: str, dtype: torch.dtype) -> Launched:
    """Those of the lecture's steps that are no block's, once each; products are small, and count for nothing."""
    known = set()
    for name, make_plan in STEPS.items():
        with dry_run(architecture) as launches:
            for launch, tensors in make_plan(PlannedSteps(dtype)).calls:
                if launch.kernel.fn.__name__ not in OF_BLOCKS:
                    launch(*tensors)
        for done in launches:
            if done.compiled not in known:
                known.add(done.compiled)
                yield name, "128 images", done, 0


def describe(launch: Launch, architecture: str, flops: int) -> Row:
    """What the launch costs, given its products in operations of bf16."""
    code = machine_code.read(launch.compiled)
    row = {
        "programs": launch.programs,
        "warps": launch.compiled.metadata.num_warps,
        "registers": code.registers,
        "spills": code.spills,
        "shared_memory": launch.compiled.metadata.shared,
        "instructions": code.instructions,
        "tensor": code.tensor,
        "wide_accesses": code.wide_accesses,
        "narrow_accesses": code.narrow_accesses,
    }
    if architecture not in GPUS:
        return row
    gpu = GPUS[architecture]
    moved = launch.bytes / (gpu.terabytes_per_second * 1e6)
    multiplied = flops / (gpu.teraflops * 1e6)
    # The busiest multiprocessor's, which issues an instruction of four warps in each cycle.
    programs = ceil(launch.programs / gpu.multiprocessors)
    warps = programs * row["warps"]
    again = ROUNDS[launch.kernel](launch.arguments) - 1 if launch.kernel in ROUNDS else 0
    instructions = code.instructions + again * code.looped_instructions
    issued = instructions * warps / 4 / (gpu.gigahertz * 1e3)
    memory_cycles = code.memory_cycles + again * code.looped_memory_cycles
    accessed = memory_cycles * warps / (gpu.gigahertz * 1e3)
    uneven = programs * gpu.multiprocessors / launch.programs
    estimate = max(issued, accessed, moved, multiplied * uneven)
    return row | {"estimate_us": round(estimate, 2), "floor_us": round(max(moved, multiplied), 2)}


def measure_all(architectures: list[str], precisions: list[str]) -> list[Row]:
    """The rows of all parts, each measured in a process of its own, because Triton compiles in one thread."""
    jobs = []
    for architecture in architectures:
        for precision in precisions or IN_TABLE[architecture]:
            jobs.append((architecture, precision, "lecture"))
            # The widest block takes 72 KiB of shared memory in float32, and a program on Turing has 64. Training
            # takes bfloat16, which Turing has not, or float32.
            if architecture != "sm_75":
                jobs += [(architecture, precision, part) for part in ("widest block", STEP)]
            if architecture in WITH_STAGES and precision in STAGE_OF:
                jobs.append((architecture, precision, STAGE_OF[precision]))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(measure, *zip(*jobs, strict=True)) for row in rows]


def write_table(rows: list[Row]) -> None:
    """Write one row a line, so that diffs are readable; rows of another Triton version are dropped."""
    table = json.loads(TABLE.read_text())
    new = {(row["architecture"], row["dtype"]) for row in rows}
    kept = table["rows"] if table["triton"] == triton.__version__ else []
    rows = [row for row in kept if (row["architecture"], row["dtype"]) not in new] + rows
    rows.sort(key=lambda row: list(TARGETS).index(row["architecture"]))
    lines = ",\n".join(json.dumps(row) for row in rows)
    TABLE.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


def print_table(rows: list[Row]) -> None:
    table = Table("operation", "shape", "kernel", "dtype", "GPU")
    columns = ("warps", "registers", "spills", "shared", "instr.", "tensor", "128-bit", "model us", "floor us")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        wide, narrow = row["wide_accesses"], row["narrow_accesses"]
        table.add_row(
            *(row[key] for key in LABELS),
            *(str(row[key]) for key in ("warps", "registers", "spills", "shared_memory", "instructions")),
            " ".join(f"{name} {count}" for name, count in row["tensor"].items()),
            f"{wide} of {wide + narrow}",
            *(f"{row[key]:.2f}" if key in row else "" for key in ("estimate_us", "floor_us")),
        )
    # A file or a pipe has no width to fit into.
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def main(
    architecture: Annotated[list[str], typer.Option(help="Only for these GPUs.")] = list(TARGETS),  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="In these precisions instead of the table's.")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the rows into bench/tools/budget.json.")] = False,
) -> None:
    """Compile every kernel, and print what it costs."""
    rows = measure_all(architecture, dtype)
    if write:
        write_table(rows)
    if as_json:
        print(json.dumps(rows))
    else:
        print_table(rows)


if __name__ == "__main__":
    typer.run(main)
