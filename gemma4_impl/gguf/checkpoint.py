"""A GGUF file as a source of weights: its tensors under canonical names, as floats or as the integers stored."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl import names
from gemma4_impl.checkpoint import CheckpointError
from gemma4_impl.config import TextConfig
from gemma4_impl.errors import short
from gemma4_impl.gguf.blocks import BlockType, dense, dequantize
from gemma4_impl.gguf.config import check_architecture, config_from_metadata
from gemma4_impl.gguf.reader import GGUFFile, TensorInfo
from gemma4_impl.gguf.repack import repack
from gemma4_impl.quant.tensor import QuantizedTensor

_SAMPLED = 1024


@dataclass(frozen=True)
class _Part:
    """Rows of a GGUF tensor that are, or belong to, one of ours."""

    info: TensorInfo
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.info.shape[1:])


class GGUFCheckpoint:
    """The text tensors of a GGUF file under their canonical names, as `gemma4_impl.checkpoint.Weights` has them.

    Nothing is read until asked for, and then one tensor: the file stays mapped. A tensor that is not quantized may be
    a view of the mapping. Raises as `GGUFFile` does, GGUFError for a file that holds no Gemma 4 text model, and
    CheckpointError for tensors that Gemma 4 does not have."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.gguf = GGUFFile(self.path)
        check_architecture(self.gguf)
        self._parts: dict[str, list[_Part]] = {}
        for info in self.gguf.tensors.values():
            if info.name != names.GGUF_ROPE_FREQS:
                self._place(info)
        for name, parts in self._parts.items():
            if name.endswith(".experts.gate_up_proj"):
                self._check_experts(name, parts)
            elif len(parts) > 1:
                found = " and ".join(short(part.info.name) for part in parts)
                raise CheckpointError(f"{self.path}: {found} both hold {name}")
        self.files = {name: parts[0].info.path for name, parts in self._parts.items()}

    def _place(self, info: TensorInfo) -> None:
        held = names.held_by_gguf(info.name)
        if not held:
            raise CheckpointError(f"{info.path}: tensor {short(info.name)} is unknown in Gemma 4; it would be ignored")
        ends = [info.shape[0]] if len(held) == 1 else self._ends(info, int(held[0].split(".")[1]))
        for name, start, stop in zip(held, [0, *ends], ends, strict=False):
            self._parts.setdefault(name, []).append(_Part(info, start, stop))

    def _ends(self, info: TensorInfo, index: int) -> list[int]:
        """The rows at which q, k and v end in a tensor that joins them."""
        config = self.config
        if index >= config.num_hidden_layers:
            raise CheckpointError(f"{info.path}: tensor {info.name!r}: there are {config.num_hidden_layers} layers")
        layer = config.layers[index]
        heads = (config.num_attention_heads, layer.num_key_value_heads, layer.num_key_value_heads)
        ends = [sum(heads[: i + 1]) * layer.head_dim for i in range(3)]
        if info.shape != (ends[-1], config.hidden_size):
            wanted = [ends[-1], config.hidden_size]
            raise CheckpointError(f"{info.path}: tensor {info.name!r} is {list(info.shape)}, expected {wanted}")
        return ends

    def _check_experts(self, name: str, parts: list[_Part]) -> None:
        """Puts the gates before the ups, and sees that there are both, or one tensor that is both."""
        parts.sort(key=lambda part: part.info.name.endswith("ffn_up_exps.weight"))
        kinds = [part.info.name.split(".")[2] for part in parts]
        if kinds not in (["ffn_gate_up_exps"], ["ffn_gate_exps", "ffn_up_exps"]):
            raise CheckpointError(f"{self.path}: {name} needs gates and ups, once; there is {' and '.join(kinds)}")
        if len({part.shape for part in parts}) > 1 or len(parts[0].shape) != 3:
            found = " and ".join(f"{part.info.name} {list(part.shape)}" for part in parts)
            raise CheckpointError(f"{self.path}: the experts' tensors do not fit together: {found}")

    @functools.cached_property
    def config(self) -> TextConfig:
        """From the metadata; raises as `config_from_metadata` does."""
        return config_from_metadata(self.gguf)

    @property
    def dtype(self) -> torch.dtype:
        """float32 if all tensors are, else bfloat16."""
        stored = {part.info.type.dtype for parts in self._parts.values() for part in parts}
        return torch.float32 if stored == {torch.float32} else torch.bfloat16

    def stored(self, name: str) -> tuple[TensorInfo, ...]:
        """The GGUF tensors that hold `name`: one, or the experts' gates and ups."""
        return tuple(part.info for part in self._parts[name])

    def shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts[name]
        shape = parts[0].shape
        return shape if len(parts) == 1 else (*shape[:-2], sum(part.shape[-2] for part in parts), shape[-1])

    def tensor(self, name: str) -> Tensor:
        """The tensor in its own dtype, or dequantized in float32."""
        return self._floats(name, slice(None))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor(name)[start:stop]`, of which nothing else is read."""
        return self._floats(name, slice(start, stop))

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor's integers, regrouped without going through floats; None for F32, F16 and BF16, and for experts
        whose gates and ups are of different types."""
        parts = self._parts[name]
        block_type = parts[0].info.type
        if not block_type.quantized or any(part.info.type != block_type for part in parts):
            return None
        data = [self._bytes(part) for part in parts]
        return repack(data[0] if len(data) == 1 else torch.cat(data, dim=-2), block_type)

    def fingerprint(self) -> str:
        """sha256 over each tensor's name, type, shape, and its first and last 1024 bytes."""
        digest = hashlib.sha256()
        for name in sorted(self._parts):
            for part in self._parts[name]:
                digest.update(f"{name} {part.info.type.name} {part.shape}\n".encode())
                flat = self._bytes(part).flatten()
                for edge in (flat[:_SAMPLED], flat[-_SAMPLED:]):
                    digest.update(edge.numpy().tobytes())
        return digest.hexdigest()

    def _bytes(self, part: _Part) -> Tensor:
        data = self.gguf.bytes(part.info.name)
        return data if data.dim() == 1 else data[part.start : part.stop]

    def _floats(self, name: str, rows: slice) -> Tensor:
        parts = []
        for part in self._parts[name]:
            data = self._bytes(part)
            # A vector's bytes are one row: it is cut when it is numbers.
            parts.append(
                _values(data, part.info.type)[rows] if data.dim() == 1 else _values(data[rows], part.info.type)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _values(data: Tensor, block_type: BlockType) -> Tensor:
    return dequantize(data, block_type) if block_type.quantized else dense(data, block_type)
