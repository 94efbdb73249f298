"""The pointwise convolution with GELU."""
