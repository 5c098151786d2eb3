"""What a fault of an exported program is, and how one is put in: into its manifest, its graph, or its session."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.export.folder import MANIFEST, Manifest
from gemma4_impl.export.front import export
from gemma4_impl.quant.recipe import load_recipe
from gemma4_impl.quant.save import quantize_checkpoint
from parity.candidate_pte import ProgramCandidate
from parity.compare import Comparison
from parity.engine import Baseline
from parity.exported import Program, judge_program, open_program, program_baseline
from parity.inputs import default_tokens
from reference.tiny import aligned, make_tiny

CHUNK, CONTEXT, LENGTH = 12, 64, 40
Place = Literal["manifest", "graph", "session"]

# So few layers that an export takes seconds. Two layers of the shared one's type compute keys, so that reading the
# wrong one's shows.
_SHARED = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL, FULL, FULL], "num_kv_shared_layers": 1}
_TWO = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
_ONE = {"num_hidden_layers": 1, "layer_types": [FULL]}
_LAYERS = {"E2B": _SHARED, "E4B": _ONE | {"num_kv_shared_layers": 0}, "26B-A4B": _ONE, "31B": _TWO}


@dataclass(frozen=True)
class Recipe:
    """A small program with taps: of which checkpoint, and for what."""

    variant: str
    backend: str
    quantized: str = ""
    """The recipe of the checkpoint's weights; empty for floats."""
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.variant, self.backend, self.quantized, self.dtype) if part)


SHARED = Recipe("E2B", "mlx")
QUANTIZED = Recipe("31B", "mlx", "default")
XNNPACK = Recipe("E4B", "xnnpack")


@dataclass(frozen=True)
class ExportFault:
    """A mistake that an exporter or a runner makes.

    manifest: `inject(manifest)` changes the JSON
    beside it. graph: `inject(graph)` changes the instructions of an MLX program as they are loaded. session:
    `inject(candidate)` changes the loaded `ProgramCandidate`."""

    name: str
    summary: str
    place: Place
    inject: Callable[..., Any]
    where: str
    """The tap that must be the first divergence; for what is refused before it is judged, words of the message."""
    program: Recipe = SHARED
    path: str = "chunked"

    @property
    def refused(self) -> bool:
        """Whether the fault is an error, and not a divergence."""
        return " " in self.where


@dataclass(frozen=True)
class Made:
    """A small program, and what it was made from."""

    recipe: Recipe
    folder: Path
    source: Path
    original: Path

    @cached_property
    def tokens(self) -> list[int]:
        return default_tokens(TextConfig.from_file(self.source), self.source, LENGTH)

    @cached_property
    def base(self) -> Baseline:
        """What the program is held against."""
        target = Program(self.recipe.variant, "pte", self.folder, self.source)
        return program_baseline(target, Manifest.read(self.folder), self.tokens, ("chunked",))


def make(recipe: Recipe, folder: Path) -> Made:
    """Makes the program in `folder`, or takes the one that was made there."""
    original, source = folder / "original", folder / ("quantized" if recipe.quantized else "original")
    made = Made(recipe, folder / "program", source, original)
    if made.folder.exists():
        return made
    overrides = _LAYERS[recipe.variant]
    if recipe.quantized:
        overrides = overrides | aligned(recipe.variant, 32)
    # XNNPACK holds the scales of groups in bfloat16, as those of a bfloat16 checkpoint are.
    make_tiny(recipe.variant, original, dtype="bfloat16" if recipe.quantized else "float32", overrides=overrides)
    if recipe.quantized:
        quantize_checkpoint(original, source, load_recipe(recipe.quantized))
    _export(made, made.folder)
    return made


def find(fault: ExportFault | None, made: Made, folder: Path, path: str = "chunked") -> Comparison:
    """What the engine says of the program with `fault` in it; `folder` is where a changed copy is put. Raises what
    opening or running it does."""
    at, within = made.folder, nullcontext()
    if fault and fault.place == "manifest":
        at = folder / "program"
        shutil.copytree(made.folder, at)
        manifest = json.loads((at / MANIFEST).read_text(encoding="utf-8"))
        fault.inject(manifest)
        (at / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    elif fault and fault.place == "graph":
        within = graph_changed(fault.inject)
    with within:
        candidate, _ = open_program(at)
    if fault and fault.place == "session":
        fault.inject(candidate)
    return judge_program(candidate, made.base, fault.path if fault else path)


def _export(made: Made, out: Path) -> None:
    recipe, sizes = made.recipe, {"max_seq_len": CONTEXT, "max_prefill_chunk": CHUNK}
    export(made.source, out, recipe.backend, dtype=getattr(torch, recipe.dtype), taps=True, **sizes)


@contextmanager
def graph_changed(change: Callable[[Any], None]) -> Iterator[None]:
    """Inside, MLX programs that are loaded have their graphs changed by `change(graph)`, in place."""
    from gemma4_impl.export.replay import machine

    parse = machine.parse

    def changed(payload: bytes) -> Any:
        graph = parse(payload)
        change(graph)
        return graph

    with patch.object(machine, "parse", changed):
        yield


def wrap(candidate: ProgramCandidate, name: str, function: Callable[..., Any]) -> None:
    """Makes `function(original, *args, **kwargs)` the method `name` of this one session."""
    original = getattr(candidate.session, name)
    setattr(candidate.session, name, lambda *args, **kwargs: function(original, *args, **kwargs))
