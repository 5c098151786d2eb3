"""Runs a parity check end to end: truth, reference floors, candidate through every path, verdicts."""

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.config import TextConfig
from gemma4_impl.vision.processing import ImageSource, ProcessedImages
from parity import PATHS
from parity.candidate import RAGGED, TorchCandidate
from parity.compare import Comparison, Taps, compare, routing_of
from parity.images import place
from parity.metrics import Metrics, position_errors
from parity.three_way import ThreeWay, compare_truths
from reference.hf import HFReference
from reference.weights import Source

if TYPE_CHECKING:
    from parity.quantized import Split

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ATTENTIONS = {"hf": ("eager", "sdpa"), "jax": ("xla",)}
"""Reference -> its attention implementations."""
REFERENCES = tuple(_ATTENTIONS)
CANDIDATES = ("torch", "jax")
"""The implementations of ours that run a checkpoint as it is."""
_CHUNKS = {"chunked": RAGGED, "left_padded": RAGGED, "right_padded": RAGGED, "decode": (1,), "generate": (1,)}


@dataclass(frozen=True)
class Case:
    """One line of the report."""

    checkpoint: str
    dtype: str
    path: str
    comparison: Comparison
    candidate: str = "torch"
    reference: str = "hf"


@dataclass
class Baseline:
    """What a candidate in one dtype is held against: the truth, and the reference's own errors."""

    dtype: torch.dtype
    config: TextConfig
    tokens: list[int]
    truth: Taps
    references: list[Taps]
    local_references: list[Taps]
    forced: Taps
    routing: Taps
    images: ProcessedImages | None = None
    """What stands at the image tokens."""
    errors: dict[tuple[str, str], list[Metrics]] = field(default_factory=dict)
    """What `compare` remembers of the references."""
    draws: list[Taps] = field(default_factory=list)
    """tap -> [B, L] |r - t| of reference runs whose embedding, or that of the patches, was moved by a roundoff."""
    open: Callable[[], Any] | None = None
    """Loads the reference once more."""
    reference: str = "hf"

    def draw(self, count: int, reference: Any = None) -> None:
        """Runs the reference until there are `count` draws.

        Where a small vector is normed, one unlucky rounding decides the error of everything after it, and a handful of
        runs does not show how unlucky the reference itself can be. Stochastic arithmetic (Vignes 1993) does."""
        reference = reference or self.open()
        reference.use(_ATTENTIONS[self.reference][0])
        # One at a time: a forced embedding would take the place of what the moved patches become.
        starts = ["embed"] if self.images is None else ["vision.patch_embed", "embed"]
        while len(self.draws) < count:
            generator = torch.Generator().manual_seed(len(self.draws))
            name = starts[len(self.draws) % len(starts)]
            sign = torch.randint(0, 2, self.truth[name].shape, generator=generator) * 2 - 1
            moved = {name: self.truth[name] * (1 + torch.finfo(self.dtype).eps / 2 * sign)}
            taps = reference.capture([self.tokens], routing=self.routing, forced=moved, images=self.images)
            self.draws.append({name: position_errors(taps[name], self.truth[name]) for name in taps})


DRAWS = (4, 32)
"""How often the reference is run with its embedding moved by one roundoff, up or down at random: always, and before
an error that only accumulated is called red."""


def baseline(
    checkpoint: str | Path,
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    stream: bool = False,
    paths: Sequence[str] = PATHS,
    weights: Source | None = None,
    images: ProcessedImages | None = None,
    reference: str = "hf",
    routing: Taps | None = None,
    activations: Collection[str] = (),
    local: bool = True,
) -> Baseline:
    """Runs the reference: in float64 for the truth, then in `dtype`, free and with the truth forced into every tap.

    Its variants in `dtype` are transformers' eager and sdpa attention (our JAX model has one), and the first of them
    through its own cache in the chunks that `paths` feed, because a product of few rows is rounded differently (not
    with `stream`, which would read the weights for each chunk). One copy of the model is held at a time; the float64
    one is the largest (8 bytes a parameter). With `stream` it is one layer, or the output head, of it. `weights` are
    used in place of the checkpoint's own. `images` stand at the image tokens; they take a checkpoint's own weights,
    without `stream`. `routing` is whose choices of experts the truth follows, by default its own; `activations` are the
    weights whose inputs are quantized (`HFReference`); without `local` no truth is forced into the references.
    Raises ValueError for `stream` or `weights` with the reference `jax`, which has neither."""
    # Metal has no float64.
    where = "cpu" if torch.device(device).type == "mps" else device
    own: dict[str, Any] = {}
    if reference == "hf":
        own = {"stream": stream, "weights": weights, "activations": activations}
    if reference == "jax" and (stream or weights is not None):
        raise ValueError("--reference jax: runs the weights of a plain checkpoint, held in memory whole")
    model = open_reference(reference, checkpoint, dtype, truth=True, device=where, **own)
    config = model.config
    truth = model.capture([tokens], images=images, routing=routing)
    forced = {name: value for name, value in truth.items() if model.forceable(name)}
    routing = routing_of(truth, config.top_k_experts) if routing is None else routing
    del model
    gc.collect()
    model = open_reference(reference, checkpoint, dtype, device=device, **own)
    free, created = [], []
    first = _ATTENTIONS[reference][0]
    cached = [] if stream else dict.fromkeys(_CHUNKS[path] for path in paths if path in _CHUNKS)
    runs = [(attention, ()) for attention in _ATTENTIONS[reference]] + [(first, chunks) for chunks in cached]
    for attention, chunks in runs:
        model.use(attention)
        run = {"routing": routing, "chunks": chunks, "images": images}
        free.append(model.capture([tokens], **run))
        if local:
            created.append(model.capture([tokens], forced=forced, **run))
    base = Baseline(dtype, config, list(tokens), truth, free, created, forced, routing, images, reference=reference)
    base.open = lambda: open_reference(reference, checkpoint, dtype, device=device, **own)
    base.draw(DRAWS[0], model)
    return base


def open_reference(reference: str, checkpoint: str | Path, dtype: torch.dtype, **options: Any) -> Any:
    """An `HFReference`, or a `JaxReference`, which has the same interface."""
    if reference == "hf":
        return HFReference(checkpoint, dtype, **options)
    from reference.jax import JaxReference

    return JaxReference(checkpoint, dtype, **options)


def open_candidate(candidate: str, checkpoint: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A `TorchCandidate`, or a `JaxCandidate`, which has the same interface."""
    if candidate == "torch":
        return TorchCandidate(checkpoint, dtype, device)
    from parity.candidate_jax import JaxCandidate

    return JaxCandidate(checkpoint, dtype, device)


def judge(candidate: Any, base: Baseline, path: str) -> Comparison:
    """Runs `candidate` through one cache path, free and with the truth forced, and compares.

    Both runs use the truth's routing: a flipped choice would drown every later tap; flips are counted apart."""
    run = {"routing": base.routing} if base.images is None else {"routing": base.routing, "images": base.images}
    free = candidate.capture(base.tokens, path, **run)
    local = candidate.capture(base.tokens, path, forced=base.forced, **run)

    def verdict() -> Comparison:
        return compare(
            free,
            base.truth,
            base.references,
            base.dtype,
            local=local,
            local_references=base.local_references,
            draws=base.draws,
            top_k=base.config.top_k_experts,
            errors=base.errors,
            may_be_partial=lambda name: path == "generate" and after_the_cache(name, base.config),
        )

    result = verdict()
    if result.only_accumulated and len(base.draws) < DRAWS[1]:
        base.draw(DRAWS[1])
        result = verdict()
    return result


def after_the_cache(name: str, config: TextConfig) -> bool:
    """Whether prefill computes this tap for the last position of a prompt only."""
    layer = name.split(".")[1] if name.startswith("layers.") else None
    return name in ("norm", "logits") or (layer is not None and int(layer) >= config.first_kv_shared_layer)


@dataclass
class Report:
    """All cases of a run."""

    cases: list[Case] = field(default_factory=list)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """checkpoint label -> fingerprint of its weights, and the tokens it was run on."""
    splits: list["Split"] = field(default_factory=list)
    """Of each quantized candidate. Its cases are among `cases`."""
    images: dict[str, ProcessedImages] = field(default_factory=dict)
    """checkpoint label -> what its vision tower was given."""
    three_way: list[ThreeWay] = field(default_factory=list)
    """Of each checkpoint and dtype that both our models were held against transformers in."""

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.cases + other.cases,
            self.inputs | other.inputs,
            self.splits + other.splits,
            self.images | other.images,
            self.three_way + other.three_way,
        )

    @property
    def failed(self) -> bool:
        return bool(self.red) or any(part.red for part in (*self.splits, *self.three_way))

    @property
    def red(self) -> list[Case]:
        return [case for case in self.cases if case.comparison.red]

    @property
    def worst(self) -> Case | None:
        return max(self.cases, key=lambda case: case.comparison.worst_ratio, default=None)


def run(
    checkpoints: dict[str, Path],
    tokens: Callable[[TextConfig, Path], list[int]],
    dtypes: Sequence[str] = tuple(DTYPES),
    paths: Sequence[str] | Mapping[str, Sequence[str]] = PATHS,
    device: torch.device | str = "cpu",
    stream: bool = False,
    advance: Callable[[str], None] = lambda what: None,
    images: Sequence[ImageSource] = (),
    reference: str = "hf",
) -> Report:
    """Every checkpoint (label -> folder) in every dtype through every one of `paths`, our PyTorch model's or, by name,
    those of each of CANDIDATES, with `images` put into the tokens. `advance` is told what comes next, as often as
    `steps` says. Raises as `images.place` and `baseline` do."""
    report = Report()
    taken = paths if isinstance(paths, Mapping) else {CANDIDATES[0]: paths}
    for label, path in checkpoints.items():
        config = TextConfig.from_file(path)
        sequence, shown = place(path, tokens(config, path), images)
        if shown is not None:
            report.images[label] = shown
        report.inputs[label] = {"fingerprint": Checkpoint(path).fingerprint(), "tokens": sequence}
        for name in dtypes:
            advance(f"{label} {name} reference")
            every = dict.fromkeys(path for found in taken.values() for path in found)
            base = baseline(
                path, sequence, DTYPES[name], device, stream, tuple(every), images=shown, reference=reference
            )
            cases = []
            for which, own_paths in taken.items():
                candidate = open_candidate(which, path, DTYPES[name], device)
                for cache_path in own_paths:
                    advance(f"{label} {name} {which} {cache_path}")
                    comparison = judge(candidate, base, cache_path)
                    cases.append(Case(label, name, cache_path, comparison, which, reference))
                del candidate
                gc.collect()
            if _three(taken, reference, stream):
                advance(f"{label} {name} the truths")
                report.three_way.append(_three_way(label, name, path, base, cases, device))
            report.cases += cases
    return report


def steps(
    checkpoints: int, dtypes: int, paths: Mapping[str, Sequence[str]], reference: str, stream: bool = False
) -> int:
    """How often `run` tells `advance` what comes next."""
    return checkpoints * dtypes * (1 + sum(map(len, paths.values())) + _three(paths, reference, stream))


def _three(candidates: Collection[str], reference: str, stream: bool) -> bool:
    """Whether `run` makes a `ThreeWay`; JAX's truth takes a model that is held whole."""
    return reference == "hf" and set(candidates) == set(CANDIDATES) and not stream


def _three_way(
    label: str, dtype: str, checkpoint: Path, base: Baseline, cases: Sequence[Case], device: torch.device | str
) -> ThreeWay:
    where = "cpu" if torch.device(device).type == "mps" else device
    truth = open_reference("jax", checkpoint, base.dtype, truth=True, device=where)
    taps = truth.capture([base.tokens], images=base.images)
    found: dict[str, list[Comparison]] = {}
    for case in cases:
        found.setdefault(case.candidate, []).append(case.comparison)
    # The reference has no budget but its own: its first run is held against the others.
    options = {"local": base.local_references[0], "local_references": base.local_references[1:], "draws": base.draws}
    top_k = base.config.top_k_experts
    found["hf"] = [compare(base.references[0], base.truth, base.references[1:], base.dtype, top_k=top_k, **options)]
    return compare_truths(label, dtype, found, base.truth, taps)
