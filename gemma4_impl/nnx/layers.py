"""What the text decoder and the vision tower share: parameters, linear maps, norms, activation, attention."""

from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gemma4_impl.nnx import elementary
from gemma4_impl.nnx.sharding import constrain, partition


class Make(TypedDict):
    """What every module is made with."""

    dtype: Any
    """Computed in; the parameters are cast to it where they are used."""
    param_dtype: Any
    rngs: nnx.Rngs


_linear_init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)


def param(
    make: Make,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: Any = nnx.initializers.ones,
    units: Sequence[int] | None = None,
) -> nnx.Param:
    """A parameter whose metadata says over which mesh axes its dims are spread; `units` are what they may be cut
    into (heads, say), by default single rows and columns. Under a mesh every device makes its own part."""
    spec = partition(units or shape, axes)
    value = _initial(init, make["rngs"].params(), tuple(shape), jnp.dtype(make["param_dtype"]), spec)
    return nnx.Param(value, out_sharding=spec, eager_sharding=False)


@jax.jit(static_argnums=(0, 2, 3, 4))
def _initial(init: Any, key: Array, shape: tuple[int, ...], dtype: Any, spec: tuple[str | None, ...]) -> Array:
    return constrain(init(key, shape, dtype), *spec)


class Linear(nnx.Module):
    """x @ weight.T without bias. The weight is [out, in] as in the checkpoint: one token's product then reduces along
    rows, which XLA does while it reads them, and columns it does not (measured on a GPU: decode 1.5 times as fast)."""

    def __init__(
        self,
        make: Make,
        in_features: int,
        out_features: int,
        axes: Sequence[str | None] = (None, None),
        units: Sequence[int] | None = None,
    ):
        """`axes` of (out, in); `units` are what these may be cut into, see `partition`."""
        self.dtype = make["dtype"]
        self.weight = param(make, (out_features, in_features), axes, _linear_init, units)

    def __call__(self, x: Array) -> Array:
        return jnp.einsum("...i,oi->...o", x.astype(self.dtype), self.weight[...].astype(self.dtype))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, at least in float32 and rounded once; the weight multiplies as it is."""

    def __init__(self, make: Make, dim: int, eps: float, with_scale: bool = True):
        self.eps, self.dtype = eps, make["dtype"]
        self.weight = param(make, (dim,), (None,)) if with_scale else None

    def __call__(self, x: Array) -> Array:
        wide = at_least_float32(x)
        mean = elementary.divide(jnp.sum(wide * wide, axis=-1, keepdims=True), x.shape[-1])
        y = wide * elementary.rsqrt(mean + self.eps)
        if self.weight is not None:
            y = y * self.weight[...].astype(y.dtype)
        return y.astype(self.dtype)


def gelu(x: Array) -> Array:
    """The tanh form, at least in float32, not rounded back."""
    return elementary.gelu(at_least_float32(x))


def gated(gate: Array, up: Array) -> Array:
    """gelu(gate) * up, rounded once."""
    return (gelu(gate) * up).astype(up.dtype)


def scaled(x: Array, scale: Array) -> Array:
    """x times scale [1] in the dtype of x. The scale's gradient, a sum over all of x, is added up at least in float32:
    XLA adds bfloat16 in bfloat16."""
    wide = at_least_float32(x)
    return (wide * scale.astype(x.dtype).astype(wide.dtype)).astype(x.dtype)


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
