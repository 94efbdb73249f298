"""The depthwise convolution of small maps, as products with Toeplitz matrices, followed by layer norm."""
