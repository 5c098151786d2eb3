"""Program programs as candidates: each held against what it was made from, through its own caches.

Of a quantized source, the error is split as a quantized candidate's is: A is what quantizing costs, B our model on
dense dequantized weights, and C the program. Where the program rounds activations to integers, the truth of C and its
references round them too, so that what is judged is the program; what the rounding costs is reported beside A.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma4_impl.export.folder import Manifest, open_folder
from gemma4_impl.export.program import dtype_name
from gemma4_impl.export.run import open_session
from parity.affine import AffineWeights
from parity.candidate import TorchCandidate
from parity.candidate_pte import PATHS, ProgramCandidate
from parity.compare import Comparison, Taps, compare
from parity.engine import DRAWS, Baseline, Case, Report, after_the_cache, baseline, judge, open_reference
from parity.program_check import check_program
from parity.quantized import Quantized, Split, damage, quantized_at
from parity.weights import check_tensors
from reference.weights import Source, WeightFiles

AFFINE = ("mlx",)
"""Backends that dequantize by a product and a sum, each rounded."""


@dataclass(frozen=True)
class Program:
    """An exported folder, and what it was made from."""

    label: str
    """Of the source."""
    candidate: str
    """`pte:NAME`."""
    path: Path
    source: Path
    """A checkpoint folder, plain or quantized, or a GGUF file."""
    original: Path | None = None
    """The checkpoint that a quantized source was made from, if that is there."""


def judge_program(
    candidate: ProgramCandidate, base: Baseline, path: str, reroute: Callable[[Taps], Baseline] | None = None
) -> Comparison:
    """Runs a program through one cache path and compares the taps that it has; without taps, the logits.

    Nothing can be forced on it: its errors are those accumulated from the input, and where a tie between experts went
    otherwise than in the truth, `reroute(choices)` makes the baseline that follows the program there."""
    free = candidate.capture(base.tokens, path)
    choices = _choices(free, base)
    if reroute and choices is not None:
        base = reroute(choices)

    def verdict() -> Comparison:
        return compare(
            free,
            {name: value for name, value in base.truth.items() if candidate.tapped or name == "logits"},
            base.references,
            base.dtype,
            draws=base.draws,
            top_k=base.config.top_k_experts,
            errors=base.errors,
            may_be_partial=lambda name: path != "decode" and after_the_cache(name, base.config),
        )

    result = verdict()
    if result.only_accumulated and len(base.draws) < DRAWS[1]:
        base.draw(DRAWS[1])
        result = verdict()
    return result


def _choices(free: Taps, base: Baseline) -> Taps | None:
    """layer prefix -> experts [1, L, k] that the program chose, the truth's where it computed none; None if no set of
    experts differs from the truth's."""
    out, differ = {}, False
    for prefix, theirs in base.routing.items():
        own = free.get(f"{prefix}choice")
        if own is None:
            return None
        there = ~own.isnan().any(-1, keepdim=True)
        out[prefix] = torch.where(there, own.nan_to_num(0).long(), theirs)
        differ |= bool((out[prefix].sort(-1).values != theirs.sort(-1).values).any())
    return out if differ else None


def open_program(path: Path) -> tuple[ProgramCandidate, Manifest]:
    """The program in an exported folder, ready to be judged. Raises as `open_folder`, `check_program` and
    `open_session` do."""
    exported = open_folder(path)
    check_program(exported)
    manifest, session = exported.manifest, open_session(exported.folder, exported.manifest)
    tapped = bool(getattr(session, "taps", manifest.taps))
    return ProgramCandidate(session, exported.config, manifest.max_prefill_chunk, tapped), manifest


def program_baseline(
    target: Program,
    manifest: Manifest,
    tokens: Sequence[int],
    paths: Sequence[str],
    device: torch.device | str = "cpu",
    stream: bool = False,
    routing: Taps | None = None,
) -> Baseline:
    """What a program is held against: the reference on the source's dequantized weights, with the activations rounded
    that the program rounds."""
    quantized, at = quantized_at(target.source), target.original or target.source
    activations = rounded_inputs(manifest)
    own = {"weights": quantized and quantized.source(), "activations": activations, "local": False, "routing": routing}
    base = baseline(at, tokens, manifest.dtype, device, stream, paths, **own)
    if quantized and manifest.backend in AFFINE:
        weights = AffineWeights(own["weights"], quantized.weights(), manifest.dtype)
        model = open_reference("hf", at, manifest.dtype, device=device, stream=stream, weights=weights)
        base.references.append(model.capture([base.tokens], routing=base.routing))
    return base


def rounded_inputs(manifest: Manifest) -> list[str]:
    """Names of the weights whose inputs the program rounds to 8-bit integers: XNNPACK's quantized linears."""
    names = manifest.extra.get("quantized", []) if manifest.backend == "xnnpack" else []
    return [name for name in names if not name.startswith("embed_tokens")]


def check(programs: Sequence[Program], dtypes: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
    """Those of `paths` that programs have, all of theirs if none are asked for. Raises ValueError if none is left, or
    for a program that is in none of `dtypes`."""
    for program in programs:
        own = dtype_name(Manifest.read(program.path).dtype)
        if dtypes and own not in dtypes:
            raise ValueError(f"--candidate {program.candidate}: is a {own} program; leave --dtype {dtypes[0]} out")
    kept = tuple(path for path in PATHS if path in paths or not paths)
    if programs and not kept:
        raise ValueError(f"--path {paths[0]}: an exported program has caches and one row; it has {', '.join(PATHS)}")
    return kept


def run(
    report: Report,
    target: Program,
    tokens: Sequence[int],
    paths: Sequence[str] = PATHS,
    device: torch.device | str = "cpu",
    stream: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> None:
    """Adds the cases of a program, in its own dtype, to `report`, and its `Split` if the source is quantized. `advance`
    is told what comes next, as often as `steps` says. Raises ValueError for more tokens than the program's context, and
    as `open_program` does."""
    candidate, manifest = open_program(target.path)
    name, dtype = f"{target.label} {target.candidate}", dtype_name(manifest.dtype)
    if len(tokens) > manifest.max_seq_len:
        raise ValueError(
            f"{target.path}: a sequence of {len(tokens)} tokens, but the program holds {manifest.max_seq_len}; give "
            f"--length {manifest.max_seq_len}"
        )
    quantized = quantized_at(target.source)
    source, split = quantized and quantized.source(), None
    if quantized:
        split = _judge_weights(target, quantized, source, tokens, device, stream, advance)
    advance(f"{name} reference")

    def make(routing: Taps | None = None) -> Baseline:
        return program_baseline(target, manifest, tokens, paths, device, stream, routing)

    base = make()
    cases = []
    for path in paths:
        advance(f"{name} {path}")
        cases.append(Case(target.label, dtype, path, judge_program(candidate, base, path, make), target.candidate))
    report.cases += cases
    if split is not None:
        split.packed, split.program = cases, manifest.backend
        if rounded_inputs(manifest):
            split.activations = damage(target.original or target.source, base, device, stream, source)
        report.cases += split.dense
        report.splits.append(split)
    report.inputs[name] = {"fingerprint": manifest.source["fingerprint"], "tokens": list(tokens)}


def _judge_weights(
    target: Program,
    quantized: Quantized,
    source: Source,
    tokens: Sequence[int],
    device: torch.device | str,
    stream: bool,
    advance: Callable[[str], None],
) -> Split:
    """What `quantized.split` says of the tensors, and its stages A and B."""
    weights, original = quantized.weights(), target.original
    advance(f"{target.label} {target.candidate} weights")
    files = None if original is None else WeightFiles(original)
    tensors = check_tensors(weights, source, files, quantized.plan(weights))
    split = Split(target.label, target.candidate, quantized.kind, tensors, None)
    base = baseline(original or target.source, tokens, torch.float32, device, stream, (), source)
    if original is not None:
        split.damage = damage(original, base, device, stream)
    advance(f"{target.label} {target.candidate} dequantized")
    ours = TorchCandidate(weights, torch.float32, device, dense=True)
    name = f"{target.candidate} dequantized"
    split.dense.append(Case(target.label, "float32", "full", judge(ours, base, "full"), name))
    return split


def steps(program: Program, paths: Sequence[str]) -> int:
    """How often `run` tells `advance` what comes next."""
    return 1 + len(paths) + 2 * (quantized_at(program.source) is not None)
