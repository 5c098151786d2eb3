"""Four-bit linears without a GPU: the tiles against the codes they hold, the operator's fake, what compiles."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.int4_linear import fused_linear, naive
from gemma4_impl.kernels.int4_linear.few import SIZES, _slice_rows
from gemma4_impl.kernels.int4_linear.few import SOURCE as FEW
from gemma4_impl.kernels.int4_linear.matvec import SOURCE as MATVEC
from gemma4_impl.kernels.int4_linear.matvec import SPAN, WARPS
from gemma4_impl.model.decoder import MLP
from gemma4_impl.quant.cuda import CudaWeight, group_of
from gemma4_impl.quant.tensor import QuantizedTensor


def quantized(seed: int, N: int, K: int, bits: int, group: int, zero: bool, offset: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    if bits == 4:
        qdata = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator)
    else:
        qdata = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
    scale = (torch.rand(N, K // group, generator=generator) + 0.1).bfloat16()
    shift = torch.randn(N, K // group, generator=generator).bfloat16() if zero else None
    return QuantizedTensor(qdata, scale, shift, bits, offset)


@st.composite
def weights(draw: st.DrawFn) -> QuantizedTensor:
    bits = draw(st.sampled_from([4, 8]))
    group = draw(st.sampled_from([32, 64, 96, 128] if bits == 4 else [16, 32, 64, 80]))
    N, K = draw(st.integers(1, 40)), group * draw(st.integers(1, 6))
    offset = draw(st.integers(0, 15 if bits == 4 else 127))
    return quantized(draw(st.integers(0, 99)), N, K, bits, group, draw(st.booleans()), offset)


@given(weights())
@settings(max_examples=60, deadline=None)
def test_tiles_hold_what_was_packed(weight):
    packed = CudaWeight(weight, torch.bfloat16)
    assert packed.shape == weight.shape
    assert torch.equal(packed.dequantize(), weight.dequantize())


@given(weights(), weights())
@settings(max_examples=30, deadline=None)
def test_stacked_rows_follow_each_other(one, other):
    if one.bits != other.bits or one.group_size != other.group_size:
        return
    K = min(one.shape[-1], other.shape[-1])
    parts = [quantized(i, 32, K, one.bits, one.group_size, one.zero is not None, one.offset) for i in range(2)]
    packed = CudaWeight.stacked(parts, torch.bfloat16)
    assert torch.equal(packed.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_a_stack_of_experts_and_gated_rows():
    flat = quantized(0, 96, 128, 4, 32, False, 8)
    stack = QuantizedTensor(flat.qdata.view(3, 32, -1), flat.scale.view(3, 32, -1), None, 4, 8)
    packed = CudaWeight(stack, torch.bfloat16)
    assert torch.equal(packed.dequantize(), stack.dequantize())
    gate, up = stack[0], stack[1]
    both = CudaWeight(gate, torch.bfloat16, gated=up).dequantize().unflatten(0, (-1, 2, 8))
    assert torch.equal(both[:, 0].flatten(0, 1), gate.dequantize())
    assert torch.equal(both[:, 1].flatten(0, 1), up.dequantize())


def test_scales_that_bfloat16_rounds_are_rounded_without_a_bias():
    weight = quantized(1, 16, 4096, 4, 32, False, 8)
    weight = QuantizedTensor(weight.qdata, torch.full((16, 128), 1.003), None, 4, 8)
    packed = CudaWeight(weight, torch.bfloat16).dequantize()
    assert abs(float(packed.double().norm() / weight.dequantize().double().norm()) - 1) < 2e-4


@pytest.mark.parametrize(
    ("bits", "group", "K", "offset", "expected"),
    [
        (4, 32, 64, 8, 32),
        (4, 64, 64, 8, 64),
        (4, 256, 512, 0, 128),
        (4, 96, 192, 8, 32),
        (8, 16, 64, 0, 32),
        (8, 5376, 5376, 0, 128),
        (4, 16, 64, 8, None),
        (4, 8, 24, 8, None),
        (8, 8, 64, 0, None),
        (4, 32, 64, 16, None),
    ],
)
def test_groups_that_fit(bits, group, K, offset, expected):
    assert group_of(quantized(0, 16, K, bits, group, False, offset)) == expected


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="not for tiles"):
        CudaWeight(quantized(0, 16, 64, 4, 16, False, 8), torch.bfloat16)
    a, b = quantized(0, 16, 64, 4, 32, False, 8), quantized(0, 16, 64, 4, 64, False, 8)
    with pytest.raises(ValueError, match="alike"):
        CudaWeight(a, torch.bfloat16, gated=b)
    with pytest.raises(ValueError, match="multiple of 16 rows"):
        CudaWeight.stacked([quantized(0, 8, 64, 4, 32, False, 8), a], torch.bfloat16)


def test_linear_without_a_gpu_goes_by_blocks():
    weight = quantized(0, 48, 128, 4, 32, True, 8)
    packed = CudaWeight(weight, torch.bfloat16)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(packed.linear(x), naive.int4_linear(x, weight))


def test_the_definition_is_what_the_modules_compute():
    mlp = MLP(64, 96).double()
    x = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate, up = mlp.gate_proj.weight.unflatten(0, (-1, 8)), mlp.up_proj.weight.unflatten(0, (-1, 8))
    h, _ = naive.fused_linear(torch.stack((gate, up), dim=1).flatten(0, 2), x, act="gelu_mul")
    assert torch.allclose(mlp.down_proj(h), mlp(x), rtol=1e-12)


def test_fused_linear_checks_before_it_launches():
    packed = CudaWeight(quantized(0, 32, 64, 4, 32, False, 8), torch.bfloat16)
    x, out = torch.zeros(1, 64).bfloat16(), torch.zeros(1, 32).bfloat16()
    with pytest.raises(ValueError, match=r"expected \[1, 64\] and \[1, 32\]"):
        fused_linear(packed, x[:, :32], out)
    with pytest.raises(ValueError, match="gated"):
        fused_linear(packed, x, out[:, :16], act="gelu_mul")
    with pytest.raises(ValueError, match="contiguous"):
        fused_linear(packed, x, out, norm=torch.zeros(128).bfloat16()[::2])


def test_the_operator_can_be_traced():
    args = torch.empty(3, 256, device="meta"), torch.empty(1, 1, 2304, device="meta"), torch.empty(1, device="meta")
    assert torch.ops.gemma4.int4_linear(*args, 16, 32, 8, False, False).shape == (3, 16)


@given(st.integers(17, 9000), st.sampled_from([512, 5376, 21504, 262144]))
def test_slices_are_whole_and_bounded(M, K):
    packed = CudaWeight(quantized(0, 16, 512, 4, 32, False, 8), torch.bfloat16).matrix()
    rows = _slice_rows(M, type(packed)(**{**packed.__dict__, "K": K}), 132)
    assert rows >= 256
    assert rows % 256 == 0
    once = 256 * (132 // -(-M // 128))
    assert rows * K * 2 <= (96 if rows == once else 48) << 20 or rows == 256


@pytest.mark.parametrize(
    ("source", "defines"),
    [
        (MATVEC, {"GROUP": g, "ZERO": z, "SPLIT": s, "NORM": n, "ADD": n, "ACT": act, "OUT_FLOAT": 0, "EXPERTS": e})
        for g, z, s, n, act, e in [(32, 0, 0, 1, 1, 0), (64, 1, 0, 0, 2, 0), (128, 0, 1, 0, 3, 0), (32, 1, 1, 0, 0, 1)]
    ]
    + [(FEW, {"GROUP": g, "ZERO": z, "SPLIT": s, "WIDE": w}) for g, z, s, w in [(32, 0, 0, 1), (128, 1, 1, 2)]],
)
def test_sources_compile_for_hopper(source, defines, tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC")
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path))
    defines = defines | ({"WARPS": WARPS, "SPAN": SPAN, "HELD": 2} if source == MATVEC else SIZES | {"OFFSET": 8})
    code = cuda.compiled(source, defines, "sm_90a")
    assert code == cuda.compiled(source, defines, "sm_90a")
    assert len(list((tmp_path / "cuda").iterdir())) == 1


def unread_loads(listing: str) -> list[str]:
    """Loads from shared memory that nothing has read when a barrier is arrived at, or a copy asked for: they may still
    be on the way."""
    pending, found = [], []
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([^;]*);", listing):
        name, _, rest = line.partition(" ")
        operands = rest.split(",")
        sources = operands if name.startswith(("ST", "SYNCS")) else operands[1:]
        read = {int(r) for r in re.findall(r"\bR(\d+)", ",".join(sources))}
        pending = [(load, registers) for load, registers in pending if not registers & read]
        if name.startswith(("SYNCS.ARRIVE", "UBLKCP")):
            found += [load for load, _ in pending]
        if name.startswith("LDS") and (first := re.search(r"R(\d+)", operands[0])):
            count = {"64": 2, "128": 4}.get(name.rpartition(".")[2], 1)
            pending.append((line, set(range(int(first[1]), int(first[1]) + count))))
    return found


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("kernel", ["matvec", "few 1", "few 2"])
def test_no_load_is_on_its_way_when_its_room_is_given_back(kernel, more, group, tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC")
    triton = pytest.importorskip("triton", reason="needs Triton's disassembler")
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path))
    defines = {"GROUP": group, "ZERO": more, "SPLIT": more}
    if kernel == "matvec":
        source = MATVEC
        defines |= {"WARPS": WARPS, "SPAN": SPAN, "HELD": 1}
        defines |= {"NORM": 0, "ADD": 0, "ACT": 0, "OUT_FLOAT": 0, "EXPERTS": 0}
    else:
        source, defines = FEW, defines | SIZES | {"WIDE": int(kernel[-1]), "OFFSET": 8}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    (tmp_path / "x.cubin").write_bytes(cuda.compiled(source, defines, "sm_90a"))
    command = [tool, "--dump-sass", "--function", source.stem, tmp_path / "x.cubin"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert listing.count("SYNCS.ARRIVE") >= 2
    assert listing.count("UBLKCP") >= 2
    # A tile's words and vectors of scales (and zeros); matvec takes two tiles at a time.
    assert listing.count("LDS") >= (10 if kernel == "matvec" else 4 + (2 if group == 32 else 1) * (1 + more))
    assert unread_loads(listing) == []
    # Four products at a time are waited for, while the next are made ready; the compiler must not wait for each.
    assert listing.count("WARPGROUP.DEPBAR") * 4 <= listing.count("HGMMA") + 4
    # Nor work out for each of them, lane by lane, where x is: a third more instructions.
    assert kernel == "matvec" or listing.count("R2UR") <= listing.count("HGMMA")
