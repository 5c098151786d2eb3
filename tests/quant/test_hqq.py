"""mse and hqq: never worse than min_max in their own objective, better in the mean, and what they converge to."""

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma4_impl.quant import hqq
from gemma4_impl.quant.hqq import BETA, NORM, Codes, objective, refine
from gemma4_impl.quant.quantize import LARGEST, SCALE_DTYPES, quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor

REFINED = [(True, "mse"), (False, "mse"), (False, "hqq")]
EXACT = Codes(-8, 7, lambda x: x)


def losses(w: Tensor, q: QuantizedTensor, method: str) -> Tensor:
    """The objective of each group, with float64 arithmetic on what is stored, in units of the group's range."""
    groups = w.double().reshape(-1, q.group_size)
    units = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)).clamp(min=1e-300)
    return objective((groups - q.dequantize(torch.float64).reshape(groups.shape)) / units, method)


def student_t(rows: int, columns: int, degrees: float, seed: int) -> Tensor:
    """Heavy-tailed weights with a size for each row and column, as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    chi = torch.distributions.Gamma(degrees / 2, 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        w = normal / (chi.sample(normal.shape) / degrees).sqrt()
    sizes = torch.randn(rows, 1, generator=generator).mul_(0.3).exp_()
    return 0.02 * w * sizes * torch.randn(columns, generator=generator).mul_(0.2).exp_()


class TestNeverWorse:
    @settings(max_examples=150, deadline=None)
    @given(
        st.sampled_from(REFINED),
        st.sampled_from([4, 8]),
        st.sampled_from([2, 16, 32, 300]),
        st.sampled_from(SCALE_DTYPES),
        st.sampled_from([1.0, 1e-3, 1e4, 1e-25, 1e-38, 1e-44, 1e30, 1e37]),
        st.sampled_from(["normal", "lattice", "outliers", "constant", "far away", "few values", "mixed"]),
        st.integers(0, 2**31),
    )
    def test_in_its_objective(
        self, how: tuple, bits: int, group: int, dtype: torch.dtype, size: float, kind: str, seed: int
    ) -> None:
        symmetric, method = how
        w = torch.randn(6, 2 * group, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if kind == "lattice":
            w = (w * 3).round() * 0.25
        elif kind == "outliers":
            w[:, ::7] *= 100
        elif kind == "constant":
            w[:] = w[:, :1]
        elif kind == "far away":
            w += 1000
        elif kind == "few values":
            w = w.sign() * 0.7 + (w > 1)
        elif kind == "mixed":
            w *= 10.0 ** torch.arange(-3, 3)[:, None]
        if dtype == torch.float16:
            size = min(max(size, 1e-4), 10)
        w = (w * size).clamp(-LARGEST, LARGEST).float()
        config = QuantConfig(bits, group, symmetric, method)
        start = losses(w, quantize(w, dataclasses.replace(config, method="min_max"), dtype), method)
        assert (losses(w, quantize(w, config, dtype), method) <= start * (1 + 1e-6)).all()

    @settings(deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=8, max_size=8), st.sampled_from(REFINED))
    def test_for_any_floats(self, values: list[float], how: tuple) -> None:
        symmetric, method = how
        w = torch.tensor([values])
        config = QuantConfig(4, 8, symmetric, method)
        start = losses(w, quantize(w, dataclasses.replace(config, method="min_max")), method)
        assert (losses(w, quantize(w, config), method) <= start * (1 + 1e-6)).all()


class TestBetter:
    @pytest.mark.parametrize(("symmetric", "method"), REFINED)
    @pytest.mark.parametrize("degrees", [4.0, 1e6])
    def test_in_the_mean(self, degrees: float, symmetric: bool, method: str) -> None:
        """mse cuts the mean of its objective by a tenth, hqq its own by a fiftieth and the square by a tenth."""
        w = student_t(64, 2048, degrees, seed=0).bfloat16()
        config = QuantConfig(4, 64, symmetric, method)
        before, after = (quantize(w, c) for c in (dataclasses.replace(config, method="min_max"), config))
        ratio = losses(w, after, method).mean() / losses(w, before, method).mean()
        assert ratio < (0.9 if method == "mse" else 0.98)
        if method == "hqq":
            assert losses(w, after, "mse").mean() / losses(w, before, "mse").mean() < 0.9

    def test_compact_beats_default(self) -> None:
        """Half as many scales, and a zero beside each, take the same bytes and leave less noise: by 0.9 dB here."""
        w = student_t(64, 2048, 1e6, seed=1).bfloat16()
        default, compact = (quantize(w, c) for c in (QuantConfig(4, 32), QuantConfig(4, 64, False, "mse")))
        assert compact.nbytes == default.nbytes
        noise = [(q.dequantize(torch.float64) - w).square().sum() for q in (default, compact)]
        assert noise[1] < noise[0] * 10**-0.07


class TestRefine:
    @pytest.mark.parametrize(("symmetric", "method"), REFINED)
    @pytest.mark.parametrize("dtype", SCALE_DTYPES)
    def test_what_is_returned_can_be_stored(self, symmetric: bool, method: str, dtype: torch.dtype) -> None:
        codes = Codes(-8, 7, lambda x: x.to(dtype).float())
        w = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
        scale = codes.store(w.abs().amax(1, keepdim=True) / 7)
        zero = None if symmetric else torch.zeros_like(scale)
        for t in refine(w, scale, zero, codes, method):
            assert t is None or torch.equal(codes.store(t), t)

    def test_recovers_a_lattice(self) -> None:
        """Weights that are scale * q + zero, seen through a start that is off in both."""
        generator = torch.Generator().manual_seed(0)
        q = torch.randint(-8, 8, (40, 64), generator=generator).float()
        q[:, :16] = torch.arange(-8, 8)
        scale = torch.rand(40, 1, generator=generator) + 0.5
        zero = torch.randn(40, 1, generator=generator)
        for method in NORM:
            start_scale, start_zero = scale * 1.02, zero + 0.1 * scale
            found_scale, found_zero = refine(scale * q + zero, start_scale, start_zero, EXACT, method)
            # A group stops when it moves by less than `_TOLERANCE` of a step; another step would have moved by less.
            assert ((found_scale - scale).abs() < hqq._TOLERANCE * scale).all()
            assert ((found_zero - zero).abs() < 2 * hqq._TOLERANCE * scale).all()

    def test_mse_is_lloyds_fixed_point(self) -> None:
        """With its codes fixed, no scale and zero fit a converged group noticeably better."""
        w = torch.randn(100, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        scale = ((w.amax(1, True) - w.amin(1, True)) / 15).float()
        zero = w.amin(1, True).float() + 8 * scale
        scale, zero = (t.double() for t in refine(w.float(), scale, zero, EXACT, "mse"))
        q = ((w - zero) / scale).round().clamp(-8, 7)
        mean_q, mean_w = q.mean(1, True), w.mean(1, True)
        slope = ((q - mean_q) * (w - mean_w)).sum(1, True) / (q - mean_q).square().sum(1, True)
        best = (w - mean_w - slope * (q - mean_q)).square().sum(1, True)
        loss = (w - zero - scale * q).square().sum(1, True)
        # The slope may be off by _TOLERANCE, and by twice that where the iterations were not enough.
        allowed = (2 * hqq._TOLERANCE * scale) ** 2 * ((q - mean_q).square().sum(1, True) + 64)
        assert (loss <= best + allowed).float().mean() > 0.95

    def test_shrinkage(self) -> None:
        """hqq's step in float64: the regression of w - e, where e is the residual, shrunk."""
        w = torch.randn(30, 32, generator=torch.Generator().manual_seed(2))
        scale, zero = w.abs().amax(1, keepdim=True) / 7.2, torch.zeros(30, 1)
        with mock.patch.object(hqq, "_ITERATIONS", 2):
            found, _ = refine(w, scale, zero, EXACT, "hqq")
        q = (w.double() / scale).round().clamp(-8, 7)
        r = w / scale.double() - q
        e = r.sign() * (r.abs() - r.abs() ** (NORM["hqq"] - 1) / BETA).clamp(min=0)
        target = w / scale.double() - e
        slope = ((q - q.mean(1, True)) * target).sum(1, True) / (q - q.mean(1, True)).square().sum(1, True)
        moved = (found != scale).flatten()
        assert moved.float().mean() > 0.3
        expected = scale * (1 + hqq._RELAXATION * (slope - 1))
        assert torch.allclose(found[moved].double(), expected[moved], rtol=1e-5)

    @pytest.mark.parametrize("method", NORM)
    def test_both_layouts(self, method: str) -> None:
        """Wide groups are not transposed: other sums, the same minimum."""
        w = torch.randn(40, 128, generator=torch.Generator().manual_seed(3))
        config = QuantConfig(4, 128, False, method)
        tall = losses(w, quantize(w, config), method)
        with mock.patch.object(hqq, "_TRANSPOSED", 0):
            wide = losses(w, quantize(w, config), method)
        assert torch.allclose(tall.mean(), wide.mean(), rtol=1e-3)

    def test_objective(self) -> None:
        error = torch.tensor([[4.0, -9.0], [0.0, 0.25]])
        assert objective(error, "mse").tolist() == [97.0, 0.0625]
        assert objective(error, "hqq").tolist() == [5.0, 0.5]
