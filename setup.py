"""Package layout: `kernels/` is installed as `megatron_tropd.kernels`, never as a global package `kernels`."""

from setuptools import find_packages, setup

KERNELS = [f"megatron_tropd.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=[
        "megatron_tropd",
        *(f"megatron_tropd.{name}" for name in find_packages("megatron_tropd")),
        "megatron_tropd.kernels",
        *KERNELS,
        "megatron_tropd.recipes",
    ],
    package_dir={
        "megatron_tropd": "megatron_tropd",
        "megatron_tropd.kernels": "kernels",
        "megatron_tropd.recipes": "examples/recipes",
    },
    package_data={
        "megatron_tropd.reporting": ["*.html", "*.css", "*.js"],
        "megatron_tropd.recipes": ["*.yaml"],
        "megatron_tropd.kernels": ["*.md", "*/*.md"],
    },
)
