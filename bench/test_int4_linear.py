"""Products with four-bit weights: linears of the 31B, one by one and all of six layers, and small ones for the CPU."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Backend, Case, close_to, grid, needs, publish, timed
from bench.timing import CORES
from gemma4_impl.kernels.int4_linear import naive
from gemma4_impl.quant.tensor import QuantizedTensor

DTYPE = torch.bfloat16
MOST = 16
"""Rows of x that the weights of several linears are checked for, once for every M."""

SLIDING = {"qkv": (16384, 5376), "o": (5376, 8192), "gate_up": (43008, 5376), "down": (5376, 21504)}
FULL = SLIDING | {"qkv": (18432, 5376), "o": (5376, 16384)}
"""Output and input sizes of the 31B's linears, q, k and v as one, and gate and up: of a full layer v is k."""
SIX_LAYERS = [*SLIDING.values()] * 5 + [*FULL.values()]
TINY = {"gate_up": (256, 128), "down": (128, 256)}
SMALL = {"qkv": (2048, 1024), "gate_up": (8192, 1024), "down": (1024, 4096)}


@dataclass(frozen=True)
class Linears:
    """Shapes (N, K) that one call multiplies with M rows each, their weights in groups of `group`."""

    size: str
    name: str
    shapes: Sequence[tuple[int, int]]
    M: int
    group: int = 32
    zeros: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.size == "31B" else "cpu")


CASES = [
    *(Linears("tiny", name, [shape], M) for name, shape in TINY.items() for M in (1, 5)),
    *(Linears("small", name, [shape], 1) for name, shape in SMALL.items()),
    Linears("small", "gate_up", [SMALL["gate_up"]], 1, 128),
    Linears("small", "gate_up", [SMALL["gate_up"]], 16),
]
if torch.cuda.is_available():
    CASES += [
        *(Linears("31B", "linears of 6 layers", SIX_LAYERS, M) for M in (1, 2, 4, 8, 16)),
        Linears("31B", "gate", [(21504, 5376)], 2048),
        *(Linears("31B", name, [shape], 1) for name, shape in SLIDING.items()),
        Linears("31B", "o of a full layer", [FULL["o"]], 1),
        Linears("31B", "head", [(262144, 5376)], 1),
        *(Linears("31B", "linears of 6 layers", SIX_LAYERS, 1, group) for group in (64, 128)),
        Linears("31B", "linears of 6 layers", SIX_LAYERS, 1, zeros=True),
    ]


@dataclass
class Weights:
    """The weights of a working set, and what backends made of them."""

    tensors: list[QuantizedTensor]
    packed: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    x: list[Tensor]
    """[M, K], one a weight."""
    tensors: list[QuantizedTensor]
    weights: Weights

    def pack(self, name: str, pack: Callable[[QuantizedTensor], Any]) -> list[tuple[Tensor, Any]]:
        """x and what `pack` makes of its weight, once for all M."""
        known = self.weights.packed
        if name not in known:
            known[name] = [pack(weight) for weight in self.tensors]
        return list(zip(self.x, known[name], strict=True))


def _weight(N: int, K: int, group: int, zeros: bool, generator: torch.Generator) -> QuantizedTensor:
    device = generator.device
    qdata = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator, device=device)
    scale = torch.rand(N, K // group, generator=generator, device=device).add_(0.5).mul_(K**-0.5 / 8).to(DTYPE)
    if not zeros:
        return QuantizedTensor(qdata, scale, None, 4, offset=8)
    shift = torch.rand(scale.shape, generator=generator, device=device).add_(7)
    return QuantizedTensor(qdata, scale, (-shift * scale.float()).to(DTYPE), 4)


def _weights(case: Linears, i: int) -> Weights:
    generator = torch.Generator(case.device).manual_seed(i)
    return Weights([_weight(N, K, case.group, case.zeros, generator) for N, K in case.shapes])


@functools.lru_cache(maxsize=1)
def _shared(key: tuple) -> tuple[Weights, list[Tensor], list[Tensor], list[Tensor]]:
    """Weights of several linears; `MOST` rows of x for each; the float64 products; the naive ones."""
    case = Linears(*key)
    weights, x = _weights(case, 0), _x(case, MOST)
    truth = [naive.int4_linear(x.double(), w) for x, w in zip(x, weights.tensors, strict=True)]
    return weights, x, truth, [naive.int4_linear(x, w) for x, w in zip(x, weights.tensors, strict=True)]


def _x(case: Linears, M: int) -> list[Tensor]:
    generator = torch.Generator(case.device).manual_seed(7)
    return [torch.randn(M, K, generator=generator, device=case.device).to(DTYPE) for _, K in case.shapes]


def _key(case: Linears) -> tuple:
    return case.size, case.name, tuple(case.shapes), MOST, case.group, case.zeros


def _make(case: Linears, i: int) -> Inputs:
    if len(case.shapes) > 1:
        weights, x, *_ = _shared(_key(case))
        return Inputs([rows[: case.M].contiguous() for rows in x], weights.tensors, weights)
    weights = _weights(case, i)
    return Inputs(_x(case, case.M), weights.tensors, weights)


def _judge(case: Linears, inputs: Inputs) -> Callable[[Any], Any]:
    if len(case.shapes) > 1:
        _, _, truth, rounded = _shared(_key(case))
        return close_to([t[: case.M] for t in truth], [r[: case.M] for r in rounded], DTYPE)
    (x,), (weight,) = inputs.x, inputs.tensors
    return close_to([naive.int4_linear(x.double(), weight)], [naive.int4_linear(x, weight)], DTYPE)


def _each(pairs: Sequence[tuple[Tensor, Any]], multiply: Callable[[Tensor, Any], Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [multiply(x, weight) for x, weight in pairs]


def _ours(inputs: Inputs) -> Callable[[], list[Tensor]]:
    from gemma4_impl.quant.pack import pack_weight

    pairs = inputs.pack("gemma4", lambda weight: pack_weight(weight, DTYPE, weight.device))
    return _each(pairs, lambda x, weight: weight.linear(x))


def _dense(inputs: Inputs) -> Callable[[], list[Tensor]]:
    return _each(inputs.pack("dense", lambda weight: weight.dequantize(DTYPE)), F.linear)


def _dequantize(qdata: Tensor, scale: Tensor, zero: Tensor | None, offset: int) -> Tensor:
    codes = torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(1).unflatten(1, (scale.shape[1], -1))
    weight = (codes.float() - offset) * scale.float()[..., None]
    return (weight if zero is None else weight + zero.float()[..., None]).flatten(1).to(DTYPE)


@functools.cache
def _fused(device: str) -> Callable[..., Tensor]:
    return torch.compile(_dequantize, dynamic=True) if device == "cuda" else _dequantize


def _dequantized(inputs: Inputs) -> Callable[[], list[Tensor]]:
    dequantize = _fused(inputs.x[0].device.type)
    pairs = inputs.pack("codes", lambda weight: weight)
    return _each(pairs, lambda x, w: F.linear(x, dequantize(w.qdata, w.scale, w.zero, w.offset)))


def _tinygemm(inputs: Inputs) -> Callable[[], list[Tensor]]:
    def pack(weight: QuantizedTensor) -> tuple[Tensor, Tensor, int]:
        swapped = weight.qdata << 4 | weight.qdata >> 4
        zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
        zero = (zero.float() + weight.scale.float() * (8 - weight.offset)).to(DTYPE)
        both = torch.stack((weight.scale, zero), dim=-1).transpose(0, 1).contiguous()
        return torch._convert_weight_to_int4pack(swapped, 8), both, weight.group_size

    return _each(inputs.pack("tinygemm", pack), lambda x, w: torch._weight_int4pack_mm(x, w[0], w[2], w[1]))


def _symmetric(weight: QuantizedTensor) -> QuantizedTensor:
    if weight.zero is not None or weight.offset != 8:
        raise ValueError("takes symmetric weights only")
    return weight


def _executorch(inputs: Inputs) -> Callable[[], list[Tensor]]:
    from executorch.backends.cuda.triton.kernels import int4_matmul as module

    pairs = inputs.pack("symmetric", _symmetric)
    multiply = module.int4_matvec if len(inputs.x[0]) == 1 else module.int4_matmul
    return _each(pairs, lambda x, w: multiply(x, w.qdata.view(torch.int8), w.scale, w.group_size))


def _executorch_dequantize(inputs: Inputs) -> Callable[[], list[Tensor]]:
    from executorch.backends.cuda.triton.kernels import dequant_w4_to_bf16

    pairs = inputs.pack("symmetric", _symmetric)
    return _each(pairs, lambda x, w: F.linear(x, dequant_w4_to_bf16(w.qdata.view(torch.int8), w.scale, w.group_size)))


def _gemlite(inputs: Inputs) -> Callable[[], list[Tensor]]:
    import gemlite
    from gemlite.helper import A16W4_HQQ_INT

    gemlite.set_autotune("fast")

    def pack(weight: QuantizedTensor) -> Any:
        # It multiplies with (code - zero) * scale.
        zero = torch.full_like(weight.scale, weight.offset)
        if weight.zero is not None:
            zero = (weight.offset - weight.zero.float() / weight.scale.float()).to(DTYPE)
        return A16W4_HQQ_INT(device=str(weight.device), dtype=DTYPE).from_weights(weight.codes(), weight.scale, zero)

    return _each(inputs.pack("gemlite", pack), lambda x, linear: linear(x))


ABSENT_ET = needs("executorch.backends.cuda.triton.kernels", cuda=True)
BACKENDS = [
    Backend("gemma4", _ours, ours=True),
    Backend("dense bfloat16", _dense),
    Backend("dequantize, then dense", _dequantized),
    Backend("tinygemm", _tinygemm, absent=needs(cuda=True)),
    Backend("ExecuTorch Triton", _executorch, absent=ABSENT_ET),
    Backend("ExecuTorch dequantize, then dense", _executorch_dequantize, absent=ABSENT_ET),
    Backend("gemlite", _gemlite, absent=needs("gemlite", cuda=True)),
]


def _case(case: Linears) -> Case:
    weights = sum(N * K for N, K in case.shapes)
    scales = 2 * weights // case.group * (1 + case.zeros)
    kind = ", zeros" if case.zeros else ""
    sizes = "" if len(case.shapes) > 1 else " {}x{}".format(*case.shapes[0])
    return Case(
        suite="int4_linear",
        operation="int4 linear",
        shape=f"{case.size}: {case.name}{sizes} M={case.M} group {case.group}{kind}",
        backends=BACKENDS,
        make=lambda i: _make(case, i),
        judge=lambda inputs: _judge(case, inputs),
        cost=lambda: (weights // 2 + scales + 2 * case.M * sum(N + K for N, K in case.shapes), 2 * case.M * weights),
        dtype=DTYPE,
        device=case.device,
        rotate=len(case.shapes) == 1,
        threads=1 if case.size == "tiny" else CORES,
    )


@timed
@grid([_case(case) for case in CASES])
def test_int4_linear(benchmark: Any, rows: Any, case: Case, backend: str) -> None:
    publish(benchmark, rows(case)[backend])


@pytest.fixture(scope="module", autouse=True)
def _freed():
    """Weights of several linears are large."""
    yield
    _shared.cache_clear()
