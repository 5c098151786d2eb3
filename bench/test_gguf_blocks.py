"""GGUF blocks, from the mapped file: ours and gguf-py's in turn, on the same bytes."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from torch import Tensor

from gemma4_impl.gguf.blocks import GGML_TYPES, BlockType, bytes_per_row, dequantize
from gemma4_impl.gguf.repack import repack

K = 5376
ROWS = {"Q4_K": 21_504}
"""A gate_proj of the 31B for the type that most of a file is in."""
LESS = 5376
"""A quarter of one for the others."""
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
"""Times as fast as gguf-py's `dequantize` is what `repack` of Q4_K must be, in the median of the rounds."""


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture
def file(type: BlockType, tmp_path: Path) -> Path:
    """Random blocks, with scales as small as weights have."""
    rows = ROWS.get(type.name, LESS)
    blocks = numpy.random.default_rng(0).integers(0, 256, (rows * K // type.block, type.nbytes), dtype=numpy.uint8)
    for at in SCALES[type.name]:
        blocks[:, at + 1] = blocks[:, at + 1] & 0x83 | 0x10
    if type.name == "MXFP4":
        blocks[:, 0] = 110 + blocks[:, 0] % 16
    path = tmp_path / type.name
    blocks.tofile(path)
    return path


def _gguf_py(data: Tensor, type: BlockType) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(type.id)))


WAYS: dict[str, Callable] = {"repack": repack, "dequantize": dequantize, "gguf-py's dequantize": _gguf_py}


@pytest.mark.parametrize("type", TYPES, ids=[t.name for t in TYPES])
def test_blocks(benchmark, file: Path, type: BlockType) -> None:
    """The row's time is that of `repack`; the others run before it in every round."""

    rows = ROWS.get(type.name, LESS)

    def run(way: str):
        data = torch.from_numpy(numpy.memmap(file, numpy.uint8, "c")).view(rows, bytes_per_row(type, K))
        return WAYS[way](data, type)

    truth = run("gguf-py's dequantize").view(torch.int32)
    for way, values in (("repack", run("repack").dequantize()), ("dequantize", run("dequantize"))):
        if not torch.equal(values.view(torch.int32), truth):
            pytest.fail(f"{way} of {type.name} does not give gguf-py's values; no time is published")
    del truth, values

    times: dict[str, list[float]] = {way: [] for way in WAYS if way != "repack"}

    def others() -> None:
        for way, seconds in times.items():
            start = time.perf_counter()
            run(way)
            seconds.append(time.perf_counter() - start)

    benchmark.group = f"GGUF blocks, {rows} x {K}"
    benchmark.pedantic(run, args=("repack",), setup=others, rounds=5)
    benchmark.extra_info.update(type=type.name, threads=torch.get_num_threads())
    if not benchmark.enabled:
        return
    times["repack"] = benchmark.stats.stats.data
    peer = times["gguf-py's dequantize"]
    for way, seconds in times.items():
        benchmark.extra_info[f"{way} {type.name}, Gweights/s"] = rows * K / statistics.median(seconds) / 1e9
        if way in ("repack", "dequantize"):
            ratio = statistics.median(p / s for p, s in zip(peer, seconds, strict=True))
            benchmark.extra_info[f"{way} {type.name}: times as fast as gguf-py's dequantize"] = ratio
            if type.name == "Q4_K" and way == "repack":
                assert ratio >= FLOOR
