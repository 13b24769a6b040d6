"""Benchmark of the kernels against named baselines; `python -m megatron_tropd.kernels.benchmarks --help`."""
