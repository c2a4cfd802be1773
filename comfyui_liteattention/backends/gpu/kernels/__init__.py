"""The kernels' Triton sources. ``kernels/build.py`` compiles them ahead of time."""
