"""Error metrics between two captures of a tap, [B, L, ...] each, over the positions that were reached."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    worst_rel_l2: float
    """The largest |c - t| of one position, over the root mean square of |t| a position."""
    worst_position: tuple[int, int]
    """Row and position of it."""
    reached: int
    """Number of (row, position) pairs compared."""


def reached(value: Tensor) -> Tensor:
    """bool [B, L]: positions that a capture filled (the rest is NaN throughout)."""
    return ~value.flatten(2).isnan().all(dim=-1)


def pairs(candidate: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 values [n, features] of both at the positions that the candidate reached, and those [n, 2].

    The truth may have a single row: then every row of the candidate is a prefix of that sequence."""
    where = reached(candidate).nonzero()
    rows = where[:, 0] if truth.shape[0] == candidate.shape[0] else torch.zeros_like(where[:, 0])
    t = truth[rows, where[:, 1]].flatten(1).double()
    return candidate[where[:, 0], where[:, 1]].flatten(1).double(), t, where


def measure(candidate: Tensor, truth: Tensor) -> Metrics:
    """Metrics of candidate [B, L, ...] against truth [B or 1, L, ...]. NaN or inf in a reached position gives inf."""
    c, t, where = pairs(candidate, truth)
    if not len(c):
        return Metrics(math.inf, math.inf, 0.0, -math.inf, math.inf, math.inf, (0, 0), 0)
    error = c - t
    if not bool(error.isfinite().all()):
        first = int((~error.isfinite()).any(dim=1).nonzero()[0])
        at = (int(where[first, 0]), int(where[first, 1]))
        return Metrics(math.inf, math.inf, 0.0, -math.inf, math.inf, math.inf, at, len(c))
    by_position = error.norm(dim=1)
    worst = int(by_position.argmax())
    scale, norm = float(t.norm()), float(error.norm())
    rel = _ratio(norm, scale)
    return Metrics(
        rel_l2=rel,
        max_abs=float(error.abs().max()),
        cosine=_ratio(float((c * t).sum()), float(c.norm()) * scale) if norm else 1.0,
        sqnr_db=math.inf if rel == 0 else -20 * math.log10(rel) if rel < math.inf else -math.inf,
        gain=_ratio(float((error * t).sum()), scale**2) if norm else 0.0,
        worst_rel_l2=_ratio(float(by_position[worst]), scale / math.sqrt(len(t))),
        worst_position=(int(where[worst, 0]), int(where[worst, 1])),
        reached=len(c),
    )


def error_by_position(candidate: Tensor, truth: Tensor) -> Tensor:
    """[B, L] |c - t| over the root mean square of |t| a position; NaN where the candidate has nothing."""
    c, t, where = pairs(candidate, truth)
    out = torch.full(candidate.shape[:2], torch.nan, dtype=torch.float64)
    if len(c):
        out[where[:, 0], where[:, 1]] = (c - t).norm(dim=1) / (t.norm() / math.sqrt(len(t)))
    return out


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
    c, t, _ = pairs(candidate, truth)
    log_c, log_t = c.log_softmax(-1), t.log_softmax(-1)
    kl = (log_t.exp() * (log_t - log_c)).sum(-1)
    top_c, top_t = c.topk(5).indices, t.topk(5).indices
    overlap = (top_c[:, :, None] == top_t[:, None, :]).any(-1).double().mean(-1)
    agree = (c.argmax(-1) == t.argmax(-1)).double()
    return LogitMetrics(float(kl.mean()), float(kl.max()), float(agree.mean()), float(overlap.mean()))


def _ratio(a: float, b: float) -> float:
    if b == 0:
        return 0.0 if a == 0 else math.inf
    return a / b
