"""NNX models out to a checkpoint folder in Hugging Face's format: tensor by tensor, all of it or nothing."""

import functools
import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import torch
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils

from gemma4_impl import names
from gemma4_impl.checkpoint import Checkpoint, CheckpointError, check_shapes, open_checkpoint, tracked
from gemma4_impl.folders import SHARD_BYTES, check_out, copy_files, new_folder, shards, write_index, write_json
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.load import to_torch
from gemma4_impl.nnx.vision import Vision
from gemma4_impl.quant.container import StreamWriter


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def save_pretrained(
    model: Gemma4,
    out: str | Path,
    source: str | Path,
    vision: Vision | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Writes `model` to the new folder `out`, which appears when it is complete: our PyTorch model, transformers and
    `from_pretrained` load it, with the same bits.

    `source` is the checkpoint folder that the model was loaded from, which may be quantized: its names of the tensors,
    its config but for the dtype, and its tokenizer's files are taken over, and so are its towers but for the tensors of
    `vision`. On several hosts all must call it, and the first one writes. Memory besides the model's: two copies of
    the largest tensor on the host, and one on each device where weights are spread over hosts.
    Raises FileNotFoundError, FileExistsError, ConfigError, CheckpointError, OSError; then `out` is not there."""
    source, out = Path(source), Path(os.path.abspath(out))
    checkpoint = open_checkpoint(source)
    if not isinstance(checkpoint, Checkpoint):
        raise CheckpointError(f"{source}: has no config.json to save beside the weights; name a checkpoint folder")
    check_out(source, out)
    leaves = _leaves(model)
    text = check_shapes({name: leaf.shape for name, leaf in leaves.items()}, model.config, checkpoint)
    tensors = [_tensor(checkpoint.hf_names[name], leaves[name]) for name in text] + _towers(checkpoint, vision)
    if jax.process_index() == 0:
        with new_folder(out, sum(tensor.nbytes for tensor in tensors)) as folder:
            _write(tensors, folder, shard_bytes, progress)
            _write_config(source, leaves["embed_tokens.weight"].dtype.name, folder)
            copy_files(source, folder)
    else:
        for tensor in tensors:
            tensor.read()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {out}")


def _leaves(module: nnx.Module) -> dict[str, Array]:
    return {names.from_nnx(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.split(module)[1])}


def _tensor(name: str, leaf: Array) -> _Tensor:
    return _Tensor(name, getattr(torch, leaf.dtype.name), leaf.shape, functools.partial(_gathered, leaf))


def _gathered(leaf: Array) -> torch.Tensor:
    """The whole tensor on the host."""
    if not leaf.is_fully_addressable:
        return to_torch(multihost_utils.process_allgather(leaf, tiled=True))
    # An array keeps what the host once had of it; this one goes.
    parts = [shard.data for shard in leaf.addressable_shards]
    return to_torch(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts))


def _towers(checkpoint: Checkpoint, vision: Vision | None) -> list[_Tensor]:
    trained = {} if vision is None else _leaves(vision)
    tensors = []
    for hf_name in sorted(checkpoint.towers):
        tensor = checkpoint.tower(hf_name)
        leaf = trained.pop(names.tower_from_hf(hf_name), None)
        if leaf is None:
            read = functools.partial(checkpoint.tower, hf_name)
            tensors.append(_Tensor(hf_name, tensor.dtype, tuple(tensor.shape), read))
        elif leaf.shape != tuple(tensor.shape):
            raise CheckpointError(f"{checkpoint.path}: {hf_name} is {list(tensor.shape)}, not {list(leaf.shape)}")
        else:
            tensors.append(_tensor(hf_name, leaf))
    if trained:
        raise CheckpointError(f"{checkpoint.path}: holds no {min(trained)}, which the vision tower has")
    return tensors


def _write(tensors: list[_Tensor], folder: Path, shard_bytes: int, progress: bool) -> None:
    weight_map: dict[str, str] = {}
    following = iter(tracked(tensors, "saving", progress))
    for file, part in shards(tensors, lambda tensor: tensor.nbytes, shard_bytes).items():
        specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in part}
        weight_map |= dict.fromkeys(specs, file)
        with StreamWriter(folder / file, specs, {"format": "pt"}) as writer:
            for tensor in itertools.islice(following, len(part)):
                writer.write(tensor.name, tensor.read())
    write_index(folder, weight_map, sum(tensor.nbytes for tensor in tensors))


def _write_config(source: Path, dtype: str, folder: Path) -> None:
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict):
            for key in ("quantization_config", "torch_dtype"):
                part.pop(key, None)
            part["dtype"] = dtype
    write_json(folder / "config.json", raw)
