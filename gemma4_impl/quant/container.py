"""A safetensors file written piece by piece, for tensors that are larger than what should be in memory at once."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""What safetensors calls torch's dtypes."""

Spec = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor to come."""


def nbytes(spec: Spec) -> int:
    dtype, shape = spec
    return dtype.itemsize * torch.Size(shape).numel()


class StreamWriter:
    """Writes the tensors of `specs` to `path`: in any order, each in consecutive pieces. The file is complete, and
    valid, once `close` returns; use it as a context manager, which closes it unless an error passes through."""

    def __init__(self, path: str | Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]):
        # The widest elements first keeps every tensor aligned, as the safetensors library itself has it.
        order = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        self._at: dict[str, int] = {}
        for name in order:
            dtype, shape = specs[name]
            self._at[name] = end
            end += nbytes(specs[name])
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [self._at[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._specs = specs
        self._left = {name: nbytes(specs[name]) for name in order}
        self._at = {name: start + at for name, at in self._at.items()}
        self._file = open(path, "wb")  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, piece: Tensor) -> None:
        """The next elements of `name`, in row-major order, on the CPU."""
        if piece.dtype != self._specs[name][0] or piece.nbytes > self._left[name]:
            raise ValueError(f"{name}: {piece.nbytes} bytes of {piece.dtype} do not fit {self._specs[name]}")
        self._file.seek(self._at[name])
        self._file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
        self._at[name] += piece.nbytes
        self._left[name] -= piece.nbytes

    def close(self) -> None:
        """Raises ValueError if a tensor lacks a piece."""
        self._file.close()
        if missing := [name for name, left in self._left.items() if left]:
            raise ValueError(f"{self._file.name}: {missing[0]} was not written to its end")

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self._file.close()
