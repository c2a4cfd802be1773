"""The tables of the README: ``python -m benchmarks.speed``."""
