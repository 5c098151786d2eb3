"""What a wrong quantizer or converter writes: a file that every reader finds the same wrong weights in."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma4_impl.config import TextConfig
from gemma4_impl.quant.recipe import RECIPES
from gemma4_impl.quant.save import quantize_checkpoint
from parity.faults.misread import llama_rows
from parity.quantized import Quantized
from reference.tiny_gguf import make_tiny_gguf


def rewritten(change: Callable[[str, dict[str, Tensor]], None]) -> Any:
    """The folder holds other 4-bit codes or scales: `change` edits a tensor's `qdata`, `scale` and `zero_point`."""

    def inject(candidate: Quantized, original: Path) -> None:
        file = candidate.path / "model.safetensors"
        with safe_open(file, framework="pt") as handle:
            tensors, metadata = {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata()  # noqa: SIM118
        for name in [name for name, said in metadata.items() if '"Int4Tensor"' in said]:
            stem = name.removesuffix("weight") + "_weight_"
            parts = {part: tensors[stem + part] for part in ("qdata", "scale", "zero_point")}
            change(name, parts)
            tensors |= {stem + part: value.contiguous() for part, value in parts.items()}
        save_file(tensors, file, metadata)

    return inject


def original_of(original: Path, name: str) -> Tensor | None:
    """None for an untied head."""
    with safe_open(original / "model.safetensors", framework="pt") as handle:
        return handle.get_tensor(name) if name in handle.keys() else None  # noqa: SIM118


def groups_along_columns(candidate: Quantized, original: Path) -> None:
    """Weights of a column share a scale, and the scales are stored as if it were those of a row."""

    def change(name: str, parts: dict[str, Tensor]) -> None:
        weight = original_of(original, name)
        if weight is None:
            return
        groups = weight.unflatten(0, (-1, 32))
        scale = groups.abs().amax(1, keepdim=True) / 7
        low, high = (groups / scale).round().to(torch.int8).flatten(0, 1).unflatten(-1, (-1, 2)).unbind(-1)
        parts["qdata"] = (low & 15 | high << 4).view(parts["qdata"].dtype)
        parts["scale"] = scale[:, 0].reshape(parts["scale"].shape).to(parts["scale"].dtype)

    rewritten(change)(candidate, original)


def zeros_not_written(name: str, parts: dict[str, Tensor]) -> None:
    parts["zero_point"] = torch.zeros_like(parts["zero_point"])


def written_unsigned(name: str, parts: dict[str, Tensor]) -> None:
    parts["qdata"] = (parts["qdata"].view(torch.uint8) ^ 0x88).view(parts["qdata"].dtype)


def last_edge_forgotten(candidate: Quantized, original: Path) -> None:
    """A recipe for the edge layers was followed in the first ones alone."""
    said = (candidate.path / "quantization.json").read_text(encoding="utf-8")
    recipe = RECIPES["sensitive"]
    rules = tuple(replace(rule, layers=rule.layers and "0") for rule in recipe.rules)
    shutil.rmtree(candidate.path)
    quantize_checkpoint(original, candidate.path, replace(recipe, rules=rules))
    (candidate.path / "quantization.json").write_text(said, encoding="utf-8")


def converted(change: Callable[[TextConfig, str, Tensor], Tensor]) -> Any:
    """The GGUF file was made of tensors that the converter had changed."""

    def inject(candidate: Quantized, original: Path) -> None:
        config, folder = TextConfig.from_file(original), candidate.path.with_name("changed")
        shutil.copytree(original, folder)
        tensors = {
            key: change(config, key, tensor) for key, tensor in load_file(original / "model.safetensors").items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        make_tiny_gguf(folder, candidate.path, candidate.label.partition(":")[2])

    return inject


def permuted_by_converter(config: TextConfig, key: str, tensor: Tensor) -> Tensor:
    if not key.endswith("q_proj.weight"):
        return tensor
    return tensor[llama_rows(tensor.shape[0], config.num_attention_heads)].contiguous()


def norms_less_one(config: TextConfig, key: str, tensor: Tensor) -> Tensor:
    """Norms of Gemma 1 to 3 multiply by 1 + w."""
    return tensor - 1 if key.endswith("norm.weight") else tensor
