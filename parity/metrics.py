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
    positions at a time, because the logits of a real model are gigabytes; on the GPU if there is one.

    The truth may have a single row: then every row of the candidate is a prefix of that sequence."""
    where = reached(candidate).nonzero()
    rows = where[:, 0] if truth.shape[0] == candidate.shape[0] else torch.zeros_like(where[:, 0])
    size = max(1, _BLOCK // max(1, math.prod(candidate.shape[2:])))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for at, row in zip(where.split(size), rows.split(size), strict=True):
        if len(at):
            c, t = candidate[at[:, 0], at[:, 1]], truth[row, at[:, 1]]
            yield c.flatten(1).to(device).double(), t.flatten(1).to(device).double(), at


def measure(candidate: Tensor, truth: Tensor) -> Metrics:
    """Metrics of candidate [B, L, ...] against truth [B or 1, L, ...]. NaN or inf in a reached position gives inf."""
    return measure_positions(candidate, truth)[0]


def measure_positions(candidate: Tensor, truth: Tensor) -> tuple[Metrics, Tensor]:
    """`measure`, and [B, L] |c - t| over the root mean square of |t| a position (NaN where nothing was computed)."""
    by_position = torch.full(candidate.shape[:2], torch.nan, dtype=torch.float64)
    sums: list[Tensor] = []
    max_abs = 0.0
    for c, t, where in blocks(candidate, truth):
        e = c - t
        rows = torch.stack([torch.linalg.vecdot(x, y) for x, y in ((e, e), (t, t), (c, c), (c, t), (e, t))])
        sums.append(rows.cpu())
        max_abs = max(max_abs, float(torch.linalg.vector_norm(e, torch.inf)))
        by_position[where[:, 0], where[:, 1]] = sums[-1][0].sqrt().nan_to_num(torch.inf)
    n = int((~by_position.isnan()).sum())
    if not n:
        return _infinite((0, 0), 0), by_position
    worst = int(by_position.nan_to_num(-1.0, torch.inf).argmax())
    at = divmod(worst, by_position.shape[1])
    if not math.isfinite(by_position.flatten()[worst]):
        return _infinite(at, n), by_position
    by_row = torch.cat(sums, dim=1)
    ee, tt, cc, ct, et = by_row.sum(dim=1).tolist()
    rel = _ratio(math.sqrt(ee), math.sqrt(tt))
    scale = math.sqrt(tt / n)
    gains = (by_row[4] / by_row[1].clamp(min=1e-300)).square().mean().sqrt()
    metrics = Metrics(
        rel_l2=rel,
        max_abs=max_abs,
        cosine=_ratio(ct, math.sqrt(cc * tt)) if ee else 1.0,
        sqnr_db=math.inf if rel == 0 else -20 * math.log10(rel) if rel < math.inf else -math.inf,
        gain=_ratio(et, tt) if ee else 0.0,
        row_gain=float(gains),
        worst_rel_l2=_ratio(float(by_position[at]), scale),
        worst_position=at,
        reached=n,
    )
    return metrics, by_position / scale if scale else by_position


def position_errors(candidate: Tensor, truth: Tensor) -> Tensor:
    """[B, L] |c - t| of each position; NaN where the candidate has nothing."""
    out = torch.full(candidate.shape[:2], torch.nan, dtype=torch.float64)
    for c, t, where in blocks(candidate, truth):
        out[where[:, 0], where[:, 1]] = (c - t).norm(dim=1).cpu()
    return out


def _infinite(at: tuple[int, int], n: int) -> Metrics:
    return Metrics(math.inf, math.inf, 0.0, -math.inf, math.inf, math.inf, math.inf, at, n)


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
