"""What attention is: every other module of this folder computes this, faster."""

import torch
from torch import Tensor

# Scores that may exist at once, in elements.
_SCORES = 2**26


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    *,
    window: int | None = None,
    ends: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """softmax(scale q kᵀ + mask) v; query head n reads kv head n // (N // K).

    A query sees keys at positions 0 .. its own, or 0 .. `ends`; of those before it the last `window`, itself included.
    Padded queries, and queries that see no key, give zeros. Float16 and bfloat16 are computed in float32.

    Args:
        q: [B, N, T, H]. k, v: [B, K, S, H], of q's dtype.
        q_positions: int64 [B, T], -1 for padding.
        k_positions: int64 [B, S], -1 where there is no key.
        ends: int64 [B, T], the last position that each query sees.
    Returns `empty_out(q)`, filled. Raises ValueError for shapes that do not match.
    """
    B, N, T, _ = q.shape
    _, K, S, _ = k.shape
    check(q, k, v, q_positions, k_positions, ends)
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(dtype), v.to(dtype)
    seen_until = q_positions if ends is None else ends
    out = empty_out(q)
    step = max(1, _SCORES // max(1, B * N * S))
    for start in range(0, T, step):
        part = slice(start, start + step)
        at, until = q_positions[:, part, None], seen_until[:, part, None]
        keys = k_positions[:, None]
        visible = (keys >= 0) & (keys <= until) & (at >= 0)
        if window is not None:
            visible &= keys > at - window
        # The heads of a group share their kv head: [B, K, G * t, S].
        group = q[:, :, part].to(dtype).unflatten(1, (K, N // K)).flatten(2, 3)
        scores = (group @ k.transpose(2, 3) * scale).unflatten(2, (N // K, -1))
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        top = scores.amax(dim=-1, keepdim=True) if S else scores.new_zeros(*scores.shape[:-1], 1)
        weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0))
        weights = weights / weights.sum(dim=-1, keepdim=True).masked_fill(top == -torch.inf, 1)
        out[:, :, part] = (weights.flatten(2, 3) @ v).unflatten(2, (N // K, -1)).flatten(1, 2).to(q.dtype)
    return out


def empty_out(q: Tensor) -> Tensor:
    """[B, N, T, H], a view of [B, T, N, H]: the order in which the projection after attention reads it."""
    B, N, T, H = q.shape
    return q.new_empty(B, T, N, H).transpose(1, 2)


def known_positions(q: Tensor, k: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q_positions [B, T] and k_positions [B, S] if the queries are the last T of `length` [B] tokens, S by default,
    and position p is in slot p % S of the keys."""
    B, _, T, _ = q.shape
    S = k.shape[2]
    if length is None:
        length = torch.full((B,), S, device=q.device)
    length = length.long()[:, None]
    slots = torch.arange(S, device=q.device)
    positions = length - 1 - (length - 1 - slots) % S if S else slots.expand(B, 0)
    at = length - T + torch.arange(T, device=q.device)
    return torch.where(at >= 0, at, -1), torch.where(positions >= 0, positions, -1)


def check(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor | None, k_positions: Tensor | None, ends: Tensor | None
) -> None:
    """Raises ValueError for shapes and dtypes that do not fit together; positions may be absent."""
    B, N, T, H = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != H or k.shape[1] == 0 or N % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    wanted = {"q_positions": (q_positions, T), "k_positions": (k_positions, k.shape[2]), "ends": (ends, T)}
    for name, (positions, length) in wanted.items():
        if positions is None:
            continue
        if positions.shape != (B, length) or positions.dtype != torch.long:
            got = f"{tuple(positions.shape)} {positions.dtype}"
            raise ValueError(f"{name} must be int64 of shape {(B, length)}, got {got}")
