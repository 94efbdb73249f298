"""Maps top-level folders onto one package; everything else is in pyproject.toml.

`kernels/` and `bench/` sit beside `fastconv/` so that they are easy to find, but are installed as
`fastconv.kernels` and `fastconv.bench`: top-level import packages of these names would collide with others', as
with Hugging Face's `kernels`. setuptools' automatic discovery does not see packages outside their parent's folder.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["fastconv", "fastconv.*"]),
        *(f"fastconv.{package}" for package in find_packages(include=["kernels", "kernels.*"])),
        # Without bench/tools, which are for those who work on fastconv.
        "fastconv.bench",
    ],
    package_dir={"fastconv": "fastconv", "fastconv.bench": "bench", "fastconv.kernels": "kernels"},
    package_data={"fastconv": ["py.typed"], "fastconv.kernels.cpu": ["sources/*"]},
)
