"""Faults of what a query attends to: masks, caches, padding, KV sharing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.model.cache import Keys, KVCache
from gemma4_impl.model.decoder import KV, Attention, Gemma4, attention_mask
from gemma4_impl.model.rope import apply_rotary
from parity.candidate import TorchCandidate
from parity.faults.attention import attentions
from parity.faults.fault import PLE, Fault, Inject, first, in_full, in_shared, override

_OUT = first("self_attn.out")


def window(change: Callable[[int], int]) -> Inject:
    def inject(candidate: TorchCandidate) -> None:
        config = candidate.model.config
        candidate.model.config = replace(config, sliding_window=change(config.sliding_window))

    return inject


Mask = Callable[[Gemma4, str, Tensor, Keys, int | None], Any]


def masks(function: Mask) -> Inject:
    """Replaces `Gemma4._mask` in a model that is shown no images."""

    def mask(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None, images: None) -> Any:
        return function(self, kind, positions, keys, start)

    def inject(candidate: TorchCandidate) -> None:
        override(candidate.model, "_mask", mask)

    return inject


def window_on_full_layers(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    return Gemma4._mask(self, SLIDING, positions, keys, start, None)


def future_visible(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    healthy = attention_mask(positions, keys.positions, self.config.sliding_window if kind == SLIDING else None)
    return healthy | (keys.positions[:, None, None, :] > positions[:, None, :, None])


def diagonal_excluded(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    visible = attention_mask(positions, keys.positions, self.config.sliding_window if kind == SLIDING else None)
    own = keys.positions[:, None, None, :] == positions[:, None, :, None]
    # The first token has nothing else to look at.
    return visible & (~own | (positions == 0)[:, None, :, None])


def causal_from_first_key(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    if kind == FULL:
        return "causal" if positions.shape[1] > 1 else None
    return Gemma4._mask(self, kind, positions, keys, start, None)


def empty_slots_visible(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    return Gemma4._mask(self, kind, positions, replace(keys, positions=keys.positions.clamp(min=0)), start, None)


def masked_by_slot(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    slots = torch.arange(keys.positions.shape[1], device=positions.device)
    return slots <= positions[:, None, :, None]


def cache(cls: type[KVCache]) -> Inject:
    def make_cache(self: Gemma4, batch_size: int = 1, max_seq_len: int = 4096, max_chunk: int = 512) -> KVCache:
        return cls(self.config, batch_size, max_seq_len, max_chunk, self.dtype, self.device)

    def inject(candidate: TorchCandidate) -> None:
        override(candidate.model, "make_cache", make_cache)

    return inject


def ring(capacity: Callable[[int, int], int], chunk: Callable[[int], int] | None = None) -> Inject:
    """Sliding layers with a ring of `capacity(W, max_chunk)` slots, fed `chunk(W)` tokens at a time if given."""

    class Ring(KVCache):
        def _ring_capacity(self, window: int) -> int:
            return min(self.max_seq_len, capacity(window, self.max_chunk))

    def inject(candidate: TorchCandidate) -> None:
        if chunk is not None:
            candidate.chunks = (chunk(candidate.config.sliding_window),)
        cache(Ring)(candidate)

    return inject


class _ColumnCache(KVCache):
    """Counts columns of the batch: padding takes a slot and a place in the order like any token."""

    def reserve(self, positions: Tensor, unpadded: bool = False) -> dict[str, Keys]:
        return super().reserve(self.next_positions(positions.shape[1]), unpadded=True)


def padding_attended(candidate: TorchCandidate) -> None:
    def mask(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
        return Gemma4._mask(self, kind, keys.positions.gather(1, keys.write), keys, None, None)

    cache(_ColumnCache)(candidate)
    masks(mask)(candidate)


def _shared(candidate: TorchCandidate) -> list[Attention]:
    return [a for a in attentions(candidate) if a.config.kv_shared]


def kv_from_previous_producer(candidate: TorchCandidate) -> None:
    for attention in _shared(candidate):
        own = attention.config
        before = [a.config.index for a in attentions(candidate, own.layer_type, kv=True)]
        attention.config = replace(own, kv_source=before[before.index(own.kv_source) - 1])


def kv_of_chunk_only(candidate: TorchCandidate) -> None:
    def forward(self: Attention, x: Tensor, rotary: Any, mask: Any, keys: Keys, kv: KV, cache: Any) -> Tensor:
        new = keys.write[0]
        kv = {source: (k[:, :, new], v[:, :, new]) for source, (k, v) in kv.items() if source == self.config.kv_source}
        mask = mask[..., new] if isinstance(mask, Tensor) else mask
        return Attention.forward(self, x, rotary, mask, keys, kv, cache)

    for attention in _shared(candidate):
        override(attention, "forward", forward)


def kv_computed_by_shared_layer(candidate: TorchCandidate) -> None:
    def forward(self: Attention, x: Tensor, rotary: Any, mask: Any, keys: Keys, kv: KV, cache: Any) -> Tensor:
        # Its producer's weights: the smallest difference that weights of its own could make.
        producer = candidate.model.layers[self.config.kv_source].self_attn
        k = apply_rotary(producer.k_norm(self._heads(producer.k_proj(x))), *rotary)
        v = producer.v_norm(self._heads(producer.v_proj(x)))
        kv = {self.config.kv_source: (k.transpose(1, 2), v.transpose(1, 2))}
        return Attention.forward(self, x, rotary, mask, keys, kv, cache)

    for attention in _shared(candidate):
        override(attention, "forward", forward)


def last_position_rotated_as_first(candidate: TorchCandidate) -> None:
    of_chunk: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(layer: nn.Module, args: tuple) -> tuple | None:
        x, ple, rotary, *rest = args
        kind = layer.config.layer_type
        if not layer.config.kv_shared:
            of_chunk[kind] = rotary
            return None
        cos, sin = of_chunk[kind]
        return (x, ple, (cos[:, : x.shape[1]], sin[:, : x.shape[1]]), *rest)

    for layer in candidate.model.layers:
        layer.register_forward_pre_hook(hook)


MASKS = [
    Fault("window_too_small", "the window is W - 1 keys", window(lambda w: w - 1), _OUT),
    Fault("window_too_large", "the window is W + 1 keys: q - W itself is seen", window(lambda w: w + 1), _OUT),
    Fault("window_ignored", "sliding layers see everything", window(lambda w: 10**6), _OUT),
    Fault(
        "window_on_full_layers",
        "full layers are given the window too",
        masks(window_on_full_layers),
        in_full("self_attn.out"),
    ),
    Fault("not_causal", "every query also sees the future", masks(future_visible), _OUT),
    Fault("own_key_hidden", "kv < q instead of kv <= q", masks(diagonal_excluded), _OUT),
    Fault(
        "causal_from_first_key",
        "a chunk's causal mask is aligned to the oldest key, as is_causal=True does when T != S",
        masks(causal_from_first_key),
        in_full("self_attn.out"),
        path="chunked",
    ),
    Fault(
        "ring_of_two_windows",
        "2W slots and chunks of 2W: a chunk overwrites keys that its first queries need",
        ring(lambda w, chunk: 2 * w, chunk=lambda w: 2 * w),
        _OUT,
        path="chunked",
    ),
    Fault(
        "ring_of_window",
        "W slots and chunks of W, right for single tokens only",
        ring(lambda w, chunk: w, chunk=lambda w: w),
        _OUT,
        path="chunked",
    ),
    Fault(
        "ring_one_slot_short",
        "W - 2 + max_chunk slots: the first query of a whole chunk lacks its oldest key",
        ring(lambda w, chunk: w - 2 + chunk),
        _OUT,
        path="chunked",
    ),
    Fault(
        "ring_masked_by_slot",
        "the mask compares slot numbers, not the positions in the slots",
        masks(masked_by_slot),
        _OUT,
        path="decode",
    ),
    Fault(
        "empty_slots_attended",
        "slots that a shorter row has not filled yet are seen as keys",
        masks(empty_slots_visible),
        in_full("self_attn.out"),
        path="right_padded",
    ),
    Fault(
        "padding_attended", "padding takes cache slots and is seen as a key", padding_attended, _OUT, path="left_padded"
    ),
    Fault(
        "kv_previous_producer",
        "a shared layer reads the last but one unshared layer of its type",
        kv_from_previous_producer,
        in_shared("self_attn.out"),
        PLE,
    ),
    Fault(
        "kv_of_chunk_only",
        "a shared layer reads its producer's new keys and values, not the cached ones",
        kv_of_chunk_only,
        in_shared("self_attn.out"),
        PLE,
        path="chunked",
    ),
    Fault(
        "kv_sharing_dropped",
        "a shared layer computes keys and values of its own",
        kv_computed_by_shared_layer,
        in_shared("self_attn.out"),
        PLE,
    ),
    Fault(
        "last_position_rope",
        "prefill sends only the last position through the shared layers, with the first one's RoPE",
        last_position_rotated_as_first,
        in_shared("self_attn.q"),
        PLE,
        path="generate",
    ),
]
