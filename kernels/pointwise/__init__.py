"""The pointwise convolution followed by GELU."""
