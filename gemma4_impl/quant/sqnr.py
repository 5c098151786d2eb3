"""What quantizing did to each tensor: signal-to-noise ratios, measured block by block, as JSON and as a page."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma4_impl.files import replacing
from gemma4_impl.quant.tensor import QuantizedTensor

FORMAT = "gemma4-quantization-1"
JSON_NAME, HTML_NAME = "quantization.json", "quantization.html"
_BLOCK = 1 << 18
_CHUNK = 1024
_LAYER = re.compile(r"layers\.(\d+)\.(.+?)(?:\.weight)?")


class Sqnr:
    """Sums of squares of a weight and of its quantization error, over blocks of it."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, weight: Tensor, q: QuantizedTensor) -> None:
        """weight [..., N, K], and what it became."""
        flat = {name: None if (t := getattr(q, name)) is None else t.flatten(0, -2) for name in ("scale", "zero")}
        q = dataclasses.replace(q, qdata=q.qdata.flatten(0, -2), **flat)
        weight = weight.flatten(0, -2)
        # Small blocks stay in the processor's cache.
        step = max(1, _BLOCK // weight.shape[-1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            w = weight[rows].float()
            self.signal += _squares(w)
            self.noise += _squares(q[rows].dequantize().sub_(w))

    def merge(self, other: "Sqnr") -> None:
        """Adds the sums of other blocks."""
        self.signal += other.signal
        self.noise += other.noise

    @property
    def db(self) -> float:
        """10 log10(sum w^2 / sum (w - w')^2); infinite where nothing was lost."""
        return decibels(self.signal, self.noise)


def decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _squares(x: Tensor) -> float:
    """Sum of squares: of 1024 at a time in float32, then in float64, which is right to 1e-6."""
    x = x.flatten()
    whole = x.numel() // _CHUNK * _CHUNK
    chunks = x[:whole].view(-1, 1, _CHUNK)
    total = (chunks @ chunks.mT).sum(dtype=torch.float64) + x[whole:].double().square().sum()
    return float(total if total.isfinite() else x.double().square().sum())


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    stored: str
    """torchao's class, or the dtype of a tensor that was not quantized."""
    bytes_before: int
    """0 for a head that was tied to the embedding."""
    bytes_after: int
    bits: int | None = None
    group_size: int | None = None
    """Weights that share a scale; None: a whole row."""
    symmetric: bool | None = None
    method: str | None = None
    signal: float = 0.0
    """Sum of squares."""
    noise: float = 0.0
    """Sum of squared errors."""

    @property
    def sqnr_db(self) -> float:
        return decibels(self.signal, self.noise)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / math.prod(self.shape) if math.prod(self.shape) else 0.0

    @property
    def place(self) -> tuple[str, int | None]:
        """("self_attn.q_proj", 3), or ("lm_head", None) outside of the layers."""
        match = _LAYER.fullmatch(self.name)
        return (match[2], int(match[1])) if match else (self.name.removesuffix(".weight"), None)


@dataclass(frozen=True)
class QuantizationReport:
    """Everything that `quantize_checkpoint` did."""

    source: str
    """Name of the folder."""
    fingerprint: str
    """`Weights.fingerprint` of the source."""
    recipe: Mapping[str, Any]
    """The recipe itself, as its file would spell it, and its name."""
    versions: Mapping[str, str]
    created: str
    tensors: tuple[TensorReport, ...]
    """In the model's order, quantized or not."""
    untied: bool
    """Whether the head was the embedding and is now a tensor of its own."""
    towers: tuple[str, ...] = ()
    """Vision and audio tensors, copied as they were; not among `tensors`."""
    tower_bytes: int = 0
    dropped: tuple[str, ...] = ()
    """Tensors of the source that the model does not read."""

    @property
    def quantized(self) -> list[TensorReport]:
        return [t for t in self.tensors if t.bits is not None]

    @property
    def bytes_before(self) -> int:
        return sum(t.bytes_before for t in self.tensors) + self.tower_bytes

    @property
    def bytes_after(self) -> int:
        return sum(t.bytes_after for t in self.tensors) + self.tower_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized tensors, scales included."""
        weights = sum(math.prod(t.shape) for t in self.quantized)
        return 8 * sum(t.bytes_after for t in self.quantized) / weights if weights else 0.0

    @property
    def sqnr_db(self) -> float:
        """Of all quantized weights together: those of a large scale count most."""
        return decibels(sum(t.signal for t in self.quantized), sum(t.noise for t in self.quantized))

    def to_json(self) -> dict[str, Any]:
        """Strict JSON; an infinite ratio is the string "inf"."""
        return {
            "format": FORMAT,
            "source": {"name": self.source, "fingerprint": self.fingerprint},
            "created": self.created,
            "versions": dict(self.versions),
            "recipe": dict(self.recipe),
            "untied": self.untied,
            "summary": {
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
                "bits_per_weight": self.bits_per_weight,
                "sqnr_db": _number(self.sqnr_db),
            },
            "tensors": [_row(t) for t in self.tensors],
            "towers": {"tensors": list(self.towers), "bytes": self.tower_bytes},
            "dropped": list(self.dropped),
        }

    def write(self, folder: Path) -> None:
        """Writes quantization.json and quantization.html to `folder`. Without matplotlib the page has no pictures,
        and says so."""
        from gemma4_impl.quant.page import to_html

        text = json.dumps(self.to_json(), allow_nan=False, indent=1) + "\n"
        page = to_html(self)
        with replacing(folder / JSON_NAME) as json_path, replacing(folder / HTML_NAME) as html_path:
            json_path.write_text(text, encoding="utf-8")
            html_path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _row(t: TensorReport) -> dict[str, Any]:
    row = {
        "name": t.name,
        "shape": list(t.shape),
        "stored": t.stored,
        "bytes_before": t.bytes_before,
        "bytes_after": t.bytes_after,
    }
    if t.bits is None:
        return row
    row |= {"bits": t.bits, "group_size": t.group_size, "symmetric": t.symmetric, "method": t.method}
    return row | {"bits_per_weight": t.bits_per_weight, "sqnr_db": _number(t.sqnr_db)}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
