"""What kernels of several rooms are built from."""
