"""Holds a candidate's taps against truth and reference: verdict by tap, first divergence, routing flips."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gemma4_impl.taps import CHOICE, VISION
from parity import budget
from parity.budget import Check
from parity.metrics import LogitMetrics, Metrics, blocks, measure, measure_logits, measure_positions, reached

Taps = Mapping[str, Tensor]


@dataclass(frozen=True)
class TapResult:
    name: str
    shape: tuple[int, ...]
    metrics: Metrics
    """Against the truth, errors accumulated from the input."""
    local: Metrics | None
    """Against the truth, with the truth forced into the taps before: None where no such run was made."""
    checks: dict[str, Check]

    @property
    def ratio(self) -> float:
        return max(check.ratio for check in self.checks.values())

    @property
    def red(self) -> bool:
        return any(check.red for check in self.checks.values())

    @property
    def created(self) -> bool | None:
        """Whether the error above budget arises at this tap; None where no local run was made."""
        if self.local is None:
            return None
        return any(check.red for name, check in self.checks.items() if name.startswith("local"))


@dataclass(frozen=True)
class Divergence:
    """The first tap, in execution order, that is out of budget, or a router's choice that no rounding explains."""

    tap: str
    row: int
    position: int
    origin: Literal["created", "inherited", "unknown"]
    """created: out of budget although everything before was the truth; inherited: only the accumulated error is."""
    check: str
    error: float
    allowed: float
    ratio: float


@dataclass(frozen=True)
class Flip:
    """A token for which the candidate's router prefers other experts than the truth's."""

    layer: int
    row: int
    position: int
    margin: float
    """Truth's probability of the likeliest expert that was left out, minus that of the least likely one taken in."""
    allowed: float
    """The largest margin that errors within budget can overturn: twice the probability error allowed."""

    @property
    def tie(self) -> bool:
        return self.margin <= self.allowed


@dataclass
class Comparison:
    """One candidate, in one dtype, through one cache path."""

    taps: list[TapResult]
    missing: list[str]
    """Taps of the truth that the candidate lacks."""
    partial: list[str]
    """Taps that should reach every position and do not."""
    unexpected: list[str]
    logits: LogitMetrics | None
    choices: int = 0
    flips: list[Flip] = field(default_factory=list)
    by_position: dict[str, Tensor] = field(default_factory=dict)
    """tap -> [B, L] relative error, for the heat map."""

    @property
    def worst(self) -> TapResult | None:
        return max(self.taps, key=lambda t: -1 if math.isnan(t.ratio) else t.ratio, default=None)

    @property
    def worst_ratio(self) -> float:
        return self.worst.ratio if self.worst else math.inf

    @property
    def bugs(self) -> list[Flip]:
        return [flip for flip in self.flips if not flip.tie]

    @property
    def red(self) -> bool:
        return not self.taps or any(t.red for t in self.taps) or any((self.missing, self.partial, self.bugs))

    @property
    def only_accumulated(self) -> bool:
        """Red, but by no error that is known to have been created at any one tap."""
        others = any((not self.taps, self.missing, self.partial, self.bugs))
        return self.red and not others and not any(t.created for t in self.taps if t.red)

    @property
    def first_divergence(self) -> Divergence | None:
        bugs = {f"layers.{flip.layer}.router": flip for flip in reversed(self.bugs)}
        for tap in self.taps:
            if tap.red:
                break
            if flip := bugs.get(tap.name):
                # The probabilities are in budget and what was made of them is not.
                name, ratio = f"layers.{flip.layer}{CHOICE}", budget.K * flip.margin / flip.allowed
                at = flip.row, flip.position
                return Divergence(name, *at, "created", "choice", flip.margin, flip.allowed, ratio)
        else:
            return None
        name, check = max(((n, c) for n, c in tap.checks.items() if c.red), key=lambda item: item[1].ratio)
        at = (tap.local if name.startswith("local") else tap.metrics).worst_position
        origin = {True: "created", False: "inherited", None: "unknown"}[tap.created]
        return Divergence(tap.name, *at, origin, name, check.error, check.allowed, check.ratio)


def compare(
    candidate: Taps,
    truth: Taps,
    references: Sequence[Taps],
    dtype: torch.dtype,
    *,
    local: Taps | None = None,
    local_references: Sequence[Taps] = (),
    draws: Sequence[Taps] = (),
    top_k: int | None = None,
    may_be_partial: Callable[[str], bool] = lambda name: False,
    errors: dict[tuple[str, str], list[Metrics]] | None = None,
) -> Comparison:
    """Judges every tap of `candidate` [B, L, ...] against `truth` [1 or B, L, ...]; of the vision tower's, a row is an
    image and a position a patch or soft token of it.

    Args:
        references: the reference's own captures in `dtype`, one a variant (eager, sdpa); their error is the budget.
        local, local_references: the same with the truth forced into every tap, for the error created at each.
        draws: tap -> [1, L] |r - t| of further runs r of the reference, for the accumulated error only.
        top_k: experts a token, where `router` taps exist.
        may_be_partial: names of taps that need not reach every position that the candidate's best one does.
        errors: remembers the references' metrics over all positions from one call to the next.
    A reference's error is taken over the positions that the candidate reached.
    """
    heat: dict[str, Tensor] = {}
    flips: list[Flip] = []
    choices = 0
    errors = {} if errors is None else errors
    measured: list[tuple[str, Metrics, list[float], Metrics | None, list[Metrics]]] = []
    worst: dict[str, float] = defaultdict(float)

    def of_references(captures: Sequence[Taps], kind: str, name: str, where: Tensor) -> list[Metrics]:
        everywhere = where.shape[0] == truth[name].shape[0] and torch.equal(where, reached(truth[name]))
        if not everywhere:
            return [measure(_only(capture[name], where), truth[name]) for capture in captures]
        if (kind, name) not in errors:
            errors[kind, name] = [measure(capture[name], truth[name]) for capture in captures]
        return errors[kind, name]

    for name, t in truth.items():
        if name not in candidate or name.endswith(CHOICE):
            continue
        c = candidate[name]
        if c.shape[1:] != t.shape[1:]:
            raise ValueError(f"{name}: the candidate has shape {list(c.shape)}, the truth {list(t.shape)}")
        total, heat[name] = measure_positions(c, t)
        where = reached(c)
        own = [m.rel_l2 for m in of_references(references, "total", name, where)]
        if draws:
            size = t.flatten(2).norm(dim=-1)
            own += [_relative(draw[name], size, where) for draw in draws]
        created, own_local = None, []
        if local is not None:
            created = measure(local[name], t)
            own_local = of_references(local_references, "local", name, reached(local[name]))
            worst[_kind(name)] = max(worst[_kind(name)], *(m.worst_rel_l2 for m in own_local))
        measured.append((name, total, own, created, own_local))
        if name.endswith(".router") and top_k:
            choices += total.reached
            chosen = candidate.get(name.removesuffix("router") + "choice")
            allowed = _overturned([r[name] for r in references], t, dtype)
            flips += _flips(int(name.split(".")[1]), c, t, chosen, top_k, allowed)

    results = []
    for name, total, own, created, own_local in measured:
        shape = tuple(candidate[name].shape)
        checks = budget.check_total(total.rel_l2, own, dtype)
        if created is not None:
            checks |= budget.check_local(created, own_local, dtype, math.prod(shape[2:]), worst[_kind(name)])
        results.append(TapResult(name, shape, total, created, checks))
    whole = max((r.metrics.reached for r in results if not r.name.startswith(VISION)), default=0)
    # Images have different numbers of patches and soft tokens: the truth's taps say which there are.
    wanted = {r.name: int(reached(truth[r.name]).sum()) if r.name.startswith(VISION) else whole for r in results}
    short = [r.name for r in results if r.metrics.reached < wanted[r.name] and not may_be_partial(r.name)]
    return Comparison(
        taps=results,
        missing=[name for name in truth if name not in candidate],
        partial=short,
        unexpected=[name for name in candidate if name not in truth],
        logits=measure_logits(candidate["logits"], truth["logits"]) if "logits" in candidate else None,
        choices=choices,
        flips=flips,
        by_position=heat,
    )


def _kind(name: str) -> str:
    """`layers.3.self_attn.q` -> `self_attn.q`, `vision.layers.3.mlp` -> `vision.mlp`."""
    return re.sub(r"(^|\.)layers\.\d+\.", r"\1", name)


def _relative(error: Tensor, size: Tensor, where: Tensor) -> float:
    """Errors and sizes [1, L] a position -> relative error over the positions `where` [B, L]."""
    e, t = (x.expand(where.shape)[where].square().sum() for x in (error, size))
    return float((e / t).sqrt()) if t else 0.0


def _only(reference: Tensor, where: Tensor) -> Tensor:
    """The reference [1 or B, L, ...] at the positions `where` [B, L], NaN elsewhere."""
    out = reference.expand(where.shape[0], *reference.shape[1:]).clone()
    out[~where] = torch.nan
    return out


def _overturned(references: Sequence[Tensor], truth: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, L] margin between two probabilities that errors within budget can overturn at each position: twice K times
    the reference's own largest error there (or its root mean square over the positions, if that is more), and floor."""
    errors = torch.stack([(r.double() - truth).abs().amax(-1) for r in references]).amax(0)
    typical = errors.square().nanmean().sqrt()
    return 2 * (budget.K * errors.clamp(min=float(typical)) + budget.floor(dtype))


def _flips(
    layer: int, candidate: Tensor, truth: Tensor, chosen: Tensor | None, top_k: int, allowed: Tensor
) -> list[Flip]:
    """Positions for which other experts were `chosen` [B, L, k] than the truth's probabilities rank first."""
    out = []
    for c, t, where in blocks(candidate, truth):
        own = c.topk(top_k).indices if chosen is None else chosen[where[:, 0], where[:, 1]].to(c.device).long()
        mine, theirs = (
            torch.zeros_like(t, dtype=torch.bool).scatter_(1, x, True) for x in (own, t.topk(top_k).indices)
        )
        for i in (mine != theirs).any(-1).nonzero()[:, 0].tolist():
            # Whatever was left out for whatever was taken in: one expert taken twice counts as the least likely.
            taken = t[i][mine[i] & ~theirs[i]]
            margin = float(t[i][theirs[i] & ~mine[i]].max() - (taken.min() if len(taken) else 0))
            row, position = where[i].tolist()
            out.append(Flip(layer, row, position, margin, float(allowed[row % len(allowed), position])))
    return out


def routing_of(truth: Taps, top_k: int | None) -> dict[str, Tensor]:
    """layer prefix (`layers.3.`) -> experts [B, L, k] that the truth's router chose."""
    if not top_k:
        return {}
    return {n.removesuffix("router"): t.topk(top_k).indices for n, t in truth.items() if n.endswith(".router")}
