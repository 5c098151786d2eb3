"""What the text decoder and the vision tower share: parameters, linear maps, norms, activation, attention."""

from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gemma4_impl.nnx import elementary
from gemma4_impl.nnx.sharding import partition


class Make(TypedDict):
    """What every module is made with."""

    dtype: Any
    """Computed in; the parameters are cast to it where they are used."""
    param_dtype: Any
    rngs: nnx.Rngs


def param(make: Make, shape: Sequence[int], axes: Sequence[str | None], init: Any = nnx.initializers.ones) -> nnx.Param:
    """A parameter whose metadata says over which mesh axes its dims are spread."""
    value = init(make["rngs"].params(), tuple(shape), make["param_dtype"])
    return nnx.Param(value, out_sharding=partition(shape, axes), eager_sharding=False)


def linear(
    make: Make,
    in_features: int,
    out_features: int,
    axes: Sequence[str | None] = (None, None),
    units: Sequence[int] | None = None,
) -> nnx.Linear:
    """A linear map without bias, kernel [in, out]; `units` are what its dims may be cut into, see `partition`."""
    spec = partition(units or (in_features, out_features), axes)
    metadata = {"out_sharding": spec, "eager_sharding": False}
    return nnx.Linear(in_features, out_features, use_bias=False, kernel_metadata=metadata, **make)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, at least in float32 and rounded once; the scale multiplies as it is."""

    def __init__(self, make: Make, dim: int, eps: float, with_scale: bool = True):
        self.eps, self.dtype = eps, make["dtype"]
        self.scale = param(make, (dim,), (None,)) if with_scale else None

    def __call__(self, x: Array) -> Array:
        wide = at_least_float32(x)
        mean = elementary.divide(jnp.sum(wide * wide, axis=-1, keepdims=True), x.shape[-1])
        y = wide * elementary.rsqrt(mean + self.eps)
        if self.scale is not None:
            y = y * self.scale[...].astype(y.dtype)
        return y.astype(self.dtype)


def gelu(x: Array) -> Array:
    """The tanh form, at least in float32, not rounded back."""
    return elementary.gelu(at_least_float32(x))


def gated(gate: Array, up: Array) -> Array:
    """gelu(gate) * up, rounded once."""
    return (gelu(gate) * up).astype(up.dtype)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B, T, N, H], k and v [B, S, K, H], bool mask [B, 1, T, S] -> [B, T, N, H]. No 1/sqrt(H): norms set the scale.
    Scores and softmax are at least float32; every query must see a key."""
    B, T, N, H = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(B, T, k.shape[2], -1, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=wide)
    probs = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", probs.astype(v.dtype), v, preferred_element_type=wide)
    return out.astype(v.dtype).reshape(B, T, N, H)


def at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
