"""Every block type's values are gguf-py's, bit for bit, whatever the bytes."""

import gguf
import pytest
import torch
from block_bytes import MODEST, PLAIN, QUANTIZED, by_name, peer, random_bytes, same_bits, split
from hypothesis import given
from hypothesis import strategies as st

from gemma4_impl.gguf import pieces
from gemma4_impl.gguf.blocks import GGML_TYPES, bytes_per_row, dense, dequantize, type_of


def test_the_table_is_ggufs():
    for type in GGML_TYPES.values():
        assert (type.block, type.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type.name]]
        assert gguf.GGMLQuantizationType[type.name] == type.id
        assert type_of(type.id) is type


def test_any_other_type_is_refused_by_name():
    for other in gguf.GGMLQuantizationType:
        if other not in GGML_TYPES:
            with pytest.raises(ValueError, match=rf"type {int(other)} \({other.name}\) cannot be read.*Q4_K.*MXFP4"):
                type_of(other)
    for number in (-1, 4, 5, 43, 1 << 40):
        with pytest.raises(ValueError, match=f"type {number} "):
            type_of(number)


@by_name(QUANTIZED)
def test_any_block(type):
    @MODEST
    @given(st.integers(1, 3).flatmap(lambda n: st.binary(min_size=n * type.nbytes, max_size=n * type.nbytes)))
    def check(data):
        row = torch.frombuffer(bytearray(data), dtype=torch.uint8)[None]
        assert same_bits(dequantize(row, type), peer(row, type))

    check()


@by_name(QUANTIZED)
def test_any_shape(type):
    """Rows, stacks of them, and pieces that end within a row, on several threads."""

    @MODEST
    @given(
        lead=st.lists(st.integers(1, 5), min_size=1, max_size=2),
        blocks=st.integers(1, 9),
        piece=st.integers(1, 12),
        threads=st.integers(1, 3),
        seed=st.integers(0, 1 << 32),
    )
    def check(lead, blocks, piece, threads, seed):
        data = random_bytes(seed, *lead, blocks * type.nbytes)
        with split(piece * type.block, threads):
            assert same_bits(dequantize(data, type), peer(data, type))

    check()


@by_name(QUANTIZED)
def test_more_than_one_piece(type):
    data = random_bytes(0, 3, (pieces.PIECE // 2 // type.block + 1) * type.nbytes)
    assert same_bits(dequantize(data, type), peer(data, type))


@by_name([t for t in PLAIN if t.nbytes == 2])
def test_every_value_of_two_bytes(type):
    data = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(8, -1)
    assert same_bits(dequantize(data, type), peer(data, type))


def test_every_scale_and_code_of_mxfp4():
    """Down to the subnormal scales 2 ** -128 and 2 ** -127, and up to those that overflow."""
    codes = torch.arange(16, dtype=torch.uint8)
    data = torch.cat((torch.arange(256).to(torch.uint8)[:, None], (codes | codes.flip(0) << 4).expand(256, 16)), 1)
    type = next(t for t in QUANTIZED if t.name == "MXFP4")
    values = dequantize(data, type)
    assert same_bits(values, peer(data, type))
    assert values[0, 1] == 2.0**-128
    assert values[255, 1] == 2.0**127
    assert values[255, 7].isinf()


@by_name(PLAIN)
def test_plain_types_are_viewed(type):
    data = random_bytes(0, 4, 6 * type.nbytes)
    own = dense(data, type)
    assert (own.dtype, own.shape, own.data_ptr()) == (type.dtype, (4, 6), data.data_ptr())
    assert torch.equal(own.view(torch.uint8), data)
    assert same_bits(dequantize(data, type), peer(data, type))
    assert same_bits(dequantize(data[0], type), peer(data[0], type))


@by_name(list(GGML_TYPES.values()))
def test_bytes_anywhere_in_memory(type):
    nbytes = 3 * type.nbytes
    held = random_bytes(1, 2 * nbytes + 16)
    for start in (1, 2, 3, 4, 6):
        data = held[start : start + 2 * nbytes].view(2, nbytes)
        assert same_bits(dequantize(data, type), peer(data, type))
    columns = random_bytes(2, 2, nbytes + 5)[:, 5:]
    assert same_bits(dequantize(columns, type), peer(columns.contiguous(), type))


@by_name(list(GGML_TYPES.values()))
def test_in_inference_mode(type):
    with torch.inference_mode():
        data = random_bytes(3, 2, 2 * type.nbytes)
        assert same_bits(dequantize(data, type), peer(data, type))


GRIDS = {
    "Q4_0": (-8, 7, 1.0),
    "Q4_1": (0, 15, 1.0),
    "Q5_0": (-16, 15, 1.0),
    "Q5_1": (0, 31, 1.0),
    "Q8_0": (-127, 127, 1.0),
    "MXFP4": (-12, 12, 0.5),
}
"""The codes that a block can hold, and the step at scale 1."""


@pytest.mark.parametrize("name", GRIDS)
def test_what_gguf_py_quantizes_without_loss_comes_back(name):
    type = next(t for t in QUANTIZED if t.name == name)
    low, high, step = GRIDS[name]

    @MODEST
    @given(st.lists(st.integers(low, high), min_size=64, max_size=64), st.integers(-8, 8))
    def check(codes, exponent):
        rows = torch.tensor(codes, dtype=torch.float32).view(2, 32)
        if name == "MXFP4":
            rows = torch.where(rows.abs() > 4, rows // 2 * 2, rows)
            rows = torch.where(rows.abs() == 10, 8, rows)
        # The extremes fix the scale (and the minimum).
        rows[:, 0], rows[:, 31] = (low, high) if name != "Q4_0" else (low, 0)
        rows *= step * 2.0**exponent
        data = torch.from_numpy(gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType(type.id)))
        assert torch.equal(dequantize(data, type), rows)

    check()


@by_name(list(GGML_TYPES.values()))
def test_incomplete_rows_are_refused(type):
    for width in (type.nbytes * 2 + 1, type.nbytes - 1):
        if width % type.nbytes:
            with pytest.raises(ValueError, match=f"{width} bytes are not a multiple of {type.name}'s block"):
                dequantize(torch.zeros(2, width, dtype=torch.uint8), type)
    with pytest.raises(ValueError, match=r"uint8 \[..., bytes per row\], not torch.int8"):
        dequantize(torch.zeros(2, type.nbytes, dtype=torch.int8), type)
    with pytest.raises(ValueError, match="uint8"):
        dequantize(torch.zeros((), dtype=torch.uint8), type)
    assert bytes_per_row(type, 3 * type.block) == 3 * type.nbytes
    if type.quantized:
        with pytest.raises(ValueError, match="is quantized"):
            dense(torch.zeros(2, type.nbytes, dtype=torch.uint8), type)
        with pytest.raises(ValueError, match=f"{type.block + 1} weights are not a multiple"):
            bytes_per_row(type, type.block + 1)


@by_name(list(GGML_TYPES.values()))
def test_no_rows(type):
    assert dequantize(torch.empty(0, 2 * type.nbytes, dtype=torch.uint8), type).shape == (0, 2 * type.block)
