"""A jitted module whose taps go to a `taps.Recorder`: they are outputs of the compiled function, forced ones inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gemma4_impl import taps
from gemma4_impl.nnx.load import to_numpy, to_torch


class Tapped:
    """Calls `model`, compiled once for each shape of its arguments, and records its taps.

    A NaN among forced values, or an expert below 0, leaves the model's own; what is not forced is all of these, so that
    free and forced runs share one compiled function."""

    def __init__(self, model: nnx.Module):
        self._graphdef, self._state = nnx.split(model)
        self._jitted = jax.jit(self._traced, static_argnames="static")
        self._inputs: tuple[taps.Recorder | None, tuple] = (None, ())
        self._shapes: tuple[Any, tuple[dict, dict]] | None = None

    def __call__(self, recorder: taps.Recorder, *args: Any, **static: Any) -> Any:
        """What `model(*args, **static)` returns; `args` are arrays or pytrees, `static` is compiled in."""
        if self._inputs[0] is not recorder:
            self._inputs = recorder, self._forced(recorder, args)
        out, seen = self._jitted(self._state, *self._inputs[1], args, static=tuple(static.items()))
        for name, (positions, value) in seen.items():
            recorder.at(to_torch(positions).long())
            recorder.record(name, to_torch(value))
        return out

    def _forced(self, recorder: taps.Recorder, args: tuple) -> tuple[dict[str, Array], dict[str, Array]]:
        """Values of every tap and choice that could be forced, for positions [B, L] of the sequence."""
        sizes = [leaf.shape for leaf in jax.tree.leaves(args)]
        # The tower's taps are as large as what it is given; the others' features are always the same.
        before, shapes = self._shapes or (None, None)
        if before != sizes and (shapes is None or any(name.startswith(taps.VISION) for name in shapes[0])):
            shapes = jax.eval_shape(self._reached, self._state, args)
            self._shapes = sizes, shapes
        wide = jax.dtypes.canonicalize_dtype(np.float64)
        out: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
        given = (recorder.forced, wide, np.nan), (recorder.routing, np.int32, -1)
        for part, known, (values, dtype, nothing) in zip(out, shapes, given, strict=True):
            for name, shape in known.items():
                size = shape.shape[:2] if name.startswith(taps.VISION) else (recorder.batch, recorder.length)
                own = values.get(name)
                blank = np.full((*size, *shape.shape[2:]), nothing, dtype) if own is None else to_numpy(own)
                part[name] = jnp.asarray(blank, dtype)
        return out

    def _reached(self, state: Any, args: tuple) -> tuple[dict[str, Array], dict[str, Array]]:
        recorder = Traced({}, {})
        with taps.recording(recorder):
            nnx.merge(self._graphdef, state)(*args)
        return {name: value for name, (_, value) in recorder.seen.items()}, recorder.routed

    def _traced(self, state: Any, forced: dict, routing: dict, args: tuple, static: tuple) -> Any:
        recorder = Traced(forced, routing)
        with taps.recording(recorder):
            out = nnx.merge(self._graphdef, state)(*args, **dict(static))
        return out, recorder.seen | recorder.chosen


class Traced:
    """Stands where a `taps.Recorder` does while the model is traced."""

    def __init__(self, forced: dict[str, Array], routing: dict[str, Array]):
        self.forced, self.routing = forced, routing
        self.seen: dict[str, tuple[Array, Array]] = {}
        self.routed: dict[str, Array] = {}
        self.chosen: dict[str, tuple[Array, Array]] = {}

    def at(self, positions: Array) -> None:
        self._positions = positions

    def record(self, name: str, value: Array) -> Array:
        self.seen[name] = self._positions, value
        return self._replaced(value, self.forced.get(name))

    def route(self, prefix: str, index: Array) -> Array:
        self.routed[prefix] = index
        self.chosen[prefix + "choice"] = self._positions, index.astype(jnp.float32)
        return self._replaced(index, self.routing.get(prefix))

    def _replaced(self, value: Array, forced: Array | None) -> Array:
        """`value` [B, T, ...] with what `forced` [B, L, ...] holds for its positions, padding left as it is."""
        if forced is None:
            return value
        rows, at = jnp.arange(value.shape[0])[:, None], self._positions
        keep = jnp.expand_dims(at < 0, tuple(range(2, value.ndim)))
        given = forced[rows, jnp.maximum(at, 0)]
        nothing = jnp.isnan(given) if jnp.issubdtype(given.dtype, jnp.floating) else given < 0
        return jnp.where(keep | nothing, value, given.astype(value.dtype))
