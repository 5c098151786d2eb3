"""Packed weights against their definition in float64: what they represent, and what each kernel makes of it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import nearest, weights
from torch import Tensor

from gemma4_impl.quant import cpu, pack, packed
from gemma4_impl.quant.cpu import Int4Weight
from gemma4_impl.quant.pack import pack_error, pack_weight, register_packer
from gemma4_impl.quant.packed import DequantizedWeight, PackedWeight
from gemma4_impl.quant.tensor import QuantizedTensor

BF16, U = torch.bfloat16, 2.0**-8  # unit roundoffs: of bfloat16, and
U32 = 2.0**-24  # of float32
kernels = pytest.mark.skipif(
    cpu._block_rows() is None, reason="torch's kernels are vectorized for AVX2 and AVX512 only"
)
modest = settings(max_examples=60, deadline=None)


def codes(q: QuantizedTensor) -> Tensor:
    return q.codes().double() - q.offset


def per_weight(q: QuantizedTensor, groups: Tensor) -> Tensor:
    return groups.double().repeat_interleave(q.group_size, dim=-1)


def exact(q: QuantizedTensor) -> Tensor:
    """The definition, in float64."""
    w = codes(q) * per_weight(q, q.scale)
    return w if q.zero is None else w + per_weight(q, q.zero)


def rounding(q: QuantizedTensor, p: PackedWeight) -> Tensor:
    """How far the kernel's weights may be from the exact ones. Scale and zero are bfloat16 each, or two of them; of
    scales alone, what was rounded in one group is added to the row's next one, and may be larger than that."""
    scale = per_weight(q, q.scale).abs()
    if p.kernel == "dequantize":
        return exact(q).abs() * (U if p.dtype == BF16 else 0)
    if p.kernel == "int8pack":
        return codes(q).abs() * scale * U
    if p.split:
        # The zero takes over what does not fit into a byte whose middle is 136.
        low, high = (int(v) for v in q.codes().aminmax())
        shift = min((136 - q.offset - b for b in range(-low, 256 - high)), key=abs)
    else:
        shift = 8 - q.offset
    zero = shift * per_weight(q, q.scale) + (0 if q.zero is None else per_weight(q, q.zero))
    if p.twice:
        return U**2 * ((codes(q) - shift).abs() * scale + zero.abs())
    scale, zero = (part.abs().amax(-1, keepdim=True) for part in (scale, zero))
    return (2 + 2 * U) * U * ((codes(q) - shift).abs() * scale + zero)


def magnitude(q: QuantizedTensor) -> Tensor:
    """Bounds every intermediate of a weight in float32, however it is cut up."""
    zero = 0 if q.zero is None else per_weight(q, q.zero).abs()
    return (codes(q).abs() + 300) * per_weight(q, q.scale).abs() + zero


@given(weights(), st.sampled_from([BF16, torch.float32, torch.float16]))
@modest
def test_what_is_represented(q, dtype):
    if dtype == torch.float16:
        q = QuantizedTensor(q.qdata, q.scale.clamp(-1, 1), q.zero if q.zero is None else q.zero * 0, q.bits, q.offset)
    p = pack_weight(q, dtype)
    assert p.shape == q.shape
    assert p.dequantize().dtype == torch.float32
    assert p.dequantize().shape == q.shape
    if dtype == torch.float16:
        assert torch.equal(p.dequantize(), q.dequantize(dtype).float())
        return
    wrong = (p.dequantize().double() - exact(q)).abs()
    assert (wrong <= 1.01 * rounding(q, p) + 4 * U32 * magnitude(q)).all()


def check_product(p: PackedWeight, x: Tensor, y: Tensor, expert: int | None, kernel: bool) -> None:
    """y against x @ w.T in float64. The sum is in float32, in any order, and y is rounded once; twice and added, where
    the kernel runs twice."""
    K = p.shape[-1]
    w = torch.cat(list(p.represented(expert) if kernel else p.blocks(torch.float32, expert))).double()
    truth, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    if kernel and isinstance(p, Int4Weight):
        # Terms may cancel within a weight: scale * (code - 8) + zero, and 16 x the high nibble + the low one.
        scale, zero = (p.scale_and_zero if expert is None else p.scale_and_zero[expert]).double().abs().unbind(-1)
        terms = (8 * scale + zero).T.repeat_interleave(p.unit, dim=1) * (17 if p.split else 1)
        size = x.double().abs() @ terms.T
    once = 3 if kernel and getattr(p, "twice", False) else 1
    u = torch.finfo(y.dtype).eps / 2
    weights_rounded = 0 if kernel or y.dtype == torch.float32 else u
    bound = (
        (1 + u) * (weights_rounded + (2 * K + 4) * U32) * size
        + once * u * truth.abs()
        + (once - 1) * u**2 * size
        + 1e-38
    )
    assert y.dtype == x.dtype
    assert ((y.double() - truth).abs() <= bound).all()


@given(weights(), st.sampled_from([1, 2, 5, 33, 200]), st.sampled_from([BF16, BF16, torch.float32]), st.integers(0, 99))
@modest
def test_linear(q, M, dtype, seed):
    p = pack_weight(q, dtype)
    expert = None if len(q.shape) == 2 else q.shape[0] - 1
    x = torch.randn(M, q.shape[-1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    on_kernel = p.kernel != "dequantize" and len(x) <= p.most_rows
    check_product(p, x, p.linear(x, expert), expert, on_kernel)


@given(weights(stacks=False), st.sampled_from([BF16, torch.float32, torch.float16]))
@modest
def test_generic_form_is_a_linear_of_the_dequantized_weight(q, dtype):
    p = DequantizedWeight(q, dtype)
    x = torch.randn(3, q.shape[-1]).to(dtype)
    assert torch.equal(p.linear(x), F.linear(x, q.dequantize(dtype)))
    index = torch.tensor([[0, q.shape[0] - 1], [0, 0]])
    assert torch.equal(p.rows(index), q.dequantize(dtype)[index])


@given(weights(), st.sampled_from([torch.float32, torch.float64]))
@modest
def test_packed_for_bfloat16_and_asked_for_more(q, dtype):
    """A model that was moved to another dtype computes in it, with the weights that it was packed with."""
    p = pack_weight(q, BF16).to(dtype)
    assert p.dtype == dtype
    expert = None if len(q.shape) == 2 else 0
    x = torch.randn(3, q.shape[-1]).to(dtype)
    y = p.linear(x, expert)
    if p.kernel != "dequantize":
        w = torch.cat(list(p.blocks(torch.float64, expert)))
        bound = (2 * q.shape[-1] + 4) * U32 * (x.double().abs() @ w.double().abs().T) + 1e-38
        assert ((y.double() - x.double() @ w.double().T).abs() <= bound).all()
    assert y.dtype == dtype


@pytest.mark.parametrize("make", [DequantizedWeight, cpu.pack])
def test_blocks_of_rows_join(make, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 1 << 9)
    monkeypatch.setattr(cpu, "BLOCK", 1 << 9)
    for bits, group in ((4, 32), (8, 16), (8, None)):
        q = nearest(torch.randn(2, 208, 96), bits, group, zero=False)
        p = make(q, BF16)
        x = torch.randn(5, 96)
        blocks = list(p.blocks(torch.float32, 1))
        assert len(blocks) > 2
        assert torch.equal(torch.cat(list(p.represented(1))), p.dequantize()[1])
        truth = x.double() @ torch.cat(blocks).double().T
        assert ((p.linear(x, 1).double() - truth).abs() <= 200 * U32 * (x.abs() @ torch.cat(blocks).abs().T)).all()


def stack(bits: int, N: int, K: int, group: int | None, zero: bool = False) -> QuantizedTensor:
    return nearest(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), bits, group, zero)


@kernels
@pytest.mark.parametrize(
    ("q", "kernel"),
    [
        (stack(4, 32, 256, 32), "int4pack"),
        (stack(4, 32, 256, 256, zero=True), "int4pack"),
        (stack(4, 32, 512, None), "int4pack"),
        (stack(4, 32, 96, 16, zero=True), "int4pack"),
        (stack(8, 32, 256, 16), "int4pack"),
        (stack(8, 32, 256, 32, zero=True), "int4pack"),
        (stack(8, 32, 256, None), "int8pack"),
        (stack(8, 31, 256, None), "int8pack"),
        (stack(8, 32, 256, None, zero=True), "int4pack"),
        (stack(4, 31, 256, 32), "dequantize"),
        (stack(4, 32, 256, 8), "dequantize"),
        (stack(8, 32, 40, None), "dequantize"),
    ],
)
def test_kernel(q, kernel):
    assert pack_weight(q, BF16).kernel == kernel
    assert f"kernel={kernel}" in repr(pack_weight(q, BF16))
    assert pack_weight(q, torch.float32).kernel == pack_weight(q, torch.float16).kernel == "dequantize"


@kernels
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
@modest
def test_nibbles_are_in_torchs_order(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    qdata = torch.randint(0, 256, (16 * n, 16 * k), dtype=torch.uint8, generator=generator)
    q = QuantizedTensor(qdata, torch.ones(16 * n, k), None, 4, 8)
    expected = torch._convert_weight_to_int4pack_for_cpu(q.codes().to(torch.int32), 1)
    assert torch.equal(pack_weight(q, BF16).qdata, expected)


@kernels
@pytest.mark.parametrize(("bits", "group", "zero"), [(4, 32, False), (4, 32, True), (8, None, False), (8, 32, False)])
def test_bfloat16_scales_are_not_rounded(bits, group, zero):
    q = nearest(torch.randn(64, 256), bits, group, zero=False)
    start = torch.randn(q.scale.shape).to(BF16) if zero else None
    # Below 120, eight bits need no zero.
    q = QuantizedTensor(
        q.qdata if group is None or bits == 4 else q.qdata // 2, q.scale.to(BF16), start, bits, q.offset
    )
    p = pack_weight(q, BF16)
    assert p.kernel != "dequantize"
    assert pack_error(q, p) == 0
    assert torch.equal(p.dequantize(), q.dequantize())


@given(weights())
@modest
def test_pack_error(q):
    for dtype in (BF16, torch.float32):
        p = pack_weight(q, dtype)
        w = q.dequantize().double()
        wrong = float((p.dequantize().double() - w).norm())
        size = float(w.norm())
        expected = wrong / size if size else math.inf if wrong else 0.0
        assert pack_error(q, p) == pytest.approx(expected, rel=1e-6)
        assert dtype == BF16 or pack_error(q, p) == 0


def test_pack_error_is_that_of_the_scales():
    """float32 scales, rounded to eight bits: errors are even in +-2^-9 to +-2^-8 of the value, 1.6e-3 on average, and
    the square root of 2 times that where each group makes good what the one before took. With zeros two bfloat16 hold
    them: 2^-9 of that is left."""
    q = nearest(torch.randn(256, 512), 4, 32, zero=False)
    assert 1.4e-3 < pack_error(q, pack_weight(q, BF16)) < 3.3e-3
    q = nearest(torch.randn(256, 512), 4, 32, zero=True)
    assert 0 < pack_error(q, pack_weight(q, BF16)) < 1e-5


@given(weights())
@settings(max_examples=20, deadline=None)
def test_a_stack_is_its_matrices(q):
    if len(q.shape) == 2:
        return
    p, x = pack_weight(q, BF16), torch.randn(3, q.shape[-1]).to(BF16)
    for e in range(q.shape[0]):
        alone = pack_weight(q[e], BF16)
        assert alone.kernel == p.kernel
        assert torch.equal(p.linear(x, e), alone.linear(x))
        assert torch.equal(p.dequantize()[e], alone.dequantize())


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 16), (8, None), (4, 8)])
def test_shapes_and_strides_of_inputs(bits, group):
    p = pack_weight(stack(bits, 32, 64, group), BF16)
    x = torch.randn(2, 3, 128).to(BF16)[..., ::2]
    y = p.linear(x)
    assert y.shape == (2, 3, 32)
    assert torch.equal(y, p.linear(x.contiguous()))
    assert torch.equal(p.linear(x[1, 2]), p.linear(x[1, 2, None])[0])
    assert p.linear(x[:0]).shape == (0, 3, 32)
    assert p.linear(torch.full((1, 64), torch.nan, dtype=BF16)).isnan().all()


def displaced(tensor: Tensor, elements: int) -> Tensor:
    """The same values in memory that starts so many elements after an aligned address, as in a mapped file."""
    out = torch.empty(elements + tensor.numel(), dtype=tensor.dtype)[elements:].view(tensor.shape)
    return out.copy_(tensor)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 16), (8, None), (4, 8)])
@pytest.mark.parametrize("elements", [1, 4, 8, 12])
def test_any_alignment(bits, group, elements):
    q = stack(bits, 32, 64, group, zero=bits == 4)
    scale, zero = (None if t is None else displaced(t, elements) for t in (q.scale, q.zero))
    moved = QuantizedTensor(displaced(q.qdata, elements), scale, zero, q.bits, q.offset)
    for M in (1, 3, 5):
        x = torch.randn(M, 64).to(BF16)
        y = pack_weight(moved, BF16).linear(displaced(x, elements))
        assert torch.equal(y, pack_weight(q, BF16).linear(x))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, None), (4, 8)])
def test_only_the_dtype_computed_in_follows_the_model(bits, group):
    p = pack_weight(stack(bits, 32, 64, group, zero=bits == 4), BF16)
    before = {name: t.clone() for name, t in p.state_dict().items()}
    p.to(torch.float16)
    assert p.dtype == torch.float16
    after = p.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in after)
    p.to("meta")
    assert {t.device.type for t in p.buffers()} == {"meta"}
    assert p.device.type == "meta"


def test_backends(monkeypatch):
    monkeypatch.setattr(pack, "_PACKERS", dict(pack._PACKERS))
    q = stack(4, 32, 64, 32)
    seen = []

    def packer(weight: QuantizedTensor, dtype: torch.dtype) -> PackedWeight:
        seen.append((weight.device.type, dtype))
        return DequantizedWeight(weight, dtype)

    assert pack_weight(q, BF16, "meta").kernel == "dequantize"
    register_packer("meta", packer)
    register_packer("other", packer)
    pack_weight(q, BF16, "meta")
    pack_weight(q, BF16, backend="other")
    assert seen == [("meta", BF16), ("cpu", BF16)]
    with pytest.raises(ValueError, match="'cuda-x'; known: cpu, cuda, meta, other"):
        pack_weight(q, BF16, backend="cuda-x")


OTHER_PROCESSORS = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from quantizing import nearest
from gemma4_impl.quant.pack import pack_error, pack_weight
torch.manual_seed(0)
for bits, group in ((4, 32), (8, 16), (8, None)):
    q = nearest(torch.randn(176, 96), bits, group, zero=False)
    p = pack_weight(q, torch.bfloat16)
    assert (p.kernel == "dequantize") == (sys.argv[1] == "default"), p.kernel
    assert 0 < pack_error(q, p) < 3e-3
    x = torch.randn(5, 96).to(torch.bfloat16)
    truth = x.double() @ p.dequantize().double().T
    assert (p.linear(x).double() - truth).norm() < 4e-3 * truth.norm()
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs an x86 processor")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_processors(capability):
    """As a processor without AVX512, or without any AVX, would run."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", OTHER_PROCESSORS, capability, str(here), str(here.parents[1])]
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


@kernels
def test_a_maximum_divided_by_127_keeps_its_size():
    """Q8_0's scales: rounded one by one they would shrink the whole tensor, by 3e-4."""
    w = torch.randn(256, 3072, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    scale = w.view(256, -1, 32).abs().amax(-1) / 127
    q = QuantizedTensor((w.view(256, -1, 32) / scale[..., None]).round().to(torch.int8).view(256, -1), scale, None, 8)
    exact = q.dequantize().double()

    def gain(kept: Tensor) -> float:
        return abs(float((kept.double() * exact).sum() / exact.square().sum()) - 1)

    assert gain(pack_weight(q, BF16).dequantize()) < 2e-5
    alone = QuantizedTensor(q.qdata, scale.to(BF16), None, 8).dequantize()
    assert gain(alone) > 1e-4
