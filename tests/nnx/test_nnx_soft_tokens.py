"""Image blocks in JAX: the mask's ends and the merge, against the rule token by token and against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.model import soft_tokens as in_torch
from gemma4_impl.nnx.decoder import attention_mask
from gemma4_impl.nnx.soft_tokens import SoftTokens, image_slots, merge

# One shape for all examples, so that one is compiled: shorter rows are padded.
B, T, D = 2, 20, 3
ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=T), min_size=B, max_size=B)
IMAGE = 9
COMPILES = settings(deadline=None)

ends = jax.jit(lambda soft, positions: soft.ends(positions))
visible = jax.jit(lambda soft, positions, window: attention_mask(positions, positions, window, soft.ends(positions)))


def padded(rows: list[list[bool]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of any length as mask bool and positions int32 [B, T], padding at -1 on one side."""
    mask, positions = np.zeros((B, T), bool), np.full((B, T), -1, np.int32)
    for b, row in enumerate(rows):
        where = slice(T - len(row), T) if left else slice(0, len(row))
        mask[b, where], positions[b, where] = row, np.arange(len(row))
    return mask, positions


def soft(mask: np.ndarray, bidirectional: bool = True) -> SoftTokens:
    return SoftTokens(mask, np.zeros((*mask.shape, D), np.float32), bidirectional)


def last_of_block(row: list[bool], i: int) -> int:
    while row[i] and i + 1 < len(row) and row[i + 1]:
        i += 1
    return i


@COMPILES
@given(ROWS, st.booleans(), st.integers(0, 50))
def test_ends_are_the_last_positions_of_blocks(rows: list[list[bool]], left: bool, start: int) -> None:
    mask, positions = padded(rows, left)
    positions = np.where(positions < 0, -1, positions + np.int32(start))
    got = np.asarray(ends(soft(mask), positions))
    for b, row in enumerate(rows):
        assert got[b][positions[b] >= 0].tolist() == [start + last_of_block(row, i) for i in range(len(row))]
    assert (got[positions < 0] == -1).all()
    want = in_torch.SoftTokens(torch.from_numpy(mask), torch.zeros(B, T, D), True).ends(torch.from_numpy(positions))
    assert np.array_equal(got, want.numpy())
    assert np.array_equal(ends(soft(mask, False), positions), positions)


@COMPILES
@given(ROWS, st.booleans())
def test_padding_that_looks_like_an_image_is_none(rows: list[list[bool]], left: bool) -> None:
    mask, positions = padded(rows, left)
    assert np.array_equal(ends(soft(mask | (positions < 0)), positions), ends(soft(mask), positions))


@settings(max_examples=30, deadline=None)
@given(ROWS, st.integers(1, 12))
def test_the_mask_is_causal_or_same_block_and_within_the_window(rows: list[list[bool]], window: int) -> None:
    mask, positions = padded(rows, left=False)
    got = np.asarray(visible(soft(mask), positions, window))
    for b, row in enumerate(rows):
        for q in range(len(row)):
            for k in range(T):
                seen = k < len(row) and q - window < k <= last_of_block(row, q)
                assert got[b, 0, q, k] == seen


@given(ROWS, st.integers(1, T))
def test_chunks_are_those_of_the_pytorch_model(rows: list[list[bool]], size: int) -> None:
    mask = padded(rows, left=False)[0]
    for bidirectional in (True, False):
        ours = soft(mask, bidirectional)
        theirs = in_torch.SoftTokens(torch.from_numpy(mask), torch.zeros(B, T, D), bidirectional)
        assert ours.longest == theirs.longest
        if bidirectional and any(run > size for run in joined_runs(mask)):
            with pytest.raises(ValueError, match="max_chunk"):
                ours.chunks(size)
            continue
        parts = ours.chunks(size)
        assert parts == theirs.chunks(size)
        assert np.array_equal(np.concatenate([ours[part].mask for part in parts], axis=1), mask)


def joined_runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of columns that must be fed together: cut between two, some row's block would be."""
    runs = [1]
    for goes_on in (mask[:, 1:] & mask[:, :-1]).any(axis=0):
        runs = [*runs[:-1], runs[-1] + 1] if goes_on else [*runs, 1]
    return runs


# Merging: three images of up to four soft tokens

IMAGES, L = 3, 4
COUNTS = st.lists(st.integers(0, L), min_size=IMAGES, max_size=IMAGES)

merged = jax.jit(lambda features, slots: merge(features, slots, True, features.dtype))


@st.composite
def prompts(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Tokens [B, T] with as many image tokens as there are soft tokens, and the images' counts."""
    counts = draw(COUNTS)
    flat = np.ones(B * T, np.int32)
    flat[draw(st.permutations(range(B * T)))[: sum(counts)]] = IMAGE
    return flat.reshape(B, T), counts


@COMPILES
@given(prompts(), st.integers(0, 99))
def test_merge_is_the_pytorch_models(prompt: tuple[np.ndarray, list[int]], seed: int) -> None:
    tokens, counts = prompt
    features = np.random.default_rng(seed).normal(size=(IMAGES, L, D)).astype(np.float32)
    got = merged(features, image_slots(tokens, IMAGE, counts, L))
    shown = [torch.from_numpy(row[:n]) for row, n in zip(features, counts, strict=True)]
    want = in_torch.merge(torch.from_numpy(tokens), IMAGE, shown, True, torch.float32)
    assert got.bidirectional
    assert np.array_equal(got.mask, want.mask.numpy())
    assert np.array_equal(np.asarray(got.embeds)[got.mask], want.embeds.numpy()[want.mask.numpy()])


@jax.jit
@jax.grad
def weighed(features: jax.Array, slots: jax.Array, weight: jax.Array) -> jax.Array:
    soft = merge(features, slots, True, features.dtype)
    return jnp.sum(jnp.where(soft.mask[..., None], soft.embeds, 0) * weight)


@COMPILES
@given(prompts(), st.integers(0, 99))
def test_gradients_of_the_merge_go_to_the_images_own_soft_tokens(prompt: tuple, seed: int) -> None:
    """Each soft token's is that of its place; what is padding gets none."""
    tokens, counts = prompt
    weight = np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)
    got = np.asarray(weighed(np.ones((IMAGES, L, D), np.float32), image_slots(tokens, IMAGE, counts, L), weight))
    want, at = np.zeros((IMAGES, L, D), np.float32), iter(weight[tokens == IMAGE])
    for i, n in enumerate(counts):
        for j in range(n):
            want[i, j] = next(at)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("counts", [[1, 2, 0], [0, 0, 0], [4, 4, 4]])
def test_counts_must_fit(counts: list[int]) -> None:
    tokens = np.array([[IMAGE, IMAGE, 1]])
    with pytest.raises(ValueError, match=f"room for 2 soft tokens, but its images have {sum(counts)}"):
        image_slots(tokens, IMAGE, counts, L)
