"""One command for whoever has a graphics card: ``python -m benchmarks.gpu_check``."""
