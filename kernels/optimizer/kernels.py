"""The end of a step: sums of all partial gradients, AdamW over flat vectors, and what is counted of a batch.

L is the number of parameters' elements: parameters, gradients and AdamW's moments are each one vector [L].
"""

import triton
import triton.language as tl

from ..common.product import divide
from ..common.reduction import fold_onto_taps, sum_column_block


@triton.jit
def enter_outcome(
    losses,  # [parts]: parts of the batch's sum of losses
    correct,  # [parts]: parts of its number of correct answers
    position,  # [1]: how many images come before the batch
    step_losses,  # [steps]: mean losses
    total_correct,  # [1]: is added to
    parts,
    images,
    batch,
    BLOCK_OUTCOME: tl.constexpr,
):
    i = tl.arange(0, BLOCK_OUTCOME)
    loss = tl.sum(tl.load(losses + i, mask=i < parts, other=0.0), 0)
    hits = tl.sum(tl.load(correct + i, mask=i < parts, other=0).to(tl.int64), 0)
    tl.store(step_losses + tl.load(position) // batch, loss / images)
    tl.store(total_correct, tl.load(total_correct) + hits)


@triton.jit
def reduce_step(
    workspace,  # [size]: columns [rows, length]; matrices [blocks, outputs, P, P], then biases [blocks, outputs]
    table,  # [sums, 6], int64: what each program sums, as `StepReduction.table` says
    losses,  # [parts]: parts of the batch's sum of losses
    correct,  # [parts]: parts of its number of correct answers
    position,  # [1]: how many images of the epoch come before the batch
    gradients,  # [L]
    step_losses,  # [steps of the epoch]: mean losses
    total_correct,  # [1]: is added to
    steps,  # [parameters]: AdamW's counters of steps, to which 1 is added
    sums,
    parts,
    images,
    batch,
    parameters,
    GEOMETRIES: tl.constexpr,  # `Matrices.geometry` of each kind
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_OUTCOME: tl.constexpr,
    BLOCK_PARAMETERS: tl.constexpr,
):
    """Each program sums BLOCK_COLUMNS columns, or folds the matrices of one output; the last ends the step."""
    program = tl.program_id(0).to(tl.int64)
    if program == sums:
        enter_outcome(losses, correct, position, step_losses, total_correct, parts, images, batch, BLOCK_OUTCOME)
        i = tl.arange(0, BLOCK_PARAMETERS)
        tl.store(steps + i, tl.load(steps + i, mask=i < parameters) + 1, mask=i < parameters)
    else:
        row = table + program * 6
        kind = tl.load(row)
        source = workspace + tl.load(row + 1)
        rows = tl.load(row + 2).to(tl.int32)
        length = tl.load(row + 3)
        number = tl.load(row + 4)
        result = gradients + tl.load(row + 5)
        if kind == 0:
            sum_column_block(source, result, number, rows, length, BLOCK_ROWS, BLOCK_COLUMNS)
        for i in tl.static_range(len(GEOMETRIES)):
            if kind == i + 1:
                PIXELS: tl.constexpr = GEOMETRIES[i][0] * GEOMETRIES[i][1]
                biases = source + rows * length * (PIXELS * PIXELS)
                fold_onto_taps(source, biases, result, number, rows, length, *GEOMETRIES[i])


@triton.jit
def end_evaluation(
    losses,  # [parts]: parts of the batch's sum of losses
    correct,  # [parts]: parts of its number of correct answers
    position,  # [1]: `images` are added
    step_losses,  # [steps]: mean losses
    total_correct,  # [1]: is added to
    parts,
    images,
    batch,
    BLOCK_OUTCOME: tl.constexpr,
):
    enter_outcome(losses, correct, position, step_losses, total_correct, parts, images, batch, BLOCK_OUTCOME)
    tl.store(position, tl.load(position) + images)


@triton.jit
def adamw(
    parameters,  # [L]
    gradients,  # [L]
    exp_avg,  # [L]
    exp_avg_sq,  # [L]
    steps,  # [parameters]: the number of this step, the same for all of them
    hyperparameters,  # [5], float64: lr, beta1, beta2, eps, weight decay
    rounded,  # [L]: the parameters in the dtype in which kernels read them
    position,  # [1]: `images` are added
    length,
    images,
    HAS_ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As torch.optim.AdamW, whose scalars are float64 too: a float32 has few digits of 1 - beta2.

    m = beta1 m + (1 - beta1) g and v = beta2 v + (1 - beta2) g^2; with m' = m / (1 - beta1^step) and
    v' = v / (1 - beta2^step), parameter = (1 - lr * decay) parameter - lr m' / (sqrt(v') + eps).
    """
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < length
    dtype = parameters.dtype.element_ty

    lr, beta1, beta2 = tl.load(hyperparameters), tl.load(hyperparameters + 1), tl.load(hyperparameters + 2)
    eps, decay = tl.load(hyperparameters + 3), tl.load(hyperparameters + 4)
    step = tl.load(steps).to(tl.float64)
    step_size = lr / (1 - tl.exp(step * tl.log(beta1)))
    correction = tl.sqrt(1 - tl.exp(step * tl.log(beta2)))

    g = tl.load(gradients + i, mask=inside, other=0.0)
    m = beta1.to(dtype) * tl.load(exp_avg + i, mask=inside, other=0.0) + (1 - beta1).to(dtype) * g
    # In this order a square beyond the largest number need not be.
    v = beta2.to(dtype) * tl.load(exp_avg_sq + i, mask=inside, other=0.0) + (1 - beta2).to(dtype) * g * g
    root = tl.sqrt(v) if dtype == tl.float64 else tl.sqrt_rn(v)
    direction = divide(m, divide(root, correction.to(dtype)) + eps.to(dtype))
    p = tl.load(parameters + i, mask=inside, other=0.0) * (1 - lr * decay).to(dtype)
    p -= step_size.to(dtype) * direction

    tl.store(exp_avg + i, m, mask=inside)
    tl.store(exp_avg_sq + i, v, mask=inside)
    tl.store(parameters + i, p, mask=inside)
    if HAS_ROUNDED:
        tl.store(rounded + i, p.to(rounded.dtype.element_ty), mask=inside)
    if program == 0:
        tl.store(position, tl.load(position) + images)
