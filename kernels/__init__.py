"""Triton kernels, installed as `fastconv.kernels`. Nothing here imports the rest of fastconv."""
