"""The kernels' machine code against bench/tools/budget.json: compiled for GPUs that need not be there."""

import json
from pathlib import Path

import pytest
from processes import printed_by

pytest.importorskip("triton")
import torch
import triton

from fastconv.bench.tools import budget, dry_run, planned

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "bench/tools/budget.json").read_text())
# Accesses of global memory are narrow if they are of less than 128 bits.
COSTS = ("registers", "spills", "shared_memory", "instructions", "narrow_accesses")
REWRITE = "if that is on purpose, rewrite the table with python -m bench.tools.budget --write"


def worsened(rows, table):
    """Lines that say what costs more than the table allows; a launch that is not in it is one."""
    allowed = {}
    for row in table:
        # If an operation launches a kernel twice, the costlier launch sets the budget.
        known = allowed.setdefault(tuple(row[label] for label in budget.LABELS), dict(row))
        known.update({cost: max(known[cost], row[cost]) for cost in COSTS})
    lines = []
    for row in rows:
        name = tuple(row[label] for label in budget.LABELS)
        if name not in allowed:
            lines.append(f"{', '.join(name)} is not in the table")
            continue
        for cost in COSTS:
            if row[cost] > allowed[name][cost]:
                lines.append(f"{', '.join(name)}: {cost} rose from {allowed[name][cost]} to {row[cost]}")
        if allowed[name]["tensor"] and not row["tensor"]:
            lines.append(f"{', '.join(name)}: no tensor core instructions any more")
    return lines


@pytest.fixture(scope="module")
def rows():
    if triton.__version__ != TABLE["triton"]:
        pytest.skip(f"the table is for triton {TABLE['triton']}, this is {triton.__version__}")
    # One GPU and one precision: to compile all of the table takes the cores several minutes.
    arguments = "-m", "bench.tools.budget", "--json", "--architecture", "sm_90", "--dtype", "bf16"
    # Other tests interpret the kernels, and so would this process.
    return json.loads(printed_by(*arguments, cwd=ROOT, TRITON_INTERPRET="0"))


@pytest.mark.slow
def test_no_kernel_costs_more_than_its_budget(rows):
    lines = worsened(rows, TABLE["rows"])
    assert not lines, "\n".join([*lines, REWRITE])


@pytest.mark.slow
def test_the_block_is_two_launches_forward_and_three_backward(rows):
    launches = [row["kernel"] for row in rows if row["operation"] == "convnext_block"]
    assert launches == 3 * [
        "depthwise_forward",
        "norm_mlp_residual",
        "norm_mlp_residual_backward",
        "depthwise_backward",
        "reduce_partials",
    ]


def test_the_table_has_each_kernel_of_a_planned_step():
    steps = planned.PlannedSteps(torch.bfloat16, "meta")
    launched = {launch.kernel.fn.__name__ for make in budget.STEPS.values() for launch, _ in make(steps).calls}
    assert launched - {row["kernel"] for row in TABLE["rows"]} == set()


@pytest.mark.slow
def test_kernels_are_small(rows):
    """Large ones spill registers, or miss the instruction cache; bench/NOTES.md says more."""
    assert [row for row in rows if row["instructions"] > 4000 or row["spills"] > 64] == []


def test_the_table_has_each_gpu_in_each_of_its_precisions():
    found = {(row["architecture"], row["dtype"]) for row in TABLE["rows"]}
    assert found == {(gpu, precision) for gpu, precisions in budget.IN_TABLE.items() for precision in precisions}
    assert budget.IN_TABLE.keys() == dry_run.TARGETS.keys()


def test_a_worse_row_is_found():
    row = TABLE["rows"][0]
    for cost in COSTS:
        (line,) = worsened([{**row, cost: row[cost] + 1}], TABLE["rows"])
        assert f"{cost} rose from {row[cost]} to {row[cost] + 1}" in line
    assert "not in the table" in worsened([{**row, "kernel": "new"}], TABLE["rows"])[0]
    assert worsened([row], TABLE["rows"]) == []
