"""Speed, as ratios measured in one run. Run by name: ``python -m benchmarks.kernels``."""
