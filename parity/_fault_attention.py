"""Faults of attention, RoPE, masks, caches and KV sharing, as functions that put them into a loaded candidate.

They change instances only; a class or module changed here would change every other model of the process."""

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.model.cache import Keys, KVCache
from gemma4_impl.model.decoder import KV, Attention, Gemma4, attention_mask
from gemma4_impl.model.rope import RotaryEmbedding, apply_rotary, inverse_frequencies
from parity.candidate import TorchCandidate

Inject = Callable[[TorchCandidate], None]


def override(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Makes `function` the method `name` of this one module."""
    setattr(module, name, MethodType(function, module))


def _attentions(candidate: TorchCandidate, kind: str | None = None, kv: bool = False) -> list[Attention]:
    """Those of one layer type, or of all; with `kv`, only those that compute keys and values."""
    found = [layer.self_attn for layer in candidate.model.layers if kind in (None, layer.config.layer_type)]
    return [a for a in found if not (kv and a.config.kv_shared)]


# RoPE


def frequencies(of: Callable[[RotaryEmbedding], Tensor], kind: str | None = None) -> Inject:
    """`of` gives the frequencies [H / 2] of the RoPE of one layer type, or of each."""

    def inject(candidate: TorchCandidate) -> None:
        for name, rope in candidate.model.rope.items():
            if kind in (None, name):
                half = of(rope).to(rope.inv_freq)
                rope.inv_freq = torch.cat([half, half])

    return inject


def full_rope(rope: RotaryEmbedding) -> Tensor:
    return inverse_frequencies(rope.head_dim, replace(rope.parameters_, partial_rotary_factor=1.0))


def rotary_dim_rope(rope: RotaryEmbedding) -> Tensor:
    rotated = int(rope.parameters_.partial_rotary_factor * rope.head_dim)
    half = torch.zeros(rope.head_dim // 2)
    half[: rotated // 2] = inverse_frequencies(rotated, replace(rope.parameters_, partial_rotary_factor=1.0))
    return half


def rope_bases_swapped(candidate: TorchCandidate) -> None:
    theta = {kind: rope.parameters_.rope_theta for kind, rope in candidate.model.rope.items()}
    for kind, other in ((SLIDING, FULL), (FULL, SLIDING)):
        frequencies(lambda r, t=theta[other]: inverse_frequencies(r.head_dim, replace(r.parameters_, rope_theta=t)), kind)(
            candidate
        )


def rope_angles_in_bfloat16(candidate: TorchCandidate) -> None:
    def forward(self: RotaryEmbedding, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.clamp(min=0)[:, :, None, None].bfloat16() * self.inv_freq.bfloat16()
        return angles.cos().float(), angles.sin().float()

    for rope in candidate.model.rope.values():
        override(rope, "forward", forward)


def rope_positions(change: Callable[[Tensor], Tensor]) -> Inject:
    """RoPE sees `change(positions)`; masks and caches see the right ones."""

    def forward(self: RotaryEmbedding, positions: Tensor) -> tuple[Tensor, Tensor]:
        return RotaryEmbedding.forward(self, change(positions))

    def inject(candidate: TorchCandidate) -> None:
        for rope in candidate.model.rope.values():
            override(rope, "forward", forward)

    return inject


def one_late_after_first_chunk(positions: Tensor) -> Tensor:
    return positions + (positions[:, :1] > 0)


def positions_of_longest_row(positions: Tensor) -> Tensor:
    return positions.amax(dim=0, keepdim=True).expand_as(positions)


Turn = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(norm, heads [B, T, N, H], cos, sin) -> what the attention uses as q, or as k."""


def rotation(turn: Turn, kind: str | None = None) -> Inject:
    """Attention of one layer type, or of all, that norms and rotates q and k by `turn`."""

    def forward(self: Attention, x: Tensor, rotary: Any, mask: Any, keys: Keys, kv: KV, cache: Any) -> Tensor:
        q = taps.tap(self.prefix, "q", turn(self.q_norm, self._heads(self.q_proj(x)), *rotary))
        if not self.config.kv_shared:
            k, v = self.project_kv(x, rotary)
            cached = (k.transpose(1, 2), v.transpose(1, 2)) if cache is None else cache.update(self.config, keys, k, v)
            kv[self.config.index] = cached
        out = self.attend(q.transpose(1, 2), *kv[self.config.kv_source], mask)
        return taps.tap(self.prefix, "out", self.o_proj(out.transpose(1, 2).flatten(2)))

    def project_kv(self: Attention, x: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        k = self._heads(self.k_proj(x))
        v = k if self.config.k_eq_v else self._heads(self.v_proj(x))
        k = taps.tap(self.prefix, "k", turn(self.k_norm, k, *rotary))
        return k, taps.tap(self.prefix, "v", self.v_norm(v))

    def inject(candidate: TorchCandidate) -> None:
        for attention in _attentions(candidate, kind):
            override(attention, "forward", forward)
            override(attention, "project_kv", project_kv)

    return inject


def interleaved(norm: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x, cos, sin = norm(x), cos[..., :half], sin[..., :half]
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2).type_as(x)


def norm_after_rotation(norm: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return norm(apply_rotary(x, cos, sin))


def first_quarter_rotated(norm: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = norm(x)
    quarter = x.shape[-1] // 4
    cos, sin = (torch.cat([t[..., : quarter // 2]] * 2, dim=-1) for t in (cos, sin))
    return torch.cat([apply_rotary(x[..., :quarter], cos, sin), x[..., quarter:]], dim=-1)


# Values and the attention itself


def values(of: Callable[[Attention, Tensor, Tensor, Any], Tensor], kind: str | None = None) -> Inject:
    """`of(attention, x, k, rotary)` makes v; k is as cached, normed and rotated."""

    def project_kv(self: Attention, x: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        k = apply_rotary(self.k_norm(self._heads(self.k_proj(x))), *rotary)
        k = taps.tap(self.prefix, "k", k)
        return k, taps.tap(self.prefix, "v", of(self, x, k, rotary))

    def inject(candidate: TorchCandidate) -> None:
        for attention in _attentions(candidate, kind, kv=True):
            override(attention, "project_kv", project_kv)

    return inject


def normed_k_as_v(self: Attention, x: Tensor, k: Tensor, rotary: Any) -> Tensor:
    return self.v_norm(self.k_norm(self._heads(self.k_proj(x))))


def rotated_v(self: Attention, x: Tensor, k: Tensor, rotary: Any) -> Tensor:
    return apply_rotary(self.v_norm(self._heads(self.v_proj(x))), *rotary)


def v_norm_weighted(candidate: TorchCandidate) -> None:
    for attention in _attentions(candidate, kv=True):
        attention.v_norm = attention.k_norm


Attend = Callable[[Attention, Tensor, Tensor, Tensor, Any], Tensor]


def attend(function: Attend) -> Inject:
    """Replaces `Attention.attend`."""

    def inject(candidate: TorchCandidate) -> None:
        for attention in _attentions(candidate):
            override(attention, "attend", function)

    return inject


def scaled(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return Attention.attend(self, q * q.shape[-1] ** -0.5, k, v, mask)


def tiled(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return Attention.attend(self, q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), mask)


def in_bfloat16(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return Attention.attend(self, q.bfloat16(), k.bfloat16(), v.bfloat16(), mask).type_as(q)


def capped_scores(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return explicit(q, k, v, mask, lambda scores: (50 * torch.tanh(scores / 50)).softmax(dim=-1))


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Any, softmax: Callable[[Tensor], Tensor]) -> Tensor:
    """Attention with its scores written out; only for the full path, where no row is padded."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if isinstance(mask, str):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(2, 3)
    # -1e4 is far below any score, and survives the cap of `capped_scores` as -50.
    return softmax(scores if mask is None else scores.masked_fill(~mask, -1e4)) @ v


# Masks


def window(change: Callable[[int], int]) -> Inject:
    def inject(candidate: TorchCandidate) -> None:
        config = candidate.model.config
        candidate.model.config = replace(config, sliding_window=change(config.sliding_window))

    return inject


Mask = Callable[[Gemma4, str, Tensor, Keys, int | None], Any]


def masks(function: Mask) -> Inject:
    """Replaces `Gemma4._mask`."""

    def inject(candidate: TorchCandidate) -> None:
        override(candidate.model, "_mask", function)

    return inject


def window_on_full_layers(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    return Gemma4._mask(self, SLIDING, positions, keys, start)


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
    return Gemma4._mask(self, kind, positions, keys, start)


def empty_slots_visible(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    return Gemma4._mask(self, kind, positions, replace(keys, positions=keys.positions.clamp(min=0)), start)


def masked_by_slot(self: Gemma4, kind: str, positions: Tensor, keys: Keys, start: int | None) -> Any:
    slots = torch.arange(keys.positions.shape[1], device=positions.device)
    return slots <= positions[:, None, :, None]


# Caches


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
        return Gemma4._mask(self, kind, keys.positions.gather(1, keys.write), keys, None)

    cache(_ColumnCache)(candidate)
    masks(mask)(candidate)


# KV sharing


def _shared(candidate: TorchCandidate) -> list[Attention]:
    return [a for a in _attentions(candidate) if a.config.kv_shared]


def kv_from_previous_producer(candidate: TorchCandidate) -> None:
    for attention in _shared(candidate):
        own = attention.config
        before = [a.config.index for a in _attentions(candidate, own.layer_type, kv=True)]
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
