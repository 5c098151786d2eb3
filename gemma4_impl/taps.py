"""The tap vocabulary and the recorder. A tap costs one global look-up unless something is recording."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gemma4_impl.config import TextConfig


def tap_names(config: TextConfig) -> list[str]:
    """Every tap of a text model, in execution order.

    A KV-shared layer has no `self_attn.k` and `.v`: it computes none."""
    ple, moe = config.hidden_size_per_layer_input > 0, config.enable_moe_block
    names = ["embed"] + ["per_layer_inputs"] * ple
    for layer in config.layers:
        kv = [] if layer.kv_shared else ["self_attn.k", "self_attn.v"]
        branches = ["mlp"] + ["router", "experts"] * moe
        tail = ["resid_mlp"] + ["resid_ple"] * ple + ["out"]
        suffixes = ["self_attn.q", *kv, "self_attn.out", "resid_mid", *branches, *tail]
        names += [f"layers.{layer.index}.{suffix}" for suffix in suffixes]
    return [*names, "norm", "logits"]


class Recorder:
    """Collects taps by absolute position, so that any chunking of the input fills the same tensors [B, length, ...].

    NaN marks positions that were not computed; a computed NaN is kept as inf.

    Args:
        batch, length: rows and positions of the sequences being run.
        glob: only taps whose name matches are kept.
        forced: values [B, length, ...] that replace a tap's own value after it was recorded: what is recorded
            downstream then shows only the error created there.
        routing: [B, length, k] expert indices that replace the router's choice, by layer prefix (`layers.3.`).
    """

    def __init__(
        self,
        batch: int,
        length: int,
        glob: str = "*",
        forced: Mapping[str, Tensor] | None = None,
        routing: Mapping[str, Tensor] | None = None,
    ):
        self.batch, self.length, self.glob = batch, length, glob
        self.forced, self.routing = forced or {}, routing or {}
        self.values: dict[str, Tensor] = {}
        self.order: list[str] = []

    def at(self, positions: Tensor) -> None:
        self._rows, self._cols = (positions >= 0).nonzero(as_tuple=True)
        self._at = positions[self._rows, self._cols]

    # What is stored outlives the forward, which may run in inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def record(self, name: str, value: Tensor) -> Tensor:
        rows, cols, at = (index.to(value.device) for index in (self._rows, self._cols, self._at))
        if fnmatchcase(name, self.glob):
            if name not in self.values:
                shape = (self.batch, self.length, *value.shape[2:])
                self.values[name] = value.new_full(shape, torch.nan, device="cpu")
                self.order.append(name)
            # NaN means "not computed"; a NaN that was computed must stay an error.
            new = value[rows, cols].detach().cpu().nan_to_num(torch.inf, torch.inf, -torch.inf)
            self.values[name][self._rows.cpu(), self._at.cpu()] = new
        if name in self.forced:
            value = value.clone()
            value[rows, cols] = self.forced[name].to(value.device, value.dtype)[rows, at]
        return value

    def route(self, prefix: str, index: Tensor) -> Tensor:
        if prefix not in self.routing:
            return index
        rows, cols, at = (where.to(index.device) for where in (self._rows, self._cols, self._at))
        index = index.clone()
        index[rows, cols] = self.routing[prefix].to(index.device)[rows, at]
        return index


_recorder: Recorder | None = None


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Makes `recorder` receive the taps of every forward inside the block. Not re-entrant, one thread."""
    global _recorder
    if _recorder is not None:
        raise RuntimeError("a recorder is already active")
    _recorder = recorder
    try:
        yield recorder
    finally:
        _recorder = None


def at(positions: Tensor) -> None:
    """Tells the recorder the absolute positions [B, T] of the tokens that the next taps belong to; -1 is padding."""
    if _recorder is not None:
        _recorder.at(positions)


def tap(prefix: str, name: str, value: Tensor) -> Tensor:
    """Records `value` [B, T, ...] as `prefix + name`; returns it, or the value forced in its place."""
    if _recorder is None:
        return value
    return _recorder.record(prefix + name, value)


def route(prefix: str, index: Tensor) -> Tensor:
    """Returns the experts [B, T, k] chosen by the router, or those forced in their place."""
    if _recorder is None:
        return index
    return _recorder.route(prefix, index)
