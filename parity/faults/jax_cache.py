"""JAX faults of caches: rings, slots of padding, what a caller carries from one call to the next."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.nnx.cache import KVCache, write
from gemma4_impl.nnx.decoder import KV, Attention, Gemma4
from parity.faults.fault import Fault, Inject, first, in_full, on_model
from parity.faults.jax_attention import rope_positions, steps
from parity.faults.jax_fault import override, rounded, same

if TYPE_CHECKING:
    from parity.candidate_jax import JaxCandidate

_OUT = first("self_attn.out")

Slots = Callable[[str, Array, int], Array]
"""(layer type, positions [B, T], capacity) -> the slots [B, T] that tokens are put into."""


def placed(slots_of: Slots, padding_too: bool = False) -> type[KVCache]:
    """A cache that puts tokens, with `padding_too` every column of a chunk, where `slots_of` says."""

    class Placed(KVCache):
        def reserve(self, positions: Array) -> tuple[KVCache, dict[str, Array]]:
            healthy, _ = KVCache.reserve(self, positions)
            at = self.next_positions(positions.shape[1]) if padding_too else positions
            rows = jnp.arange(self.batch_size)[:, None]
            slots = {kind: slots_of(kind, at, held.shape[1]) for kind, held in self.positions.items()}
            stored = {kind: self.positions[kind].at[rows, slots[kind]].set(at, mode="drop") for kind in slots}
            return replace(healthy, positions=stored), slots

    return Placed


def keeping(cache: type[KVCache]) -> Inject:
    """The model reserves slots as `cache` does."""

    def call(self: Gemma4, tokens: Array, positions: Array | None, held: KVCache, *args: Any, **kwargs: Any) -> tuple:
        held = cache(held.lengths, held.positions, held.layers)
        return Gemma4.__call__(self, tokens, positions, held, *args, **kwargs)

    return on_model(lambda model: override(model, __call__=call))


def ring(slots: Callable[[int, int], int], chunk: Callable[[int], int] | None = None) -> Inject:
    """Sliding layers use only the first `slots(W, capacity)` slots; `chunk(W)` tokens are fed at a time, if given."""

    def inject(candidate: "JaxCandidate") -> None:
        window = candidate.config.sliding_window
        if chunk is not None:
            candidate.chunks = (chunk(window),)

        def slots_of(kind: str, positions: Array, capacity: int) -> Array:
            used = slots(window, capacity) if kind == SLIDING else capacity
            return jnp.where(positions < 0, capacity, positions % used)

        keeping(placed(slots_of))(candidate)

    return inject


def wrapped(kind: str, positions: Array, capacity: int) -> Array:
    return positions % capacity


def padding_at_minus_one(kind: str, positions: Array, capacity: int) -> Array:
    return jnp.where(positions < 0, -1, positions % capacity)


def one_slice(kind: str, positions: Array, capacity: int) -> Array:
    T = positions.shape[1]
    # lax.dynamic_update_slice moves a slice that would end outside.
    start = jnp.minimum(positions[:, :1] % capacity, capacity - T)
    return jnp.where(positions < 0, capacity, start + jnp.arange(T))


def lengths_by_bucket(model: Gemma4) -> None:
    ahead: list[Array] = []

    def call(self: Gemma4, tokens: Array, positions: Array | None, cache: KVCache, *args: Any, **kwargs: Any) -> tuple:
        start = 1 + cache.positions[FULL].max(axis=1, keepdims=True)
        ahead[:] = [cache.lengths[:, None] - start]
        if positions is None:
            positions = start + jnp.arange(tokens.shape[1])
        logits, new = Gemma4.__call__(self, tokens, positions, cache, *args, **kwargs)
        return logits, replace(new, lengths=cache.lengths + tokens.shape[1])

    def rotary(self: Gemma4, kind: str, positions: Array) -> tuple[Array, Array]:
        return Gemma4._rotary(self, kind, jnp.where(positions < 0, -1, positions + ahead[0]))

    override(model, __call__=call, _rotary=rotary)


def old_cache_kept(model: Gemma4) -> None:
    def call(self: Gemma4, tokens: Array, positions: Array | None, cache: KVCache, *args: Any, **kwargs: Any) -> tuple:
        logits, new = Gemma4.__call__(self, tokens, positions, cache, *args, **kwargs)
        return logits, replace(new, layers=cache.layers)

    override(model, __call__=call)


def added(self: Attention, held: KV, slots: Array, k: Array, v: Array) -> KV:
    rows = jnp.arange(slots.shape[0])[:, None]
    return tuple(old.at[rows, slots].add(new, mode="drop") for old, new in zip(held, (k, v), strict=True))


def in_bfloat16(self: Attention, held: KV, slots: Array, k: Array, v: Array) -> KV:
    return write(held, slots, rounded(k), rounded(v))


CACHES = [
    same("ring_of_two_windows", ring(lambda w, capacity: 2 * w, chunk=lambda w: 2 * w)),
    same("ring_one_slot_short", ring(lambda w, capacity: capacity - 1)),
    Fault(
        "padding_wraps",
        "padding is written to slot -1 to be dropped, but that is the last slot: only what is past the end is dropped",
        keeping(placed(padding_at_minus_one)),
        _OUT,
        path="chunked",
    ),
    Fault(
        "bucket_stored",
        "a chunk's padding is stored as if it were tokens: past the end of a full cache it overwrites the beginning",
        keeping(placed(wrapped, padding_too=True)),
        in_full("self_attn.out"),
        path="chunked",
    ),
    Fault(
        "ring_written_as_slice",
        "a chunk is written by dynamic_update_slice, which moves it back where the ring ends instead of wrapping",
        keeping(placed(one_slice)),
        _OUT,
        path="chunked",
    ),
    Fault(
        "lengths_by_bucket",
        "the cache's lengths advance by the bucket, not by its tokens, and the next chunk's RoPE starts there",
        on_model(lengths_by_bucket),
        first("self_attn.q"),
        path="chunked",
    ),
    Fault(
        "old_cache_kept",
        "the caller goes on with the keys and values that it gave, not with those that it got back",
        on_model(old_cache_kept),
        _OUT,
        path="decode",
    ),
    Fault(
        "scan_positions_stale",
        "a scan's steps all turn by the position of its first one",
        rope_positions(lambda positions: jnp.minimum(positions, 0)),
        first("self_attn.q"),
        path="decode",
    ),
    Fault("cache_added", "new keys are added to what a slot of the ring held", steps(store=added), _OUT, path="decode"),
    Fault(
        "cache_in_bfloat16",
        "the cache of a float32 model is kept in bfloat16",
        steps(store=in_bfloat16),
        _OUT,
        path="decode",
    ),
]
