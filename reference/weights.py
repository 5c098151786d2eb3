"""Where a reference's weights come from: Hugging Face files, or another `Source` in their place."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from gemma4_impl.names import from_hf


class Source(Protocol):
    """The tensors of a text model by their canonical names, read by other code than the candidate's: an error that
    both made would not be seen."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor; without `lm_head.weight` the head is the embedding."""

    def tensor(self, name: str) -> Tensor:
        """The tensor, dense; a quantized one dequantized, in float32."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor(name)[start:stop]`."""

    def is_quantized(self, name: str) -> bool:
        """Whether its values are those of a quantized format, which a model in bfloat16 need not round again."""

    def kind(self, name: str) -> str:
        """How it is stored, in a few words: `BF16`, `Q4_K`, `int4, group 32`."""

    def stored_bytes(self, name: str) -> int:
        """What the tensor takes in its file."""


class WeightFiles:
    """The float tensors of a checkpoint folder, text-only or multimodal."""

    def __init__(self, path: Path):
        self.slices = safetensors_slices(path)

    def __contains__(self, name: str) -> bool:
        return name in self.slices

    def tensor(self, name: str) -> Tensor:
        return self.slices[name][:]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.slices[name][start:stop]

    def is_quantized(self, name: str) -> bool:
        return False

    def kind(self, name: str) -> str:
        return self.slices[name].get_dtype()

    def stored_bytes(self, name: str) -> int:
        part = self.slices[name]
        return torch.Size(part.get_shape()).numel() * int("".join(filter(str.isdigit, part.get_dtype()))) // 8


def stored_as(bits: int, group_size: int | None, shape: tuple[int, ...]) -> str:
    """The `kind` of an integer tensor: `int4, group 32`, or `int8, a row` where a whole row has one scale (None)."""
    return f"int{bits}, " + ("a row" if group_size in (None, shape[-1]) else f"group {group_size}")


def safetensors_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint folder, with or without an index."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return [path / "model.safetensors"]
    return [path / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def safetensors_slices(path: Path) -> dict[str, Any]:
    """Canonical name -> safetensors slice of each text tensor."""
    found = {}
    for file in safetensors_files(path):
        handle = safe_open(file, framework="pt")
        for key in handle.keys():  # noqa: SIM118
            if name := from_hf(key):
                found[name] = handle.get_slice(key)
    return found
