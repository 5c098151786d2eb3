"""Image blocks in the mask and in chunks, against the rule written out token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma4_impl.model.decoder import attention_mask
from gemma4_impl.model.soft_tokens import SoftTokens, merge

ROWS = st.integers(1, 24).flatmap(
    lambda T: st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=3)
)


def soft(rows: list[list[bool]], bidirectional: bool = True) -> SoftTokens:
    mask = torch.tensor(rows)
    return SoftTokens(mask, torch.zeros(*mask.shape, 2), bidirectional)


def blocks(row: list[bool]) -> list[int]:
    """The number of each token's block of image tokens, -1 for text, as transformers counts them."""
    out, number = [], -1
    for i, image in enumerate(row):
        number += image and (i == 0 or not row[i - 1])
        out.append(number if image else -1)
    return out


@given(ROWS, st.integers(1, 12))
def test_the_mask_is_causal_or_same_block_and_within_the_window(rows: list[list[bool]], window: int) -> None:
    positions = torch.arange(len(rows[0])).expand(len(rows), -1)
    mask = attention_mask(positions, positions, window, soft(rows).ends(positions))
    for b, row in enumerate(rows):
        block = blocks(row)
        for q in range(len(row)):
            for k in range(len(row)):
                same = block[q] == block[k] >= 0
                assert bool(mask[b, 0, q, k]) == ((k <= q or same) and k > q - window)


@given(ROWS, st.integers(0, 5), st.integers(0, 5))
def test_padding_only_moves_the_ends(rows: list[list[bool]], left: int, right: int) -> None:
    T = len(rows[0])
    plain = soft(rows).ends(torch.arange(T).expand(len(rows), -1))
    pads = [torch.full((n,), -1) for n in (left, right)]
    positions = torch.cat((pads[0], torch.arange(T), pads[1])).expand(len(rows), -1)
    padded = soft([[False] * left + row + [False] * right for row in rows]).ends(positions)
    assert torch.equal(padded[:, left : left + T], plain)
    assert (padded[:, :left] == -1).all()
    assert (padded[:, left + T :] == -1).all()


@given(ROWS, st.integers(1, 30))
def test_chunks_cover_the_sequence_and_cut_no_block(rows: list[list[bool]], size: int) -> None:
    both = soft(rows)
    together = [any(row[i] and row[i + 1] for row in rows) for i in range(len(rows[0]) - 1)]
    longest, run = 1, 1
    for goes_on in together:
        run = run + 1 if goes_on else 1
        longest = max(longest, run)
    if longest > size:
        with pytest.raises(ValueError, match="max_chunk"):
            both.chunks(size)
        return
    parts = both.chunks(size)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(rows[0])))
    assert all(0 < part.stop - part.start <= size for part in parts)
    assert not any(together[part.stop - 1] for part in parts[:-1])


@given(ROWS)
def test_longest_is_the_longest_block(rows: list[list[bool]]) -> None:
    sizes = [max((blocks(row).count(n) for n in set(blocks(row)) - {-1}), default=0) for row in rows]
    assert soft(rows).longest == max(1, *sizes)
    assert soft(rows, bidirectional=False).longest == 1


@given(ROWS)
def test_a_causal_image_looks_like_text(rows: list[list[bool]]) -> None:
    positions = torch.arange(len(rows[0])).expand(len(rows), -1)
    both = soft(rows, bidirectional=False)
    assert torch.equal(both.ends(positions), positions)
    assert [part.stop - part.start for part in both.chunks(5)][:-1] == [5] * (len(both.chunks(5)) - 1)


def test_merge_puts_images_in_reading_order() -> None:
    tokens = torch.tensor([[5, 9, 9, 1], [9, 2, 3, 9]])
    features = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]]), torch.tensor([[4.0]])]
    merged = merge(tokens, 9, features, True, torch.float32)
    assert merged.embeds[..., 0].tolist() == [[0, 1, 2, 0], [3, 0, 0, 4]]
    assert torch.equal(merged.mask, tokens == 9)


def test_merge_counts() -> None:
    with pytest.raises(ValueError, match="room for 2 soft tokens, but its images have 3"):
        merge(torch.tensor([[9, 9]]), 9, [torch.ones(3, 4)], True, torch.float32)
