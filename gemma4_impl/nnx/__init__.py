"""Gemma 4 in JAX/Flax NNX, for fine-tuning and sampling: the same model, the same taps, its own maths."""

from importlib.util import find_spec

if missing := [name for name in ("jax", "flax") if find_spec(name) is None]:
    raise ImportError(f"{' and '.join(missing)} not installed; the JAX model needs: pip install 'gemma4-parity[jax]'")
