"""Key/value caches: a ring for sliding layers, a flat one for full layers, none for KV-shared ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma4_impl.config import FULL, SLIDING, LayerConfig, TextConfig


@dataclass(frozen=True)
class Keys:
    """The keys that one forward attends to in the layers of one type."""

    positions: Tensor
    """[B, S] absolute position of each key; -1 where there is none."""
    write: Tensor | None = None
    """[B, T] cache slot of each new key; None without a cache."""
    contiguous: bool = False
    """True if row b's keys are known to be 0 .. S-1 in order (no padding, no wrap)."""


class KVCache(nn.Module):
    """Keys and values of every layer that computes its own, as buffers [B, K, C + 1, H].

    A sliding layer's query sees the last W - 1 keys of the past and its own chunk, so a ring of
    C = W - 1 + max_chunk slots never overwrites a key that is still needed; masks are computed from the positions
    stored beside the slots. Slot C takes the padding. Feeding more than `max_chunk` tokens, or a position that does
    not continue its row, is a ValueError.
    """

    def __init__(
        self,
        config: TextConfig,
        batch_size: int,
        max_seq_len: int,
        max_chunk: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        for name, value in {"batch_size": batch_size, "max_seq_len": max_seq_len, "max_chunk": max_chunk}.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if max_seq_len > config.max_position_embeddings:
            raise ValueError(
                f"max_seq_len = {max_seq_len} exceeds the model's max_position_embeddings "
                f"= {config.max_position_embeddings}"
            )
        self.batch_size, self.max_seq_len, self.max_chunk = batch_size, max_seq_len, min(max_chunk, max_seq_len)
        self.capacity = {
            SLIDING: self._ring_capacity(config.sliding_window),
            FULL: max_seq_len,
        }
        self.lengths = [0] * batch_size
        with torch.device(device):
            for kind in dict.fromkeys(config.layer_types):
                self.register_buffer(f"{kind}_positions", torch.full((batch_size, self.capacity[kind] + 1), -1))
            for layer in config.layers[: config.first_kv_shared_layer]:
                slots = self.capacity[layer.layer_type] + 1
                shape = (batch_size, layer.num_key_value_heads, slots, layer.head_dim)
                for name in ("k", "v"):
                    self.register_buffer(f"layers_{layer.index}_{name}", torch.zeros(shape, dtype=dtype))
            self.register_buffer("rows", torch.arange(batch_size)[:, None], persistent=False)

    def _ring_capacity(self, window: int) -> int:
        return min(self.max_seq_len, window - 1 + self.max_chunk)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.nbytes for b in self.buffers())

    def reset(self) -> None:
        """Forgets everything; the next forward starts at position 0."""
        self.lengths = [0] * self.batch_size
        for name, buffer in self.named_buffers():
            if name.endswith("_positions"):
                buffer.fill_(-1)

    def next_positions(self, length: int) -> Tensor:
        """[B, length] positions that continue every row."""
        start = torch.tensor(self.lengths, device=self.rows.device)
        return start[:, None] + torch.arange(length, device=self.rows.device)

    def reserve(self, positions: Tensor, unpadded: bool = False) -> dict[str, Keys]:
        """Takes slots for new tokens at `positions` [B, T] and returns what each layer type then attends to.

        Raises ValueError, before anything is written, for a chunk or position that does not fit."""
        length = positions.shape[1]
        if length > self.max_chunk:
            raise ValueError(f"chunk of {length} tokens exceeds the cache's max_chunk = {self.max_chunk}")
        on_host = not torch.compiler.is_compiling()
        if on_host:
            self._advance(positions, unpadded)
        keys = {}
        for kind, capacity in self.capacity.items():
            if not hasattr(self, f"{kind}_positions"):
                continue
            stored = getattr(self, f"{kind}_positions")
            slots = torch.where(positions < 0, capacity, positions % capacity)
            # Padding goes to the last slot, whose position must stay -1: that is what `positions` holds there.
            stored.scatter_(1, slots, positions)
            longest = max(self.lengths) if on_host else capacity
            contiguous = unpadded and on_host and min(self.lengths) == longest <= capacity
            keys[kind] = Keys(stored[:, : min(longest, capacity)], slots, contiguous)
        return keys

    def _advance(self, positions: Tensor, unpadded: bool) -> None:
        length = positions.shape[1]
        if unpadded:
            ends = [start + length for start in self.lengths]
        else:
            ends = []
            for row, (start, chunk) in enumerate(zip(self.lengths, positions.tolist(), strict=True)):
                valid = [p for p in chunk if p >= 0]
                expected = range(start, start + len(valid))
                if valid != list(expected):
                    wrong = next(p for p, e in zip(valid, expected, strict=True) if p != e)
                    raise ValueError(f"row {row}: position {wrong} does not continue the cache, which ends at {start}")
                ends.append(start + len(valid))
        if max(ends) > self.max_seq_len:
            raise ValueError(
                f"position {max(ends) - 1} is past the end of the cache (max_seq_len = {self.max_seq_len})"
            )
        self.lengths = ends

    def update(self, layer: LayerConfig, keys: Keys, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, T, K, H] into the layer's slots; returns all its keys and values [B, K, S, H]."""
        size = keys.positions.shape[1]
        out = []
        for name, new in (("k", k), ("v", v)):
            buffer = getattr(self, f"layers_{layer.index}_{name}")
            if self.batch_size == 1:
                buffer.index_copy_(2, keys.write[0], new.transpose(1, 2))
            else:
                buffer[self.rows, :, keys.write] = new
            out.append(buffer[:, :, :size])
        return out[0], out[1]
