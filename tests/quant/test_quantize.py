"""`quantize`: half a step for min_max, whatever the weights; every method's promises; refusals; blocks and memory."""

import math
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from gemma4_impl.quant import quantize as module
from gemma4_impl.quant.quantize import LARGEST, SCALE_DTYPES, quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor

CONFIGS = [
    QuantConfig(bits, 16, symmetric, method)
    for bits in (4, 8)
    for symmetric, method in [(True, "min_max"), (False, "min_max"), (True, "mse"), (False, "mse"), (False, "hqq")]
]
MIN_MAX = st.builds(
    QuantConfig, st.sampled_from([4, 8]), st.sampled_from([2, 8, 32, None]), st.booleans(), st.just("min_max")
)
scale_dtypes = st.sampled_from(SCALE_DTYPES)


@st.composite
def weights(draw: st.DrawFn, group: int, largest: float = LARGEST) -> Tensor:
    """[..., N, K] float32, K a multiple of `group`: any floats at all, or groups of a kind and size each of its own."""
    shape = (*draw(st.sampled_from([(), (2,)])), draw(st.integers(1, 4)), group * draw(st.integers(1, 3)))
    if draw(st.booleans()):
        floats = st.floats(-largest, largest, width=32, allow_nan=False)
        return torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=floats)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = torch.randn(math.prod(shape) // group, group, generator=generator, dtype=torch.float64)
    for i in range(len(groups)):
        kind = draw(st.sampled_from(["normal", "zero", "constant", "outlier", "positive", "far away", "two values"]))
        if kind == "zero":
            groups[i] = 0
        elif kind == "constant":
            groups[i] = groups[i, 0]
        elif kind == "outlier":
            groups[i, draw(st.integers(0, group - 1))] *= 1000
        elif kind == "positive":
            groups[i] = groups[i].abs()
        elif kind == "far away":
            groups[i] += draw(st.sampled_from([1e2, -1e4, 1e6]))
        elif kind == "two values":
            groups[i] = torch.where(groups[i] > 0, 1.0, -0.3)
        size = 10.0 ** draw(st.sampled_from([0, 0, -2, -5, -20, -38, -43, 4, 30, 38]))
        groups[i] = (groups[i] * size).clamp(-largest, largest)
    return groups.float().view(shape)


def drawn(data: st.DataObject, config: QuantConfig, dtype: torch.dtype) -> Tensor:
    """Weights whose scales `dtype` can hold."""
    return data.draw(weights(config.group_size or 6, 60000.0 if dtype == torch.float16 else LARGEST))


def parts(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes, scale, zero in float64; [groups, G], [groups, 1], [groups, 1]."""
    codes = q.codes().double().sub(q.offset).reshape(-1, q.group_size)
    zero = torch.zeros_like(q.scale) if q.zero is None else q.zero
    return codes, q.scale.double().reshape(-1, 1), zero.double().reshape(-1, 1)


def equal(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    same_zero = a.zero is b.zero if a.zero is None or b.zero is None else torch.equal(a.zero, b.zero)
    return same_zero and a.offset == b.offset and torch.equal(a.qdata, b.qdata) and torch.equal(a.scale, b.scale)


class TestMinMax:
    @settings(max_examples=300, deadline=None)
    @given(MIN_MAX, scale_dtypes, st.data())
    def test_half_a_step(self, config: QuantConfig, dtype: torch.dtype, data: st.DataObject) -> None:
        w = drawn(data, config, dtype)
        q = quantize(w, config, dtype)
        codes, scale, zero = parts(q)
        assert (scale > 0).all()
        groups = w.double().reshape(codes.shape)
        error = (groups - (scale * codes + zero)).abs()
        assert (error <= scale / 2 + (groups - zero).abs() * 2**-22).all()
        # What is dequantized in float32 is finite, and off by its own rounding only.
        dequantized = q.dequantize().double().reshape(codes.shape)
        rounding = ((scale * codes).abs() + zero.abs()) * 2**-23 + 2**-148
        assert ((dequantized - (scale * codes + zero)).abs() <= rounding).all()

    @settings(deadline=None)
    @given(st.sampled_from([4, 8]), scale_dtypes, st.data())
    def test_symmetric_does_not_clip(self, bits: int, dtype: torch.dtype, data: st.DataObject) -> None:
        config = QuantConfig(bits, 8)
        w = drawn(data, config, dtype)
        codes, scale, _ = parts(quantize(w, config, dtype))
        ratio = w.double().reshape(codes.shape) / scale
        assert (ratio <= (7 if bits == 4 else 127)).all()
        assert (ratio >= (-8 if bits == 4 else -128)).all()

    @settings(deadline=None)
    @given(st.sampled_from([4, 8]), scale_dtypes, st.data())
    def test_scale_is_the_smallest(self, bits: int, dtype: torch.dtype, data: st.DataObject) -> None:
        """The next smaller float of the dtype would clip."""
        config = QuantConfig(bits, 8)
        w = drawn(data, config, dtype)
        q = quantize(w, config, dtype)
        _, scale, _ = parts(q)
        ints = q.scale.reshape(-1, 1).view(torch.int32 if dtype == torch.float32 else torch.int16)
        smaller = (ints - 1).view(dtype).double()
        groups = w.double().reshape(len(scale), -1)
        high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
        clips = (high > smaller * (2 ** (bits - 1) - 1)) | (low < -smaller * 2 ** (bits - 1))
        assert (clips | (groups == 0).all(1, keepdim=True)).all()

    @settings(deadline=None)
    @given(MIN_MAX, scale_dtypes, st.data())
    def test_zeros_are_exact(self, config: QuantConfig, dtype: torch.dtype, data: st.DataObject) -> None:
        w = drawn(data, config, dtype)
        first = w[..., 0, : config.group_size]
        first.zero_()
        q = quantize(w, config, dtype)
        assert (q.dequantize()[..., 0, : config.group_size] == 0).all()
        assert (q.scale[..., 0, 0] == 1).all()

    @settings(deadline=None)
    @given(st.floats(-60000, 60000, width=16), st.sampled_from([4, 8]), scale_dtypes)
    def test_constant_groups_are_exact_with_a_zero(self, value: float, bits: int, dtype: torch.dtype) -> None:
        value = float(torch.tensor(value).to(dtype))
        q = quantize(torch.full((2, 16), value), QuantConfig(bits, 8, symmetric=False), dtype)
        assert (q.dequantize() == value).all()

    @settings(deadline=None)
    @given(st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([2, 8, 32]), st.integers(0, 2**31))
    def test_symmetric_int4_is_idempotent(self, dtype: torch.dtype, group: int, seed: int) -> None:
        """With scales of 16 bits, none of them subnormal."""
        config = QuantConfig(4, group)
        w = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)).mul_(0.02)
        assume(bool((w.unflatten(-1, (-1, group)).abs().amax(-1) > 1e-3).all()))
        once = quantize(w, config, dtype)
        assert equal(quantize(once.dequantize(), config, dtype), once)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_far_away_from_zero(self, bits: int) -> None:
        """A bfloat16 zero near 1000 is up to 2 off, many times the weights' own range: the scale makes up for it."""
        w = 1001.7 + torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).mul_(0.01)
        q = quantize(w, QuantConfig(bits, 32, symmetric=False), torch.bfloat16)
        assert ((q.dequantize(torch.float64) - w).abs() <= q.scale.double() / 2 * (1 + 2**-20)).all()
        assert (q.scale.float() <= 4 / (8 if bits == 4 else 128)).all()

    def test_known_values(self) -> None:
        w = torch.tensor([[7.0, -8.0, 3.4, -3.6], [14.0, -2.0, 1.0, 0.9], [-16.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        q = quantize(w, QuantConfig(4, 4))
        assert q.scale.tolist() == [[1.0], [2.0], [2.0], [1.0]]
        assert (q.codes().to(torch.int8) - 8).tolist() == [[7, -8, 3, -4], [7, -1, 0, 0], [-8, 0, 2, 0], [0, 0, 0, 0]]
        assert q.qdata[0].tolist() == [0x0F, 0x4B]
        q = quantize(torch.tensor([[10.0, 25.0, 11.0, 24.4]]), QuantConfig(4, 4, symmetric=False))
        assert (q.scale.item(), q.zero.item()) == (1.0, 18.0)
        assert q.codes().tolist() == [[0, 15, 1, 14]]
        q = quantize(torch.tensor([[127.0, -64.4], [-256.0, 3.0]]), QuantConfig(8, None))
        assert q.scale.tolist() == [[1.0], [2.0]]
        assert q.qdata.tolist() == [[127, -64], [-128, 2]]


class TestEveryMethod:
    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    def test_codes_are_the_nearest(self, config: QuantConfig) -> None:
        w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
        codes, scale, zero = parts(quantize(w, config, torch.bfloat16))
        choices = torch.arange(-8 if config.bits == 4 else -128, 8 if config.bits == 4 else 128, dtype=torch.float64)
        groups = w.double().reshape(codes.shape)
        errors = (groups[..., None] - (scale * choices + zero)[:, None]).abs()
        error = (groups - (scale * codes + zero)).abs()
        assert (error <= errors.amin(-1) + scale * 2**-18).all()

    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    @pytest.mark.parametrize("dtype", [*SCALE_DTYPES, torch.float64])
    def test_dtypes_and_shapes(self, config: QuantConfig, dtype: torch.dtype) -> None:
        w = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
        before = w.clone()
        q = quantize(w, config)
        assert torch.equal(w, before)
        assert (q.shape, q.group_size, q.bits, q.offset) == (w.shape, 16, config.bits, 8 if config.bits == 4 else 0)
        assert q.scale.dtype == (torch.float32 if dtype == torch.float64 else dtype)
        assert (q.zero is None) == config.symmetric
        stored = w.float().to(q.scale.dtype)
        assert equal(q, quantize(stored, config, q.scale.dtype))

    @settings(deadline=None)
    @given(st.sampled_from(CONFIGS), scale_dtypes, st.data())
    def test_stack_is_its_matrices(self, config: QuantConfig, dtype: torch.dtype, data: st.DataObject) -> None:
        w = torch.stack([drawn(data, config, dtype).reshape(-1, 16)[:1] for _ in range(3)])
        whole = quantize(w, config, dtype)
        for i in range(3):
            assert equal(whole[i], quantize(w[i], config, dtype))

    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from(CONFIGS), scale_dtypes, st.integers(16, 200), st.integers(0, 2**31))
    def test_blocks_change_nothing(self, config: QuantConfig, dtype: torch.dtype, block: int, seed: int) -> None:
        w = torch.randn(19, 48, generator=torch.Generator().manual_seed(seed))
        whole = quantize(w, config, dtype)
        with mock.patch.dict(module._BLOCK, {config.method: block}):
            assert equal(quantize(w, config, dtype), whole)

    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    def test_threads_change_nothing(self, config: QuantConfig) -> None:
        w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(3))
        whole = quantize(w, config)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            assert equal(quantize(w, config), whole)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    def test_strides_change_nothing(self, config: QuantConfig) -> None:
        w = torch.randn(32, 3, 48, generator=torch.Generator().manual_seed(4))
        assert equal(
            quantize(w.transpose(0, 1)[:, ::2], config), quantize(w.transpose(0, 1)[:, ::2].contiguous(), config)
        )

    def test_parameter(self) -> None:
        weight = torch.nn.Parameter(torch.randn(4, 32))
        assert equal(quantize(weight, QuantConfig(4, 32)), quantize(weight.detach(), QuantConfig(4, 32)))
        assert not quantize(weight, QuantConfig(4, 32)).scale.requires_grad


class TestRefused:
    @settings(max_examples=50, deadline=None)
    @given(
        st.sampled_from(CONFIGS),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.sampled_from([math.nan, math.inf, -math.inf]),
        st.tuples(st.integers(0, 6), st.integers(0, 31)),
    )
    def test_not_finite(self, config: QuantConfig, dtype: torch.dtype, value: float, where: tuple[int, int]) -> None:
        w = torch.randn(7, 32).to(dtype)
        w[where] = value
        with pytest.raises(ValueError, match=r"^layers\.3\.mlp\.up_proj\.weight: holds (NaN|inf)") as error:
            quantize(w, config, name="layers.3.mlp.up_proj.weight")
        assert ("NaN" in str(error.value)) == math.isnan(value)

    def test_not_finite_in_another_thread(self) -> None:
        w = torch.randn(64, 4096)
        w[50, 9] = math.nan
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            with pytest.raises(ValueError, match=r"^a: holds NaN"):
                quantize(w, QuantConfig(4, 32), name="a")
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_largest(self, symmetric: bool) -> None:
        config = QuantConfig(4, 2, symmetric)
        assert quantize(torch.tensor([[LARGEST, -LARGEST]]), config).dequantize().isfinite().all()
        for value in (math.nextafter(LARGEST, math.inf) * (1 + 2**-20), -3e38):
            with pytest.raises(ValueError, match=r"^a: holds .*e\+38; weights must be finite, and at most 2\*\*127"):
                quantize(torch.tensor([[value, 0.0]]), config, name="a")

    def test_float64_that_overflows(self) -> None:
        with pytest.raises(ValueError, match=r"^a: holds inf"):
            quantize(torch.full((1, 2), 1e300, dtype=torch.float64), QuantConfig(4, 2), name="a")

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_scale_that_does_not_fit(self, symmetric: bool) -> None:
        w = torch.tensor([[0.0, 7e5]])
        with pytest.raises(
            ValueError, match=r"^a: weights up to 7e\+05 need scales beyond torch\.float16; choose another"
        ):
            quantize(w, QuantConfig(4, 2, symmetric), torch.float16, "a")

    @pytest.mark.parametrize(
        ("weight", "config", "dtype", "message"),
        [
            (torch.zeros(4, 33), QuantConfig(4, 32), None, "rows of 33 weights, which groups of 32 do not divide"),
            (torch.zeros(4, 33), QuantConfig(4, None), None, "rows of 33 weights, which groups of 2 do not divide"),
            (torch.zeros(32), QuantConfig(4, 32), None, r"is torch.float32 \[32\]; expected floats"),
            (torch.zeros(0, 32), QuantConfig(4, 32), None, r"is torch.float32 \[0, 32\]"),
            (torch.zeros(4, 0), QuantConfig(8, None), None, r"is torch.float32 \[4, 0\]"),
            (torch.zeros(4, 32, dtype=torch.int8), QuantConfig(4, 32), None, "is torch.int8"),
            (torch.zeros(4, 32), QuantConfig(4, 32), torch.float64, "scales cannot be torch.float64"),
            (torch.zeros(4, 32).to(torch.float8_e4m3fn), QuantConfig(4, 32), None, "scales cannot be torch.float8"),
        ],
    )
    def test_malformed(self, weight: Tensor, config: QuantConfig, dtype: torch.dtype | None, message: str) -> None:
        with pytest.raises(ValueError, match=f"^a: .*{message}"):
            quantize(weight, config, dtype, "a")


MEMORY = """
import resource, torch
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
torch.set_num_threads({threads})
config = QuantConfig(4, 32, symmetric=False, method="{method}")
weight = torch.empty(4096, 8192, dtype=torch.bfloat16).fill_(0.5)
weight[:, ::2] = -0.25
quantize(weight[:4, :512], config)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = quantize(weight, config)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) - result.nbytes)
"""


@pytest.mark.parametrize(("method", "threads"), [("min_max", 1), ("hqq", 1), ("hqq", 2)])
def test_memory(method: str, threads: int) -> None:
    """Besides the result, 20 MB a thread; the weight in float32 would be 134 MB."""
    code = MEMORY.format(method=method, threads=threads)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) < 20e6 * threads + 4e6
