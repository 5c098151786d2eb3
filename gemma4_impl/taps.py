"""The tap vocabulary and the recorder. A tap costs one global look-up unless something is recording."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4_impl.config import TextConfig

if TYPE_CHECKING:
    from gemma4_impl.vision.config import VisionConfig


VISION = "vision."
"""Begins the names of the vision tower's taps [I, P, ...], of I images; those after pooling are [I, L, ...]."""

CHOICE = ".choice"
"""Ends the names of what routers chose, see `choice_names`."""


def vision_tap_names(config: "VisionConfig") -> list[str]:
    """Every tap of a vision tower and its projector, in execution order."""
    suffixes = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "resid_mid", "mlp", "out")
    layers = [f"layers.{i}.{suffix}" for i in range(config.num_hidden_layers) for suffix in suffixes]
    names = ["patch_embed", *layers, "pool", *["standardised"] * config.standardize, "proj"]
    return [VISION + name for name in names]


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


def choice_names(config: TextConfig) -> list[str]:
    """What every router chose, `layers.{i}.choice` [B, T, k], recorded beside the taps: experts as floats, so that NaN
    can mark positions that were not computed."""
    return [f"layers.{layer.index}{CHOICE}" for layer in config.layers if config.enable_moe_block]


def in_order(
    values: Mapping[str, Tensor], config: TextConfig, vision: "VisionConfig | None" = None
) -> dict[str, Tensor]:
    """What was recorded of a model, with its tower if it has one, in execution order; then the routers' choices."""
    names = ([] if vision is None else vision_tap_names(vision)) + tap_names(config) + choice_names(config)
    return {name: values[name] for name in names if name in values}


class Recorder:
    """Collects taps by absolute position, so that any chunking of the input fills the same tensors [B, length, ...].

    NaN marks positions that were not computed; a computed NaN is kept as inf.

    Args:
        batch, length: rows and positions of the sequences being run. The vision tower's taps are as large as what it
            is given.
        glob: only taps whose name matches are kept.
        forced: values [B, length, ...], on the CPU, that replace a tap's own value after it was recorded: what is
            recorded downstream then shows only the error created there.
        routing: expert indices [B, length, k], on the CPU, that replace the router's choice, by layer prefix
            (`layers.3.`).
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
        self.order: list[str] = []
        self._events: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    @property
    def values(self) -> dict[str, Tensor]:
        """tap -> [B, length, ...] on the CPU, of all that was recorded so far, in execution order."""
        out = {}
        for name in self.order:
            rows, at, values = (torch.cat(parts).cpu() for parts in zip(*self._events[name], strict=True))
            size = (self.batch, self.length)
            if name.startswith(VISION):
                size = (int(rows.max()) + 1, int(at.max()) + 1)
            out[name] = values.new_full((*size, *values.shape[1:]), torch.nan)
            # NaN means "not computed"; a NaN that was computed must stay an error.
            out[name][rows, at] = values.nan_to_num(torch.inf, torch.inf, -torch.inf)
        return out

    def at(self, positions: Tensor) -> None:
        rows, cols = (positions.cpu() >= 0).nonzero(as_tuple=True)
        self._on_cpu = rows, positions.cpu()[rows, cols]
        self._where = tuple(index.to(positions.device) for index in (rows, cols, self._on_cpu[1]))

    # What is stored outlives the forward, which may run in inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def record(self, name: str, value: Tensor) -> Tensor:
        rows, cols, at = self._where
        if fnmatchcase(name, self.glob):
            if name not in self._events:
                self._events[name] = []
                self.order.append(name)
            # Put together at the end: a copy to the CPU for each token and tap would take most of the time on a GPU.
            self._events[name].append((rows, at, value[rows, cols].detach()))
        if name in self.forced:
            value = value.clone()
            value[rows, cols] = self.forced[name][self._on_cpu].to(value.device, value.dtype)
        return value

    def route(self, prefix: str, index: Tensor) -> Tensor:
        self.record(prefix + "choice", index.float())
        if prefix not in self.routing:
            return index
        rows, cols, _ = self._where
        index = index.clone()
        index[rows, cols] = self.routing[prefix][self._on_cpu].to(index.device)
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
