"""How a part of Triton's interpreter is corrected."""

import triton


def replace(owner, name, correct):
    """Put `correct(original)` in the place of an attribute."""
    if not hasattr(owner, name):
        raise RuntimeError(
            f"triton {triton.__version__} has no {owner.__name__}.{name} to correct; "
            "adapt tests/interpreter to this version"
        )
    setattr(owner, name, correct(getattr(owner, name)))
