"""How a sequence with images in it is cut into chunks."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def chunks(length: int, sizes: Sequence[int], whole: Tensor | None = None) -> list[slice]:
    """The sequence in chunks of these sizes, over and over, each extended so that it ends inside no run of True in any
    row of `whole` [B, length]: the image tokens that must be fed at once."""
    inside = torch.zeros(length, dtype=torch.bool)
    if whole is not None:
        inside[1:] = (whole[:, 1:] & whole[:, :-1]).any(dim=0).cpu()
    out, start, size = [], 0, itertools.cycle(sizes)
    while start < length:
        stop = min(start + next(size), length)
        while stop < length and inside[stop]:
            stop += 1
        out.append(slice(start, stop))
        start = stop
    return out
