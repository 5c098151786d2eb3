"""A jitted module whose taps go to a `taps.Recorder`: they are outputs of the compiled function, forced ones inputs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gemma4_impl import taps
from gemma4_impl.nnx.load import to_numpy, to_torch


class Tapped:
    """Calls `model`, compiled once for each shape of its arguments, and records its taps."""

    def __init__(self, model: nnx.Module):
        self._graphdef, self._state = nnx.split(model)
        self._jitted = jax.jit(self._traced, static_argnames="static")
        self._inputs: tuple[taps.Recorder | None, tuple] = (None, ())

    def __call__(self, recorder: taps.Recorder, *args: Any, **static: Any) -> Any:
        """What `model(*args, **static)` returns; `args` are arrays or pytrees, `static` is compiled in."""
        if self._inputs[0] is not recorder:
            self._inputs = recorder, _forced_inputs(recorder)
        out, seen = self._jitted(self._state, *self._inputs[1], args, static=tuple(static.items()))
        for name, (positions, value) in seen.items():
            recorder.at(to_torch(positions).long())
            recorder.record(name, to_torch(value))
        return out

    def _traced(self, state: Any, forced: dict, routing: dict, args: tuple, static: tuple) -> Any:
        recorder = _Traced(forced, routing)
        with taps.recording(recorder):
            out = nnx.merge(self._graphdef, state)(*args, **dict(static))
        return out, recorder.seen


class _Traced:
    """Stands where a `taps.Recorder` does while the model is traced."""

    def __init__(self, forced: dict[str, Array], routing: dict[str, Array]):
        self.forced, self.routing = forced, routing
        self.seen: dict[str, tuple[Array, Array]] = {}

    def at(self, positions: Array) -> None:
        self._positions = positions

    def record(self, name: str, value: Array) -> Array:
        self.seen[name] = self._positions, value
        return self._replaced(value, self.forced.get(name))

    def route(self, prefix: str, index: Array) -> Array:
        return self._replaced(index, self.routing.get(prefix))

    def _replaced(self, value: Array, forced: Array | None) -> Array:
        """`value` [B, T, ...] with what `forced` [B, L, ...] holds for its positions, padding left as it is."""
        if forced is None:
            return value
        rows, at = jnp.arange(value.shape[0])[:, None], self._positions
        keep = jnp.expand_dims(at < 0, tuple(range(2, value.ndim)))
        return jnp.where(keep, value, forced[rows, jnp.maximum(at, 0)].astype(value.dtype))


def _forced_inputs(recorder: taps.Recorder) -> tuple[dict[str, Array], dict[str, Array]]:
    return tuple({n: jnp.asarray(to_numpy(v)) for n, v in part.items()} for part in (recorder.forced, recorder.routing))
