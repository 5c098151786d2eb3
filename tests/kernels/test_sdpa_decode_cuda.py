"""decode.cu: every instantiation compiles; on a GPU, both forms against float64."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_checks import assert_repeatable, assert_within_budget, normal, poisoned_memory, rel_l2, ring_positions
from torch import Tensor

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.sdpa import decode as module
from gemma4_impl.kernels.sdpa.decode import HEAD_DIMS, SOURCE, decode, decode_fused, defines, inverses, split_of
from gemma4_impl.kernels.sdpa.naive import sdpa

H200 = 132
SHARED_LIMIT = 227 * 1024


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows", [1, 8, 9, 32, 64])
def test_shared_memory_fits(head_dim: int, rows: int) -> None:
    for items, capacity in itertools.product((1, 4, 16, 33, 200), (4096, 4097)):
        split = split_of(head_dim, rows, items, capacity, H200)
        assert split.shared_bytes(head_dim, positions=True) <= SHARED_LIMIT
        assert 8 * split.groups >= rows
        assert split.groups * split.teams <= 8


@given(st.integers(1, 8), st.integers(0, 8191), st.integers(1, 2**31 - 1), st.integers(0, 2**32 - 1))
@example(1, 8191, 1, 2**32 - 1)
def test_products_with_inverses_divide(tokens: int, row: int, capacity: int, position: int) -> None:
    of_tokens, of_capacity = inverses(tokens, capacity)
    assert of_tokens < 2**32
    assert of_capacity < 2**64
    assert row * of_tokens >> 16 == row // tokens
    assert (of_capacity * position % 2**64) * capacity >> 64 == position % capacity


KINDS = {"plain": (False, False), "positions": (True, False), "fused": (False, True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("head_dim", "rows", "items", "capacity"),
    [
        *((64, 2, 4, 1024), (128, 8, 4, 1024), (256, 2, 16, 1024), (256, 16, 200, 1024)),
        *((512, 8, 4, 4096), (512, 8, 4, 8192), (512, 8, 64, 8192), (512, 32, 4, 8192), (512, 64, 4, 8192)),
    ],
)
def test_compiles_without_a_gpu(head_dim: int, rows: int, items: int, capacity: int, kind: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC")
    split = split_of(head_dim, rows, items, capacity, H200)
    assert cuda.compiled(SOURCE, defines(split, head_dim, *KINDS[kind]), "sm_90a")


def _cache(
    lengths: list[int], K: int, C: int, H: int, seed: int, shuffled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [B, K, C, H] as slices of [B, K, C + 1, H] and the slots' positions [B, C]; NaN where no token is."""
    positions = torch.stack([ring_positions(length, C) for length in lengths])
    if shuffled:
        generator = torch.Generator().manual_seed(seed)
        positions = positions.gather(1, torch.stack([torch.randperm(C, generator=generator) for _ in lengths]))
    k, v = (normal(len(lengths), K, C + 1, H, seed=seed + i, dtype=torch.bfloat16, device="cuda") for i in (1, 2))
    positions = positions.cuda()
    for x in (k, v):
        x[:, :, C] = torch.nan
        x[:, :, :C].masked_fill_((positions < 0)[:, None, :, None], torch.nan)
    return k[:, :, :C], v[:, :, :C], positions


def _check(
    lengths: list[int],
    *,
    N: int = 32,
    K: int = 4,
    H: int = 512,
    T: int = 1,
    C: int = 5000,
    window: int | None = None,
    kind: str = "plain",
) -> None:
    """Against float64; nothing that lies outside the visible keys may reach the result, and no run differs."""
    B, scale = len(lengths), H**-0.5
    q = normal(B, T, N, H, seed=0, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    k, v, k_positions = _cache(lengths, K, C, H, 10, shuffled=kind == "shuffled")
    length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    q_positions = length[:, None].long() - T + torch.arange(T, device="cuda")
    q_positions = torch.where(q_positions < 0, -1, q_positions)
    args = q_positions, k_positions
    clean = k.nan_to_num(), v.nan_to_num()
    truth = sdpa(q.double(), *(x.double() for x in clean), *args, window=window, scale=scale)
    naive = sdpa(q, *clean, *args, window=window, scale=scale)
    given = {} if kind == "plain" else {"q_positions": q_positions}
    if kind == "shuffled":
        given["k_positions"] = k_positions
    with poisoned_memory():
        out = assert_repeatable(lambda: decode(q, k, v, length, window=window, scale=scale, **given), 4)
    assert out.transpose(1, 2).is_contiguous()
    assert_within_budget(out, truth, naive)


@pytest.mark.cuda
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 63, 64, 65, 1000, 4096, 5000])
def test_flat_cache(length: int) -> None:
    _check([length])


@pytest.mark.cuda
@pytest.mark.parametrize("length", [1, 100, 1023, 1024, 1025, 1535, 1536, 1541, 3070, 9001, 200001])
def test_ring_and_window(length: int) -> None:
    _check([length], K=16, H=256, C=1535, window=1024)


@pytest.mark.cuda
@pytest.mark.parametrize("T", range(1, 9))
@pytest.mark.parametrize(("N", "K", "H"), [(32, 4, 512), (32, 16, 256), (8, 8, 64), (6, 2, 128)])
def test_several_tokens(T: int, N: int, K: int, H: int) -> None:
    for length in (T, 77, 700, 2001):
        _check([length], N=N, K=K, H=H, T=T, C=700 if H < 512 else 2001, window=300 if H < 512 else None)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["plain", "q_positions", "shuffled"])
def test_rows_of_different_lengths(kind: str) -> None:
    _check([1, 512, 37, 513, 699, 600, 64, 3], N=8, K=1, H=256, C=700, kind=kind)
    _check([1, 512, 37, 1513, 1699, 600, 64, 3], N=8, K=1, H=256, T=2, C=700, window=512, kind=kind)
    _check([17, 2999], C=3000, kind=kind)
    _check([1 + 13 * i for i in range(24)], N=16, K=16, H=64, C=320, kind=kind)


@pytest.mark.cuda
def test_scores_of_any_size() -> None:
    """A running maximum that rises from tile to tile, and keys that outweigh all others."""
    N, K, H, S = 8, 1, 256, 4096
    q = normal(1, N, 1, H, seed=0, dtype=torch.bfloat16, device="cuda")
    k, v = (normal(1, K, S, H, seed=i, dtype=torch.bfloat16, device="cuda") for i in (1, 2))
    k = (k * torch.linspace(0.1, 4, S, device="cuda")[:, None]).bfloat16()
    at, positions = torch.tensor([[S - 1]], device="cuda"), torch.arange(S, device="cuda")[None]
    for order in (k, k.flip(2).contiguous()):
        truth = sdpa(q.double(), order.double(), v.double(), at, positions)
        naive = sdpa(q, order, v, at, positions)
        assert_within_budget(decode(q, order, v, torch.tensor([S], device="cuda")), truth, naive)


@pytest.mark.cuda
def test_graph_follows_the_length() -> None:
    q = normal(1, 32, 1, 512, seed=0, dtype=torch.bfloat16, device="cuda")
    k, v, _ = _cache([3000], 4, 3000, 512, 10)
    length = torch.tensor([1], dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)
    decode(q, k, v, length, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            decode(q, k, v, length, out=out)
    for n in (1, 2999, 64, 3000, 500):
        length.fill_(n)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, decode(q, k, v, length))


@pytest.mark.cuda
def test_the_first_call_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_workspace", functools.cache(module._workspace.__wrapped__))
    q = normal(1, 32, 1, 512, seed=0, dtype=torch.bfloat16, device="cuda")
    k, v, _ = _cache([3000], 4, 3000, 512, 10)
    length = torch.tensor([1000], dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="before a graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        decode(q, k, v, length)
    decode(q, k, v, length)


LATE = """
#include "common.cuh"
extern "C" __global__ void write_late(i32* p, i32 x) {
  grid_trigger();
  for (int i = 0; i < 100; ++i) __nanosleep(500);
  p[threadIdx.x] = x;
}
"""


@pytest.mark.cuda
@pytest.mark.parametrize(("K", "H", "C"), [(4, 512, 3000), (16, 256, 1024)])
@pytest.mark.parametrize("B", [1, 2])
def test_a_length_that_the_kernel_before_writes_late(B: int, K: int, H: int, C: int, tmp_path: Path) -> None:
    """The kernel starts while that one runs, and sees another length at first."""
    (tmp_path / "late.cu").write_text(LATE)
    write_late = cuda.kernel(tmp_path / "late.cu", "write_late")
    q = normal(B, 32, 1, H, seed=0, dtype=torch.bfloat16, device="cuda")
    k, v, _ = _cache([C] * B, K, C, H, 10)
    for before, after in itertools.permutations((0, 5, 700, C, C + 300, -(2**31), 2**31 - 1), 2):
        if not 0 < after <= C + 300:
            continue
        length = torch.full((B,), after, dtype=torch.int32, device="cuda")
        wanted = decode(q, k, v, length, window=None if after <= C else 900)
        length.fill_(before)
        write_late(1, B, [length, after])
        assert torch.equal(decode(q, k, v, length, window=None if after <= C else 900), wanted)


def _rotated(x: Tensor, position: Tensor, inv_freq: Tensor) -> Tensor:
    angle = position.double()[:, None, None] * inv_freq.double()
    return x * angle.cos() + x.roll(x.shape[-1] // 2, dims=-1) * angle.sin()


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


def _assert_written(cache: Tensor, wanted: Tensor) -> None:
    """Bit for bit, but where float32 and float64 round a norm's result apart: then a rotated pair is 1 ulp off."""
    assert torch.equal(cache.isnan(), wanted.isnan())
    cache, wanted = cache.nan_to_num().double(), wanted.nan_to_num().double()
    pair = (wanted.square() + wanted.roll(wanted.shape[-1] // 2, dims=-1).square()).sqrt()
    assert bool(((cache - wanted).abs() <= 2**-7 * pair).all())
    B, K, _, H = cache.shape
    assert int((cache != wanted).sum()) <= B * K * H // 100


def _check_fused(
    positions: list[int],
    *,
    N: int,
    K: int,
    H: int,
    ring: int,
    window: int | None = None,
    k_eq_v: bool = False,
    shared: bool = False,
    overlap: bool = True,
    dtype: torch.dtype = torch.int64,
) -> None:
    """Against the same steps in float64, rounded to bfloat16 where the model rounds; and the cache after it."""
    B, eps = len(positions), 1e-6
    extra = 0 if shared else K if k_eq_v else 2 * K
    k, v, _ = _cache([p + shared for p in positions], K, ring, H, 10)
    qkv = 2 * normal(B, (N + extra) * H, seed=0, dtype=torch.bfloat16, device="cuda")
    q_norm = (1 + 0.2 * normal(H, seed=3, device="cuda")).bfloat16() * (4 / H**0.5)
    k_norm = (1 + 0.2 * normal(H, seed=4, device="cuda")).bfloat16()
    frequencies = 10000.0 ** (-torch.arange(H // 2, dtype=torch.float64, device="cuda") * 2 / H)
    inv_freq = torch.cat([-frequencies, frequencies]).float()
    at = torch.tensor(positions, device="cuda")

    x = qkv.double().view(B, -1, H)
    q = _rotated(_normed(x[:, :N], q_norm, eps).bfloat16().double(), at, inv_freq).bfloat16()
    after_k, after_v = k.clone(), v.clone()
    if not shared:
        key = _rotated(_normed(x[:, N : N + K], k_norm, eps).bfloat16().double(), at, inv_freq).bfloat16()
        value = _normed(x[:, N : N + K] if k_eq_v else x[:, N + K :], None, eps).bfloat16()
        for b, p in enumerate(positions):
            after_k[b, :, p % ring], after_v[b, :, p % ring] = key[b], value[b]
    where = at[:, None], torch.stack([ring_positions(p + 1, ring, "cuda") for p in positions])
    clean = after_k.nan_to_num(), after_v.nan_to_num()
    truth = sdpa(q[:, :, None].double(), *(c.double() for c in clean), *where, window=window).reshape(B, N * H)
    naive = sdpa(q[:, :, None], *clean, *where, window=window).reshape(B, N * H)

    def run() -> Tensor:
        out = torch.full((B, N * H), torch.nan, dtype=torch.bfloat16, device="cuda")
        k_cache, v_cache = k.clone(), v.clone()
        torch.cuda.synchronize()
        decode_fused(
            qkv,
            q_norm,
            None if shared else k_norm,
            inv_freq,
            at.to(dtype),
            k_cache,
            v_cache,
            ring=ring,
            window=window,
            k_eq_v=k_eq_v,
            eps=eps,
            out=out,
            overlap=overlap,
        )
        for got, wanted in ((k_cache, after_k), (v_cache, after_v)):
            _assert_written(got, wanted)
        return out

    assert_within_budget(assert_repeatable(run, 4), truth, naive)


@pytest.mark.cuda
@pytest.mark.parametrize("position", [0, 1, 14, 15, 16, 17, 31, 32, 1000, 4095, 4999])
def test_fused_flat(position: int) -> None:
    _check_fused([position], N=32, K=4, H=512, ring=5000, k_eq_v=True)


@pytest.mark.cuda
@pytest.mark.parametrize("position", [0, 5, 1022, 1023, 1024, 1534, 1535, 1536, 70000, 200000, 262143])
@pytest.mark.parametrize("ring", [1024, 1535])
def test_fused_ring(position: int, ring: int) -> None:
    _check_fused([position], N=32, K=16, H=256, ring=ring, window=1024, dtype=torch.int32)


@pytest.mark.cuda
@pytest.mark.parametrize("overlap", [False, True])
def test_fused_batches_and_variants(overlap: bool) -> None:
    for shared in (False, True):
        _check_fused([0, 511, 400, 77], N=8, K=2, H=256, ring=512, window=512, shared=shared, overlap=overlap)
        _check_fused([15, 300], N=8, K=1, H=512, ring=301, shared=shared, overlap=overlap)
    _check_fused([3 * i for i in range(40)], N=8, K=8, H=128, ring=128, k_eq_v=True, overlap=overlap)
    _check_fused([90, 4], N=24, K=2, H=64, ring=100, overlap=overlap)


@pytest.mark.cuda
def test_fused_chain_of_a_decode_loop() -> None:
    """Kernels that overlap, on caches that each step extends: as single launches do, one by one."""
    N, K, H, ring, layers, steps = 8, 2, 256, 300, 6, 40
    qkv = normal(steps, layers, (N + 2 * K) * H, seed=0, dtype=torch.bfloat16, device="cuda")
    norm = torch.ones(H, dtype=torch.bfloat16, device="cuda")
    inv_freq = torch.linspace(-1, 1, H, device="cuda")
    results = []
    for overlap in (True, False):
        caches = torch.zeros(layers, 2, 1, K, ring + 1, H, dtype=torch.bfloat16, device="cuda")
        position, between = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
        out = torch.full((steps, layers, 1, N * H), torch.nan, dtype=torch.bfloat16, device="cuda")
        for step in range(steps):
            for layer in range(layers):
                decode_fused(
                    qkv[step, layer][None],
                    norm,
                    norm,
                    inv_freq,
                    position,
                    *caches[layer],
                    ring=ring,
                    window=20,
                    k_eq_v=False,
                    eps=1e-6,
                    out=out[step, layer],
                    overlap=overlap,
                )
            # Not by the kernel right before the next step's first: that one reads it early.
            position += 1
            between += 1
            if not overlap:
                torch.cuda.synchronize()
        results.append((out, caches))
    assert torch.isfinite(results[0][0]).all()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.cuda
def test_refused() -> None:
    q, k = torch.zeros(1, 8, 1, 256, device="cuda").bfloat16(), torch.zeros(1, 2, 64, 256, device="cuda").bfloat16()
    length = torch.ones(1, dtype=torch.int32, device="cuda")
    assert rel_l2(decode(q, k, k, length), torch.zeros_like(q)) == 0
    with pytest.raises(ValueError, match="window"):
        decode(q, k, k, length, window=0)
    with pytest.raises(ValueError, match="length"):
        decode(q, k, k, length.float())
    with pytest.raises(ValueError, match="bfloat16"):
        decode(q.half(), k.half(), k.half(), length)
    with pytest.raises(ValueError, match="at most 8"):
        decode(q.expand(1, 8, 9, 256), k, k, length)
    with pytest.raises(ValueError, match="one after another"):
        decode(
            q, k.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(1, 2).contiguous().transpose(1, 2), length
        )
    with pytest.raises(ValueError, match="length"):
        decode(q, k, k, None, k_positions=torch.zeros(1, 64, dtype=torch.long, device="cuda"))
