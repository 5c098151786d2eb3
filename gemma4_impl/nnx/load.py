"""Checkpoints onto NNX models: every tensor is read, cast and put on its device before the next one is."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from flax import nnx

from gemma4_impl import names
from gemma4_impl.checkpoint import Weights, open_checkpoint
from gemma4_impl.nnx.decoder import Gemma4


def from_pretrained(path: str | Path, dtype: Any = None, param_dtype: Any = None, remat: bool = False) -> Gemma4:
    """Loads what `open_checkpoint` opens. `dtype` is computed in and defaults to the checkpoint's own, `param_dtype` is
    that of the parameters and defaults to `dtype`."""
    return from_weights(open_checkpoint(path), dtype, param_dtype, remat)


def from_weights(source: Weights, dtype: Any = None, param_dtype: Any = None, remat: bool = False) -> Gemma4:
    """`from_pretrained` of weights that are already open."""
    dtype = dtype or str(source.dtype).removeprefix("torch.")
    model = nnx.eval_shape(
        lambda: Gemma4(source.config, dtype=dtype, param_dtype=param_dtype or dtype, remat=remat, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    loaded = []
    for path, leaf in flat:
        name = names.from_nnx(path)
        tensor = source.tensor(name)
        if names.to_nnx(name)[1]:
            tensor = tensor.mT
        loaded.append((path, leaf.replace(jax.device_put(to_numpy(tensor).astype(leaf.dtype)))))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


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
