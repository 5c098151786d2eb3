"""Error metrics between two captures of a tap, [B, L, ...] each, over the positions that were reached."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 24


@dataclass(frozen=True)
class Metrics:
    """How far a candidate's tap is from the truth's."""

    rel_l2: float
    """|c - t| / |t| over every reached position."""
    max_abs: float
    cosine: float
    sqnr_db: float
    gain: float
    """<c - t, t> / <t, t>: the part of the error that is a change of scale. Rounding averages out of it, a wrong
    constant does not."""
    row_gain: float
    """Root mean square over positions of each position's own gain: what a norm in too low a precision leaves."""
    worst_rel_l2: float
    """The largest |c - t| of one position, over the root mean square of |t| a position."""
    worst_position: tuple[int, int]
    """Row and position of it."""
    reached: int
    """Number of (row, position) pairs compared."""


def reached(value: Tensor) -> Tensor:
    """bool [B, L]: positions that a capture filled (the rest is NaN throughout)."""
    return ~value.flatten(2).isnan().all(dim=-1)


def blocks(candidate: Tensor, truth: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Float64 values [n, features] of both at the positions that the candidate reached, and those [n, 2]; a few
    positions at a time, because the logits of a real model are gigabytes.

    The truth may have a single row: then every row of the candidate is a prefix of that sequence."""
    where = reached(candidate).nonzero()
    rows = where[:, 0] if truth.shape[0] == candidate.shape[0] else torch.zeros_like(where[:, 0])
    size = max(1, _BLOCK // max(1, math.prod(candidate.shape[2:])))
    for at, row in zip(where.split(size), rows.split(size), strict=True):
        if len(at):
            t = truth[row, at[:, 1]].flatten(1).double()
            yield candidate[at[:, 0], at[:, 1]].flatten(1).double(), t, at


def measure(candidate: Tensor, truth: Tensor) -> Metrics:
    """Metrics of candidate [B, L, ...] against truth [B or 1, L, ...]. NaN or inf in a reached position gives inf."""
    ee = tt = cc = ct = et = max_abs = gains = 0.0
    by_position, positions = [], []
    for c, t, where in blocks(candidate, truth):
        e = c - t
        by_position.append(e.norm(dim=1).nan_to_num(math.inf))
        positions.append(where)
        ee, tt, cc = ee + float((e * e).sum()), tt + float((t * t).sum()), cc + float((c * c).sum())
        ct, et = ct + float((c * t).sum()), et + float((e * t).sum())
        max_abs = max(max_abs, float(e.abs().max()))
        gains += float(((e * t).sum(1) / (t * t).sum(1).clamp(min=1e-300)).square().sum())
    if not by_position:
        return Metrics(math.inf, math.inf, 0.0, -math.inf, math.inf, math.inf, math.inf, (0, 0), 0)
    errors, where = torch.cat(by_position), torch.cat(positions)
    worst = int(errors.argmax())
    at = (int(where[worst, 0]), int(where[worst, 1]))
    if not bool(errors.isfinite().all()):
        return Metrics(math.inf, math.inf, 0.0, -math.inf, math.inf, math.inf, math.inf, at, len(errors))
    rel = _ratio(math.sqrt(ee), math.sqrt(tt))
    return Metrics(
        rel_l2=rel,
        max_abs=max_abs,
        cosine=_ratio(ct, math.sqrt(cc * tt)) if ee else 1.0,
        sqnr_db=math.inf if rel == 0 else -20 * math.log10(rel) if rel < math.inf else -math.inf,
        gain=_ratio(et, tt) if ee else 0.0,
        row_gain=math.sqrt(gains / len(errors)),
        worst_rel_l2=_ratio(float(errors[worst]), math.sqrt(tt / len(errors))),
        worst_position=at,
        reached=len(errors),
    )


def error_by_position(candidate: Tensor, truth: Tensor) -> Tensor:
    """[B, L] |c - t| over the root mean square of |t| a position; NaN where the candidate has nothing."""
    out = torch.full(candidate.shape[:2], torch.nan, dtype=torch.float64)
    tt, n = 0.0, 0
    for c, t, where in blocks(candidate, truth):
        out[where[:, 0], where[:, 1]] = (c - t).norm(dim=1)
        tt, n = tt + float((t * t).sum()), n + len(t)
    return out / math.sqrt(tt / n) if tt else out


@dataclass(frozen=True)
class LogitMetrics:
    """What a difference in logits means for the next token, over every reached position."""

    kl_mean: float
    """Mean of KL(truth || candidate), nats."""
    kl_max: float
    top1: float
    """Share of positions whose most likely token agrees."""
    top5: float
    """Mean overlap of the five most likely tokens."""


def measure_logits(candidate: Tensor, truth: Tensor) -> LogitMetrics:
    """Logits [B, L, V] of both."""
    kl, agree, overlap = [], [], []
    for c, t, _ in blocks(candidate, truth):
        log_c, log_t = c.log_softmax(-1), t.log_softmax(-1)
        kl.append((log_t.exp() * (log_t - log_c)).sum(-1))
        top_c, top_t = c.topk(5).indices, t.topk(5).indices
        overlap.append((top_c[:, :, None] == top_t[:, None, :]).any(-1).double().mean(-1))
        agree.append((c.argmax(-1) == t.argmax(-1)).double())
    divergence = torch.cat(kl)
    return LogitMetrics(
        float(divergence.mean()),
        float(divergence.max()),
        float(torch.cat(agree).mean()),
        float(torch.cat(overlap).mean()),
    )


def _ratio(a: float, b: float) -> float:
    if b == 0:
        return 0.0 if a == 0 else math.inf
    return a / b
