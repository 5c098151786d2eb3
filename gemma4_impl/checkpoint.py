"""Hugging Face safetensors checkpoints, single or sharded: opened safely, and streamed onto a meta-built model."""

import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gemma4_impl import names
from gemma4_impl.config import TextConfig
from gemma4_impl.errors import one_line, plain, short
from gemma4_impl.quant.pack import can_pack, install, tie_head
from gemma4_impl.quant.tensor import QuantizedTensor

_T = TypeVar("_T")

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LISTED = 8
_SAMPLED = 1024


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or does not fit its config; the message names the file and the tensors."""


class Weights(Protocol):
    """Where a model's tensors come from: a checkpoint folder, a quantized one, a GGUF file. Canonical names; nothing
    is read until asked for."""

    path: Path
    files: dict[str, Path]
    """Each text tensor's name, and the file that holds it."""

    @property
    def config(self) -> TextConfig: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in unless told otherwise."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor, dense; a quantized one dequantized in float32."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor(name)[start:stop]`, without reading the rest."""

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor as it is stored, if that is quantized."""

    def fingerprint(self) -> str:
        """A hash that tells these weights from others."""


def open_checkpoint(path: str | Path) -> Weights:
    """The weights at `path`: a folder in Hugging Face's format, one that `gemma4 quantize` or torchao wrote, or a
    GGUF file. Raises FileNotFoundError, ConfigError, CheckpointError, GGUFError."""
    path = Path(path)
    if path.is_file() or path.suffix == ".gguf":
        from gemma4_impl.gguf.checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if is_quantized(path):
        from gemma4_impl.quant.checkpoint import QuantizedCheckpoint

        return QuantizedCheckpoint(path)
    return Checkpoint(path)


def is_quantized(path: Path) -> bool:
    """Whether the folder's config.json names a quantization; a file that cannot be read names none."""
    return quantization_config(path) is not None


def quantization_config(path: Path) -> object | None:
    """What the folder's config.json says under `quantization_config`, of the model or of its text part."""
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    for part in (raw, raw.get("text_config") if isinstance(raw, dict) else None):
        if isinstance(part, dict) and part.get("quantization_config") is not None:
            return part["quantization_config"]
    return None


class Checkpoint:
    """The text tensors of a checkpoint folder under their canonical names; nothing is read until asked for.

    Raises FileNotFoundError or CheckpointError for what is missing, truncated, or points outside the folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder; a checkpoint holds config.json and *.safetensors")
        self._check_kind()
        self.files: dict[str, Path] = {}
        self.hf_names: dict[str, str] = {}
        self.towers: dict[str, Path] = {}
        """Tensors of the vision and audio towers, under their own names."""
        self._open = {}
        for file, listed in self._shards().items():
            handle = self._handle(file)
            stored = set(handle.keys())
            if listed is not None and (absent := sorted(listed - stored)):
                raise CheckpointError(f"{file}: the index lists {short(absent[0])} here, but the file does not hold it")
            for hf_name in sorted(stored if listed is None else listed):
                name = names.from_hf(hf_name)
                if name is None:
                    self.towers[hf_name] = file
                    continue
                if name in self.files:
                    raise CheckpointError(
                        f"{file}: {short(hf_name)} and {short(self.hf_names[name])} are the same tensor"
                    )
                self.files[name], self.hf_names[name] = file, hf_name

    def _check_kind(self) -> None:
        if is_quantized(self.path):
            raise CheckpointError(f"{self.path}: its weights are quantized (config.json); `open_checkpoint` reads it")

    def _shards(self) -> dict[Path, set[str] | None]:
        """Each weight file, and which tensors its index says it holds (None: all)."""
        index = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if not index.is_file():
            if not single.is_file():
                raise FileNotFoundError(f"{self.path}: neither model.safetensors nor model.safetensors.index.json")
            return {single: None}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            items = [(str(name), str(file)) for name, file in weight_map.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index}: not a shard index ({type(error).__name__}: {one_line(error)})") from None
        shards: dict[Path, set[str]] = {}
        for name, file in items:
            # A hub cache links its files elsewhere, so links are fine; a path in the index is not.
            if file != Path(file).name or "\\" in file or "\0" in file or file in ("", ".", ".."):
                raise CheckpointError(f"{index}: {short(name)} points outside the folder: {short(file)}")
            if not os.path.isfile(self.path / file):
                raise FileNotFoundError(f"{index}: {short(name)} is in {short(file)}, which does not exist")
            shards.setdefault(self.path / file, set()).add(name)
        if not shards:
            raise CheckpointError(f"{index}: weight_map is empty")
        return dict(shards)

    def _handle(self, file: Path):
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a complete safetensors file ({one_line(error)})") from None
        return self._open[file]

    def release(self) -> None:
        """Unmaps the files, whose pages count as this process's memory; they are mapped again when read."""
        self._open.clear()

    @functools.cached_property
    def config(self) -> TextConfig:
        return TextConfig.from_file(self.path)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def stored_dtype(self, name: str) -> str:
        """As safetensors spells it: F32, BF16, I8, ..."""
        return self._slice(name).get_dtype()

    def _slice(self, name: str):
        return self._handle(self.files[name]).get_slice(self.hf_names[name])

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor. Raises CheckpointError if it is not floating point."""
        self._check_float(name)
        return self._handle(self.files[name]).get_tensor(self.hf_names[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads these rows only. Raises as `tensor` does."""
        self._check_float(name)
        return self._slice(name)[start:stop]

    def quantized(self, name: str) -> None:
        return None

    def tower(self, hf_name: str) -> Tensor:
        """Reads a tensor of a tower, of whatever dtype."""
        return self._handle(self.towers[hf_name]).get_tensor(hf_name)

    def _check_float(self, name: str) -> None:
        if (stored := self.stored_dtype(name)) not in FLOATS:
            raise CheckpointError(
                f"{self.files[name]}: {self.hf_names[name]!r} is stored as {stored}; expected F32, BF16, F16 or F64"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, which stands for the checkpoint's; bfloat16 if it has none."""
        if "embed_tokens.weight" not in self.files:
            return torch.bfloat16
        return FLOATS.get(self.stored_dtype("embed_tokens.weight"), torch.bfloat16)

    def fingerprint(self) -> str:
        """sha256 over each tensor's name, dtype, shape, and its first and last 1024 values, whatever the sharding."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            update_hash(digest, name, self._slice(name))
        return digest.hexdigest()


def update_hash(digest, name: str, part) -> None:
    """Adds a tensor's name, dtype, shape, and edges to a hash."""
    shape = part.get_shape()
    digest.update(f"{name} {part.get_dtype()} {shape}\n".encode())
    if len(shape) == 0 or 0 in shape:
        return
    rows = min(shape[0], math.ceil(_SAMPLED / math.prod(shape[1:])))
    first, last = part[:rows].flatten()[:_SAMPLED], part[shape[0] - rows :].flatten()[-_SAMPLED:]
    for edge in (first, last):
        digest.update(edge.contiguous().view(torch.uint8).numpy().tobytes())


def load_into(
    model: nn.Module, checkpoint: Weights, dtype: torch.dtype, device: torch.device, progress: bool = False
) -> None:
    """Replaces every meta tensor of `model` by the checkpoint's, one at a time, as `dtype` on `device`.

    A quantized tensor is packed for the device if the model can run it so; its module becomes one of quant/modules.py.
    The weights of a tied head and of KV-shared layers' unused projections may be in the file and are not needed.
    Raises CheckpointError as `check_fits` does."""
    expected = check_fits(model, checkpoint)
    order = sorted(expected, key=lambda name: (str(checkpoint.files[name]), name))
    for name in tracked(order, "loading", progress):
        _load_tensor(model, checkpoint, name, dtype, device)
    tie_head(model)


def tracked(items: Sequence[_T], what: str, progress: bool) -> Iterable[_T]:
    """The items, on a terminal with a bar if there is to be one."""
    return track(items, description=what, disable=not (progress and sys.stdout.isatty()), transient=True)


def _load_tensor(model: nn.Module, checkpoint: Weights, name: str, dtype: torch.dtype, device: torch.device) -> None:
    if can_pack(model, name) and (weight := checkpoint.quantized(name)) is not None:
        install(model, name, weight, dtype, device)
    else:
        set_tensor(model, name, checkpoint.tensor(name).to(device=device, dtype=dtype))


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Makes `tensor` the model's parameter or buffer `name`, whatever that was."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def check_fits(model: nn.Module, checkpoint: Weights) -> list[str]:
    """Names of the tensors that `model` (may be on meta) takes from `checkpoint`.

    Raises CheckpointError listing every missing, unexpected or mis-shaped tensor, or for a head that ought to be tied
    and is not."""
    return check_shapes({name: tuple(t.shape) for name, t in model.state_dict().items()}, model.config, checkpoint)


def check_shapes(expected: Mapping[str, tuple[int, ...]], config: TextConfig, checkpoint: Weights) -> list[str]:
    """`check_fits` of a model that is known by the shapes of its tensors; a tied head may be among them or not."""
    expected = dict(expected)
    unused = {
        f"layers.{layer.index}.self_attn.{part}.weight"
        for layer in config.layers
        if layer.kv_shared
        for part in ("k_proj", "v_proj", "k_norm")
    }
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        unused.add("lm_head.weight")
    _compare_names(checkpoint, expected, unused)
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint.files:
        _check_tied(checkpoint)
    return list(expected)


def _compare_names(checkpoint: Weights, expected: dict[str, tuple[int, ...]], unused: set[str]) -> None:
    stored = set(checkpoint.files)
    shapes = {name: checkpoint.shape(name) for name in stored & set(expected)}
    wrong = [
        f"{name} is {list(shapes[name])}, expected {list(expected[name])}"
        for name in sorted(shapes)
        if shapes[name] != expected[name]
    ]
    problems = {
        "missing": sorted(set(expected) - stored),
        "unexpected": [plain(name) for name in sorted(stored - set(expected) - unused)],
        "mis-shaped": wrong,
    }
    if any(problems.values()):
        parts = [f"{len(found)} {what}: {_some(found)}" for what, found in problems.items() if found]
        config = "config.json" if checkpoint.path.is_dir() else "the metadata"
        raise CheckpointError(f"{checkpoint.path}: the tensors do not fit {config}; " + "; ".join(parts))


def _check_tied(checkpoint: Weights) -> None:
    head, embedding = "lm_head.weight", "embed_tokens.weight"
    same = checkpoint.shape(head) == checkpoint.shape(embedding)
    rows = checkpoint.shape(embedding)[0]
    for start in range(0, rows if same else 0, 16_384):
        block = start, min(start + 16_384, rows)
        same = same and torch.equal(checkpoint.rows(head, *block), checkpoint.rows(embedding, *block))
    if not same:
        raise CheckpointError(
            f"{checkpoint.path}: tie_word_embeddings is true, but lm_head.weight differs from embed_tokens.weight"
        )


def _some(items: Iterable[str]) -> str:
    items = list(items)
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
