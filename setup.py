"""Maps top-level folders onto one package; everything else is in pyproject.toml.

`kernels/` and `bench/` sit beside `fastconv/` so that they are easy to find, but are installed as
`fastconv.kernels` and `fastconv.bench`: top-level import packages of these names would collide with others', as
with Hugging Face's `kernels`. setuptools' automatic discovery does not see packages outside their parent's folder,
so they are listed.
"""

from setuptools import setup

ROOMS = ("operations", "swapping", "checking", "training", "commands")
KERNELS = ("common", "toeplitz", "layer_norm", "stencil", "channel_norm", "pointwise", "block")

setup(
    packages=[
        "fastconv",
        *(f"fastconv.{room}" for room in ROOMS),
        "fastconv.kernels",
        *(f"fastconv.kernels.{room}" for room in KERNELS),
        # Without bench/tools, which are for those who work on fastconv.
        "fastconv.bench",
    ],
    package_dir={"fastconv": "fastconv", "fastconv.bench": "bench", "fastconv.kernels": "kernels"},
    package_data={"fastconv": ["py.typed"]},
)
