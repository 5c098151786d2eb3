"""How sequences with images in them are cut into chunks, and which images a shorter one of them has."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_Features = TypeVar("_Features")


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


def shown_in(tokens: Tensor, image_token_id: int, features: Iterable[_Features]) -> list[_Features]:
    """The soft tokens [n, D] of each row's images, tokens [B, L]: all of `features`, or the first few of them."""
    shown = []
    for row in tokens:
        left = int((row == image_token_id).sum())
        for feature in features:
            left -= len(feature)
            shown += [feature] if left >= 0 else []
    return shown
