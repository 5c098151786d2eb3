"""Scaled dot-product attention for prefill and decode: naive.py is the definition, dispatch.py chooses who computes it."""
