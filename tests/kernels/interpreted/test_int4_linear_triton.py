"""Quantized linears in Triton, interpreted on the CPU, against their definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Guarded, assert_within_budget, normal, poisoned_memory

from gemma4_impl.kernels.int4_linear import triton
from gemma4_impl.quant.tensor import QuantizedTensor


def quantized(bits: int, shape: tuple[int, ...], group: int, zero: bool, offset: int, seed: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    *lead, K = shape
    if bits == 4:
        qdata = torch.randint(0, 256, (*lead, K // 2), generator=generator, dtype=torch.uint8)
    else:
        qdata = torch.randint(-128, 128, (*lead, K), generator=generator, dtype=torch.int8)
    scale = (0.5 + torch.rand(*lead, K // group, generator=generator)).bfloat16() / 64
    zeros = torch.randn(scale.shape, generator=generator).bfloat16() / 8 if zero else None
    return QuantizedTensor(qdata, scale, zeros, bits, offset)


def guarded(weight: QuantizedTensor) -> tuple:
    """Codes and scales in memory that ends with them."""
    flat = (
        None if t is None else Guarded().around(t.flatten()).view_as(t)
        for t in (weight.qdata, weight.scale, weight.zero)
    )
    return (*flat, weight.bits, weight.offset)


# The interpreter truncates what it makes bfloat16.
WEIGHTS = {
    "bits": st.sampled_from([4, 8]),
    # Of a single number even the plain computation is exact now and then, and no budget is left.
    "N": st.sampled_from([3, 9]),
    "groups": st.integers(1, 5),
    "group": st.sampled_from([2, 6, 32, 40, 512]),
    "zero": st.booleans(),
    "offset": st.sampled_from([0, 8]),
    "dtype": st.sampled_from([torch.float32, torch.float16]),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=6, deadline=None)
@given(**WEIGHTS)
def test_matvec(bits, N, groups, group, zero, offset, dtype, seed) -> None:
    weight = quantized(bits, (N, groups * group), group, zero, offset, seed)
    x = normal(1, groups * group, seed=seed, dtype=dtype)
    with poisoned_memory():
        out = triton.matvec(Guarded().around(x), *guarded(weight))
    naive = x @ weight.dequantize(dtype).T
    assert_within_budget(out, x.double() @ weight.dequantize(torch.float64).T, naive)


@settings(max_examples=4, deadline=None)
@given(each=st.booleans(), index=st.lists(st.integers(0, 4), min_size=1, max_size=3), **WEIGHTS)
def test_experts(each, index, bits, N, groups, group, zero, offset, dtype, seed) -> None:
    weight = quantized(bits, (5, N, groups * group), group, zero, offset, seed)
    x = normal(len(index) if each else 1, groups * group, seed=seed, dtype=dtype)
    with poisoned_memory():
        out = triton.matvec(x, *guarded(weight), torch.tensor(index))
    rows, chosen = x.expand(len(index), -1), weight[torch.tensor(index)]
    naive = torch.einsum("kd,knd->kn", rows, chosen.dequantize(dtype))
    truth = torch.einsum("kd,knd->kn", rows.double(), chosen.dequantize(torch.float64))
    assert_within_budget(out, truth, naive)


@settings(max_examples=4, deadline=None)
@given(stack=st.booleans(), **WEIGHTS)
def test_dequantize_is_the_definition(stack, bits, N, groups, group, zero, offset, dtype, seed) -> None:
    weight = quantized(bits, (2, N, groups * group) if stack else (N, groups * group), group, zero, offset, seed)
    with poisoned_memory():
        out = triton.dequantize(*guarded(weight), dtype)
    assert torch.equal(out, weight.dequantize(dtype))


@pytest.mark.parametrize("N", [1, 9, 40])
def test_codes_that_begin_anywhere(N: int) -> None:
    """Bytes are loaded where words would not be aligned."""
    weight, x = quantized(4, (N, 96), 32, False, 8, 0), normal(1, 96, seed=1)
    truth = x.double() @ weight.dequantize(torch.float64).T
    for start in (0, 1, 4):
        codes = torch.empty(N * 48 + start, dtype=torch.uint8)[start:].view(N, 48).copy_(weight.qdata)
        out = triton.matvec(x, codes, weight.scale, None, 4, 8)
        assert_within_budget(out, truth, x @ weight.dequantize().T)


@pytest.mark.parametrize(
    ("bits", "group", "offset", "codes"),
    [(4, 32, 0, 8), (4, 6, 0, 2), (4, 32, 2, 2), (8, 5376, 0, 4), (8, 6, 0, 1), (8, 32, 5, 1)],
)
def test_unit(bits: int, group: int, offset: int, codes: int) -> None:
    assert triton.codes_of_unit(bits, group, offset) == codes
