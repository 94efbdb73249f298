"""What the kernels of several rooms are built from.

Called by kernels: `activation` (GELU), `product` (matrix products, exact division), `statistics` (mean and
variance over many programs), `reduction` (sums of partial gradients).

Called by the host: `registration` (operators that PyTorch sees, and plans), `launch`, `layout` (strides and memory
formats), `moments` and `partials` (memory for what `statistics` and `reduction` work on), `errors`, `rules`,
`values`.
"""
