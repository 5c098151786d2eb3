"""Kernels, one folder an operation: `naive.py` defines it, the rest computes it faster, README.md has maths and bytes."""
