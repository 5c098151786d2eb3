"""The tensor types of GGUF files: their blocks, and their values in float32."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4_impl.gguf.formats import FORMATS, aligned, empty
from gemma4_impl.gguf.pieces import in_pieces


@dataclass(frozen=True)
class BlockType:
    """How a row of weights is laid out: blocks of `block` weights, each `nbytes` long."""

    name: str
    id: int
    """ggml's number of the type, which is what a GGUF file stores."""
    block: int
    nbytes: int
    dtype: torch.dtype | None = None
    """Of a plain type; None when the blocks are quantized."""

    @property
    def quantized(self) -> bool:
        return self.dtype is None


_TYPES = (
    BlockType("F32", 0, 1, 4, torch.float32),
    BlockType("F16", 1, 1, 2, torch.float16),
    BlockType("BF16", 30, 1, 2, torch.bfloat16),
    BlockType("Q4_0", 2, 32, 18),
    BlockType("Q4_1", 3, 32, 20),
    BlockType("Q5_0", 6, 32, 22),
    BlockType("Q5_1", 7, 32, 24),
    BlockType("Q8_0", 8, 32, 34),
    BlockType("Q2_K", 10, 256, 84),
    BlockType("Q3_K", 11, 256, 110),
    BlockType("Q4_K", 12, 256, 144),
    BlockType("Q5_K", 13, 256, 176),
    BlockType("Q6_K", 14, 256, 210),
    BlockType("IQ4_NL", 20, 32, 18),
    BlockType("IQ4_XS", 23, 256, 136),
    BlockType("MXFP4", 39, 32, 17),
)
GGML_TYPES: dict[int, BlockType] = {t.id: t for t in _TYPES}
"""Every type that can be read, by ggml's number."""

_UNREADABLE = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}


def type_of(ggml_type_id: int) -> BlockType:
    """ValueError, with the names of the types that can be read, for any other number."""
    if found := GGML_TYPES.get(ggml_type_id):
        return found
    name = _UNREADABLE.get(ggml_type_id, "which ggml does not define")
    raise ValueError(f"tensor type {ggml_type_id} ({name}) cannot be read; can be: {', '.join(t.name for t in _TYPES)}")


def bytes_per_row(type: BlockType, K: int) -> int:
    """Of a row of K weights; ValueError if K is not a whole number of blocks."""
    if K % type.block:
        raise ValueError(f"rows of {K} weights are not a multiple of {type.name}'s block of {type.block}")
    return K // type.block * type.nbytes


def check_blocks(data: Tensor, type: BlockType) -> None:
    """ValueError unless `data` is uint8 [..., bytes_per_row], of whole blocks."""
    if data.dtype != torch.uint8 or not data.dim():
        raise ValueError(f"{type.name} blocks are uint8 [..., bytes per row], not {data.dtype} {list(data.shape)}")
    if data.shape[-1] % type.nbytes:
        raise ValueError(f"rows of {data.shape[-1]} bytes are not a multiple of {type.name}'s block of {type.nbytes}")


def dense(data: Tensor, type: BlockType) -> Tensor:
    """A plain type's bytes, uint8 [..., bytes_per_row], in its own dtype [..., K]; not a copy unless they are
    misaligned. ValueError for a quantized type and for incomplete rows."""
    check_blocks(data, type)
    if type.dtype is None:
        raise ValueError(f"{type.name} is quantized: dequantize or repack it")
    return aligned(data, type.nbytes).view(type.dtype)


def dequantize(data: Tensor, type: BlockType) -> Tensor:
    """uint8 [..., bytes_per_row] -> float32 [..., K], on the CPU: the bits that gguf-py gives, except for the sign and
    payload of a NaN, which IEEE 754 leaves open. F32 is viewed as by `dense`. Memory: the result and a few MB a
    thread.    ValueError for incomplete rows."""
    if not type.quantized:
        return dense(data, type).to(torch.float32)
    check_blocks(data, type)
    form = FORMATS[type.name]
    out = empty(*data.shape[:-1], data.shape[-1] // type.nbytes * type.block)
    blocks, rows = data.reshape(-1, type.nbytes), out.view(-1, type.block)

    def fill(part: slice) -> None:
        weights = form.empty(len(blocks[part]), type.block)
        form.unpack(aligned(blocks[part], 8), weights.qdata, weights.scale, weights.zero)
        weights.dequantize(out=rows[part])

    in_pieces(fill, len(blocks), type.block)
    return out
