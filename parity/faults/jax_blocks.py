"""JAX faults of the decoder block, its ends and its branches: embedding, norms, MLP, head, experts, PLE."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gemma4_impl import taps
from gemma4_impl.nnx.decoder import MLP, DecoderLayer, Gemma4, ScaledEmbedding
from gemma4_impl.nnx.layers import Linear, RMSNorm, gated
from gemma4_impl.nnx.moe import Experts, Router
from parity.faults import FAULTS
from parity.faults.fault import K_EQ_V, MOE, Fault, Inject, each_layer, first, named, on_model
from parity.faults.jax_fault import Identity, assign, drop, of_type, ones, override, rounded, same, swap

_FIRST_LINEAR = FAULTS["norm_eps"].tap


def exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def norms(change: Callable[[RMSNorm], None]) -> Inject:
    return on_model(lambda model: [change(norm) for norm in of_type(model, RMSNorm)])


def one_plus(norm: RMSNorm) -> None:
    if norm.weight is not None:
        assign(norm.weight, lambda w: w + 1)


def loose_eps(norm: RMSNorm) -> None:
    norm.eps = 1e-5


def in_its_own_dtype(norm: RMSNorm) -> None:
    def call(self: RMSNorm, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        root = rounded(jax.lax.rsqrt(rounded(jnp.mean(rounded(wide * wide), axis=-1, keepdims=True) + self.eps)))
        return (rounded(wide * root) * self.weight[...]).astype(self.dtype)

    override(norm, __call__=call)


def scalars_of_next_layer(model: Gemma4) -> None:
    scalars = [layer.layer_scalar[...] for layer in model.layers]
    for i, layer in enumerate(model.layers):
        assign(layer.layer_scalar, lambda w, i=i: scalars[(i + 1) % len(scalars)])


def mlp_activation(act: Callable[[Array], Array]) -> Inject:
    def call(self: MLP, x: Array) -> Array:
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))

    return each_layer(lambda layer: override(layer.mlp, __call__=call))


def single_width(model: Gemma4) -> None:
    width = model.config.intermediate_size
    for layer in model.layers:
        assign(layer.mlp.gate_proj.weight, lambda w: w[:width])
        assign(layer.mlp.up_proj.weight, lambda w: w[:width])
        assign(layer.mlp.down_proj.weight, lambda w: w[:, :width])


def embedding_scale(scale: Callable[[Gemma4], float]) -> Inject:
    """The scale in float32, of which the product is rounded: a Python float would be rounded to bfloat16 first."""

    def change(model: Gemma4) -> None:
        factor = scale(model)

        def call(self: ScaledEmbedding, tokens: Array) -> Array:
            return (self.weight[...][tokens].astype(jnp.float32) * factor).astype(self.dtype)

        override(model.embed_tokens, __call__=call)

    return on_model(change)


def ids_clamped(model: Gemma4) -> None:
    def call(self: ScaledEmbedding, tokens: Array) -> Array:
        table = self.weight[...]
        return table[: len(table) // 2][tokens].astype(self.dtype) * self.scale

    override(model.embed_tokens, __call__=call)


def logits_of_padding(model: Gemma4) -> None:
    seen: list[Array] = []

    def layer(self: DecoderLayer, x: Array, *args: Any) -> tuple:
        out = DecoderLayer.__call__(self, x, *args)
        seen[:] = [out[0]]
        return out

    def norm(self: RMSNorm, x: Array) -> Array:
        return RMSNorm.__call__(self, x if x.shape[1] > 1 else seen[0][:, -1:])

    override(model.layers[-1], __call__=layer)
    override(model.norm, __call__=norm)


def linear_in_bfloat16(linear: Linear) -> None:
    def call(self: Linear, x: Array) -> Array:
        factors = x.astype(jnp.bfloat16), self.weight[...].astype(jnp.bfloat16)
        return jnp.einsum("...i,oi->...o", *factors, preferred_element_type=x.dtype)

    override(linear, __call__=call)


def squares_transposed(model: Gemma4) -> None:
    square = [linear.weight for linear in of_type(model, Linear) if len(set(linear.weight.shape)) == 1]
    if not square:
        raise ValueError("square_transposed: the model has no square matrix, and no other would load transposed")
    for weight in square:
        assign(weight, jnp.transpose)


def experts_activation(act: Callable[[Array], Array]) -> Inject:
    def call(self: Experts, x: Array, weights: Array, index: Array) -> Array:
        gate, up = jnp.split(jnp.einsum("btd,btkfd->btkf", x, self.gate_up_proj[...][index]), 2, axis=-1)
        y = jnp.einsum("btkf,btkdf->btkd", act(gate) * up, self.down_proj[...][index])
        return jnp.einsum("btkd,btk->btd", y, weights)

    return each_layer(lambda layer: override(layer.experts, __call__=call))


def up_before_gate(w: Array) -> Array:
    return jnp.concatenate(jnp.split(w, 2, axis=1)[::-1], axis=1)


def gate_and_up_alternate(w: Array) -> Array:
    return jnp.concatenate([w[:, ::2], w[:, 1::2]], axis=1)


def gate_up(change: Callable[[Array], Array]) -> Inject:
    return each_layer(lambda layer: assign(layer.experts.gate_up_proj, change))


class Sorted(Experts):
    """The grouped path with its steps as methods, which faults replace."""

    def sizes(self, flat: Array) -> Array:
        return jnp.bincount(flat, length=self.gate_up_proj.shape[0]).astype(jnp.int32)

    def rows(self, order: Array, tokens: int, k: int) -> Array:
        return order // k

    def unsorted(self, y: Array, order: Array) -> Array:
        return jnp.zeros_like(y).at[order].set(y)

    def __call__(self, x: Array, weights: Array, index: Array) -> Array:
        order, k = jnp.argsort(index.reshape(-1)), index.shape[-1]
        flat, sizes = x.reshape(-1, x.shape[-1]), self.sizes(index.reshape(-1))
        rows = flat[self.rows(order, len(flat), k)]
        gate, up = jnp.split(jax.lax.ragged_dot(rows, self.gate_up_proj[...].mT, sizes), 2, axis=-1)
        y = jax.lax.ragged_dot(gated(gate, up), self.down_proj[...].mT, sizes)
        y = self.unsorted(y, order).reshape(*index.shape, -1)
        return jnp.einsum("btkd,btk->btd", y, weights)


def sorting(**steps: Any) -> Inject:
    """Experts with other steps of `Sorted`."""

    def change(layer: DecoderLayer) -> None:
        layer.experts.__class__ = Sorted
        override(layer.experts, **steps)

    return each_layer(change)


def router_choice(choose: Callable[[Array, int], Array]) -> Inject:
    """`choose(probs [B, T, E], k)` gives the experts [B, T, k]."""
    return router_weights(scaled_after_renormalising, choose)


def router_weights(
    weigh: Callable[[Router, Array, Array], Array],
    choose: Callable[[Array, int], Array] = lambda probs, k: jax.lax.top_k(probs, k)[1],
) -> Inject:
    """`weigh(router, probs [B, T, E], index [B, T, k])` makes the weights of the chosen experts."""

    def call(self: Router, x: Array) -> tuple[Array, Array]:
        x = self.norm(x) * self.scale[...] * x.shape[-1] ** -0.5
        probs = taps.tap(self.prefix, "router", jax.nn.softmax(self.proj(x), axis=-1))
        index = taps.route(self.prefix, choose(probs, self.top_k))
        return weigh(self, probs, index), index

    return each_layer(lambda layer: override(layer.router, __call__=call))


def chosen(probs: Array, index: Array) -> Array:
    return jnp.take_along_axis(probs, index, axis=-1)


def scaled_after_renormalising(router: Router, probs: Array, index: Array) -> Array:
    weights = chosen(probs, index)
    return weights / weights.sum(axis=-1, keepdims=True) * router.per_expert_scale[...][index]


def not_renormalised(router: Router, probs: Array, index: Array) -> Array:
    return chosen(probs, index) * router.per_expert_scale[...][index]


def taken_from_first_token(router: Router, probs: Array, index: Array) -> Array:
    weights = jnp.take(probs, index)
    return weights / weights.sum(axis=-1, keepdims=True) * router.per_expert_scale[...][index]


def router_of_normed(layer: DecoderLayer) -> None:
    # The norm is copied into the router: a module that two others share would be one and the same after a merge, too.
    norm = nnx.clone(layer.pre_feedforward_layernorm_2)
    layer.router.input_norm = norm
    override(layer.router, __call__=lambda self, x: Router.__call__(self, self.input_norm(x)))


def dense_branch_missing(layer: DecoderLayer) -> None:
    def feed_forward(self: DecoderLayer, x: Array) -> Array:
        weights, index = self.router(x)
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), weights, index)
        return self.post_feedforward_layernorm_2(taps.tap(self.prefix, "experts", sparse))

    override(layer, feed_forward=feed_forward)


def unscaled_table(model: Gemma4) -> None:
    model.embed_tokens_per_layer.scale = 1.0


def sum_not_halved(model: Gemma4) -> None:
    model.embed_tokens_per_layer.scale *= 2**0.5
    assign(model.per_layer_projection_norm.weight, lambda w: w * 2**0.5)


def table_layer_last(model: Gemma4) -> None:
    """The packed row is read as [ple, L] instead of [L, ple]."""
    layers = model.config.num_hidden_layers

    def call(self: ScaledEmbedding, tokens: Array) -> Array:
        row = ScaledEmbedding.__call__(self, tokens)
        return row.reshape(*tokens.shape, -1, layers).swapaxes(-1, -2).reshape(row.shape)

    override(model.embed_tokens_per_layer, __call__=call)


def ple_of_next_layer(model: Gemma4) -> None:
    def per_layer_inputs(self: Gemma4, tokens: Array, embed: Array) -> Array:
        return jnp.roll(Gemma4.per_layer_inputs(self, tokens, embed), -1, axis=2)

    override(model, per_layer_inputs=per_layer_inputs)


def gate_of_resid_mid(layer: DecoderLayer) -> None:
    seen: list[Array] = []

    def norm(self: RMSNorm, x: Array) -> Array:
        seen[:] = [x]
        return RMSNorm.__call__(self, x)

    override(layer.pre_feedforward_layernorm, __call__=norm)
    override(layer.per_layer_input_gate, __call__=lambda self, x: Linear.__call__(self, seen[0]))


BLOCKS = [
    same("final_norm_in_bfloat16", on_model(lambda model: in_its_own_dtype(model.norm))),
    same("embed_unscaled", embedding_scale(lambda model: 1.0)),
    same("embed_scale_unrounded", embedding_scale(lambda model: model.config.hidden_size**0.5), variants=("E2B",)),
    same("final_norm_missing", on_model(lambda model: setattr(model, "norm", Identity()))),
    same("softcap_missing"),
    same("norm_one_plus_w", norms(one_plus)),
    same("norm_eps", norms(loose_eps)),
    same("input_norm_missing", drop("input_layernorm")),
    same("layer_scalar_missing", each_layer(lambda layer: ones(layer.layer_scalar))),
    same("gelu_erf", mlp_activation(exact_gelu)),
    same("gate_up_swapped", swap("mlp.gate_proj", "mlp.up_proj")),
    same("mlp_single_width", on_model(single_width)),
    Fault(
        "stacked_layers_off_by_one",
        "weights stacked over the layers are indexed one too high",
        on_model(scalars_of_next_layer),
        first("out"),
    ),
    Fault(
        "matmul_in_bfloat16",
        "products of float32 are those of bfloat16 factors, an accelerator's default precision",
        on_model(lambda model: [linear_in_bfloat16(linear) for linear in of_type(model, Linear)]),
        _FIRST_LINEAR,
    ),
    Fault(
        "square_transposed",
        "a square weight is transposed on load, as for a kernel [in, out]; its shape does not tell",
        on_model(squares_transposed),
        first("self_attn.q"),
        ("31B",),
    ),
    Fault(
        "ids_clamped",
        "the table lacks its last rows; JAX reads the last one it has for any id past the end",
        on_model(ids_clamped),
        named("embed"),
    ),
    Fault(
        "logits_of_padding",
        "prefill takes the last column's logits, which a bucket has padded, not the last token's",
        on_model(logits_of_padding),
        named("norm"),
        K_EQ_V,
        path="generate",
    ),
]

BRANCHES = [
    same("router_input_normed", each_layer(router_of_normed)),
    same("router_scale_missing", each_layer(lambda layer: ones(layer.router.scale))),
    same(
        "router_root_missing",
        each_layer(lambda layer: assign(layer.router.scale, lambda w: w * len(w) ** 0.5)),
    ),
    same("router_takes_next", router_choice(lambda probs, k: jax.lax.top_k(probs, k + 1)[1][..., 1:])),
    same("router_takes_least", router_choice(lambda probs, k: jax.lax.top_k(-probs, k)[1])),
    same("router_not_renormalised", router_weights(not_renormalised)),
    same("per_expert_scale_missing", each_layer(lambda layer: ones(layer.router.per_expert_scale))),
    same("moe_pre_norms_swapped", swap("pre_feedforward_layernorm", "pre_feedforward_layernorm_2")),
    same("moe_post_norms_swapped", swap("post_feedforward_layernorm_1", "post_feedforward_layernorm_2")),
    same("dense_branch_missing", each_layer(dense_branch_missing)),
    same("experts_gelu_erf", experts_activation(exact_gelu)),
    same("experts_up_first", gate_up(up_before_gate)),
    same("experts_alternate", gate_up(gate_and_up_alternate)),
    Fault(
        "router_take_flat",
        "jnp.take without an axis reads the probabilities of the first token for all",
        router_weights(taken_from_first_token),
        first("experts"),
        MOE,
    ),
    Fault(
        "group_sizes_rolled",
        "ragged_dot is given the group sizes of the next experts",
        sorting(sizes=lambda self, flat: jnp.roll(Sorted.sizes(self, flat), -1)),
        first("experts"),
        MOE,
    ),
    Fault(
        "experts_not_unsorted",
        "outputs stay in the order of experts",
        sorting(unsorted=lambda self, y, order: y),
        first("experts"),
        MOE,
    ),
    Fault(
        "experts_rows_of_choice",
        "a sorted choice reads token number order % T instead of order // k",
        sorting(rows=lambda self, order, tokens, k: order % tokens),
        first("experts"),
        MOE,
    ),
    same("ple_sum_not_halved", on_model(sum_not_halved)),
    same(
        "ple_root_missing",
        on_model(
            lambda model: assign(model.per_layer_model_projection.weight, lambda w: w * model.config.hidden_size**0.5)
        ),
    ),
    same("ple_table_unscaled", on_model(unscaled_table)),
    same("ple_table_layer_last", on_model(table_layer_last)),
    same("ple_without_context", on_model(lambda model: assign(model.per_layer_projection_norm.weight, jnp.zeros_like))),
    same("ple_of_next_layer", on_model(ple_of_next_layer)),
    same("ple_gate_of_resid_mid", each_layer(gate_of_resid_mid)),
]
