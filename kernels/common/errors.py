"""What goes wrong with a kernel before it runs. Imports no Triton, so that all of fastconv can name it."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel cannot be compiled for this GPU, or not be loaded; nothing has been launched.

    Attributes:
        kernel: its name.
        reason: what Triton says, in one line.
    """

    def __init__(self, kernel: str, reason: str) -> None:
        super().__init__(kernel, reason)
        self.kernel, self.reason = kernel, reason

    def __str__(self) -> str:
        return (
            f"Triton kernel {self.kernel} cannot run on this GPU: {self.reason}; use PyTorch's own operations: "
            'fastconv.backend("portable") or FASTCONV_BACKEND=portable'
        )
