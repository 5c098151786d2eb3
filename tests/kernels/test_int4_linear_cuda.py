"""Four-bit linears on a GPU, against float64: at most twice the error of bfloat16 on dequantized weights."""

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, assert_repeatable, assert_within_budget, normal
from test_int4_linear import quantized

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.int4_linear import AddNorm, few, fused_linear, int4_linear, matvec, naive
from gemma4_impl.quant.cuda import CudaWeight
from gemma4_impl.quant.tensor import QuantizedTensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs a Hopper GPU (compute capability 9.0) and cuda-bindings"),
]
BF16 = torch.bfloat16
FORMATS = [
    *itertools.product([4], [32, 64, 128], [False, True], [8]),
    (4, 256, True, 0),
    (8, 16, False, 0),
    (8, 64, True, 3),
]


def on_gpu(*args) -> QuantizedTensor:
    weight = quantized(*args).to("cuda")
    # Weights as small as a model's, so that nothing overflows in the products of several.
    return QuantizedTensor(
        weight.qdata,
        weight.scale * 0.02,
        None if weight.zero is None else weight.zero * 0.1,
        weight.bits,
        weight.offset,
    )


def check(weight: QuantizedTensor, packed: CudaWeight, x: torch.Tensor) -> None:
    truth = x.double() @ weight.dequantize(torch.float64).T
    out = assert_repeatable(lambda: int4_linear(x, packed), times=4)
    assert_within_budget(out, truth, naive.int4_linear(x, weight))
    assert not packed.scratch.any()
    assert (few.workspace(x.device) == -1).all()


@pytest.mark.parametrize(("bits", "group", "zero", "offset"), FORMATS)
@pytest.mark.parametrize("M", [1, 2, 8, 9, 16, 17, 200])
def test_formats(bits, group, zero, offset, M):
    weight = on_gpu(0, 272, 1280, bits, group, zero, offset)
    check(weight, CudaWeight(weight, BF16), normal(M, 1280, seed=M, dtype=BF16, device="cuda"))


@pytest.mark.parametrize("size", [2.0**-60, 2.0**-20, 2.0**20])
@pytest.mark.parametrize(("bits", "group", "zero", "offset"), [(4, 32, False, 8), (4, 64, True, 8), (8, 64, True, 3)])
@pytest.mark.parametrize("M", [1, 8, 16])
def test_x_may_be_large_or_small(bits, group, zero, offset, M, size):
    """Codes are multiplied as the subnormal numbers that they are bit for bit, x as 2^96 times what it is."""
    weight = on_gpu(0, 272, 1280, bits, group, zero, offset)
    x = normal(M, 1280, seed=M, dtype=BF16, device="cuda") * size
    x[:, ::3] *= 2.0**-10
    check(weight, CudaWeight(weight, BF16), x)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 700), st.integers(1, 90), st.sampled_from([1, 2, 5, 11, 16, 33]), st.integers(0, 99))
def test_shapes(N, units, M, seed):
    weight = on_gpu(seed, N, 32 * units, 4, 32, False, 8)
    check(weight, CudaWeight(weight, BF16), normal(M, 32 * units, seed=seed, dtype=BF16, device="cuda"))


@pytest.mark.parametrize(
    ("N", "K"), [(5376, 8192), (5375, 8192), (5376, 21504), (43008, 5376), (20000, 5376), (60000, 672)]
)
def test_real_shapes(N, K):
    weight = on_gpu(1, N, K, 4, 32, False, 8)
    packed = CudaWeight(weight, BF16)
    for M in (1, 4, 16, 300):
        check(weight, packed, normal(M, K, seed=M, dtype=BF16, device="cuda"))


def test_a_head_takes_more_blocks_than_there_are_multiprocessors():
    weight = on_gpu(2, 100_000, 1024, 4, 32, False, 8)
    check(weight, CudaWeight(weight, BF16), normal(1, 1024, seed=0, dtype=BF16, device="cuda"))


def test_a_real_head_gives_the_same_bits_a_thousand_times():
    """Two blocks of threads share a multiprocessor here for long: a tile whose room was given back while its scales
    were still being read came out wrong once in a hundred calls."""
    N, K = 262144, 5376
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(N, K // 32, device="cuda") * 0.01 + 0.001).to(BF16)
    packed = CudaWeight(QuantizedTensor(codes, scale, None, 4, 8), BF16)
    x, residual, post, norm = (normal(1, K, seed=i, dtype=BF16, device="cuda") for i in range(4))
    add = AddNorm(residual, post[0], None, torch.empty_like(x))
    out, wrong = torch.empty(1, N, dtype=torch.float32, device="cuda"), torch.zeros((), device="cuda")
    fused_linear(packed, x, out, norm=norm[0], add=add, softcap=30.0)
    first = out.clone()
    for _ in range(1000):
        fused_linear(packed, x, out, norm=norm[0], add=add, softcap=30.0)
        wrong += (out != first).any()
    assert int(wrong) == 0


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("M", [8, 16])
def test_few_tokens_give_the_same_bits_a_thousand_times(M, group):
    """A tile's room is given back while it is being multiplied, and blocks of threads add up what others leave."""
    weights = [CudaWeight(on_gpu(i, 5376, 8192, 4, group, True, 8), BF16).matrix() for i in range(4)]
    x = normal(M, 8192, seed=0, dtype=BF16, device="cuda")
    outs = [torch.empty(M, 5376, dtype=BF16, device="cuda") for _ in weights]
    wrong, first = torch.zeros((), device="cuda"), None
    for _ in range(250):
        for weight, out in zip(weights, outs, strict=True):
            few.few(weight, x, out)
        first = first or [out.clone() for out in outs]
        for out, expected in zip(outs, first, strict=True):
            wrong += (out != expected).any()
    assert int(wrong) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("M", [4, 16])
def test_what_is_not_a_number_reaches_those_it_concerns_only(M, value):
    """Sums that blocks of threads leave for each other are NaN until they are there."""
    weight = on_gpu(6, 5376, 8192, 4, 32, False, 8)
    x = normal(M, 8192, seed=0, dtype=BF16, device="cuda")
    packed, clean = CudaWeight(weight, BF16), x.clone()
    x[1, ::911] = value
    out = int4_linear(x, packed)
    others = [i for i in range(M) if i != 1]
    assert not out[1].isfinite().any()
    assert torch.equal(out[others], int4_linear(clean, packed)[others])
    assert (few.workspace(x.device) == -1).all()


def test_the_first_product_of_a_few_tokens_is_not_captured(monkeypatch):
    monkeypatch.setattr(few, "workspace", functools.cache(few.workspace.__wrapped__))
    weight = CudaWeight(on_gpu(7, 64, 256, 4, 32, False, 8), BF16)
    x = normal(2, 256, seed=0, dtype=BF16, device="cuda")
    with pytest.raises(RuntimeError, match="before a graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        int4_linear(x, weight)
    expected = int4_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = int4_linear(x, weight)
    graph.replay()
    assert torch.equal(out, expected)


def test_rows_dequantized_are_the_naive_ones_bit_for_bit():
    for bits, group, zero, offset in FORMATS:
        weight = on_gpu(3, 80, 1280, bits, group, zero, offset)
        out = torch.full((64, 1280), torch.nan, dtype=BF16, device="cuda")
        few.dequantize(CudaWeight(weight, BF16).matrix(), 16, out)
        assert torch.equal(out, weight.dequantize(BF16)[16:])


@pytest.mark.parametrize("M", [1, 7, 16])
def test_nothing_beyond_the_output_is_written_and_all_of_it_is(M):
    weight = on_gpu(4, 264, 672, 4, 32, True, 8)
    packed, guard = CudaWeight(weight, BF16).matrix(), Guarded(margin=64)
    x = normal(M, 672, seed=0, dtype=BF16, device="cuda")
    flat = guard.empty(M * 264, dtype=BF16, device="cuda")
    (matvec.matvec if M == 1 else few.few)(packed, x, flat.view(M, 264))
    torch.cuda.synchronize()
    guard.assert_untouched()
    assert_within_budget(
        flat.view(M, 264), x.double() @ weight.dequantize(torch.float64).T, naive.int4_linear(x, weight)
    )


@pytest.mark.parametrize("act", [None, "gelu_mul", "gelu", "softcap"])
@pytest.mark.parametrize(("with_add", "with_norm"), list(itertools.product([False, True], repeat=2)))
def test_fused(act, with_add, with_norm):
    D, N = 5376, 512
    parts = [on_gpu(seed, N, D, 4, 32, False, 8) for seed in range(2)]
    packed = CudaWeight(parts[0], BF16, gated=parts[1]) if act == "gelu_mul" else CudaWeight(parts[0], BF16)
    h, residual, post_norm, norm = (
        normal(*s, seed=i, dtype=BF16, device="cuda") for i, s in enumerate([(1, D)] * 2 + [(D,)] * 2)
    )
    scalar, times = torch.tensor([0.7], dtype=BF16, device="cuda"), normal(1, N, seed=5, dtype=BF16, device="cuda")
    options = {"softcap": 30.0} if act == "softcap" else {"act": act}
    tensors = ({"norm": norm} if with_norm else {}) | ({"times": times} if act == "gelu" else {})
    added = {"residual": residual, "post_norm": post_norm, "scalar": scalar} if with_add else {}
    exact, exact_r = naive.fused_linear(
        packed.dequantize().double(), h.double(), **options, **{k: v.double() for k, v in (tensors | added).items()}
    )
    plain, plain_r = naive.fused_linear(packed.dequantize().to(BF16), h, **options, **tensors, **added)
    r = torch.full_like(h, torch.nan)
    add = AddNorm(residual, post_norm, scalar, r) if with_add else None

    def run() -> torch.Tensor:
        out = torch.full((1, N), torch.nan, dtype=BF16, device="cuda")
        fused_linear(packed, h, out, add=add, **options, **tensors)
        return out

    assert_within_budget(assert_repeatable(run, times=8), exact, plain)
    if with_add:
        assert_within_budget(r, exact_r, plain_r)


@pytest.mark.parametrize("rows", [1, 4])
def test_experts_are_chosen_on_the_device(rows):
    flat = on_gpu(6, 16 * 352, 704, 4, 32, False, 8)
    stack = QuantizedTensor(flat.qdata.view(16, 352, -1), flat.scale.view(16, 352, -1), None, 4, 8)
    packed, chosen = CudaWeight(stack, BF16), torch.tensor([3, 15, 0, 7], device="cuda")
    x = normal(rows, 704, seed=1, dtype=BF16, device="cuda")
    wide = x.expand(4, -1)
    truth = torch.einsum("ek,enk->en", wide.double(), stack.dequantize(torch.float64)[chosen])
    plain = torch.stack([naive.int4_linear(wide[i], stack[e]) for i, e in enumerate(chosen.tolist())])
    assert_within_budget(packed.linear_experts(x, chosen), truth, plain)
    assert_within_budget(
        packed.linear(x, 15), x.double() @ stack[15].dequantize(torch.float64).T, naive.int4_linear(x, stack[15])
    )


@pytest.mark.parametrize("M", [1, 8, 16])
def test_a_chain_in_a_graph_is_what_single_launches_give(M):
    """Each kernel starts before the one ahead has ended: what it reads too early would differ."""
    weights = [CudaWeight(on_gpu(i, 1024, 1024, 4, 32, False, 8), BF16).matrix() for i in range(6)]
    x = normal(M, 1024, seed=0, dtype=BF16, device="cuda")
    buffers = [torch.zeros(M, 1024, dtype=BF16, device="cuda") for _ in range(7)]
    linear = matvec.matvec if M == 1 else few.few

    def chain() -> None:
        for i, weight in enumerate(weights):
            linear(weight, buffers[i], buffers[i + 1])

    buffers[0].copy_(x)
    expected = x
    for weight in weights:
        out = torch.empty_like(expected)
        linear(weight, expected, out)
        torch.cuda.synchronize()
        expected = out
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(50):
        for buffer in buffers[1:]:
            buffer.fill_(torch.nan)
        graph.replay()
        assert torch.equal(buffers[-1], expected)


def test_the_operator_is_sound_and_aot_inductor_takes_it(tmp_path):
    weight = CudaWeight(on_gpu(7, 64, 256, 4, 32, False, 8), BF16)
    x = normal(1, 256, seed=0, dtype=BF16, device="cuda")
    args = (x, weight.tiles, weight.scratch, 64, 32, 8, False, False)
    torch.library.opcheck(torch.ops.gemma4.int4_linear.default, args)

    class Linear(torch.nn.Module):
        def forward(self, x: torch.Tensor, tiles: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
            return torch.ops.gemma4.int4_linear(x, tiles, scratch, 64, 32, 8, False, False) * 2

    program = torch.export.export(Linear(), args[:3])
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "linear.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    assert torch.equal(loaded(*args[:3]), int4_linear(x, weight) * 2)
