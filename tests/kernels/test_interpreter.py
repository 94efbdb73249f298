"""The corrected interpreter, against PyTorch's rounding and float64; and the faults that it must catch."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from interpreter import products, replacing
from processes import printed_by, run_python

SIZE = 1024


def precision_or_skip(precision):
    if precision not in products.PRECISIONS:
        pytest.skip(f"triton {triton.__version__} has no {precision}")


def all_kinds_of_float32():
    """Every exponent, ties of the rounding to bf16, infinities and NaN."""
    bits = torch.randint(-(2**31), 2**31, (SIZE,), dtype=torch.int64).to(torch.int32)
    bits[::2] = bits[::2] & ~0xFFFF | 0x8000
    x = bits.view(torch.float32)
    x[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38])
    x.view(torch.int32)[6] = 0x7F800001  # a NaN that is one by its last digit alone
    return x


def assert_same_bits(mine, expected):
    """Equal in sign of zero too; but any NaN is as good as another."""
    assert mine.dtype == expected.dtype
    integer = {2: torch.int16, 4: torch.int32}[mine.element_size()]
    both_nan = mine.isnan() & expected.isnan()
    assert torch.equal(mine.view(integer)[~both_nan], expected.view(integer)[~both_nan])


@triton.jit
def triangle(out, count):
    total = 0
    for i in range(1, count + 1):
        total += i
    for _ in tl.range(count):
        total += 1
    tl.store(out, total)


def test_ranges_may_have_run_time_bounds():
    out = torch.zeros(1, dtype=torch.int32)
    triangle[(1,)](out, 10)
    assert out.item() == 65


@triton.jit
def cast(x, out, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    value = tl.load(x + lanes)
    if ROUNDING != "implicit":
        value = value.to(out.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(out + lanes, value)


@pytest.mark.parametrize("rounding", ["implicit", "rtne", None])
def test_casts_to_bf16_round_to_nearest_even(rounding):
    x = all_kinds_of_float32()
    out = torch.zeros(SIZE, dtype=torch.bfloat16)
    cast[(1,)](x, out, ROUNDING=rounding, BLOCK=SIZE)
    assert_same_bits(out, x.to(torch.bfloat16))


def test_casts_to_bf16_truncate_when_asked_to():
    x = torch.randn(SIZE)
    out = torch.zeros(SIZE, dtype=torch.bfloat16)
    cast[(1,)](x, out, ROUNDING="rtz", BLOCK=SIZE)
    assert_same_bits(out, (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_casts_from_bf16(dtype):
    x = torch.randn(SIZE, dtype=torch.bfloat16) * 100
    out = torch.zeros(SIZE, dtype=dtype)
    cast[(1,)](x, out, ROUNDING="implicit", BLOCK=SIZE)
    assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_casts_to_bf16_from_other_types(dtype):
    x = (torch.randn(SIZE) * 1000).to(dtype)
    out = torch.zeros(SIZE, dtype=torch.bfloat16)
    cast[(1,)](x, out, ROUNDING="implicit", BLOCK=SIZE)
    assert torch.equal(out, x.to(torch.bfloat16))


@triton.jit
def elementwise(x, y, z, out, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    a, b, c = tl.load(x + lanes), tl.load(y + lanes), tl.load(z + lanes)
    if OPERATION == "add":
        value = a + b
    elif OPERATION == "subtract":
        value = a - b
    elif OPERATION == "multiply":
        value = a * b
    elif OPERATION == "divide":
        value = a / b
    elif OPERATION == "negate":
        value = -a
    elif OPERATION == "absolute":
        value = tl.abs(a)
    elif OPERATION == "maximum":
        value = tl.maximum(a, b)
    elif OPERATION == "clamp":
        value = tl.clamp(a, -1.0, tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
    elif OPERATION == "multiply and add":
        value = tl.fma(a, b, c)
    elif OPERATION == "scalar":
        value = 0.1 * a + 3
    elif OPERATION == "compare":
        value = tl.where((a > b) & (a != 0), a, c)
    elif OPERATION == "fill":
        value = tl.full((BLOCK,), 0.7, tl.bfloat16) - tl.zeros((BLOCK,), tl.bfloat16)
    tl.store(out + lanes, value)


TENTH, THREE = torch.tensor([0.1, 3.0], dtype=torch.bfloat16)
ELEMENTWISE = {
    "add": lambda a, b, c: a + b,
    "subtract": lambda a, b, c: a - b,
    "multiply": lambda a, b, c: a * b,
    "divide": lambda a, b, c: a / b,
    "negate": lambda a, b, c: -a,
    "absolute": lambda a, b, c: a.abs(),
    "maximum": lambda a, b, c: torch.maximum(a, b),
    "clamp": lambda a, b, c: torch.minimum(a.clamp(min=-1), b.abs()),
    "multiply and add": lambda a, b, c: (a.double() * b.double() + c.double()).to(torch.bfloat16),
    "scalar": lambda a, b, c: TENTH * a + THREE,
    "compare": lambda a, b, c: torch.where((a > b) & (a != 0), a, c),
    "fill": lambda a, b, c: torch.full_like(a, 0.7),
}


@pytest.mark.parametrize("operation", ELEMENTWISE)
def test_bf16_arithmetic_is_pytorchs(operation):
    x, y, z = torch.randn(3, SIZE, dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    elementwise[(1,)](x, y, z, out, OPERATION=operation, BLOCK=SIZE)
    assert torch.equal(out, ELEMENTWISE[operation](x, y, z))


@triton.jit
def reduce(x, out, OPERATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    value = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    if OPERATION == "sum":
        tl.store(out + rows, tl.sum(value, 1))
    elif OPERATION == "sum of all":
        tl.store(out, tl.sum(value))
    elif OPERATION == "max":
        tl.store(out + rows, tl.max(value, 1))
    elif OPERATION == "argmax":
        tl.store(out + rows, tl.argmax(value, 1))
    elif OPERATION == "cumsum":
        # tl.cumsum(value, 1), but that is in float32 before Triton 3.9.
        running = tl.associative_scan(value, 1, tl.standard._sum_combine)
        tl.store(out + rows[:, None] * COLUMNS + columns[None, :], running)


def run_reduce(x, shape, operation, dtype=torch.bfloat16):
    out = torch.zeros(shape, dtype=dtype)
    reduce[(1,)](x, out, OPERATION=operation, ROWS=x.shape[0], COLUMNS=x.shape[1])
    return out


def test_bf16_sums_round_every_partial_sum():
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    halves = x
    while halves.shape[1] > 1:
        halves = halves[:, : halves.shape[1] // 2] + halves[:, halves.shape[1] // 2 :]
    sums = run_reduce(x, 8, "sum")
    assert torch.equal(sums, halves[:, 0])
    # As far off as bf16 is, and not what one rounding of the exact sum gives.
    error = (sums - x.double().sum(1)).norm() / x.double().sum(1).norm()
    assert 2e-3 < error < 2e-2
    assert run_reduce(x, 1, "sum of all").item() == pytest.approx(x.double().sum().item(), rel=0.05)


def test_bf16_maxima():
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    assert torch.equal(run_reduce(x, 8, "max"), x.amax(1))
    # All are negative: as uint16 the largest is the smallest.
    x = -x.abs()
    assert torch.equal(run_reduce(x, 8, "max"), x.amax(1))
    where = run_reduce(x, 8, "argmax", torch.int32).long()
    assert torch.equal(x.gather(1, where[:, None])[:, 0], x.amax(1))


def test_bf16_running_sums():
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    expected = x.clone()
    for i in range(1, 16):
        expected[:, i] += expected[:, i - 1]
    assert torch.equal(run_reduce(x, x.shape, "cumsum"), expected)


@triton.jit
def merge_moments(mean, square, count, other_mean, other_square, other_count):
    total = count + other_count
    delta = other_mean - mean
    return (
        mean + delta * other_count / total,
        square + other_square + delta * delta * count * other_count / total,
        total,
    )


@triton.jit
def moments(x, out, AXIS: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    value = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    one = tl.full((ROWS, COLUMNS), 1, tl.float32)
    mean, square, count = tl.reduce((value, value * 0, one), AXIS, merge_moments, keep_dims=KEEP)
    variance = square / count
    if KEEP:
        mean, variance = tl.sum(mean, AXIS), tl.sum(variance, AXIS)
    if AXIS is None:
        lanes = 0
    elif AXIS == 0:
        lanes = columns
    else:
        lanes = rows
    tl.store(out + 2 * lanes, mean)
    tl.store(out + 2 * lanes + 1, variance)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_reductions_by_a_function_of_the_kernel(axis, keep):
    x = torch.randn(8, 32) + 10
    kept = 1 if axis is None else x.shape[1 - axis]
    out = torch.zeros(kept, 2)
    moments[(1,)](x, out, AXIS=axis, KEEP=keep, ROWS=8, COLUMNS=32)
    variance, mean = torch.var_mean(x.double(), axis, correction=0)
    torch.testing.assert_close(out.double(), torch.stack([mean, variance], -1).view(kept, 2), rtol=1e-5, atol=0)


@triton.jit
def erf(x, out, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out + lanes, tl.erf(tl.load(x + lanes)))


def test_erf():
    x = torch.linspace(-5, 5, SIZE)
    out = torch.zeros_like(x)
    erf[(1,)](x, out, BLOCK=SIZE)
    assert torch.equal(out, torch.erf(x.double()).float())


@triton.jit
def dot(a, b, c, out, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    accumulator = tl.load(c + m[:, None] * N + n[None, :])
    product = tl.dot(left, right, accumulator, input_precision=PRECISION)
    tl.store(out + m[:, None] * N + n[None, :], product)


def run_dot(a, b, precision, c=None):
    out = torch.zeros(a.shape[0], b.shape[1])
    c = torch.zeros_like(out) if c is None else c
    dot[(1,)](a, b, c, out, PRECISION=precision, M=a.shape[0], N=b.shape[1], K=a.shape[1])
    return out


# The least and the largest relative error that is believable.
DOTS = {
    "ieee": (1e-9, 5e-7),
    "tf32": (2e-4, 1e-3),
    "tf32x3": (1e-9, 1e-6),
    "bf16x3": (2e-6, 2e-5),
    "bf16x6": (1e-9, 1e-6),
}


@pytest.mark.parametrize("precision", DOTS)
def test_float32_dots_have_the_error_of_their_precision(precision):
    precision_or_skip(precision)
    a, b, c = torch.randn(32, 64), torch.randn(64, 16), torch.randn(32, 16)
    exact = a.double() @ b.double() + c
    error = (run_dot(a, b, precision, c) - exact).norm() / exact.norm()
    least, most = DOTS[precision]
    assert least < error < most


@pytest.mark.parametrize("precision", ["tf32x3", "bf16x3", "bf16x6"])
def test_split_dots_leave_out_the_smallest_products(precision):
    precision_or_skip(precision)
    # (1 + small)^2 - 1 = 2 small + small^2: each summand is a product of two parts, and the largest cancel.
    small = {"tf32x3": 2.0**-12, "bf16x3": 2.0**-10, "bf16x6": 2.0**-10}[precision]
    x, y = torch.zeros(2, 16, 16)
    x[0, :2] = torch.tensor([1 + small, 1])
    y[:2, 0] = torch.tensor([1 + small, -1])
    kept = small**2 if precision == "bf16x6" else 0
    assert run_dot(x, y, precision)[0, 0].item() == 2 * small + kept


def test_the_large_part_of_tf32x3_is_rounded_to_nearest():
    # Truncated to 1 it would leave 2^-10 - 2^-22, which has too many digits for the small part.
    x = torch.eye(16) * (1 + 2.0**-10 - 2.0**-22)
    assert torch.equal(run_dot(x, torch.eye(16), "tf32x3"), x)


def test_tf32_dots_truncate_as_the_tensor_cores_do():
    x, one = torch.zeros(16, 16), torch.eye(16)
    x[0, :3] = torch.tensor([1 + 2.0**-10, 1 + 1.9 * 2.0**-10, -1 - 0.9 * 2.0**-10])
    assert run_dot(x, one, "tf32")[0, :3].tolist() == [1 + 2.0**-10, 1 + 2.0**-10, -1]


@pytest.mark.parametrize("precision", DOTS)
def test_infinities_stay_infinite_in_dots(precision):
    precision_or_skip(precision)
    x = torch.eye(16)
    x[0, 0], x[1, 1] = torch.inf, torch.nan
    product = run_dot(x, torch.ones(16, 16), precision)
    assert product[0].eq(torch.inf).all()
    assert product[1].isnan().all()
    assert product[2:].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dots_of_half_precision_accumulate_in_float32(dtype):
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    exact = a.double() @ b.double()
    assert (run_dot(a, b, "tf32") - exact).norm() / exact.norm() < 1e-6


@triton.jit
def load_block(x, column):
    lanes = tl.arange(0, 64)
    return tl.load(x + column + lanes)


@triton.jit
def copy(x, out, size, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < size
    value = tl.load(x + lanes, mask, other=0) if MASK_LOAD else tl.load(x + lanes)
    if MASK_STORE:
        tl.store(out + lanes, value, mask)
    else:
        tl.store(out + lanes, value)


DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_accesses_may_point_anywhere(dtype):
    x = torch.randn(100).to(dtype)
    out = torch.zeros_like(x)
    copy[(2,)](x, out, 100, MASK_LOAD=True, MASK_STORE=True, BLOCK=64)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_load_without_its_mask_is_caught(dtype):
    x = torch.zeros(100, dtype=dtype)
    message = rf"program \(1, 0, 0\) loads 28 of 64 elements outside .* first {x.element_size()} bytes past .* x$"
    with pytest.raises(IndexError, match=message):
        copy[(2,)](x, torch.zeros(128, dtype=dtype), 100, MASK_LOAD=False, MASK_STORE=True, BLOCK=64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_without_its_mask_is_caught(dtype):
    with pytest.raises(
        IndexError, match=r"program \(1, 0, 0\) stores 28 of 64 elements outside .* past the end of out$"
    ):
        copy[(2,)](torch.zeros(100, dtype=dtype), torch.zeros(100, dtype=dtype), 100, True, False, BLOCK=64)


def test_bounds_are_those_of_the_storage():
    holder = torch.randn(128)
    out = torch.zeros(64)
    copy[(1,)](holder[:16], out, 64, MASK_LOAD=False, MASK_STORE=False, BLOCK=64)
    assert torch.equal(out, holder[:64])
    with pytest.raises(IndexError, match=r"loads 16 of 64 elements .* past the end of x"):
        copy[(1,)](holder[80:], out, 64, MASK_LOAD=False, MASK_STORE=False, BLOCK=64)
    with pytest.raises(IndexError, match=r"loads 1 of 64 elements .* the first 4 bytes before the start of x"):
        load_row_above[(1,)](holder)


@triton.jit
def load_row_above(x):
    load_block(x, -1)


@triton.jit
def add_atomically(x, BLOCK: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, BLOCK), 1.0)


@triton.jit
def take_turns(turn, offset):
    program = tl.program_id(0)
    tl.atomic_cas(turn + offset, program, program + 1)


def test_atomics_have_bounds_and_no_races():
    x = torch.zeros(16)
    add_atomically[(3,)](x, BLOCK=16)
    assert x.eq(3).all()
    with pytest.raises(IndexError, match="updates 16 of 32 elements"):
        add_atomically[(3,)](x, BLOCK=32)
    turn = torch.zeros(1, dtype=torch.int32)
    take_turns[(3,)](turn, 0)
    assert turn.item() == 3
    with pytest.raises(IndexError, match="updates 1 of 1 elements"):
        take_turns[(3,)](turn, 1)


@triton.jit
def pass_on_atomically(x, out):
    program = tl.program_id(0)
    tl.store(out + program, tl.atomic_load(x))
    tl.atomic_store(x, program + 1)


@pytest.mark.skipif(not hasattr(tl, "atomic_load"), reason="new in Triton 3.9")
def test_atomic_loads_and_stores_are_no_races():
    out = torch.zeros(3, dtype=torch.int32)
    pass_on_atomically[(3,)](torch.zeros(1, dtype=torch.int32), out)
    assert out.tolist() == [0, 1, 2]


@triton.jit
def shift(x, out, step, LOAD_FIRST: tl.constexpr):
    """Each program stores an element of out, and loads the element of x that is `step` further."""
    program = tl.program_id(1)
    if LOAD_FIRST:
        value = tl.load(x + program + step)
        tl.store(out + program, value)
    else:
        tl.store(out + program, 1.0)
        value = tl.load(x + program + step)
        tl.store(out + program, value)


@triton.jit
def store_in_turns(out, count):
    tl.store(out + tl.program_id(1) % count, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_programs_may_work_in_place_on_their_own_elements(dtype):
    x = torch.randn(8).to(dtype)
    before = x.clone()
    for load_first in (True, False):
        shift[(1, 8)](x, x, 0, LOAD_FIRST=load_first)
    assert x.eq(1).all()
    shift[(1, 8)](before, x, 0, LOAD_FIRST=True)
    # A new launch comes after the whole of the last.
    shift[(1, 7)](x, x[:7].clone(), 1, LOAD_FIRST=True)
    assert torch.equal(x, before)


def test_two_programs_that_store_one_element_are_caught():
    store_in_turns[(1, 4)](torch.zeros(4), 4)
    message = r"program \(0, 3, 0\) stores element 0 of out, which program \(0, 0, 0\) stored in the same launch"
    with pytest.raises(RuntimeError, match=message):
        store_in_turns[(1, 4)](torch.zeros(4), 3)


def test_a_load_of_what_another_program_stored_is_caught():
    x = torch.zeros(9)[1:]
    message = r"program \(0, 1, 0\) loads element 1 of x, out, which program \(0, 0, 0\) stored"
    with pytest.raises(RuntimeError, match=message):
        shift[(1, 8)](x, x, -1, LOAD_FIRST=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_to_what_another_program_loaded_is_caught(dtype):
    x = torch.zeros(9, dtype=dtype)
    message = r"program \(0, 1, 0\) stores element 1 of x, out, which program \(0, 0, 0\) loaded"
    with pytest.raises(RuntimeError, match=message):
        shift[(1, 8)](x, x, 1, LOAD_FIRST=True)


@triton.jit
def store_what_all_load(x):
    value = tl.load(x)
    if tl.program_id(0) == 2:
        tl.store(x, value)


def test_a_store_to_what_several_programs_loaded_is_caught():
    store_what_all_load[(2,)](torch.zeros(1))
    with pytest.raises(RuntimeError, match="stores element 0 of x, which several programs loaded"):
        store_what_all_load[(3,)](torch.zeros(1))


@triton.jit
def store_halves(wide, narrow):
    """`narrow` is the same memory, seen as int32."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(wide + program, 0)
    else:
        tl.store(narrow + program, 0)


def test_races_between_views_of_different_widths_are_caught():
    x = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="stores element 1 of wide, narrow, which program"):
        store_halves[(2,)](x, x.view(torch.int32))


@triton.jit
def copy_by_descriptor(x, out, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, COLUMNS], [COLUMNS, 1], [BLOCK, COLUMNS])
    target = tl.make_tensor_descriptor(out, [rows, COLUMNS], [COLUMNS, 1], [BLOCK, COLUMNS])
    first = tl.program_id(0) * BLOCK
    target.store([first, 0], source.load([first, 0]))


def test_descriptors_are_checked_within_their_shape():
    x = torch.randn(6, 16)
    out = torch.zeros_like(x)
    copy_by_descriptor[(2,)](x, out, 6, COLUMNS=16, BLOCK=4)
    assert torch.equal(out, x)
    with pytest.raises(IndexError, match="loads 32 of 64 elements outside"):
        copy_by_descriptor[(2,)](x, out, 8, COLUMNS=16, BLOCK=4)


def test_an_import_of_triton_that_came_too_early_is_refused():
    program = "import triton, interpreter; interpreter.install()"
    done = run_python("-c", program, cwd=Path(__file__).parents[1], TRITON_INTERPRET=None)
    assert done.returncode == 1
    assert "was imported before TRITON_INTERPRET=1 was set; import tests/interpreter before" in done.stderr


# Which interpreter is there after pytest has collected the tests of a machine with a GPU.
COLLECTED = """
import sys, torch, pytest
torch.cuda.is_available = lambda: True
assert pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "gpu", *sys.argv[1:]]) == 0
import triton.language as tl
print("\\n", type(tl.sum).__name__, "interpreter" in sys.modules)
"""


def test_tests_of_a_gpu_are_collected_without_the_interpreter():
    tests = Path(__file__).parents[1]
    printed = printed_by("-c", COLLECTED, tests / "kernels", cwd=tests.parent, TRITON_INTERPRET=None)
    assert printed.splitlines()[-1].split() == ["JITFunction", "False"]


def test_a_triton_without_what_is_corrected_is_refused():
    with pytest.raises(RuntimeError, match=rf"triton {triton.__version__} has no tuple.matmul to correct"):
        replacing.replace(tuple, "matmul", lambda original: original)
