"""Quantizing bfloat16 weights on the CPU: every configuration that the built-in recipes use."""

import os
import statistics
import time

import pytest
import torch
from torch import Tensor

from gemma4_impl.quant.hqq import objective
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import RECIPES, QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor

ROWS, K = 2048, 5376
"""Enough weights for every thread."""
CONFIGS = list(dict.fromkeys(rule.config for recipe in RECIPES.values() for rule in recipe.rules))
FLOOR = 50.0
"""Mweights/s that `default`'s int4 must reach in its best, least disturbed round."""


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(ROWS, 1, generator=generator).mul_(0.3).exp_()
    return torch.randn(ROWS, K, generator=generator).mul_(0.02).mul_(sizes).bfloat16()


def _naive(w: Tensor, config: QuantConfig) -> tuple[Tensor, Tensor]:
    """min_max, symmetric, in float64: codes and scales [n, G], [n, 1]."""
    groups = w.double().reshape(-1, config.group_size or K)
    high = 2 ** (config.bits - 1) - 1
    exact = torch.maximum(groups.amax(1, True) / high, -groups.amin(1, True) / (high + 1))
    scale = exact.bfloat16()
    scale = torch.where(scale < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale).double()
    return (groups / scale).round(), scale


def _check(w: Tensor, q: QuantizedTensor, config: QuantConfig) -> str | None:
    """What is wrong with the result, if anything."""
    G = q.group_size
    if config.method == "min_max":
        codes, scale = _naive(w, config)
        same = torch.equal(q.scale.double().view(-1, 1), scale)
        off = (q.codes().double().sub(q.offset).view(-1, G) != codes).double().mean()
        # Only float32's rounding right between two codes may choose the other one.
        return None if same and off < 1e-5 else f"differs from float64: {off:.1e} of the codes"
    start = quantize(w, QuantConfig(config.bits, config.group_size, config.symmetric))
    losses = [objective((w.float() - t.dequantize()).view(-1, G), config.method) for t in (q, start)]
    better = (losses[0] <= losses[1] * (1 + 1e-5)).all() and losses[0].mean() < losses[1].mean()
    return None if better else "is worse than min_max"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_quantize(benchmark, weight: Tensor, config: QuantConfig) -> None:
    if problem := _check(weight, quantize(weight, config), config):
        pytest.fail(f"{config} {problem}; no time is published")
    cpu: list[float] = []

    def run() -> None:
        start = time.process_time()
        quantize(weight, config)
        cpu.append(time.process_time() - start)

    benchmark.group = f"quantize, {ROWS} x {K} in bfloat16"
    benchmark.pedantic(run, rounds=8, warmup_rounds=1)
    benchmark.extra_info.update(config=str(config), threads=torch.get_num_threads())
    if not benchmark.enabled:
        return
    size = weight.numel() / 1e6
    benchmark.extra_info[f"quantize {config}, Mweights/s"] = size / benchmark.stats.stats.median
    benchmark.extra_info[f"quantize {config}, Mweights/s a core"] = size / statistics.median(cpu)
    if config in [rule.config for rule in RECIPES["default"].rules]:
        assert size / benchmark.stats.stats.min >= FLOOR
