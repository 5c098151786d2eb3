"""Scaled dot-product attention for prefill and decode: naive.py defines it, dispatch.py chooses who computes it."""
