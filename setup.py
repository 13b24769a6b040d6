"""Package layout: `kernels/` is installed as `megatron_tropd.kernels`, never as a global package `kernels`."""

from setuptools import setup

setup(
    packages=[
        "megatron_tropd",
        "megatron_tropd.kernels",
        "megatron_tropd.kernels.benchmarks",
        "megatron_tropd.kernels.full_divergence",
        "megatron_tropd.kernels.fused_linear_full_divergence",
        "megatron_tropd.kernels.fused_linear_logprobs",
        "megatron_tropd.kernels.logprobs",
        "megatron_tropd.kernels.paged_attention",
        "megatron_tropd.kernels.topk",
        "megatron_tropd.recipes",
    ],
    package_dir={
        "megatron_tropd": "megatron_tropd",
        "megatron_tropd.kernels": "kernels",
        "megatron_tropd.recipes": "examples/recipes",
    },
    package_data={
        "megatron_tropd": ["*.html", "*.css", "*.js"],
        "megatron_tropd.recipes": ["*.yaml"],
        "megatron_tropd.kernels": ["*.md", "*/*.md"],
    },
)
