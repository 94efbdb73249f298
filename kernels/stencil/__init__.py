"""The depthwise convolution of maps of any size, tap by tap."""
