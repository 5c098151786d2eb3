"""The prefill kernel of Hopper GPUs: compiles everywhere, and on such a GPU agrees with naive.py in float64."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.kernel_checks import (
    Guarded,
    assert_repeatable,
    assert_within_budget,
    normal,
    poisoned_memory,
    ring_positions,
)
from torch import Tensor

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.sdpa import naive
from gemma4_impl.kernels.sdpa.prefill import HEAD_DIMS, SOURCE, prefill

hopper = pytest.mark.skipif(not cuda.available(), reason="needs a Hopper GPU and cuda-bindings")


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_compiles(H, positions):
    if not importlib.util.find_spec("cuda") or not importlib.util.find_spec("cuda.bindings"):
        pytest.skip("needs cuda-bindings")
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC", exc_type=(ImportError, RuntimeError))
    assert cuda.compiled(SOURCE, {"HEAD_DIM": H, "POSITIONS": positions}, "sm_90a")[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 8, 96, dtype=torch.bfloat16)}, "do not fit together"),
        ({"q": torch.zeros(1, 4, 8, 128)}, "differ in dtype"),
        ({"q_positions": torch.zeros(1, 8, dtype=torch.long)}, "go together"),
        ({"ends": torch.zeros(1, 8, dtype=torch.long)}, "go together"),
        (
            {"k": torch.zeros(1, 2, 7, 128, dtype=torch.bfloat16)} | {"v": torch.zeros(1, 2, 7, 128).bfloat16()},
            "8 queries",
        ),
        ({"window": 0}, "must be positive"),
        ({"scale": 0.0}, "must be positive"),
        ({"out": torch.zeros(1, 4, 8, 128)}, "out must be"),
    ],
)
def test_refuses(change, message):
    q, k, v = (torch.zeros(1, heads, 8, 128, dtype=torch.bfloat16) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=message):
        prefill(**{"q": q, "k": k, "v": v} | change)


def test_refuses_other_head_dims():
    q = torch.zeros(1, 4, 8, 96, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head dim 96"):
        prefill(q, q, q)


def tensors(B, N, K, T, S, H, seed=0, size=1.0, cache=True) -> tuple[Tensor, Tensor, Tensor]:
    """q as a transposed view; k, v as such views or laid out as a cache. Scores deviate by about `size` squared."""

    def draw(i, *shape):
        return normal(*shape, seed=3 * seed + i, device="cuda")

    q = (draw(0, B, T, N, H) * size * H**-0.25).bfloat16().transpose(1, 2)
    if cache:
        k, v = draw(1, B, K, S, H), draw(2, B, K, S, H)
    else:
        k, v = (draw(i, B, S, K, H).transpose(1, 2) for i in (1, 2))
    return q, (k * size * H**-0.25).bfloat16(), v.bfloat16()


def rounded(q, k, v, q_positions, k_positions, *, window=None, ends=None, scale=1.0) -> Tensor:
    """Plain attention in bfloat16: scores and sums in float32, probabilities rounded."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).float() for x in (k, v))
    last, keys = q_positions if ends is None else ends, k_positions[:, None]
    visible = (keys >= 0) & (keys <= last[:, :, None]) & (q_positions[:, :, None] >= 0)
    if window is not None:
        visible &= keys > q_positions[:, :, None] - window
    scores = (q.float() @ k.mT * scale).masked_fill(~visible[:, None], -torch.inf)
    return (torch.softmax(scores, -1).nan_to_num(0).bfloat16().float() @ v).bfloat16()


def check(q, k, v, q_positions=None, k_positions=None, *, times=3, **options) -> None:
    """Guards every tensor by canaries, runs the kernel a few times and compares it with float64."""
    B, N, T, H = q.shape
    S, guard = k.shape[2], Guarded()
    inside = [guard.around(x) for x in (q, k, v)]
    out = guard.around(torch.full((B, T, N, H), torch.nan, dtype=q.dtype, device="cuda").transpose(1, 2))

    def run():
        out.fill_(torch.nan)
        with poisoned_memory():
            return prefill(*inside, q_positions=q_positions, k_positions=k_positions, out=out, **options)

    assert_repeatable(run, times)
    guard.assert_untouched()
    if q_positions is None:
        q_positions = torch.arange(S - T, S, device="cuda").expand(B, T)
        k_positions = torch.arange(S, device="cuda").expand(B, S)
    truth = naive.sdpa(q.double(), k.double(), v.double(), q_positions, k_positions, **options)
    assert_within_budget(out, truth, rounded(q, k, v, q_positions, k_positions, **options), row_dims=None)
    # A wrong row is far from the truth by its own size.
    error, size = (out.double() - truth).norm(dim=-1), truth.norm(dim=-1)
    assert bool((error <= 0.05 * size).all())


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 1, 64, 100])
@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (63, 63), (64, 64), (65, 65), (257, 257), (1, 200), (64, 1000), (130, 703)]
)
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_contiguous(H, T, S, window):
    check(*tensors(1, 8, 2, T, S, H), window=window)


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_groups_and_batches(H, group):
    check(*tensors(2, 2 * group, 2, 150, 190, H, cache=False), scale=0.7)


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_large_scores(H):
    """Probabilities near 0 and 1, and row maxima that grow along the keys."""
    check(*tensors(1, 8, 2, 200, 900, H, size=6.0))
    q, k, v = tensors(1, 4, 2, 200, 900, H)
    check(q.abs(), k.abs() * torch.linspace(0, 8, 900, device="cuda")[:, None].bfloat16(), v)


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("start", [0, 100, 555, 1234])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_ring(H, start):
    window, chunk = 150, 200
    slots = window - 1 + chunk
    k_positions = ring_positions(start + chunk, slots, "cuda").expand(2, slots)
    q_positions = torch.arange(start, start + chunk, device="cuda").expand(2, chunk)
    check(*tensors(2, 8, 2, chunk, slots, H), q_positions, k_positions, window=window)


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_image_blocks(H, window):
    positions = torch.arange(333, device="cuda").expand(2, 333)
    ends = positions.clone()
    ends[:, 40:180], ends[1, 200:290] = 179, 289
    check(*tensors(2, 8, 2, 333, 333, H), positions, positions, window=window, ends=ends)


@hopper
@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_padding_and_rows_without_keys(H, window):
    steps = torch.arange(333)
    positions = torch.stack([(steps - 70).clamp(min=-1), torch.where(steps < 250, steps, -1)]).cuda()
    q, k, v = tensors(2, 8, 2, 333, 333, H)
    check(q, k, v, positions, positions, window=window)
    nowhere = positions.clone()
    nowhere[0] = -1
    check(q, k, v, positions, nowhere, window=window)


@hopper
@pytest.mark.cuda
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    H, group, K, B = (data.draw(st.sampled_from(x)) for x in (HEAD_DIMS, (1, 2, 4, 8), (1, 2, 3), (1, 2)))
    T = data.draw(st.integers(1, 400), "T")
    S = T + data.draw(st.integers(0, 600), "past")
    window = data.draw(st.none() | st.integers(1, S + 50), "window")
    size = data.draw(st.sampled_from((0.3, 1.0, 4.0)), "size")
    q, k, v = tensors(B, K * group, K, T, S, H, size=size, cache=data.draw(st.booleans(), "cache"))
    if data.draw(st.booleans(), "positions"):
        # Keys in any order of slots, some of them absent, and rows of different lengths.
        shift = torch.tensor([data.draw(st.integers(0, 200), "shift") for _ in range(B)])[:, None]
        q_positions = torch.arange(S - T, S) - shift
        order = torch.randperm(S, generator=torch.Generator().manual_seed(S))
        k_positions = torch.where(order < S - shift, order, -1)
        ends = None
        if data.draw(st.booleans(), "ends"):
            ends = (torch.where(q_positions < 0, -1, q_positions // 50 * 50 + 49).maximum(q_positions)).cuda()
        check(q, k, v, q_positions.clamp(min=-1).cuda(), k_positions.cuda(), window=window, ends=ends, times=2)
    else:
        check(q, k, v, window=window, times=2)
