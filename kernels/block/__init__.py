"""A ConvNextBlock as one operator: the convolution of `toeplitz`, then norm, MLP and residual in one kernel."""
