"""GGUF blocks from the mapped file: ours and gguf-py's, on the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from bench.harness import Backend, Case, equal_to, grid, needs, publish, ratio, scratch, timed
from bench.timing import CORES
from gemma4_impl.gguf.blocks import GGML_TYPES, BlockType, bytes_per_row, dequantize
from gemma4_impl.gguf.repack import repack

K = 5376
ROWS = {"Q4_K": 21_504}
"""A gate_proj of the 31B for the type that most of a file is in."""
LESS = 2688
"""An eighth of one for the others."""
TYPES = [t for t in GGML_TYPES.values() if t.quantized]
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "MXFP4": [],
}
"""Where a block has a float16."""
FLOOR = 8.0
"""Times as fast as gguf-py's `dequantize` is what `repack` of Q4_K must be."""


@dataclass(frozen=True)
class Blocks:
    path: Path
    type: BlockType
    rows: int
    K: int

    def read(self) -> Tensor:
        """The file's bytes, mapped anew."""
        mapped = torch.from_numpy(numpy.memmap(self.path, numpy.uint8, "c"))
        return mapped.view(self.rows, bytes_per_row(self.type, self.K))


def _make(type: BlockType, rows: int, K: int) -> Blocks:
    """Random blocks, with scales as small as weights have."""
    blocks = numpy.random.default_rng(0).integers(0, 256, (rows * K // type.block, type.nbytes), dtype=numpy.uint8)
    for at in SCALES[type.name]:
        blocks[:, at + 1] = blocks[:, at + 1] & 0x83 | 0x10
    if type.name == "MXFP4":
        blocks[:, 0] = 110 + blocks[:, 0] % 16
    path = scratch() / f"{type.name}-{rows}"
    blocks.tofile(path)
    return Blocks(path, type, rows, K)


def _gguf_py(blocks: Blocks) -> Tensor:
    import gguf

    kind = gguf.GGMLQuantizationType(blocks.type.id)
    return torch.from_numpy(gguf.quants.dequantize(blocks.read().numpy(), kind))


BACKENDS = [
    Backend(
        "gemma4 repack",
        lambda b: lambda: repack(b.read(), b.type),
        ours=True,
        absent=needs("gguf"),
        read=lambda weight: weight.dequantize(),
    ),
    Backend("gemma4 dequantize", lambda b: lambda: dequantize(b.read(), b.type), ours=True, absent=needs("gguf")),
    Backend("gguf-py dequantize", lambda b: lambda: _gguf_py(b), absent=needs("gguf")),
]


def _case(type: BlockType, rows: int, K: int, size: str = "") -> Case:
    return Case(
        suite="load",
        operation="read GGUF blocks",
        shape=f"{size}{type.name} {rows}x{K}",
        backends=BACKENDS,
        make=lambda i: _make(type, rows, K),
        judge=lambda blocks: equal_to(_gguf_py(blocks)),
        weights=rows * K,
        rotate=False,
        threads=CORES,
    )


CASES = [_case(t, 16, 512, "tiny ") for t in TYPES if t.name == "Q4_K"]
CASES += [_case(t, ROWS.get(t.name, LESS), K) for t in TYPES]


@timed
@grid(CASES)
def test_blocks(benchmark: Any, rows: Callable, case: Case, backend: str) -> None:
    found = rows(case)
    publish(benchmark, found[backend])
    ours, peer = found.get("gemma4 repack"), found.get("gguf-py dequantize")
    if case.shape == f"Q4_K {ROWS['Q4_K']}x{K}" and found[backend] is ours and ours.times and peer and peer.times:
        times = ratio(ours, peer)
        if times < FLOOR:
            pytest.fail(f"repack is only {times:.1f} times as fast as gguf-py's dequantize")
