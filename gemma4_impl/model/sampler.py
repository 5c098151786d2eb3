"""Drawing the next token from logits, on their device and without waiting for it."""

import math

import torch
from torch import Tensor

from gemma4_impl.generation import check_sampling


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
    check_sampling(temperature, top_k, top_p)
    logits = logits.float()
    scores = logits
    if temperature > 0:
        if top_k is not None or top_p is not None:
            scores = logits.masked_fill(~allowed(logits, temperature, top_k, top_p), -math.inf)
        # Gumbel-max: argmax(logits / temperature + g) is a draw from the softmax. Both sides are multiplied by the
        # temperature, so that a small one cannot overflow. A draw of exactly 0 would let any id win: hence the clamp.
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).clamp_min_(1e-10).log_()
        scores = scores + temperature * gumbel
    return torch.where(logits.amax(dim=-1) > -math.inf, scores.argmax(dim=-1), -1)


def allowed(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
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
