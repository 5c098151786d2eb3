"""What a candidate may be wrong by: k times what the reference itself is wrong by, plus a stated floor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parity.metrics import Metrics

K = 2.0
"""How many times the reference's own error a candidate may make."""

_GAIN_SIGMAS = 16.0


def floor(dtype: torch.dtype) -> float:
    """Relative error granted where the reference happens to make none: half a unit roundoff, 2^-25 in float32 and
    2^-9 in bfloat16. A correctly rounded tensor is about 0.4 roundoffs from the truth."""
    return torch.finfo(dtype).eps / 4


@dataclass(frozen=True)
class Check:
    """One error against its budget. `ratio` is 1 where the candidate is as wrong as the reference (and floor / K)."""

    error: float
    reference: float
    allowed: float

    @property
    def ratio(self) -> float:
        """K * error / allowed, so that the budget ends at K whatever the floor."""
        if self.red and not math.isfinite(self.error):
            return math.inf
        if self.error <= 0:
            return 0.0
        return K * self.error / self.allowed if self.allowed > 0 else math.inf

    @property
    def red(self) -> bool:
        """An infinite error is red whatever the reference does."""
        return not (math.isfinite(self.error) and self.error <= self.allowed)


def check(error: float, references: Sequence[float], floor: float) -> Check:
    """The reference's figure is the largest of its own variants': a budget must not depend on one lucky rounding."""
    reference = max(references)
    return Check(error, reference, K * reference + floor)


def check_total(error: float, references: Sequence[float], dtype: torch.dtype) -> dict[str, Check]:
    """The relative error accumulated from the input up to this tap."""
    return {"total": check(error, references, floor(dtype))}


def check_local(
    candidate: Metrics, references: Sequence[Metrics], dtype: torch.dtype, features: int, worst: float
) -> dict[str, Check]:
    """The error created since the previous taps, which were given the truth: in all, at the worst position, and as
    a change of scale, of the whole tensor and of each position.

    `worst` is the reference's own worst position in any layer's tap of this kind: an extreme needs a larger sample
    than one tap. The scale of a tensor of n independent roundings of size e wanders by e / sqrt(n); 16 of these are
    granted, because roundings of one matrix product are not independent."""
    eps = floor(dtype)
    noise = max(max(m.rel_l2 for m in references), eps)
    wander = _GAIN_SIGMAS * noise / math.sqrt(max(1, features * candidate.reached))
    return {
        "local": check(candidate.rel_l2, [m.rel_l2 for m in references], eps),
        "local_worst": check(candidate.worst_rel_l2, [worst], 2 * eps),
        "local_row_gain": check(candidate.row_gain, [m.row_gain for m in references], eps / math.sqrt(features)),
        "local_gain": check(abs(candidate.gain), [abs(m.gain) for m in references], wander),
    }
