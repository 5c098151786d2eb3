"""The sparse branch of a mixture-of-experts layer: router and experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gemma4_impl import taps
from gemma4_impl.config import TextConfig
from gemma4_impl.nnx.layers import Linear, Make, RMSNorm, at_least_float32, gated, param
from gemma4_impl.nnx.sharding import FSDP, TP

_init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=0)


class Router(nnx.Module):
    """Chooses `top_k_experts` experts for each token and weighs them."""

    def __init__(self, make: Make, config: TextConfig, prefix: str):
        self.prefix, self.top_k = prefix, config.top_k_experts
        D, self.dtype = config.hidden_size, make["dtype"]
        self.norm = RMSNorm(make | {"dtype": jnp.promote_types(self.dtype, jnp.float32)}, D, config.rms_norm_eps, False)
        self.scale = param(make, (D,), (None,))
        self.proj = Linear(make, D, config.num_experts, (None, FSDP))
        self.per_expert_scale = param(make, (config.num_experts,), (None,))

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """x [B, T, D], the residual itself, un-normed -> weights [B, T, k] (at least float32), experts [B, T, k]."""
        x = self.norm(x)
        x = x * self.scale[...].astype(x.dtype) * x.shape[-1] ** -0.5
        probs = jax.nn.softmax(at_least_float32(self.proj(x.astype(self.dtype))), axis=-1)
        probs = taps.tap(self.prefix, "router", probs)
        index = taps.route(self.prefix, jax.lax.top_k(probs, self.top_k)[1])
        weights = jnp.take_along_axis(probs, index, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights * self.per_expert_scale[...].astype(weights.dtype)[index], index


class Experts(nnx.Module):
    """E gated MLPs in two stacked weights [E, out, in]; each token passes through its k chosen ones."""

    def __init__(self, make: Make, config: TextConfig):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.dtype = make["dtype"]
        self.gate_up_proj = param(make, (E, 2 * F, D), (None, TP, FSDP), _init)
        self.down_proj = param(make, (E, D, F), (None, FSDP, TP), _init)

    def __call__(self, x: Array, weights: Array, index: Array) -> Array:
        """x [B, T, D], weights and index [B, T, k] -> [B, T, D]; the weighted sum is in the dtype of `weights`."""
        gate_up, down = self.gate_up_proj[...].astype(self.dtype), self.down_proj[...].astype(self.dtype)
        few = x.shape[0] * x.shape[1] * index.shape[-1] <= gate_up.shape[0]
        y = _gathered(x, index, gate_up, down) if few else _grouped(x, index, gate_up, down)
        return jnp.einsum("btkd,btk->btd", y.astype(weights.dtype), weights).astype(x.dtype)


# Rows of the left in groups, each times its own [out, in] weight.
_RAGGED = jax.lax.RaggedDotDimensionNumbers(
    (((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def _gathered(x: Array, index: Array, gate_up: Array, down: Array) -> Array:
    """x [B, T, D], experts [B, T, k] -> [B, T, k, D]: for a few tokens only the chosen experts are read."""
    gate, up = jnp.split(jnp.einsum("btd,btkfd->btkf", x, gate_up[index]), 2, axis=-1)
    return jnp.einsum("btkf,btkdf->btkd", gated(gate, up), down[index])


def _grouped(x: Array, index: Array, gate_up: Array, down: Array) -> Array:
    """The same with the tokens sorted by expert, each expert being one matrix product of a ragged group."""
    flat = index.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=gate_up.shape[0]).astype(jnp.int32)
    rows = x.reshape(-1, x.shape[-1])[order // index.shape[-1]]
    gate, up = jnp.split(jax.lax.ragged_dot_general(rows, gate_up, sizes, _RAGGED), 2, axis=-1)
    y = jax.lax.ragged_dot_general(gated(gate, up), down, sizes, _RAGGED)
    return jnp.zeros_like(y).at[order].set(y).reshape(*index.shape, -1)
