"""Kernels, one folder an operation: `naive.py` defines it, the others compute it faster, README.md has the maths and the bytes."""
