"""JAX faults of the attention: RoPE, norms of queries, keys and values, scores, masks, KV sharing."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma4_impl import taps
from gemma4_impl.config import FULL, SLIDING, RopeParameters
from gemma4_impl.nnx.cache import write
from gemma4_impl.nnx.decoder import KV, Attention, Gemma4, attention_mask
from gemma4_impl.nnx.layers import RMSNorm, attend
from gemma4_impl.nnx.rope import apply_rotary, inverse_frequencies, rotary_angles
from parity.faults.fault import Fault, Inject, first, on_model
from parity.faults.jax_fault import drop, override, rounded, same

if TYPE_CHECKING:
    from parity.candidate_jax import JaxCandidate

_OUT = first("self_attn.out")

Rotary = tuple[Array, Array]


class Steps(Attention):
    """The attention with its steps as methods, which faults replace."""

    def turn(self, norm: RMSNorm, x: Array, rotary: Rotary) -> Array:
        """Heads [B, T, N, H] -> what is used as q, or as k."""
        return apply_rotary(norm(x), *rotary)

    def values(self, x: Array, k: Array, rotary: Rotary) -> Array:
        """x [B, T, D], k as projected [B, T, K, H] -> v."""
        return self.v_norm(k if self.config.k_eq_v else self._heads(self.v_proj(x)))

    def store(self, held: KV, slots: Array, k: Array, v: Array) -> KV:
        return write(held, slots, k, v)

    def attend(self, q: Array, k: Array, v: Array, mask: Array) -> Array:
        return attend(q, k, v, mask)

    def __call__(self, x: Array, rotary: Rotary, mask: Array, held: KV | None, slots: Array | None) -> tuple[Array, KV]:
        q = taps.tap(self.prefix, "q", self.turn(self.q_norm, self._heads(self.q_proj(x)), rotary))
        kv = held
        if not self.config.kv_shared:
            k = self._heads(self.k_proj(x))
            v = self.values(x, k, rotary)
            k = taps.tap(self.prefix, "k", self.turn(self.k_norm, k, rotary))
            kv = k, taps.tap(self.prefix, "v", v)
            kv = kv if held is None else self.store(held, slots, *kv)
        out = self.attend(q, *kv, mask).reshape(*x.shape[:2], -1)
        return taps.tap(self.prefix, "out", self.o_proj(out)), kv


def attentions(candidate: "JaxCandidate", kind: str | None = None) -> list[Attention]:
    """Those of one layer type, or of all."""
    return [layer.self_attn for layer in candidate.model.layers if kind in (None, layer.config.layer_type)]


def steps(kind: str | None = None, **replaced: Any) -> Inject:
    """Attention of one layer type, or of all, with other steps of `Steps`."""

    def inject(candidate: "JaxCandidate") -> None:
        for attention in attentions(candidate, kind):
            attention.__class__ = Steps
            override(attention, **replaced)

    return inject


def interleaved(self: Attention, norm: RMSNorm, x: Array, rotary: Rotary) -> Array:
    x, (cos, sin) = norm(x), rotary
    x1, x2 = x[..., ::2], x[..., 1::2]
    return jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x.shape)


def rotary(function: Callable[[Gemma4, str, Array], Rotary]) -> Inject:
    """Replaces `Gemma4._rotary`: layer type, positions [B, T] -> cos, sin."""
    return on_model(lambda model: override(model, _rotary=function))


Frequencies = Callable[[int, RopeParameters], np.ndarray]


def frequencies(of: Frequencies, kind: str | None = None) -> Inject:
    """`of(head_dim, rope)` gives the frequencies [H / 2] of one layer type, or of each."""

    def function(self: Gemma4, own: str, positions: Array) -> Rotary:
        if kind not in (None, own):
            return Gemma4._rotary(self, own, positions)
        head_dim = self.config.head_dim if own == SLIDING else self.config.global_head_dim
        return rotary_angles(positions, of(head_dim, self.config.rope_parameters[own]), self.dtype)

    return rotary(function)


def all_dims(head_dim: int, rope: RopeParameters) -> np.ndarray:
    return inverse_frequencies(head_dim, replace(rope, partial_rotary_factor=1.0))


def over_rotary_dim(head_dim: int, rope: RopeParameters) -> np.ndarray:
    turning = all_dims(int(rope.partial_rotary_factor * head_dim), rope)
    return np.concatenate([turning, np.zeros(head_dim // 2 - len(turning))])


def bases_swapped(candidate: "JaxCandidate") -> None:
    config = candidate.model.config
    theta = {kind: rope.rope_theta for kind, rope in config.rope_parameters.items()}
    other = {SLIDING: theta[FULL], FULL: theta[SLIDING]}
    turned = {kind: replace(rope, rope_theta=other[kind]) for kind, rope in config.rope_parameters.items()}
    candidate.model.config = replace(config, rope_parameters=turned)


def angles_in_bfloat16(self: Gemma4, kind: str, positions: Array) -> Rotary:
    head_dim = self.config.head_dim if kind == SLIDING else self.config.global_head_dim
    turning = inverse_frequencies(head_dim, self.config.rope_parameters[kind]).astype(np.float32)
    angles = rounded(rounded(jnp.maximum(positions, 0)[:, :, None, None].astype(jnp.float32)) * rounded(turning))
    return rounded(jnp.cos(angles)), rounded(jnp.sin(angles))


def rope_positions(change: Callable[[Array], Array]) -> Inject:
    """RoPE sees `change(positions)`; masks and caches see the right ones."""
    return rotary(lambda self, kind, positions: Gemma4._rotary(self, kind, change(positions)))


def positions_of_longest_row(positions: Array) -> Array:
    return jnp.broadcast_to(positions.max(axis=0, keepdims=True), positions.shape)


def normed_k_as_v(self: Attention, x: Array, k: Array, rotary: Rotary) -> Array:
    return self.v_norm(self.k_norm(k))


def heads_last(self: Attention, x: Array) -> Array:
    return x.reshape(*x.shape[:2], self.config.head_dim, -1).swapaxes(-1, -2)


def scaled(self: Attention, q: Array, k: Array, v: Array, mask: Array) -> Array:
    return attend(q * q.shape[-1] ** -0.5, k, v, mask)


def tiled(self: Attention, q: Array, k: Array, v: Array, mask: Array) -> Array:
    groups = (1, 1, q.shape[2] // k.shape[2], 1)
    return attend(q, jnp.tile(k, groups), jnp.tile(v, groups), mask)


def in_bfloat16(self: Attention, q: Array, k: Array, v: Array, mask: Array) -> Array:
    return attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), mask).astype(q.dtype)


Mask = Callable[[Gemma4, str, Array, Array], Array]


def masks(function: Mask) -> Inject:
    """Replaces `Gemma4._mask` in a model that is shown no images: layer type, positions of queries and of keys."""

    def mask(self: Gemma4, kind: str, positions: Array, keys: Array, images: None) -> Array:
        return function(self, kind, positions, keys)

    return on_model(lambda model: override(model, _mask=mask))


def healthy(model: Gemma4, kind: str, positions: Array, keys: Array) -> Array:
    return attention_mask(positions, keys, model.config.sliding_window if kind == SLIDING else None)


def window_on_full_layers(model: Gemma4, kind: str, positions: Array, keys: Array) -> Array:
    return healthy(model, SLIDING, positions, keys)


def future_visible(model: Gemma4, kind: str, positions: Array, keys: Array) -> Array:
    return healthy(model, kind, positions, keys) | (keys[:, None, None, :] > positions[:, None, :, None])


def causal_from_first_key(model: Gemma4, kind: str, positions: Array, keys: Array) -> Array:
    if kind == SLIDING:
        return healthy(model, kind, positions, keys)
    return jnp.tri(positions.shape[1], keys.shape[1], dtype=bool)[None, None]


def empty_slots_visible(model: Gemma4, kind: str, positions: Array, keys: Array) -> Array:
    return healthy(model, kind, positions, jnp.maximum(keys, 0))


def masked_by_slot(model: Gemma4, kind: str, positions: Array, keys: Array) -> Array:
    return (jnp.arange(keys.shape[1]) <= positions[:, None, :, None]) | (positions < 0)[:, None, :, None]


def _shared(candidate: "JaxCandidate") -> list[Attention]:
    return [attention for attention in attentions(candidate) if attention.config.kv_shared]


def kv_from_previous_producer(candidate: "JaxCandidate") -> None:
    for layer in candidate.model.layers:
        own = layer.config
        if own.kv_shared:
            before = [a.config.index for a in attentions(candidate, own.layer_type) if not a.config.kv_shared]
            layer.config = replace(own, kv_source=before[before.index(own.kv_source) - 1])


def kv_of_chunk_only(candidate: "JaxCandidate") -> None:
    def call(self: Attention, x: Array, rotary: Rotary, mask: Array, held: KV, slots: Array) -> tuple[Array, KV]:
        rows = jnp.arange(slots.shape[0])[:, None]
        mask = jnp.take_along_axis(mask, slots[:, None, None], axis=-1)
        return Attention.__call__(self, x, rotary, mask, tuple(part[rows, slots] for part in held), slots)

    for attention in _shared(candidate):
        override(attention, __call__=call)


def kv_computed_by_shared_layer(candidate: "JaxCandidate") -> None:
    def call(self: Attention, x: Array, rotary: Rotary, mask: Array, held: KV, slots: None) -> tuple[Array, KV]:
        return Attention.__call__(self, x, rotary, mask, None, None)

    for attention in _shared(candidate):
        # Its producer's weights: the smallest difference that weights of its own could make.
        producer = candidate.model.layers[attention.config.kv_source].self_attn
        for name in ("k_proj", "k_norm", "v_proj", "v_norm"):
            setattr(attention, name, getattr(producer, name))
        attention.config = replace(attention.config, kv_source=attention.config.index)
        override(attention, __call__=call)


def last_position_rotated_as_first(candidate: "JaxCandidate") -> None:
    of_chunk: dict[str, Rotary] = {}

    def call(self: Attention, x: Array, rotary: Rotary, *args: Any) -> tuple[Array, KV]:
        kind = self.config.layer_type
        if not self.config.kv_shared:
            of_chunk[kind] = rotary
        return Attention.__call__(self, x, tuple(part[:, : x.shape[1]] for part in of_chunk[kind]), *args)

    for attention in attentions(candidate):
        override(attention, __call__=call)


def each_attention(**methods: Any) -> Inject:
    def inject(candidate: "JaxCandidate") -> None:
        for attention in attentions(candidate):
            override(attention, **methods)

    return inject


ATTENTION = [
    same("rope_full", frequencies(all_dims, FULL)),
    same("rope_over_rotary_dim", frequencies(over_rotary_dim, FULL)),
    same("rope_bases_swapped", bases_swapped),
    same("rope_interleaved", steps(turn=interleaved)),
    same("positions_count_padding", rope_positions(positions_of_longest_row)),
    same("positions_after_chunk", rope_positions(lambda positions: positions + (positions[:, :1] > 0))),
    same("rope_in_bfloat16", rotary(angles_in_bfloat16), variants=("31B",)),
    same("attention_scale", steps(attend=scaled)),
    same("attention_in_bfloat16", steps(attend=in_bfloat16)),
    same("kv_heads_tiled", steps(attend=tiled), variants=("26B-A4B",)),
    same("v_norm_missing", drop("self_attn.v_norm")),
    same("v_after_k_norm", steps(FULL, values=normed_k_as_v)),
    Fault(
        "heads_last",
        "a projection's output is read as [H, N] instead of [N, H]",
        each_attention(_heads=heads_last),
        first("self_attn.q"),
    ),
]

MASKS = [
    same("window_too_small"),
    same("window_too_large"),
    same("window_on_full_layers", masks(window_on_full_layers)),
    same("not_causal", masks(future_visible)),
    same("causal_from_first_key", masks(causal_from_first_key)),
    # A JAX cache is always attended to whole, so that its empty slots show from the first token on.
    same("empty_slots_attended", masks(empty_slots_visible), tap=_OUT, path="decode"),
    same("ring_masked_by_slot", masks(masked_by_slot)),
    same("kv_previous_producer", kv_from_previous_producer, variants=("E4B",)),
    same("kv_of_chunk_only", kv_of_chunk_only, path="decode"),
    same("kv_sharing_dropped", kv_computed_by_shared_layer),
    same("last_position_rope", last_position_rotated_as_first),
]
