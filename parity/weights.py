"""A quantized candidate's tensors one by one: read as another reader reads them, and as near the original as rounding
leaves them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gemma4_impl.checkpoint import Weights, check_fits
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.pack import pack_error
from gemma4_impl.quant.packed import PackedWeight
from gemma4_impl.quant.tensor import QuantizedTensor
from reference.weights import Source

STEPS = 0.5
"""The largest root mean square error that rounding to the nearest code can make, in steps (the distance between two
codes); evenly spread errors make 0.29."""
PLAIN = 2**-8
"""The largest relative error of a tensor that is stored as floats: bfloat16's, rounded to nearest."""
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Packed:
    """A tensor in the form that a kernel takes."""

    kernel: str
    error: float
    """Relative L2 distance of what it multiplies with from the dequantized weight."""


@dataclass(frozen=True)
class TensorCheck:
    """One tensor: how it is stored, and how far it is from the original."""

    name: str
    shape: tuple[int, ...]
    quantized: bool
    kind: str
    """`int4, group 32`, `Q4_K`, `BF16`."""
    stored_bytes: int
    misread: int
    """Values that our reader and the reference's do not agree on, to the last bit; -1 if the latter has none."""
    sqnr_db: float | None = None
    """20 log10 (|w| / |w - dequantized|); None without an original."""
    steps: float | None = None
    """|w - dequantized| over the size of the steps, root mean squares; None for floats, or without an original."""
    planned: str | None = None
    """What the recipe that the candidate names would have made of it, if that is not `kind`."""
    packed: dict[str, Packed] = field(default_factory=dict)
    """dtype -> how it runs in stage C."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / math.prod(self.shape)

    @property
    def why(self) -> list[str]:
        """What is wrong with it; empty if nothing is."""
        out = []
        if self.misread:
            values = "all" if self.misread < 0 else f"{self.misread} of {math.prod(self.shape)}"
            out.append(f"misread: {values} values are not what the reference's reader finds")
        if self.steps is not None and not self.steps <= STEPS:
            out.append(f"not a rounding of the original: off by {self.steps:.3g} steps, at most {STEPS:g} are rounding")
        if self.steps is None and self.sqnr_db is not None and not self.sqnr_db >= -20 * math.log10(PLAIN):
            out.append(f"stored as floats, but not the original's: SQNR {self.sqnr_db:.1f} dB")
        if self.planned:
            out.append(f"is {self.kind}, but the recipe says {self.planned}")
        return out


def check_tensors(
    weights: Weights, source: Source, original: Source | None = None, plan: Mapping[str, str | None] | None = None
) -> list[TensorCheck]:
    """Every tensor that the model takes from `weights`, in the model's order, against `source` (the same file as the
    reference reads it), against `original`, a block of rows at a time, and against what `plan` says it is stored as
    (None: as floats). Raises CheckpointError if they do not fit."""
    with torch.device("meta"):
        model = Gemma4(weights.config)
    found = [_check(name, weights, source, original) for name in check_fits(model, weights)]
    if HEAD in source and HEAD not in weights.files:
        found.append(_check(HEAD, weights, source, original))
    return [_planned(tensor, plan[tensor.name]) if plan and tensor.name in plan else tensor for tensor in found]


def _planned(tensor: TensorCheck, planned: str | None) -> TensorCheck:
    """With what was planned, if it is something else."""
    same = tensor.kind == planned if tensor.quantized else planned is None
    return tensor if same else replace(tensor, planned=planned or "floats")


def _check(name: str, weights: Weights, source: Source, original: Source | None) -> TensorCheck:
    ours = name if name in weights.files else EMBEDDING
    shape = weights.shape(ours)
    if name not in source:
        return TensorCheck(name, shape, False, "absent", 0, -1)
    misread, error, size = 0, 0.0, 0.0
    for found, theirs, true in _blocks(name, ours, shape, weights, source, original):
        misread += int((found != theirs).sum())
        if true is not None:
            error += float(torch.linalg.vector_norm(theirs.double() - true.double())) ** 2
            size += float(torch.linalg.vector_norm(true, dtype=torch.float64)) ** 2
    sqnr = steps = None
    if original is not None:
        sqnr = math.inf if error == 0 else 10 * math.log10(size / error) if size else -math.inf
    if original is not None and (packed := weights.quantized(ours)) is not None:
        step = _squared_steps(packed)
        steps = math.sqrt(error / step) if step else math.inf if error else 0.0
    stored = source.is_quantized(name), source.kind(name), source.stored_bytes(name)
    return TensorCheck(name, shape, *stored, misread, sqnr, steps)


def packed_in(model: Gemma4, weights: Weights) -> dict[str, Packed]:
    """Tensor -> its packed form, of those that `model` runs packed."""
    modules = dict(model.named_modules())
    found = {name: module for name in weights.files if isinstance(module := modules.get(name), PackedWeight)}
    return {name: Packed(module.kernel, pack_error(weights.quantized(name), module)) for name, module in found.items()}


def _squared_steps(packed: QuantizedTensor) -> float:
    """Sum over the weights of the squared distance from their code to the further of its neighbours: a scale, but for
    the 4-bit formats whose codes are not evenly spaced."""
    size = max(1, _BLOCK // math.prod(packed.shape[1:]))
    low = -128 if packed.bits == 8 else 0
    used = torch.unique(packed[:size].codes()).double()
    squared = torch.ones(256, dtype=torch.float64)
    if 1 < len(used) <= 16:
        gaps = torch.cat([used.diff()[:1], used.diff(), used.diff()[-1:]])
        squared[used.long() - low] = torch.maximum(gaps[:-1], gaps[1:]).square()
    total = 0.0
    for start in range(0, packed.shape[0], size):
        part = packed[start : start + size]
        by_group = squared[part.codes().long() - low].unflatten(-1, (-1, part.group_size)).sum(-1)
        total += float((by_group * part.scale.double().square()).sum())
    return total


def _blocks(
    name: str, ours: str, shape: tuple[int, ...], weights: Weights, source: Source, original: Source | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The same rows of all three; `ours` is what the model uses for `name`."""
    there = name if original is None or name in original else EMBEDDING
    size = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], size):
        rows = start, min(start + size, shape[0])
        true = None if original is None else original.rows(there, *rows)
        yield weights.rows(ours, *rows), source.rows(name, *rows), true
