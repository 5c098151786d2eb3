"""Triton attention on a GPU: error against float64, canaries, races, graphs, and what AOTInductor makes of it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, assert_repeatable, normal, poisoned_memory, rel_l2, ring_positions
from sdpa_cases import LAYOUTS, Attention, attentions, laid_out
from torch import Tensor, nn

from gemma4_impl.kernels.sdpa import dispatch, naive, operators
from gemma4_impl.kernels.sdpa.backends import BACKENDS, Call

triton = pytest.importorskip("gemma4_impl.kernels.sdpa.triton", reason="needs the package triton")

pytestmark = pytest.mark.cuda
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Each head dim, dtype and divisibility of strides is compiled anew: few of them, many shapes.
drawn = {"head_dims": (48, 128), "dtypes": (torch.bfloat16,), "layouts": LAYOUTS[:3], "device": "cuda"}
some = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def made(N: int, K: int, H: int, T: int, S: int, *, seed: int = 0, scale: float = 1.0, **rest) -> Attention:
    """bfloat16 on the GPU; queries are the last of the keys."""
    q, k, v = (
        normal(1, n, length, H, seed=3 * seed + i, dtype=torch.bfloat16, device="cuda")
        for i, (n, length) in enumerate(((N, T), (K, S), (K, S)))
    )
    at, keys = naive.known_positions(q, k)
    return Attention(q, k, v, at, keys, scale=scale, **rest)


def run(case: Attention, *, positions: bool = False, out: Tensor | None = None) -> Tensor:
    vectors = {"q_positions": case.q_positions, "k_positions": case.k_positions} if positions else {}
    options = {"window": case.window, "scale": case.scale, "out": out}
    if case.q.shape[2] <= 8 and case.ends is None:
        return triton.decode(case.q, case.k, case.v, **vectors, **options)
    return triton.prefill(case.q, case.k, case.v, ends=case.ends, **vectors, **options)


def run_guarded(case: Attention, positions: bool) -> None:
    guard = Guarded()
    case = case.guarded(guard)
    out = guard.empty(*case.q.shape, dtype=case.q.dtype, device="cuda")
    with poisoned_memory():
        run(case, positions=positions, out=out)
    guard.assert_untouched()
    case.check(out)


@pytest.mark.parametrize("kind", ["causal", "padded", "ring", "images"])
@some
@given(st.data())
def test_prefill(kind: str, data: st.DataObject) -> None:
    case = data.draw(attentions(kind, most_queries=150, most_keys=300, **drawn))
    run_guarded(case, kind != "causal")


@pytest.mark.parametrize("kind", ["causal", "padded", "ring"])
@some
@given(st.data())
def test_decode(kind: str, data: st.DataObject) -> None:
    case = data.draw(attentions(kind, most_queries=8, most_keys=300, **drawn))
    run_guarded(case, kind != "causal")


@pytest.mark.parametrize("scale", [1.0, 0.06])
@pytest.mark.parametrize(
    ("K", "H", "T", "S", "window"),
    [
        (4, 512, 1000, 1000, None),
        (4, 512, 130, 4000, None),
        (4, 320, 300, 300, None),
        (16, 256, 1500, 1500, 1024),
        (16, 256, 1000, 1000, None),
        (8, 64, 700, 900, 100),
        (4, 512, 1, 9000, None),
        (4, 512, 8, 3000, None),
        (16, 256, 1, 1024, 1024),
        (16, 256, 4, 1500, 1024),
    ],
)
def test_real_head_dims(K: int, H: int, T: int, S: int, window: int | None, scale: float) -> None:
    run_guarded(made(32, K, H, T, S, window=window, scale=scale), positions=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (normal(2, n, 200, 128, seed=n, dtype=dtype, device="cuda") for n in (8, 2, 2))
    case = Attention(q, k, v, *naive.known_positions(q, k), window=77, scale=0.09)
    case.check(run(case))
    case.check(run(case, positions=True))


def test_head_dim_that_is_not_contiguous() -> None:
    options = {"B": 1, "dtype": torch.bfloat16, "device": "cuda"}
    q, k, v = (laid_out(n, 50, 40, LAYOUTS[3], seed=n, **options) for n in (4, 2, 2))
    run_guarded(Attention(q, k, v, *naive.known_positions(q, k)), positions=False)
    run_guarded(Attention(q[:, :, -3:], k, v, *naive.known_positions(q[:, :, -3:], k)), positions=False)


@pytest.mark.parametrize(("K", "H", "T", "window"), [(4, 512, 300, None), (16, 256, 600, 256), (4, 512, 1, None)])
@pytest.mark.parametrize("seed", range(3))
def test_no_race(K: int, H: int, T: int, window: int | None, seed: int) -> None:
    case = made(32, K, H, T, max(T, 2000), window=window, seed=seed)
    case.check(assert_repeatable(lambda: run(case), 50))


def test_ring_and_length_in_a_graph() -> None:
    """One graph serves every length, around the ring too; neither time nor memory is left to capture."""
    S, window, H = 640, 512, 256
    length = torch.tensor([1], dtype=torch.int32, device="cuda")
    q = normal(1, 32, 1, H, seed=0, dtype=torch.bfloat16, device="cuda")
    k, v = (normal(1, 16, S, H, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in (1, 2))
    out = naive.empty_out(q)
    options = {"window": window, "scale": 0.0625, "out": out}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        triton.decode(q, k, v, length, **options)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        triton.decode(q, k, v, length, **options)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            triton.decode(q, k, v, length, **options)
    torch.cuda.synchronize()
    for tokens in (1, 2, 100, 512, 513, 640, 641, 900, 5000):
        length.fill_(tokens)
        out.fill_(torch.nan)
        graph.replay()
        keys = ring_positions(tokens, S, "cuda")[None]
        at = torch.full((1, 1), tokens - 1, device="cuda")
        Attention(q, k, v, at, keys, window=window, scale=0.0625).check(out)


def test_offsets_beyond_32_bits() -> None:
    """Keys so far apart that an offset, even inside a tile, needs 64 bits."""
    S, far = 80, 2**26
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 24 GB")
    buffer = torch.empty(2 * (S * far + 64), dtype=torch.bfloat16, device="cuda")
    k, v = (buffer[i * S * far :].as_strided((1, 2, S, 16), (64, 32, far, 1)) for i in (0, 1))
    for x, seed in ((k, 1), (v, 2)):
        x.copy_(normal(1, 2, S, 16, seed=seed))
    for T in (S, 1):
        q = normal(1, 4, T, 16, seed=3, dtype=torch.bfloat16, device="cuda")
        case = Attention(q, k, v, *naive.known_positions(q, k))
        case.check(run(case))
        case.check(run(case, positions=True))


class Layer(nn.Module):
    """Both operators, with a computation before and after."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, length: Tensor, at: Tensor, keys: Tensor) -> Tensor:
        out = operators.sdpa_prefill(q * 0.5, k, v) + operators.sdpa_prefill(q, k, v, at, keys, at + 3, 64, 0.5)
        last = operators.sdpa_decode(q[:, :, -1:], k, v, length, None, 64, 0.5)
        return (out + last).transpose(1, 2).flatten(2)


def layer_inputs(T: int, S: int) -> tuple[Tensor, ...]:
    case = made(8, 2, 128, T, S)
    length = torch.tensor([S], dtype=torch.int32, device="cuda")
    return case.q, case.k, case.v, length, case.q_positions, case.k_positions


def test_aot_inductor(tmp_path) -> None:
    """The package holds the kernels: it computes what eager does, for lengths that it was not exported with."""
    T, S = torch.export.Dim("T", min=9, max=512), torch.export.Dim("S", min=16, max=1024)
    shapes = ({2: T}, {2: S}, {2: S}, None, {1: T}, {1: S})
    program = torch.export.export(Layer(), layer_inputs(100, 200), dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for T, S in ((100, 200), (37, 300), (256, 256)):
        inputs = layer_inputs(T, S)
        out, eager = loaded(*inputs), Layer()(*inputs)
        assert rel_l2(out, eager) < 4e-3, (T, S)


def test_compile() -> None:
    inputs = layer_inputs(100, 200)
    assert rel_l2(torch.compile(Layer(), fullgraph=True)(*inputs), Layer()(*inputs)) < 4e-3


@pytest.mark.parametrize("kind", ["causal", "square", "window", "length", "positions", "ends", "decode"])
@pytest.mark.parametrize("H", [256, 512])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
def test_every_backend_that_does_not_refuse(backend: str, H: int, kind: str) -> None:
    T = {"length": 1, "decode": 1, "square": 300}.get(kind, 200)
    case = made(32, 16 if H == 256 else 4, H, T, 300, scale=0.06)
    vectors: dict = {}
    window = 100 if kind in ("window", "positions") else None
    ends = None
    if kind == "length":
        vectors["length"] = torch.tensor([211], dtype=torch.int32, device="cuda")
        at, keys = naive.known_positions(case.q, case.k, vectors["length"])
    else:
        at, keys = case.q_positions, case.k_positions
    if kind in ("positions", "ends"):
        vectors |= {"q_positions": at, "k_positions": keys}
    if kind == "ends":
        vectors["ends"] = ends = at // 32 * 32 + 31
    case = Attention(case.q, case.k, case.v, at, keys, ends, window, case.scale)
    absent = {"q_positions": None, "k_positions": None, "length": None, "ends": None}
    call = Call(case.q, case.k, case.v, **(absent | vectors), window=window, scale=case.scale)
    if why := BACKENDS[backend].refuses(call.case):
        pytest.skip(why)
    with poisoned_memory():
        out = dispatch.sdpa(case.q, case.k, case.v, **vectors, window=window, scale=case.scale, backend=backend)
    # PyTorch's kernels are not ours to hold to the worst row.
    case.check(out, row_dims=1 if backend in ("cuda", "triton", "naive") else None)
