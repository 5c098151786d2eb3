"""GGUF files byte by byte, so that they can be wrong, and headers of any size over a file full of holes."""

import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from gemma4_impl.config import TextConfig
from gemma4_impl.gguf.config import metadata_from_config, rope_freqs
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.names import GGUF_ROPE_FREQS, to_gguf

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + u32(kind) + payload


def array(kind: int, payload: bytes, count: int) -> bytes:
    return u32(kind) + u64(count) + payload


def tensor(name: str | bytes, dims: Sequence[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return text(name) + u32(count) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def header(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    out = magic + u32(version) + b"".join(map(u64, counts)) + b"".join(keys) + b"".join(tensors)
    return out + bytes(-len(out) % alignment) + data


def add_value(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """With the types that llama.cpp's converter takes."""
    if isinstance(value, list):
        writer.add_array(name, value)
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](name, value)


def write_hollow(
    path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope: np.ndarray, kind: str = "F16"
) -> Path:
    """A file with these metadata and tensors, of type `kind` where rows are whole blocks, else float16. All of it is
    holes but for `rope_freqs`, so that it takes no space."""
    writer = gguf.GGUFWriter(path, "gemma4")
    for name, value in metadata.items():
        if name != "general.architecture":
            add_value(writer, name, value)
    factors = rope.astype(np.float32)
    writer.add_tensor(GGUF_ROPE_FREQS, factors)
    size = 0
    for name, shape in shapes.items():
        quant = gguf.GGMLQuantizationType[kind]
        if len(shape) < 2 or shape[-1] % gguf.GGML_QUANT_SIZES[quant][0]:
            quant = gguf.GGMLQuantizationType.F16
        block, nbytes = gguf.GGML_QUANT_SIZES[quant]
        nbytes *= math.prod(shape) // block
        writer.add_tensor_info(name, shape, np.dtype(np.float16), nbytes, raw_dtype=quant)
        size += nbytes + 32
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.fout[0].write(bytes(-writer.fout[0].tell() % 32) + factors.tobytes())
    size += writer.fout[0].tell() + 32
    writer.close()
    os.truncate(path, size)
    return path


def write_config(path: Path, config: TextConfig, kind: str = "F16", **changes: Any) -> Path:
    """A hollow file of a model with this config, `changes` made to its metadata; None leaves a key out."""
    metadata = metadata_from_config(config) | changes
    metadata = {name: value for name, value in metadata.items() if value is not None}
    return write_hollow(path, metadata, shapes_of(config), rope_freqs(config).numpy(), kind)


def shapes_of(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a converted model has, by GGUF name."""
    with torch.device("meta"):
        state = Gemma4(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {to_gguf(name): tuple(tensor.shape) for name, tensor in state.items()}
