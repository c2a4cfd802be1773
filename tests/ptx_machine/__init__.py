"""A machine for PTX: runs the project's GPU kernels on the CPU, every access checked.

``python -m tests.ptx_machine`` runs them all: a compute-sanitizer for machines without a GPU, and
no part of the product. What it finds, and what it can't, stands in ``kernels/README.md``.
"""
