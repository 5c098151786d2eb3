"""Quantizing bfloat16 weights on the CPU: every configuration that the built-in recipes use."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Backend, Case, grid, publish, timed
from bench.timing import CORES
from gemma4_impl.quant.hqq import objective
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import RECIPES, QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor
from parity.budget import Check

ROWS, K = 2048, 5376
"""Enough weights for every thread."""
CONFIGS = list(dict.fromkeys(rule.config for recipe in RECIPES.values() for rule in recipe.rules))
FLOOR = 50.0
"""Mweights/s that `default`'s int4 must reach in its best, least disturbed round."""


def _weight() -> Tensor:
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


def _problem(w: Tensor, q: QuantizedTensor, config: QuantConfig) -> str | None:
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


def _case(config: QuantConfig) -> Case:
    def judge(weight: Tensor) -> Callable[[Any], Check]:
        return lambda quantized: Check(math.inf if _problem(weight, quantized, config) else 0, 0, 0)

    return Case(
        suite="load",
        operation="quantize bfloat16",
        shape=f"{config} {ROWS}x{K}",
        backends=[Backend("gemma4", lambda weight: lambda: quantize(weight, config), ours=True)],
        make=lambda i: _weight(),
        judge=judge,
        weights=ROWS * K,
        rotate=False,
        threads=CORES,
    )


@timed
@grid([_case(config) for config in CONFIGS])
def test_quantize(benchmark: Any, rows: Callable, case: Case, backend: str) -> None:
    row = rows(case)[backend]
    publish(benchmark, row)
    default = {f"{rule.config} {ROWS}x{K}" for rule in RECIPES["default"].rules}
    if row.times and case.shape in default:
        assert ROWS * K / min(row.times) / 1e6 >= FLOOR
