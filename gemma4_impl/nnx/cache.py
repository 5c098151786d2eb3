"""Key/value caches as a pytree: a ring for sliding layers, a flat one for full layers, none for KV-shared ones."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gemma4_impl.config import FULL, SLIDING, TextConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer that computes its own. A value: the model returns a new one, and a jitted caller
    that donates the old one has it updated in place.

    A sliding layer's query sees the last W - 1 keys of the past and its own chunk, so a ring of C = W - 1 + max_chunk
    slots never overwrites a key that is still needed; masks are computed from the positions beside the slots."""

    lengths: Array
    """int32 [B], tokens so far."""
    positions: dict[str, Array]
    """Layer type -> int32 [B, C], the position in each slot; -1 where there is none."""
    layers: dict[int, tuple[Array, Array]]
    """Layer index -> keys and values [B, C, K, H]."""

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def next_positions(self, length: int) -> Array:
        """int32 [B, length] that continue every row."""
        return self.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)

    def reserve(self, positions: Array) -> tuple["KVCache", dict[str, Array]]:
        """Takes slots for tokens at `positions` [B, T], -1 being padding: the cache that knows of them, and layer type
        -> [B, T] their slots, past the end for padding so that writing there does nothing."""
        rows = jnp.arange(self.batch_size)[:, None]
        stored, slots = {}, {}
        for kind, held in self.positions.items():
            capacity = held.shape[1]
            slots[kind] = jnp.where(positions < 0, capacity, positions % capacity)
            stored[kind] = held.at[rows, slots[kind]].set(positions, mode="drop")
        lengths = jnp.maximum(self.lengths, positions.max(axis=1) + 1)
        return replace(self, lengths=lengths, positions=stored), slots


def make_cache(
    config: TextConfig, batch_size: int = 1, max_seq_len: int = 4096, max_chunk: int = 512, dtype: Any = jnp.float32
) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_seq_len` tokens, fed at most `max_chunk` at a time.
    Raises ValueError for a size that is not positive or that exceeds the model's context."""
    for name, value in {"batch_size": batch_size, "max_seq_len": max_seq_len, "max_chunk": max_chunk}.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if max_seq_len > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"max_seq_len = {max_seq_len} exceeds the model's max_position_embeddings = {most}")
    ring = min(max_seq_len, config.sliding_window - 1 + min(max_chunk, max_seq_len))
    capacity = {SLIDING: ring, FULL: max_seq_len}
    layers = {}
    for layer in config.layers[: config.first_kv_shared_layer]:
        shape = (batch_size, capacity[layer.layer_type], layer.num_key_value_heads, layer.head_dim)
        layers[layer.index] = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return KVCache(
        lengths=jnp.zeros(batch_size, jnp.int32),
        positions={kind: jnp.full((batch_size, capacity[kind]), -1, jnp.int32) for kind in set(config.layer_types)},
        layers=layers,
    )


def write(held: tuple[Array, Array], slots: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values [B, C, K, H] with k, v [B, T, K, H] put into slots [B, T]."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return tuple(
        old.at[rows, slots].set(new.astype(old.dtype), mode="drop") for old, new in zip(held, (k, v), strict=True)
    )
