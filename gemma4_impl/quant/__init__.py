"""Quantization: recipe -> quantize -> save and load -> pack for a backend."""
