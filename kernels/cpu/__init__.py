"""C++ kernels for CPUs, compiled at first use by the machine's own compiler.

`library.py` opens the compiled library: `compiler.py` finds a compiler and runs it (by `processes.py`), `cache.py`
keeps what it made, and `openmp.py` gives it torch's threads. The kernels are in `sources/`.
"""
