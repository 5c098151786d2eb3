"""Where a sequence may be cut if the tokens of an image must be fed together. A block is a run of image tokens; blocks
that touch are one, as in transformers."""

import numpy as np


def longest(mask: np.ndarray) -> int:
    """The length of the longest block in any row of mask, bool [B, T], True at image tokens; 1 if there is none."""
    columns = np.arange(mask.shape[1])
    before = np.maximum.accumulate(np.where(mask, -1, columns), axis=1)
    return max(1, int((columns - before).max()))


def cut(mask: np.ndarray, size: int) -> list[slice]:
    """The T columns of mask, bool [B, T], in parts of at most `size` that cut no row's block in two.

    Raises ValueError for a block that is longer than `size`."""
    T = mask.shape[1]
    inside = [False, *(mask[:, 1:] & mask[:, :-1]).any(axis=0).tolist(), False]
    parts, start = [], 0
    while start < T:
        stop = min(start + size, T)
        while stop > start and inside[stop]:
            stop -= 1
        if stop == start:
            raise ValueError(f"an image takes up more than max_chunk = {size} tokens; raise it (max_chunk)")
        parts.append(slice(start, stop))
        start = stop
    return parts
