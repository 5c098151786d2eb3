"""Kernels, one folder an operation: `naive.py` defines it, the rest is faster; README.md has the maths and the bytes."""
