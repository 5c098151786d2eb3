"""Faults inside the attention: RoPE, norms of queries, keys and values, scores."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.model.cache import Keys
from gemma4_impl.model.decoder import KV, Attention
from gemma4_impl.model.rope import RotaryEmbedding, apply_rotary, inverse_frequencies
from parity.candidate import TorchCandidate
from parity.faults.fault import K_EQ_V, PLE, Fault, Inject, drop, first, in_full, override

_Q, _K, _V, _OUT = (first(f"self_attn.{name}") for name in ("q", "k", "v", "out"))


def attentions(candidate: TorchCandidate, kind: str | None = None, kv: bool = False) -> list[Attention]:
    """Those of one layer type, or of all; with `kv`, only those that compute keys and values."""
    found = [layer.self_attn for layer in candidate.model.layers if kind in (None, layer.config.layer_type)]
    return [a for a in found if not (kv and a.config.kv_shared)]


def frequencies(of: Callable[[RotaryEmbedding], Tensor], kind: str | None = None) -> Inject:
    """`of` gives the frequencies [H / 2] of the RoPE of one layer type, or of each."""

    def inject(candidate: TorchCandidate) -> None:
        for name, rope in candidate.model.rope.items():
            if kind in (None, name):
                rope.turn(of(rope).to(rope.inv_freq))

    return inject


def full_rope(rope: RotaryEmbedding) -> Tensor:
    return inverse_frequencies(rope.head_dim, replace(rope.rope, partial_rotary_factor=1.0))


def rotary_dim_rope(rope: RotaryEmbedding) -> Tensor:
    rotated = int(rope.rope.partial_rotary_factor * rope.head_dim)
    half = torch.zeros(rope.head_dim // 2)
    half[: rotated // 2] = inverse_frequencies(rotated, replace(rope.rope, partial_rotary_factor=1.0))
    return half


def rope_bases_swapped(candidate: TorchCandidate) -> None:
    theta = {kind: rope.rope.rope_theta for kind, rope in candidate.model.rope.items()}
    for kind, rope in candidate.model.rope.items():
        other = theta[FULL if kind == SLIDING else SLIDING]
        rope.turn(inverse_frequencies(rope.head_dim, replace(rope.rope, rope_theta=other)).to(rope.inv_freq))


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
        for attention in attentions(candidate, kind):
            override(attention, "forward", forward)
            override(attention, "project_kv", project_kv)

    return inject


def interleaved(norm: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x, cos, sin = norm(x), cos[..., half:], sin[..., half:]
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2).type_as(x)


def norm_after_rotation(norm: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return norm(apply_rotary(x, cos, sin))


def first_quarter_rotated(norm: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = norm(x)
    quarter = x.shape[-1] // 4
    cos, sin = cos[..., : quarter // 2], sin[..., : quarter // 2]
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)
    return torch.cat([apply_rotary(x[..., :quarter], cos, sin), x[..., quarter:]], dim=-1)


def values(of: Callable[[Attention, Tensor, Tensor, Any], Tensor], kind: str | None = None) -> Inject:
    """`of(attention, x, k, rotary)` makes v; k is as cached, normed and rotated."""

    def project_kv(self: Attention, x: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        k = apply_rotary(self.k_norm(self._heads(self.k_proj(x))), *rotary)
        k = taps.tap(self.prefix, "k", k)
        return k, taps.tap(self.prefix, "v", of(self, x, k, rotary))

    def inject(candidate: TorchCandidate) -> None:
        for attention in attentions(candidate, kind, kv=True):
            override(attention, "project_kv", project_kv)

    return inject


def normed_k_as_v(self: Attention, x: Tensor, k: Tensor, rotary: Any) -> Tensor:
    return self.v_norm(self.k_norm(self._heads(self.k_proj(x))))


def rotated_v(self: Attention, x: Tensor, k: Tensor, rotary: Any) -> Tensor:
    return apply_rotary(self.v_norm(self._heads(self.v_proj(x))), *rotary)


def v_norm_weighted(candidate: TorchCandidate) -> None:
    for attention in attentions(candidate, kv=True):
        attention.v_norm = attention.k_norm


Attend = Callable[[Attention, Tensor, Tensor, Tensor, Any], Tensor]


def attend(function: Attend) -> Inject:
    """Replaces `Attention.attend`."""

    def inject(candidate: TorchCandidate) -> None:
        for attention in attentions(candidate):
            override(attention, "attend", function)

    return inject


def scaled(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return Attention.attend(self, q * q.shape[-1] ** -0.5, k, v, mask)


def tiled(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return Attention.attend(self, q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), mask)


def in_bfloat16(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    mask = mask.bfloat16() if isinstance(mask, Tensor) else mask
    return Attention.attend(self, q.bfloat16(), k.bfloat16(), v.bfloat16(), mask).type_as(q)


def capped_scores(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = 50 * torch.tanh(q @ k.transpose(2, 3) / 50)
    if isinstance(mask, str):
        mask = torch.full_like(scores, -torch.inf).triu(1)
    return (scores + mask).softmax(dim=-1) @ v


ATTENTION = [
    Fault(
        "rope_full",
        "full layers rotate all dims instead of the first quarter of the pairs",
        frequencies(full_rope, FULL),
        in_full("self_attn.q"),
    ),
    Fault(
        "rope_over_rotary_dim",
        "frequencies of full layers are divided by the number of rotated dims, not by head_dim",
        frequencies(rotary_dim_rope, FULL),
        in_full("self_attn.q"),
    ),
    Fault(
        "rope_first_quarter",
        "the first quarter of the dims is rotated by itself instead of pairing across the halves",
        rotation(first_quarter_rotated, FULL),
        in_full("self_attn.q"),
    ),
    Fault("rope_bases_swapped", "each layer type has the other's theta", rope_bases_swapped, _Q),
    Fault(
        "rope_linear_scaling",
        "full layers divide positions by 8, as Gemma 3 does",
        frequencies(lambda rope: inverse_frequencies(rope.head_dim, rope.rope) / 8, FULL),
        in_full("self_attn.q"),
    ),
    Fault(
        "rope_backwards",
        "the sign of the rotated half is wrong",
        frequencies(lambda rope: -inverse_frequencies(rope.head_dim, rope.rope)),
        _Q,
    ),
    Fault("rope_interleaved", "dims are paired 2i, 2i + 1 (GPT-J) instead of i, i + H / 2", rotation(interleaved), _Q),
    Fault("rope_before_norm", "q and k are normed after RoPE", rotation(norm_after_rotation), _Q),
    Fault(
        "positions_count_padding",
        "one row of positions for the whole batch: RoPE of a padded row starts at its padding",
        rope_positions(positions_of_longest_row),
        _Q,
        path="left_padded",
    ),
    Fault(
        "positions_after_chunk",
        "positions are one too high from the second chunk on",
        rope_positions(one_late_after_first_chunk),
        _Q,
        path="chunked",
    ),
    Fault(
        "rope_in_bfloat16",
        "angles are computed in bfloat16",
        rope_angles_in_bfloat16,
        _Q,
        dtype="bfloat16",
        length=300,
    ),
    Fault("attention_scale", "scores are scaled by 1/sqrt(H)", attend(scaled), _OUT),
    Fault("attention_softcap", "scores are softcapped at 50, as in Gemma 2", attend(capped_scores), _OUT),
    Fault("attention_in_bfloat16", "a float32 model runs its attention kernel in bfloat16", attend(in_bfloat16), _OUT),
    Fault(
        "kv_heads_tiled",
        "kv heads are repeated as 0 1 0 1 instead of 0 0 1 1",
        attend(tiled),
        _OUT,
        ("E4B", "26B-A4B", "31B"),
    ),
    Fault("q_norm_missing", "queries are not normed", drop("self_attn.q_norm"), _Q),
    Fault("k_norm_missing", "keys are not normed", drop("self_attn.k_norm"), _K),
    Fault("v_norm_missing", "values are not normed", drop("self_attn.v_norm"), _V),
    Fault("v_norm_weighted", "values are normed with k_norm's weight", v_norm_weighted, _V),
    Fault("v_rotated", "RoPE is applied to the values too", values(rotated_v), _V, PLE),
    Fault(
        "v_after_k_norm",
        "with attention_k_eq_v, V is taken after k_norm",
        values(normed_k_as_v, FULL),
        in_full("self_attn.v"),
        K_EQ_V,
    ),
    Fault(
        "v_is_cached_k",
        "with attention_k_eq_v, V is K as cached: normed, weighted and rotated",
        values(lambda self, x, k, rotary: k, FULL),
        in_full("self_attn.v"),
        K_EQ_V,
    ),
]
