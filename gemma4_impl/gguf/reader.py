"""GGUF files, whole or split: a header that is checked before it is believed, and tensors as views of the mapped file.

Nothing is allocated, and no loop entered, on the word of a count or a length that the file is too short for."""

import math
import mmap
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gemma4_impl.errors import short
from gemma4_impl.gguf.blocks import BlockType, bytes_per_row, type_of

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {kind: struct.Struct("<" + code) for kind, code in _SCALARS.items()}
_U32, _U64 = _STRUCTS[4], _STRUCTS[10]
_length_at = _U64.unpack_from

# Bounds on the work that a header can cause, each far above a real file's: the largest vocabulary has 262,144 tokens
# and 514,906 merges, the largest model fewer than 1,000 tensors.
_MAX_ENTRIES = 1 << 14
_MAX_STRINGS = 1 << 22
_MAX_TEXT = 1 << 26
_MAX_KEY = (1 << 16) - 1
_MAX_NAME = 64
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32

Value = Any
"""bool, int, float, str or GGUFArray."""


class GGUFError(ValueError):
    """A file that is damaged, hostile, or no Gemma 4 in GGUF; the message names the file and the key or tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: the length of a row comes last."""
    type: BlockType
    path: Path
    """The file, or the part of a split one, that holds it."""
    offset: int
    """Bytes from the start of that file."""
    nbytes: int

    @property
    def row_nbytes(self) -> int:
        return bytes_per_row(self.type, self.shape[-1])


class GGUFArray:
    """An array of the metadata, decoded when asked for: as Python values, or numbers as a numpy view of the file."""

    def __init__(self, source: str, data: mmap.mmap, span: slice, count: int, kind: int):
        self._source, self._data, self._span, self._count, self._kind = source, data, span, count, kind

    @property
    def is_text(self) -> bool:
        return self._kind == _STRING

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        return self.tolist()[index] if self.is_text else self.numpy()[index].tolist()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __repr__(self) -> str:
        return f"<array of {self._count} {'strings' if self.is_text else self.numpy().dtype.name}>"

    def numpy(self) -> np.ndarray:
        """A read-only view. ValueError for strings."""
        if self.is_text:
            raise ValueError(f"{self._source} is an array of strings")
        dtype = np.dtype(_SCALARS[self._kind]).newbyteorder("<")
        return np.frombuffer(self._data, dtype, self._count, self._span.start)

    def tolist(self) -> list[Any]:
        """Every value. Raises GGUFError for a string that is not UTF-8."""
        if not self.is_text:
            return self.numpy().tolist()
        try:
            return [raw.decode() for raw in self.raw()]
        except UnicodeDecodeError:
            index = next(i for i, raw in enumerate(self.raw()) if not _is_utf8(raw))
            raise GGUFError(f"{self._source}: string {index} is not UTF-8") from None

    def raw(self) -> list[bytes]:
        """The strings as they are stored. ValueError for numbers."""
        if not self.is_text:
            raise ValueError(f"{self._source} is an array of numbers")
        data, at, out = self._data[self._span], 0, []
        for _ in range(self._count):
            start = at + 8
            at = start + _length_at(data, at)[0]
            out.append(data[start:at])
        return out


class GGUFFile:
    """A GGUF file of version 2 or 3, little-endian, mapped; the parts of a split file are read as one.

    Raises FileNotFoundError, and GGUFError for whatever is wrong with the header; the tensors' data are not read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        first = _Part(self.path)
        self._parts = {self.path: first}
        self._views: dict[Path, Tensor] = {}
        self.metadata: Mapping[str, Value] = first.metadata
        self.tensors: dict[str, TensorInfo] = first.tensors
        if self.metadata.get("split.count", 1) not in (0, 1):
            self._open_split()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file, or all parts of a split one."""
        return tuple(self._parts)

    def bytes(self, name: str) -> Tensor:
        """The tensor as it is stored, uint8 [..., rows, bytes per row]: a view of the mapped file.

        Raises KeyError, and ValueError after `close`."""
        info = self.tensors[name]
        if not self._parts:
            raise ValueError(f"{self.path}: the file was closed")
        if info.path not in self._views:
            self._views[info.path] = _view(self._parts[info.path].data)
        flat = self._views[info.path][info.offset : info.offset + info.nbytes]
        return flat.view(*info.shape[:-1], info.row_nbytes)

    def close(self) -> None:
        """Lets go of the tensors; the file stays mapped while views of it, or its metadata, are in use."""
        self._parts, self._views = {}, {}

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_split(self) -> None:
        number, count = self.metadata.get("split.no"), self.metadata["split.count"]
        if type(count) is not int or type(number) is not int or not 0 <= number < count:
            raise GGUFError(f"{self.path}: split.no = {short(number)} is no part of split.count = {short(count)}")
        match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", self.path.name)
        if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
            name = f"NAME-{number + 1:05d}-of-{count:05d}.gguf"
            raise GGUFError(f"{self.path}: is part {number + 1} of a file split in {count}; it must be called {name}")
        siblings = [self.path.with_name(f"{match[1]}-{i + 1:05d}-of-{match[3]}.gguf") for i in range(count)]
        if number:
            raise GGUFError(f"{self.path}: is part {number + 1} of {count}; give the first one, {siblings[0].name}")
        for i, path in enumerate(siblings[1:], start=1):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; {self.path.name} is one of {count} parts")
            part = _Part(path)
            if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (i, count):
                raise GGUFError(f"{path}: split.no and split.count do not say that it is part {i + 1} of {count}")
            if twice := part.tensors.keys() & self.tensors.keys():
                raise GGUFError(f"{path}: tensor {min(twice)!r} is in {self.tensors[min(twice)].path.name} too")
            self._parts[path] = part
            self.tensors |= part.tensors
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise GGUFError(f"{self.path}: split.tensors.count = {short(total)}, but there are {len(self.tensors)}")


class _Part:
    """One file: its mapping, metadata and tensors."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < 24:
                raise self._error(f"not a GGUF file: it has {self.size} bytes")
            self.data = _map(file)
        self._at = 0
        self._strings_left, self._text_left = _MAX_STRINGS, _MAX_TEXT
        tensors, keys = self._read_counts()
        self.metadata = self._read_metadata(keys)
        self.tensors = self._read_tensors(tensors)

    def _error(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path}: {what}")

    def _take(self, length: int, what: str) -> int:
        """Passes `length` bytes and returns where they start."""
        start = self._at
        if length > self.size - start:
            raise self._error(f"{what} ends past the end of the file; the file is truncated or damaged")
        self._at = start + length
        return start

    def _number(self, form: struct.Struct, what: str) -> Any:
        return form.unpack_from(self.data, self._take(form.size, what))[0]

    def _string(self, limit: int, what: str) -> str:
        length = self._number(_U64, what)
        start = self._take(length, what)
        if length > limit:
            raise self._error(f"{what} is a string of {length} bytes; at most {limit} are supported")
        raw = self.data[start : self._at]
        if not _is_utf8(raw):
            raise self._error(f"{what} is not UTF-8")
        return raw.decode()

    def _read_counts(self) -> tuple[int, int]:
        magic = self.data[:4]
        if magic != b"GGUF":
            raise self._error(f"not a GGUF file: it starts with {magic!r}")
        self._at = 4
        version = self._number(_U32, "the header")
        if version and version & 0xFFFF == 0:
            raise self._error("is big-endian, which is not supported; convert the model again as little-endian")
        if version not in (2, 3):
            raise self._error(f"GGUF version {version} is not supported; 2 and 3 are")
        tensors, keys = self._number(_U64, "the header"), self._number(_U64, "the header")
        # The least that an entry takes: a length and one byte of name, then its numbers.
        for what, count, least in (("tensors", tensors, 33), ("metadata keys", keys, 14)):
            if count > min(_MAX_ENTRIES, self.size // least):
                raise self._error(f"claims {count} {what}; the file is truncated or damaged")
        return tensors, keys

    def _read_metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for i in range(count):
            key = self._string(_MAX_KEY, f"metadata key {i}")
            if not key or key in metadata:
                raise self._error(f"metadata key {i}, {short(key)}, {'was there before' if key else 'is empty'}")
            metadata[key] = self._value(short(key))
        return metadata

    def _value(self, key: str) -> Value:
        kind = self._number(_U32, key)
        if kind in _STRUCTS:
            return self._number(_STRUCTS[kind], key)
        if kind == _STRING:
            start = self._at
            text = self._string(self._text_left, key)
            self._text_left -= self._at - start
            return text
        if kind != _ARRAY:
            raise self._error(f"{key} has the unknown value type {kind}")
        kind, count = self._number(_U32, key), self._number(_U64, key)
        start = self._at
        if kind == _STRING:
            self._skip_strings(count, key)
        elif kind in _STRUCTS:
            self._take(count * _STRUCTS[kind].size, f"{key}, an array of {count} numbers,")
        else:
            what = "arrays, which is not supported" if kind == _ARRAY else f"values of the unknown type {kind}"
            raise self._error(f"{key} is an array of {what}")
        return GGUFArray(f"{self.path}: {key}", self.data, slice(start, self._at), count, kind)

    def _skip_strings(self, count: int, key: str) -> None:
        what = f"{key}, an array of {count} strings,"
        data, at = self.data, self._take(8 * count, what)
        if count > self._strings_left:
            raise self._error(f"{what} is too long; a file may hold {_MAX_STRINGS} strings")
        self._strings_left -= count
        last = self.size - 8
        for _ in range(count):
            if at > last:
                break
            at += 8 + _length_at(data, at)[0]
        else:
            last = self.size
        if at > last:
            raise self._error(f"{what} ends past the end of the file; the file is truncated or damaged")
        self._at = at

    def _read_tensors(self, count: int) -> dict[str, TensorInfo]:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment = {short(alignment)}: must be a power of 2")
        read = [self._read_info(i) for i in range(count)]
        start = self._at + -self._at % alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, block_type, offset in read:
            if name in tensors:
                raise self._error(f"tensor {name!r} is there twice")
            if offset % alignment:
                raise self._error(
                    f"tensor {name!r} is at {offset}, which general.alignment = {alignment} does not divide"
                )
            nbytes = math.prod(shape[:-1]) * bytes_per_row(block_type, shape[-1])
            if start + offset + nbytes > self.size:
                raise self._error(
                    f"tensor {name!r} ends at {start + offset + nbytes}, but the file has {self.size} bytes; "
                    "it is truncated or damaged"
                )
            tensors[name] = TensorInfo(name, shape, block_type, self.path, start + offset, nbytes)
        self._check_overlap(tensors.values())
        return tensors

    def _read_info(self, i: int) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._string(_MAX_NAME, f"the name of tensor {i}")
        what = f"tensor {name!r}"
        if not name:
            raise self._error(f"tensor {i} has no name")
        dims = self._number(_U32, what)
        if not 1 <= dims <= _MAX_DIMS:
            raise self._error(f"{what} has {dims} dimensions; 1 to {_MAX_DIMS} are supported")
        shape = struct.unpack_from(f"<{dims}Q", self.data, self._take(8 * dims, what))[::-1]
        if 0 in shape or math.prod(shape) >= 1 << 63:
            raise self._error(f"{what} has the impossible shape {list(shape)}")
        kind, offset = self._number(_U32, what), self._number(_U64, what)
        try:
            block_type = type_of(kind)
            bytes_per_row(block_type, shape[-1])
        except ValueError as error:
            raise self._error(f"{what}: {error}") from None
        return name, shape, block_type, offset

    def _check_overlap(self, tensors: Iterable[TensorInfo]) -> None:
        end, before = 0, None
        for info in sorted(tensors, key=lambda info: info.offset):
            if info.offset < end:
                raise self._error(f"tensors {before!r} and {info.name!r} overlap")
            end, before = info.offset + info.nbytes, info.name


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _map(file: BinaryIO) -> mmap.mmap:
    """The file in memory. What is written there stays in memory; where the system has too little for that promise,
    nothing may be written, which whoever changes weights in place learns the hard way."""
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _view(data: mmap.mmap) -> Tensor:
    """All of it as uint8."""
    with warnings.catch_warnings():
        # torch has no read-only tensors, and says so.
        warnings.simplefilter("ignore")
        return torch.frombuffer(data, dtype=torch.uint8)
