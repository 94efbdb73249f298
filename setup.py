"""Maps two top-level folders onto one package; everything else is in pyproject.toml.

`kernels/` sits beside `fastconv/` so that the Triton sources are easy to find, but is installed as
`fastconv.kernels`: a top-level import package called `kernels` would collide with Hugging Face's.
setuptools' automatic discovery does not see packages outside their parent's folder, so they are listed.
"""

from setuptools import setup

setup(
    packages=["fastconv", "fastconv.kernels"],
    package_dir={"fastconv": "fastconv", "fastconv.kernels": "kernels"},
    package_data={"fastconv": ["py.typed"]},
)
