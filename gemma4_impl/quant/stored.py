"""How torchao stores a quantized weight in safetensors, its parts and their metadata; torchao itself is not needed."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_impl.errors import short
from gemma4_impl.quant.container import CODES, Spec
from gemma4_impl.quant.tensor import QuantizedTensor

INT4, INTX = "Int4Tensor", "IntxUnpackedToInt8Tensor"
KINDS = {4: INT4, 8: INTX}
"""What codes of so many bits are stored as."""
PARTS = ("qdata", "scale", "zero_point")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTX_BITS = {f"int{bits}": 4 if bits <= 4 else 8 for bits in range(1, 9)}


def part_name(name: str, part: str) -> str:
    """`a.weight` -> `a._weight_qdata`, as torchao calls it."""
    module, _, leaf = name.rpartition(".")
    return f"{module}._{leaf}_{part}"


@dataclass(frozen=True)
class Stored:
    """One weight [N, K] or [E, N, K]. Int4Tensor: two's-complement nibbles, even k low, w = q * scale + zero_point,
    scale and zero_point [.., K / G, N]. IntxUnpackedToInt8Tensor: int8, w = (q - zero_point) * scale, [.., N, K / G].
    """

    kind: str
    shape: tuple[int, ...]
    group_size: int
    bits: int
    """Of the codes: 4 or 8."""

    def parts(self, dtype: torch.dtype) -> dict[str, Spec]:
        """What `split` gives for the whole weight, with scales of `dtype`."""
        *outer, n, k = self.shape
        groups = k // self.group_size
        if self.kind == INT4:
            scale = (dtype, (*outer, groups, n))
            return {"qdata": (torch.int8, (*outer, n, k // 2)), "scale": scale, "zero_point": scale}
        return {
            "qdata": (torch.int8, self.shape),
            "scale": (dtype, (*outer, n, groups)),
            "zero_point": (torch.int8, (*outer, n, groups)),
        }

    def metadata(self, dtype: torch.dtype) -> str:
        """The JSON text that torchao files under the weight's name."""
        block = [1] * (len(self.shape) - 1) + [self.group_size]
        if self.kind == INT4:
            data = {"activation_dtype": _dtype("bfloat16"), "block_size": block, "shape": list(self.shape)}
        else:
            data = {"target_dtype": _dtype(f"int{self.bits}"), "block_size": block}
            data |= {"dtype": _dtype(str(dtype).removeprefix("torch.")), "activation_quantization": None}
        return json.dumps({"_type": self.kind, "_data": data, "_tensor_data_names": PARTS})


def split(q: QuantizedTensor) -> dict[str, Tensor]:
    """The parts of some rows, or of some experts, all of them still [.., N, *]: Int4Tensor's scale and zero_point are
    to be transposed when their last rows are there. Raises ValueError for what neither class holds exactly."""
    if q.bits == 4:
        if q.offset != 8:
            raise ValueError(f"offset = {q.offset}: Int4Tensor's codes are signed (8)")
        zero = torch.zeros_like(q.scale) if q.zero is None else q.zero
        return {"qdata": (q.qdata ^ 0x88).view(torch.int8), "scale": q.scale, "zero_point": zero}
    if q.zero is not None:
        raise ValueError("8 bits with a zero: IntxUnpackedToInt8Tensor has no additive one")
    zero = torch.full(q.scale.shape, q.offset, dtype=torch.int8)
    return {"qdata": q.qdata, "scale": q.scale, "zero_point": zero}


def join(stored: Stored, parts: dict[str, Tensor]) -> QuantizedTensor:
    """Inverse of `split`, from the parts as they lie in the file (Int4Tensor's scales transposed). A zero point that
    differs by group becomes an additive zero, with float32 scales; it equals torchao's product unless that rounds.
    Raises ValueError for codes that the metadata's dtype does not have."""
    qdata, scale, zero = (parts[name] for name in PARTS)
    if stored.kind == INT4:
        scale, zero = (t.transpose(-1, -2).contiguous() for t in (scale, zero))
        zero = zero if zero.any() else None
        return QuantizedTensor(qdata.view(torch.uint8) ^ 0x88, scale, zero, bits=4, offset=8)
    offset = 0
    if stored.bits == 4:
        if qdata.numel() and (qdata.amin() < -8 or qdata.amax() > 7):
            raise ValueError("codes outside of -8..7 in a tensor of 4 bits")
        low, high = qdata[..., ::2] + 8, qdata[..., 1::2] + 8
        qdata, offset = (low | (high << 4)).view(torch.uint8), 8
    first = zero.flatten()[:1]
    varies = zero.any() if zero.is_floating_point() else (zero != first).any()
    if varies:
        scale = scale.float()
        return QuantizedTensor(qdata, scale, scale * zero.float().neg(), stored.bits, offset)
    return QuantizedTensor(qdata, scale, None, stored.bits, offset + int(first.sum()))


def read_metadata(entry: Any, qdata_shape: tuple[int, ...] | None) -> Stored:
    """What `entry`, parsed JSON, says of a weight whose qdata has this shape in the file. Raises ValueError."""
    if not isinstance(entry, dict) or not isinstance(entry.get("_type"), str):
        raise ValueError("its metadata names no tensor class")
    kind, data, names = entry["_type"], entry.get("_data"), entry.get("_tensor_data_names")
    if kind not in (INT4, INTX):
        raise ValueError(f"a torchao {short(kind)}; only {INT4} and {INTX} are supported")
    if not isinstance(data, dict) or not isinstance(names, list):
        raise ValueError(f"its metadata is no {kind}")
    if "act_pre_scale" in names:
        raise ValueError("it scales activations (act_pre_scale), which is not supported")
    if sorted(map(str, names)) != sorted(PARTS):
        raise ValueError(f"its parts are {short(names)}; expected {', '.join(PARTS)}")
    for key in ("activation_quantization", "activation_dtype"):
        if (value := data.get(key)) not in (None, _dtype("bfloat16")):
            raise ValueError(f"it quantizes activations ({key} {short(value)}), which is not supported")
    if qdata_shape is None:
        raise ValueError("its qdata is in no file")
    bits = 4
    shape = list(qdata_shape)
    if kind == INT4:
        shape[-1:] = [2 * size for size in shape[-1:]]
        if data.get("shape") != shape:
            raise ValueError(f"its shape is {short(data.get('shape'))}, but its qdata holds {shape}")
    else:
        target = data.get("target_dtype")
        bits = _INTX_BITS.get(str(target.get("_data"))) if isinstance(target, dict) else None
        if bits is None:
            raise ValueError(f"target_dtype is {short(target)}; expected int1 to int8")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"its shape is {shape}; expected a matrix, or a stack of them")
    if bits == 4 and shape[-1] % 2:
        raise ValueError(f"its rows of {shape[-1]} cannot be packed in pairs")
    block = data.get("block_size")
    if not isinstance(block, list) or len(block) != len(shape) or not all(type(size) is int for size in block):
        raise ValueError(f"block_size is {short(block)}; expected {len(shape)} integers")
    if block[:-1] != [1] * (len(shape) - 1) or block[-1] < 1 or shape[-1] % block[-1]:
        raise ValueError(f"block_size {short(block)}: only groups that divide a row are supported, shape {shape}")
    return Stored(kind, tuple(shape), block[-1], bits)


def check_parts(stored: Stored, found: dict[str, tuple[str, tuple[int, ...]]]) -> torch.dtype:
    """Compares the dtypes (as safetensors spells them) and shapes in a file; returns the dtype of the scales.
    Raises ValueError."""
    floats = {CODES[dtype]: dtype for dtype in SCALE_DTYPES}
    scale = found["scale"][0]
    allowed = {"qdata": ("I8", "U8"), "scale": tuple(floats), "zero_point": (scale,)}
    if stored.kind == INTX:
        allowed |= {"qdata": ("I8",), "zero_point": ("I8", *floats)}
    for part, (_, shape) in stored.parts(floats.get(scale, torch.float32)).items():
        code, at = found[part]
        if code not in allowed[part] or at != shape:
            expected = f"{' or '.join(allowed[part])} {list(shape)}"
            raise ValueError(f"its {part} is {code} {list(at)}; expected {expected}")
    return floats[scale]


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}
