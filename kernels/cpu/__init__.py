"""C++ kernels for CPUs, compiled at first use by the machine's own compiler.

`library.py` opens the compiled library: `compiler.py` finds a compiler and runs it (by `processes.py`), `cache.py`
keeps what it made, and `openmp.py` gives it torch's threads.

PyTorch sees the operators in `block.py`, `depthwise_layer_norm.py`, `layer_norm.py` and `patches.py`, that has the
pointwise convolution too; they share `chunks.py`, and those with a norm `exchange.py`. The C++ of each has
its name in `sources/`, made of

| source | what it has |
|---|---|
| `vector.h` | vectors of images, in the vector types of GCC and Clang |
| `chunks.h` | maps as chunks of vectors, and parts of a workspace |
| `convolution` | a depthwise convolution, its input's gradient and its taps' |
| `product` | products of matrices with columns of vectors |
| `norm.h`, `gelu.h` | statistics and gradient of a norm; GELU and its derivative |
| `depthwise.h` | convolution and norm together, for the block and for the operation by itself |
| `transpose` | contiguous maps to those with images side by side, and back |
| `team.h` | threads, and sums that do not depend on which thread took what |

So the backward of a block is `backward` of `sources/block.cpp`.
"""
