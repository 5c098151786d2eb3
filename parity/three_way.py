"""Our PyTorch model, our JAX model and transformers beside each other: how far each is from the truth, and how far the
float64 runs of two of them are from each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from parity import budget
from parity.compare import Comparison, Taps
from parity.metrics import measure

_INVISIBLE = 2.0**-10
"""The part of a dtype's floor up to which the truths may differ: no ratio of a report would show which of the two was
taken."""


@dataclass(frozen=True)
class Standing:
    """One implementation in one dtype, the worst of its paths."""

    logits: float
    """Relative L2 error of the logits against transformers' float64 run."""
    ratio: float
    """The largest error ratio of any tap; of transformers itself, its eager run against the budget of its others."""
    tap: str


@dataclass(frozen=True)
class ThreeWay:
    """A checkpoint in one dtype."""

    checkpoint: str
    dtype: str
    standings: dict[str, Standing]
    """torch, jax and hf."""
    truths: float
    """Relative L2 distance of JAX's x64 run from transformers' float64 run, at the tap where it is largest."""
    truths_tap: str
    truths_logits: float

    @property
    def name(self) -> str:
        return f"{self.checkpoint} {self.dtype}"

    @property
    def allowed(self) -> float:
        return _INVISIBLE * budget.floor(getattr(torch, self.dtype))

    @property
    def red(self) -> bool:
        """Whether the two truths are different models."""
        return not self.truths <= self.allowed


def compare_truths(
    checkpoint: str, dtype: str, found: Mapping[str, Sequence[Comparison]], truth: Taps, other: Taps
) -> ThreeWay:
    """`found` has the comparisons of each implementation with `truth` [1, L, ...]; `other` is the second truth. A tap
    that one of the truths lacks is infinitely far."""
    standings = {}
    for name, comparisons in found.items():
        worst = max(comparisons, key=lambda comparison: comparison.worst_ratio)
        logits = [tap.metrics.rel_l2 for c in comparisons for tap in c.taps if tap.name == "logits"]
        tap = worst.worst.name if worst.worst else ""
        standings[name] = Standing(max(logits, default=torch.inf), worst.worst_ratio, tap)
    apart = {n: measure(other[n], truth[n]).rel_l2 if n in other and n in truth else torch.inf for n in truth | other}
    tap = max(apart, key=apart.__getitem__)
    return ThreeWay(checkpoint, dtype, standings, apart[tap], tap, apart.get("logits", torch.inf))
