"""Checkpoints onto NNX models: every tensor is read, cast and put onto its shards before the next one is."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma4_impl import names
from gemma4_impl.checkpoint import Weights, check_shapes, open_checkpoint, tracked
from gemma4_impl.nnx.decoder import Gemma4

_BLOCK = 1 << 22

Bounds = tuple[tuple[int, int], ...]
"""Part of a tensor: the start and stop of each dim."""


def from_pretrained(
    path: str | Path,
    dtype: Any = None,
    param_dtype: Any = None,
    remat: bool = False,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Gemma4:
    """Loads what `open_checkpoint` opens: a folder, a quantized one or a GGUF file, these dequantized.

    Memory of this host besides the model's own: of one tensor the shards that its devices hold, so at most the largest
    tensor, and blocks of 4M weights. On CPU devices those shards are the model's own, and nothing of the file is kept.

    Args:
        dtype: computed in; the checkpoint's own by default.
        param_dtype: of the parameters; `dtype` by default.
        remat: see `Gemma4`.
        mesh: what the weights are spread over, see `make_mesh`; that of `jax.set_mesh` by default, and if there is none
            the default device. A forward is spread as it should be only under `jax.set_mesh`.
        progress: show a bar, on a terminal.

    Raises FileNotFoundError, ConfigError, GGUFError, and CheckpointError listing what is missing, unexpected or
    mis-shaped."""
    return from_weights(open_checkpoint(path), dtype, param_dtype, remat, mesh, progress)


def from_weights(
    source: Weights,
    dtype: Any = None,
    param_dtype: Any = None,
    remat: bool = False,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Gemma4:
    """`from_pretrained` of weights that are already open."""
    dtype = dtype or str(source.dtype).removeprefix("torch.")
    with on_mesh(mesh) as mesh:
        made = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat}
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Gemma4(source.config, **made, rngs=nnx.Rngs(0))))
        leaves = {names.from_nnx(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
        taken = check_shapes({name: leaf.shape for name, (_, leaf) in leaves.items()}, source.config, source)
        order = sorted(taken, key=lambda name: (str(source.files[name]), name))
        for name in tracked(order, "loading", progress):
            path, leaf = leaves[name]
            leaves[name] = path, leaf.replace(place(leaf, functools.partial(source.rows, name), mesh))
        return nnx.merge(graphdef, nnx.from_flat_state(list(leaves.values())))


def place(leaf: nnx.Variable, rows: Callable[[int, int], torch.Tensor], mesh: Mesh | None) -> Array:
    """The value of an abstract `leaf`, in its dtype, on this host's shards; without a mesh on the default device.

    `rows(start, stop)` gives rows of the tensor, a scalar as one row. It is asked for those that this host holds, in
    blocks, once for each."""
    if mesh is None:
        (part,) = _read(leaf, rows, [tuple((0, size) for size in leaf.shape)])
        return jax.block_until_ready(jax.device_put(part))
    sharding = NamedSharding(mesh, PartitionSpec(*leaf.out_sharding))
    holders: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for cut in dict.fromkeys(bounds[:1] for bounds in holders):
        parts = [bounds for bounds in holders if bounds[:1] == cut]
        for bounds, part in zip(parts, _read(leaf, rows, parts), strict=True):
            shards += [jax.device_put(part, device) for device in holders[bounds]]
        # Before the next parts are read, these have left the host.
        jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _read(leaf: nnx.Variable, rows: Callable[[int, int], torch.Tensor], parts: list[Bounds]) -> list[np.ndarray]:
    """Copies of these parts, all of the same rows, in the dtype of `leaf`."""
    dtype = getattr(torch, jnp.dtype(leaf.dtype).name)
    out = [torch.empty([stop - start for start, stop in bounds], dtype=dtype) for bounds in parts]
    if not leaf.shape:
        out[0].copy_(rows(0, 1)[0])
        return [to_numpy(out[0])]
    start, stop = parts[0][0]
    step = max(1, _BLOCK // max(1, math.prod(leaf.shape[1:])))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        block = rows(first, last)
        for part, bounds in zip(out, parts, strict=True):
            part[first - start : last - start] = block[(slice(None), *(slice(*ends) for ends in bounds[1:]))]
    return [to_numpy(part) for part in out]


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[Mesh | None]:
    """Sets `mesh` if it is one; gives the mesh that is then set, None without any."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        current = jax.sharding.get_mesh()
        yield None if current.empty else current


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values in its own dtype; numpy knows bfloat16 through ml_dtypes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: jax.Array) -> torch.Tensor:
    """Inverse of `to_numpy`, a copy."""
    values = np.array(array)
    if values.dtype == jnp.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
