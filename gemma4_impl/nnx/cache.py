"""Key/value caches as a pytree: a ring for sliding layers, a flat one for full layers, none for KV-shared ones."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.nnx.sharding import FSDP, TP, constrain, partition

_ROWS, _HEADS = (FSDP, None), (FSDP, None, TP, None)
"""How [B, C] and [B, C, K, H] are spread: by rows, and by heads where there are enough for every device."""


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
        stored, slots = {}, {}
        for kind, held in self.positions.items():
            capacity = held.shape[1]
            slots[kind] = jnp.where(positions < 0, capacity, positions % capacity)
            stored[kind] = constrain(_put(held, slots[kind], positions), *_ROWS)
        lengths = jnp.maximum(self.lengths, positions.max(axis=1) + 1)
        return replace(self, lengths=lengths, positions=stored), slots


def make_cache(
    config: TextConfig, batch_size: int = 1, max_seq_len: int = 4096, max_chunk: int = 512, dtype: Any = jnp.float32
) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_seq_len` tokens, fed at most `max_chunk` at a time, over the
    mesh of `jax.set_mesh` as `cache_sharding` has it.
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
        layers[layer.index] = tuple(_filled(shape, 0, jnp.dtype(dtype), _HEADS) for _ in range(2))
    return KVCache(
        lengths=_filled((batch_size,), 0, jnp.dtype(jnp.int32), _ROWS[:1]),
        positions={
            kind: _filled((batch_size, capacity[kind]), -1, jnp.dtype(jnp.int32), _ROWS)
            for kind in set(config.layer_types)
        },
        layers=layers,
    )


@jax.jit(static_argnums=(0, 1, 2, 3))
def _filled(shape: tuple[int, ...], value: int, dtype: Any, axes: tuple[str | None, ...]) -> Array:
    return constrain(jnp.full(shape, value, dtype), *axes)


def cache_sharding(cache: KVCache, mesh: Mesh) -> KVCache:
    """The sharding over `mesh` of every array of a cache, which may be abstract: rows over `fsdp` and heads over `tp`
    where these divide their number; elsewhere whole on every device."""

    def sharding(x: Array) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*partition(x.shape, _HEADS if x.ndim == 4 else _ROWS[: x.ndim])))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.tree.map(sharding, cache)


def write(held: tuple[Array, Array], slots: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values [B, C, K, H] with k, v [B, T, K, H] put into slots [B, T]."""
    return tuple(
        # The new ones are whole before they are written: else they are cut like the queries and gathered again.
        constrain(_put(old, slots, constrain(new.astype(old.dtype), *_HEADS)), *_HEADS)
        for old, new in zip(held, (k, v), strict=True)
    )


@jax.vmap
def _put(held: Array, slots: Array, new: Array) -> Array:
    """held [B, C, ...] with new [B, T, ...] in slots [B, T]; row by row, so that no device needs another's rows."""
    return held.at[slots].set(new, mode="drop")
