"""Triton kernels, and C++ kernels for CPUs, installed as `fastconv.kernels`.

From the rest of fastconv they import at most `fastconv.files`, `fastconv.machine` and the definitions of the
operations, `fastconv.operations.reference`.

| room | what it does |
|---|---|
| `decisions.py` | which room computes an operation, by norm and size |
| `operations.py` | the public operations, each run by the room that was decided on |
| `block` | a whole ConvNextBlock on maps of up to 256 pixels |
| `toeplitz` | depthwise convolution + norm over a tensor or its images, on maps of up to 256 pixels |
| `stencil` | depthwise convolution on maps of any size, alone or with the norm of each pixel |
| `pointwise` | pointwise convolution + GELU |
| `layer_norm` | the norm over a tensor or its images |
| `channel_norm` | the norm of each pixel, over its channels |
| `patches` | convolution of patches: the classifier's stem, from bytes, and its downsampling, each with a norm |
| `head` | the classifier's end: pooling, logits, loss, and their gradients |
| `optimizer` | the sum of a step's partial gradients, and AdamW |
| `classifier` | a whole step of training, or evaluation, as a list of the launches of other rooms |
| `cpu` | C++ kernels for CPUs: their sources, and how these become a loaded library |
| `common` | what they are built from: launches, registration, and functions that kernels call |

Each room of an operation in Triton has the same three layers; what only `classifier` uses needs no operator:

- `kernels.py`: the kernels, in Triton's language.
- `tiling.py`: how they divide the work among programs, and their launches.
- `operator.py` or `operators.py`: the operators that PyTorch sees. `ForwardPlan` and `BackwardPlan` run one layout
  of inputs, launch by launch; `_gradients` is for autograd, and for more than first derivatives it has the
  definition, of `common/definitions.py`.

So the backward of a block is `block/operator.py`: `BackwardPlan.__call__`, whose launches are
`norm_mlp_residual_backward` of `block/kernels.py`, `depthwise_backward` of `toeplitz/kernels.py`, and
`reduce_partials` of `common/reduction.py`.
"""
