"""Gemma 4 in JAX/Flax NNX, for fine-tuning and sampling: the same model, the same taps, its own maths."""
