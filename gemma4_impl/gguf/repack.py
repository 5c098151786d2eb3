"""GGUF blocks to integer group tensors, exactly: nothing but the scales and zeros becomes floating point."""

from torch import Tensor

from gemma4_impl.gguf.blocks import BlockType, check_blocks
from gemma4_impl.gguf.formats import FORMATS, aligned
from gemma4_impl.gguf.pieces import in_pieces
from gemma4_impl.quant.tensor import QuantizedTensor


def repack(data: Tensor, type: BlockType) -> QuantizedTensor:
    """uint8 [..., rows, bytes_per_row] -> QuantizedTensor [..., rows, K] on the CPU, scale and zero in float32, whose
    float32 values are those of `blocks.dequantize`. Memory: the result and a few MB a thread. ValueError for a plain
    type and for incomplete rows."""
    check_blocks(data, type)
    if not type.quantized:
        raise ValueError(f"{type.name} is not quantized: there is nothing to repack")
    if data.dim() < 2 or not data.shape[-1]:
        raise ValueError(f"a quantized weight has rows of blocks; these bytes are {list(data.shape)}")
    form = FORMATS[type.name]
    out = form.empty(*data.shape[:-1], data.shape[-1] // type.nbytes * type.block)
    blocks = data.reshape(-1, type.nbytes)
    qdata = out.qdata.view(-1, type.block * form.bits // 8)
    scale, zero = (None if t is None else t.view(-1, type.block // form.group) for t in (out.scale, out.zero))

    def fill(part: slice) -> None:
        form.unpack(aligned(blocks[part], 8), qdata[part], scale[part], None if zero is None else zero[part])

    in_pieces(fill, len(blocks), type.block)
    return out
