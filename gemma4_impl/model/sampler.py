"""Drawing the next token from logits, on their device and without waiting for it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy; None turns a filter off; seed None draws a new seed every time.
    Raises ValueError naming the field."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check(self.temperature, self.top_k, self.top_p)
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < 2**64):
            raise ValueError(f"seed = {self.seed!r}: must be an integer from 0 to 2**64 - 1")

    def generator(self, device: torch.device | str) -> torch.Generator:
        """A generator on `device` that starts at the seed."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one id a row: logits [B, V] -> [B] int64. Temperature first, then top-k, then top-p.

    - temperature 0: the largest logit.
    - top_k: the k largest logits stay; among equal ones the lower ids.
    - top_p: the fewest ids whose probability (after temperature and top-k) reaches p, at least one; ties as above.
    - -inf is never drawn; +inf always is (the first, if several).
    - A row with a NaN, or with -inf only, has no distribution: its id is -1.

    Raises ValueError for a parameter out of its range."""
    _check(temperature, top_k, top_p)
    logits = logits.float()
    scores = logits
    if temperature > 0:
        if top_k is not None or top_p is not None:
            scores = logits.masked_fill(~_allowed(logits, temperature, top_k, top_p), -math.inf)
        # Gumbel-max: argmax(logits / temperature + g) is a draw from the softmax. Both sides are multiplied by the
        # temperature, so that a small one cannot overflow. A draw of exactly 0 would let any id win: hence the clamp.
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-10).log_()
        scores = scores + temperature * gumbel
    return torch.where(logits.amax(dim=-1) > -math.inf, scores.argmax(dim=-1), -1)


def _allowed(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """True for the ids that the filters keep, [B, V]: the n largest of each row, lower ids first among equals."""
    V = logits.shape[-1]
    k = V if top_k is None else min(top_k, V)
    largest_Bk = logits.topk(k).values
    if top_p is None or top_p == 1:
        threshold_B1, n_B1 = largest_Bk[:, -1:], k
    else:
        probs_Bk = torch.softmax((largest_Bk - largest_Bk[:, :1]) / temperature, dim=-1)
        n_B1 = (1 + (probs_Bk.cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True)).clamp_max(k)
        threshold_B1 = largest_Bk.gather(1, n_B1 - 1)
    above_BV, equal_BV = logits > threshold_B1, logits == threshold_B1
    room_B1 = n_B1 - above_BV.sum(dim=-1, keepdim=True)
    return above_BV | (equal_BV & (equal_BV.cumsum(dim=-1) <= room_B1))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(temperature: object, top_k: object, top_p: object) -> None:
    if not _is_number(temperature) or temperature < 0:
        raise ValueError(f"temperature = {temperature!r}: must be a number >= 0 (0 is greedy)")
    if top_k is not None and not (_is_int(top_k) and top_k >= 1):
        raise ValueError(f"top_k = {top_k!r}: must be an integer >= 1 (None turns it off)")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p = {top_p!r}: must be in (0, 1] (1 turns it off)")
