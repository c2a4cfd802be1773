"""Closeness against speed on real weights: ``python -m benchmarks.real_model``."""
