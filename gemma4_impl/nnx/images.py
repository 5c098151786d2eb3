"""Images in prompts for JAX: a checkpoint's vision tower with its image processor."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from torch import Tensor

from gemma4_impl import names
from gemma4_impl.nnx.load import on_mesh, place
from gemma4_impl.nnx.sharding import constrain
from gemma4_impl.nnx.soft_tokens import SoftTokens, image_slots, merge
from gemma4_impl.nnx.vision import Vision
from gemma4_impl.vision.config import VisionConfig
from gemma4_impl.vision.processing import ImageProcessor, ImageSource, ProcessedImages
from gemma4_impl.vision.tower import ImagePrompts, TowerWeights, open_tower, read_tensor, stored_names


class ImageEncoder(ImagePrompts):
    """Turns images into soft tokens: `processor` makes patches of them, `model` runs the tower."""

    def __init__(self, model: Vision, processor: ImageProcessor):
        super().__init__(model.config, processor)
        self.model = model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Any = None,
        param_dtype: Any = None,
        text: str | Path | None = None,
        mesh: Mesh | None = None,
    ) -> "ImageEncoder":
        """Loads what `open_tower` opens, with the image processor that goes with it. `dtype` is computed in and
        defaults to the weights' own, `param_dtype` is that of the parameters and defaults to `dtype`; `mesh` is as in
        `load.from_pretrained`. Raises as `open_tower` does, and CheckpointError for tensors that do not fit."""
        source, config, processor = open_tower(path, text)
        return cls(load_tower(config, source, dtype, param_dtype, mesh), processor)

    def encode(self, images: Iterable[ImageSource] | ProcessedImages) -> list[np.ndarray]:
        """Images -> the soft tokens [n, D] of each, on the host. They run one by one, each padded to as many patches as
        the processor allows, so that a single shape is compiled. Raises ImageError, FileNotFoundError."""
        if not isinstance(images, ProcessedImages):
            images = self.processor(images)
        graphdef, state = nnx.split(self.model)
        padding = (0, 0), (0, max(0, self.processor.max_patches - images.positions.shape[1])), (0, 0)
        pixels = np.pad(images.pixel_values.numpy(), padding)
        positions = np.pad(images.positions.numpy().astype(np.int32), padding, constant_values=-1)
        tokens = [_encode(graphdef, state, pixels[i : i + 1], positions[i : i + 1]) for i in range(len(pixels))]
        return [np.asarray(row)[0, :n] for row, n in zip(tokens, images.num_soft_tokens, strict=True)]

    def merge(self, tokens: np.ndarray, features: Sequence[np.ndarray], dtype: Any) -> SoftTokens:
        """Puts encoded images in the place of the image tokens of tokens [B, T], row by row, in the text model's
        `dtype`, on the host. Raises ValueError if there is more or less room than they need."""
        # At text, whose slot is -1: the last row.
        nothing = np.zeros((1, self.config.text_hidden_size), np.float32)
        flat = np.concatenate([*(np.asarray(part).astype(dtype) for part in features), nothing.astype(dtype)])
        slots = image_slots(tokens, self.config.image_token_id, [len(flat) - 1], len(flat))
        return merge(flat, slots, self.bidirectional, dtype)


@jax.jit(static_argnums=0)
def _encode(graphdef: nnx.GraphDef, state: nnx.State, pixel_values: Array, positions: Array) -> Array:
    # Whole on every device: the host reads it.
    return constrain(nnx.merge(graphdef, state)(pixel_values, positions), None, None, None)


def load_tower(
    config: VisionConfig, source: TowerWeights, dtype: Any = None, param_dtype: Any = None, mesh: Mesh | None = None
) -> Vision:
    """The tower with the source's tensors; arguments and memory are as in `load.from_weights`, and one tensor is held
    as it is stored. Raises CheckpointError listing what does not fit."""
    dtype = dtype or str(source.dtype).removeprefix("torch.")
    with on_mesh(mesh) as mesh:
        model = nnx.eval_shape(lambda: Vision(config, dtype=dtype, param_dtype=param_dtype or dtype, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        leaves = {names.from_nnx(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
        for name, stored in stored_names(source, leaves).items():
            path, leaf = leaves[name]
            leaves[name] = path, leaf.replace(place(leaf, _rows(source, stored, leaf.shape), mesh))
        return nnx.merge(graphdef, nnx.from_flat_state(list(leaves.values())))


def _rows(source: TowerWeights, name: str, shape: tuple[int, ...]) -> Callable[[int, int], Tensor]:
    tensor = read_tensor(source, name, shape)
    tensor = tensor if shape else tensor[None]
    return lambda start, stop: tensor[start:stop]
