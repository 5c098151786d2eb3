"""A quantized checkpoint folder's weights as torchao reads them: its safetensors layout, its dequantization."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gemma4_impl.names import from_hf
from reference.weights import safetensors_files, stored_as

_PLAIN = "Tensor"


class TorchAOWeights:
    """A `reference.weights.Source`. Files are mapped; a tensor is dequantized when asked for.

    Raises ImportError if torchao is not installed, KeyError for a tensor that the folder does not hold."""

    def __init__(self, path: str | Path):
        try:
            from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
        except ImportError:
            raise ImportError(
                f"{path}: torchao, which reads it for the reference, is not installed: "
                "pip install 'gemma4-parity[quant]'"
            ) from None
        self._unflatten = unflatten_tensor_state_dict
        self._handles: dict[str, Any] = {}
        self._metadata: dict[str, str] = {}
        for file in safetensors_files(Path(path)):
            handle = safe_open(file, framework="pt")
            self._handles |= dict.fromkeys(handle.keys(), handle)
            self._metadata |= handle.metadata() or {}
        quantized = json.loads(self._metadata.pop("tensor_names", "[]"))
        stored = {name for name in self._handles if f"{name.rpartition('.')[0]}._" not in name}
        self._stored = {name: key for key in [*stored, *quantized] if (name := from_hf(key))}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def tensor(self, name: str) -> Tensor:
        return _dense(self._read(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return _dense(_rows(self._read(name), start, stop))

    def is_quantized(self, name: str) -> bool:
        return self._type(self._stored[name]) != _PLAIN

    def kind(self, name: str) -> str:
        if not self.is_quantized(name):
            return str(self._read(name).dtype).removeprefix("torch.")
        value = self._read(name)
        bits = 4 if type(value).__name__ == "Int4Tensor" else value.target_dtype.itemsize * 8
        return stored_as(bits, value.block_size[-1], value.shape)

    def stored_bytes(self, name: str) -> int:
        return sum(self._handles[key].get_tensor(key).nbytes for key in self._parts(self._stored[name]))

    def _type(self, key: str) -> str:
        return json.loads(self._metadata[key])["_type"] if key in self._metadata else _PLAIN

    def _parts(self, key: str) -> list[str]:
        if self._type(key) == _PLAIN:
            return [key]
        module, _, leaf = key.rpartition(".")
        return [f"{module}._{leaf}_{part}" for part in json.loads(self._metadata[key])["_tensor_data_names"]]

    def _read(self, name: str) -> Tensor:
        key = self._stored[name]
        parts = {part: self._handles[part].get_tensor(part) for part in self._parts(key)}
        if self._type(key) == _PLAIN:
            return parts[key]
        state, _ = self._unflatten(parts, {key: self._metadata[key], "tensor_names": json.dumps([key])})
        return state[key]


def _dense(value: Tensor) -> Tensor:
    """Dequantized in float32, whatever the dtype of the scales."""
    if type(value) is Tensor:
        return value
    if type(value).__name__ != "Int4Tensor":
        return value.to(torch.float32).dequantize()
    # torchao dequantizes this type on GPUs alone: signed nibbles, the even k in the low one, q * scale + zero_point,
    # and scales [..., K / G, N].
    codes = torch.stack((value.qdata << 4, value.qdata & 0xF0), dim=-1).flatten(-2).view(torch.int8) >> 4
    scale, zero = (x.transpose(-1, -2).float() for x in (value.scale, value.zero_point))
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale[..., None] + zero[..., None]).flatten(-2)


def _rows(value: Tensor, start: int, stop: int) -> Tensor:
    """value[start:stop] without dequantizing the rest."""
    if type(value) is Tensor:
        return value[start:stop]
    part = slice(start, stop)
    qdata, scale, zero = value.qdata[part], value.scale, value.zero_point
    if type(value).__name__ != "Int4Tensor":
        zero, scale = zero[part], scale[part]
        return type(value)(qdata, scale, zero, value.target_dtype, value.block_size, value.dtype, None)
    if value.dim() == 2:
        zero, scale = zero[:, part], scale[:, part]
    else:
        zero, scale = zero[part], scale[part]
    shape = torch.Size((stop - start, *value.shape[1:]))
    return type(value)(qdata, scale, zero, value.block_size, shape)
