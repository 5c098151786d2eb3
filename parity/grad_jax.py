"""Gradients of our JAX model, for `parity.grad`: taken by its own training hooks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from torch import Tensor

from gemma4_impl import names, taps
from gemma4_impl.nnx import train
from gemma4_impl.nnx.load import to_numpy, to_torch
from gemma4_impl.nnx.soft_tokens import image_slots
from gemma4_impl.nnx.tapped import Traced
from parity.compare import Taps
from parity.grad import Batch
from reference.jax import TappedModel


class JaxGradients:
    """Our JAX model; the batch is padded on the right. `runs.model` may be changed before. Free and forced runs share
    one compiled function. Raises as `TappedModel` does."""

    name = "jax"

    def __init__(self, runs: TappedModel):
        self.runs = runs

    def gradients(self, batch: Batch, routing: Taps, forced: Taps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `parity.grad.Candidate`."""
        tokens, positions, targets = batch.padded()
        arrays = {
            "tokens": tokens.numpy().astype(np.int32),
            "positions": positions.numpy().astype(np.int32),
            "targets": targets.numpy(),
        }
        models = [self.runs.model]
        with self.runs.settings():
            if batch.images is not None:
                models.append(self.runs.encoder.model)
                arrays |= self._images(batch, arrays["tokens"])
            graphdef, parameters, rest = nnx.split(models, nnx.Param, ...)
            # A gradient has its parameter's dtype.
            parameters = jax.tree.map(lambda x: x.astype(self.runs.model.dtype), parameters)
            given = tuple({n: jnp.asarray(to_numpy(v)) for n, v in part.items()} for part in (routing, forced))

            @jax.jit
            def gradients(parameters: Any, use_forced: Array) -> Any:
                def objective(parameters: Any) -> Array:
                    with taps.recording(_StraightThrough(*given, use_forced)):
                        models = nnx.merge(graphdef, parameters, rest)
                        loss = train.next_token_loss if len(models) == 1 else train.multimodal_loss
                        return loss(*models, **arrays)

                return jax.grad(objective)(parameters)

            return tuple(_canonical(gradients(parameters, use_forced)) for use_forced in (False, True))

    def _images(self, batch: Batch, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """What `train.multimodal_loss` is to be told of the images, which are those of the first row and the first few
        of them in another."""
        config, images = self.runs.encoder.config, batch.images
        length = images.positions.shape[1] // config.pooling_kernel_size**2
        slots = []
        for row in tokens:
            room = int((row == config.image_token_id).sum())
            shown = np.cumsum(images.num_soft_tokens) <= room
            counts = np.asarray(images.num_soft_tokens)[shown].tolist()
            slots.append(image_slots(row[None], config.image_token_id, counts, length)[0])
        return {
            "pixel_values": images.pixel_values.numpy(),
            "patches": images.positions.numpy().astype(np.int32),
            "slots": np.stack(slots),
        }


class _StraightThrough(Traced):
    """Forced values replace a tap's value if `use_forced`, but not its gradient, which flows on to what came before."""

    def __init__(self, routing: dict[str, Array], forced: dict[str, Array], use_forced: Array):
        super().__init__(forced, routing)
        self.use_forced = use_forced

    def record(self, name: str, value: Array) -> Array:
        own = jax.lax.stop_gradient(value)
        given = jnp.where(self.use_forced, super().record(name, own), own)
        # Exactly the value given: the difference is 0.
        return given + (value - own)


def _canonical(gradients: Any) -> dict[str, Tensor]:
    return {names.from_nnx(path): to_torch(leaf[...]) for (_, *path), leaf in nnx.to_flat_state(gradients)}
