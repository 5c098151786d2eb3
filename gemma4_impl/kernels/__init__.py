"""Kernels, one folder an operation: `naive.py` defines it, the rest is faster; README.md has maths and bytes."""
