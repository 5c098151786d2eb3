"""Rotary position embedding: frequencies of both layer types, and their application."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma4_impl.config import RopeParameters


def inverse_frequencies(head_dim: int, rope: RopeParameters) -> np.ndarray:
    """[H / 2] float64, radians a position: theta ** (-2i / H) for the first `partial_rotary_factor` of the pairs, 0 for
    the others, which do not turn."""
    turning = int(rope.partial_rotary_factor * head_dim // 2)
    powers = np.arange(turning, dtype=np.float64) * (-2.0 / head_dim)
    return np.concatenate([np.float64(rope.rope_theta) ** powers, np.zeros(head_dim // 2 - turning)])


def rotary_angles(positions: Array, frequencies: np.ndarray, dtype: jnp.dtype) -> tuple[Array, Array]:
    """positions [B, T] -> cos, sin [B, T, 1, H / 2] in `dtype`, at least float32. Padding (-1) is turned as 0."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = jnp.maximum(positions, 0)[:, :, None, None].astype(wide) * frequencies.astype(wide)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """x [B, T, N, H], dim i paired with i + H / 2, turned in the dtype of the angles and rounded once to its own."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
