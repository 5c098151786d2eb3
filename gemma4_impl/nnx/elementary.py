"""Elementary functions to the last bit or so.

XLA's own are fast and biased: on the CPU its float32 tanh is 1e-7 off for small arguments, its rsqrt 1e-8, and a
division by a constant becomes a product with its rounded inverse, up to 6e-8 off. Each errs in one direction, which
rounding does not, and which adds up over features, tokens and layers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Chebyshev fit of (tanh(x) / x - 1) / x^2 in powers of x^2, for |x| < 0.648; off by 5e-9 of 1/3.
_TANH = (-0.333333328180081, 0.13333281013783888, -0.05395553392636206, 0.02174446957698959, -0.00827482999403977,
         0.0022224711058371274)  # fmt: skip
_TANH_SMALL = 0.625


def divide(x: Array, constant: float) -> Array:
    """x / constant, rounded once: by the inverse and by what rounding took from it."""
    if x.dtype == jnp.float64:
        return x / constant
    high = np.float64(1 / constant).astype(x.dtype)
    low = (1 / np.float64(constant) - np.float64(high)).astype(x.dtype)
    return x * high + x * low


def rsqrt(x: Array) -> Array:
    """1 / sqrt(x), with one step of Newton's method after XLA's."""
    y = jax.lax.rsqrt(x)
    return y + 0.5 * y * (1 - x * y * y)


@jax.custom_jvp
def tanh(x: Array) -> Array:
    """A polynomial where the exponential would cancel, else 1 - 2 / (exp(2 |x|) + 1)."""
    if x.dtype == jnp.float64:
        return jnp.tanh(x)
    size, square = jnp.abs(x), x * x
    series = jnp.full_like(x, _TANH[-1])
    for coefficient in _TANH[-2::-1]:
        series = series * square + coefficient
    large = 1 - 2 / (jnp.exp(2 * size) + 1)
    return jnp.copysign(jnp.where(size < _TANH_SMALL, size + size * (square * series), large), x)


# The branches' own derivatives are less exact, and an overflow in the one that is not taken would be NaN.
tanh.defjvps(lambda slope, y, x: slope * (1 - y * y))


def gelu(x: Array) -> Array:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1 + tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))
