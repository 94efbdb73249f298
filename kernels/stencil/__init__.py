"""The depthwise convolution of maps of any size, tap by tap, alone or followed by the norm of each pixel."""
