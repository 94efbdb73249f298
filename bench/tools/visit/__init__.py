"""A visit to a GPU: fifteen minutes on a machine with one, where nothing can be installed.

`bench/gpu.sh` calls the three stages, each a module of its name: `prove`, `measure` and `whole`. `fill` compiles
their kernels beforehand, without a GPU.
"""
