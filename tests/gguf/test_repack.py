"""The integer form of a block is the block: its values are `dequantize`'s, and its parts what the format says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from block_bytes import MODEST, PLAIN, QUANTIZED, by_name, random_bytes, same_bits, split
from hypothesis import given
from hypothesis import strategies as st

from gemma4_impl.gguf import pieces
from gemma4_impl.gguf.blocks import GGML_TYPES, dequantize
from gemma4_impl.gguf.repack import repack

BITS = dict.fromkeys(("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K"), 4)
GROUP = dict.fromkeys(("Q2_K", "Q3_K", "Q6_K"), 16)
MINIMUM = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}
CODES = {
    "Q4_0": (-8, 7),
    "Q4_1": (0, 15),
    "Q5_0": (-16, 15),
    "Q5_1": (0, 31),
    "Q8_0": (-128, 127),
    "Q2_K": (0, 3),
    "Q3_K": (-4, 3),
    "Q4_K": (0, 15),
    "Q5_K": (0, 31),
    "Q6_K": (-32, 31),
    "IQ4_NL": (-127, 113),
    "IQ4_XS": (-127, 113),
    "MXFP4": (-12, 12),
}


@by_name(QUANTIZED)
def test_any_bytes_mean_the_same(type):
    @MODEST
    @given(st.integers(1, 3).flatmap(lambda n: st.binary(min_size=n * type.nbytes, max_size=n * type.nbytes)))
    def check(data):
        row = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None]
        assert same_bits(repack(row, type).dequantize(), dequantize(row, type))

    check()


@by_name(QUANTIZED)
def test_any_shape(type):
    """Matrices and stacks of experts, in pieces that end within a row, on several threads."""

    @MODEST
    @given(
        lead=st.lists(st.integers(1, 5), min_size=1, max_size=3),
        blocks=st.integers(1, 9),
        piece=st.integers(1, 12),
        threads=st.integers(1, 3),
        seed=st.integers(0, 1 << 32),
    )
    def check(lead, blocks, piece, threads, seed):
        data = random_bytes(seed, *lead, blocks * type.nbytes)
        with split(piece * type.block, threads):
            packed = repack(data, type)
        assert packed.shape == (*lead, blocks * type.block)
        assert same_bits(packed.dequantize(), dequantize(data, type))
        if len(lead) > 1:
            assert torch.equal(packed[0].qdata, repack(data[0], type).qdata)

    check()


@by_name(QUANTIZED)
def test_more_than_one_piece(type):
    data = random_bytes(0, 3, (pieces.PIECE // 2 // type.block + 1) * type.nbytes)
    assert same_bits(repack(data, type).dequantize(), dequantize(data, type))


@by_name(QUANTIZED)
def test_the_form_of_each_type(type):
    """Bits, group, zero and range of the codes; random blocks reach both ends of the range."""
    packed = repack(random_bytes(1, 64, 256 // type.block * type.nbytes), type)
    assert packed.bits == BITS.get(type.name, 8)
    assert packed.group_size == GROUP.get(type.name, 32)
    assert packed.scale.dtype == torch.float32
    assert (packed.zero is not None) == (type.name in MINIMUM)
    codes = packed.codes().to(torch.int32) - packed.offset
    assert (codes.min(), codes.max()) == CODES[type.name]


@by_name(QUANTIZED)
def test_values_in_another_dtype_are_rounded_once(type):
    packed = repack(random_bytes(2, 3, 2, 256 // type.block * type.nbytes), type)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = packed.dequantize().to(dtype)
        out = torch.empty_like(rounded)
        packed.dequantize(out=out)
        for values in (packed.dequantize(dtype), out):
            assert values.dtype == dtype
            assert torch.equal(values.nan_to_num(), rounded.nan_to_num())


@by_name(QUANTIZED)
def test_in_inference_mode(type):
    data = random_bytes(3, 2, 2 * type.nbytes)
    expected = repack(data, type)
    with torch.inference_mode():
        packed = repack(data, type)
    assert torch.equal(packed.qdata, expected.qdata)


@by_name(list(GGML_TYPES.values()))
def test_refused(type):
    with pytest.raises(ValueError, match=r"uint8 \[..., bytes per row\]"):
        repack(torch.zeros(2, type.nbytes, dtype=torch.int16), type)
    if type in PLAIN:
        with pytest.raises(ValueError, match=f"{type.name} is not quantized"):
            repack(torch.zeros(2, type.nbytes, dtype=torch.uint8), type)
        return
    with pytest.raises(ValueError, match=f"{type.nbytes + 1} bytes are not a multiple"):
        repack(torch.zeros(2, type.nbytes + 1, dtype=torch.uint8), type)
    for shape in ((type.nbytes,), (2, 0)):
        with pytest.raises(ValueError, match="rows of blocks"):
            repack(torch.zeros(shape, dtype=torch.uint8), type)
    assert repack(torch.empty(0, type.nbytes, dtype=torch.uint8), type).shape == (0, type.block)


MEASURE = """
import torch
from gemma4_impl.gguf.blocks import GGML_TYPES, dequantize
from gemma4_impl.gguf.repack import repack

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":")) / 1024

torch.set_num_threads(1)
types = [t for t in GGML_TYPES.values() if t.quantized]
for type in types:
    few = torch.zeros(1024, type.nbytes, dtype=torch.uint8)
    repack(few, type), dequantize(few, type)  # what libraries allocate on first use is not counted
for type in types:
    data = torch.ones(2**24 // type.block, type.nbytes, dtype=torch.uint8)
    for run in (repack, dequantize):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from what is held now
        before = status("VmRSS")
        out = run(data, type)
        print(type.name, run.__name__, out.nbytes / 2**20, status("VmHWM") - before)
        del out
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory():
    """16 M weights a type. Besides the result, at most 3 bytes for each weight of one piece, in codes and indices."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    measured = [line.split() for line in done.stdout.splitlines()]
    assert len(measured) == 2 * len(QUANTIZED)
    scratch = 3 * pieces.PIECE / 2**20 + 1
    assert scratch < 8, "less than a copy of the codes, or the test would not see one"
    for name, run, size, peak in measured:
        assert float(size) - 1 <= float(peak) <= float(size) + scratch, (name, run)
