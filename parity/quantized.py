"""A quantized candidate's error, split in three: what quantizing costs, what reading the file adds, what packing adds.

A. *weights*: the reference in float64 on the original weights, and on the dequantized ones. Reported, not judged.
B. *dequantized*: our model in float32 on dense dequantized weights, judged like any candidate.
C. *packed*: our model as it is loaded, in each dtype, through every cache path, judged like any candidate.

The truth of B and C is the reference in float64 on dequantized weights that another reader than ours read; in a dtype
the reference rounds them, which is part of the error that it is granted. A model right in B and wrong in C has a
wrong kernel; one wrong in B, a wrong import; and one wrong in neither whose tensors are far from the original's, a
wrong file.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma4_impl.checkpoint import Weights, is_quantized, open_checkpoint
from gemma4_impl.config import RopeParameters, TextConfig
from gemma4_impl.quant.recipe import QuantRecipe, plan
from gemma4_impl.taps import tap_names
from parity import PATHS
from parity.candidate import TorchCandidate
from parity.compare import routing_of
from parity.engine import DTYPES, Baseline, Case, Report, baseline, judge
from parity.metrics import LogitMetrics, measure, measure_logits
from parity.weights import TensorCheck, check_tensors, packed_in
from reference.hf import HFReference
from reference.weights import Source, WeightFiles, stored_as

KINDS = ("quantized", "gguf")
_NO_EFFECT = {"tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings"}
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Quantized:
    """A candidate on disk: a folder that `gemma4 quantize` or torchao wrote (`quantized`), or a GGUF file (`gguf`)."""

    kind: str
    path: Path
    label: str

    def weights(self) -> Weights:
        """As the candidate reads them."""
        return open_checkpoint(self.path)

    def source(self) -> Source:
        """As the reference reads them: with gguf-py or torchao. Raises ImportError where that is not installed."""
        if self.kind == "gguf":
            from reference.gguf_py import GGUFPyWeights

            return GGUFPyWeights(sorted(set(self.weights().files.values())))
        from reference.torchao_weights import TorchAOWeights

        return TorchAOWeights(self.path)

    def plan(self, weights: Weights) -> dict[str, str | None]:
        """Tensor -> what the recipe that the folder names makes of it (None: floats); empty if it names none."""
        file = self.path / "quantization.json"
        if self.kind == "gguf" or not file.is_file():
            return {}
        try:
            recipe = QuantRecipe.from_dict(json.loads(file.read_text(encoding="utf-8"))["recipe"], str(file))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"{file}: not as `gemma4 quantize` writes it ({error}); remove it") from None
        planned = {name: how for name, how in plan(recipe, weights.config).items() if name in weights.files}
        return {name: how and stored_as(how.bits, how.group_size, weights.shape(name)) for name, how in planned.items()}


def quantized_at(path: Path, label: str = "") -> Quantized | None:
    """The quantized candidate at `path`; None for a plain checkpoint, or nothing."""
    kind = "gguf" if path.is_file() else "quantized" if is_quantized(path) else None
    return kind and Quantized(kind, path, label)


@dataclass(frozen=True)
class Target:
    """A quantized candidate, and the checkpoint it was made from, if that is there."""

    label: str
    candidate: Quantized
    original: Path | None


@dataclass(frozen=True)
class Damage:
    """Stage A: the dequantized weights' float64 run against the original's, every router choosing for itself."""

    taps: dict[str, float]
    """tap -> relative L2 error accumulated from the input, in execution order."""
    created: dict[str, float]
    """tap -> relative L2 error that arises there: of the original weights on what the dequantized ones compute from."""
    logits: LogitMetrics
    perplexity: tuple[float, float]
    """Of the tokens that were run, each from those before it: with the original weights, and with the dequantized."""
    choices: int
    """Expert choices made, tokens x MoE layers."""
    flips: int
    """Those where the set of experts is another."""


@dataclass
class Split:
    """All that is known of one quantized candidate."""

    checkpoint: str
    """Label of the original checkpoint, or of the candidate itself where there is none."""
    candidate: str
    kind: str
    """quantized or gguf."""
    tensors: list[TensorCheck]
    damage: Damage | None
    """None without an original checkpoint."""
    dense: list[Case] = field(default_factory=list)
    """Stage B."""
    packed: list[Case] = field(default_factory=list)
    """Stage C."""
    activations: Damage | None = None
    """Of an exported program that rounds activations: what that costs. The truth of its stage C rounds them as well."""
    program: str | None = None
    """What an exported program was made for, if that is what stage C ran."""

    @property
    def cases(self) -> list[Case]:
        return self.dense + self.packed

    @property
    def wrong(self) -> list[TensorCheck]:
        """Tensors that are not what they should be."""
        return [tensor for tensor in self.tensors if tensor.why]

    @property
    def red(self) -> bool:
        return bool(self.wrong) or any(case.comparison.red for case in self.cases)

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.stored_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / sum(math.prod(tensor.shape) for tensor in self.tensors)


def check_same_architecture(original: Path, candidate: Quantized) -> None:
    """Raises ValueError naming the first thing in which the configs differ that changes what the model computes."""
    theirs, ours = TextConfig.from_file(original), candidate.weights().config
    for name, a, b in _differences(theirs, ours):
        raise ValueError(f"{candidate.path}: {name} = {b!r}, but {a!r} in {original}: not made from this checkpoint")


def _differences(one: TextConfig, other: TextConfig) -> Iterator[tuple[str, Any, Any]]:
    ignored = _NO_EFFECT | {"num_global_key_value_heads", "use_double_wide_mlp", "attention_k_eq_v"}
    if not one.hidden_size_per_layer_input:
        ignored.add("vocab_size_per_layer_input")
    for name in (known.name for known in fields(TextConfig) if known.name not in ignored):
        a, b = getattr(one, name), getattr(other, name)
        if _float32(a) != _float32(b):
            yield name, a, b
    for a, b in zip(one.layers, other.layers, strict=False):
        for name in vars(a):
            if getattr(a, name) != getattr(b, name):
                yield f"layer {a.index}'s {name}", getattr(a, name), getattr(b, name)


def _float32(value: Any) -> Any:
    """`value` with the floats in it as a GGUF file holds them."""
    if isinstance(value, RopeParameters):
        return {name: _float32(part) for name, part in vars(value).items()}
    if isinstance(value, Mapping):
        return {name: _float32(part) for name, part in value.items()}
    return float(torch.tensor(value, dtype=torch.float32)) if isinstance(value, float) else value


def split(
    label: str,
    candidate: Quantized,
    tokens: Sequence[int],
    original: Path | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    paths: Sequence[str] = PATHS,
    device: torch.device | str = "cpu",
    stream: bool = False,
    advance: Callable[[str], None] = lambda what: None,
    weights: Weights | None = None,
) -> Split:
    """The three stages for one candidate. Without `original`, A is left out.

    Args:
        label: what the checkpoint is called.
        original: the folder of the Hugging Face checkpoint that the candidate was made from.
        stream: leave the reference's weights on disk.
        advance: told what comes next, as often as `steps` says.
        weights: the candidate's weights, instead of `candidate.weights()`.
    Raises ValueError if the architectures differ, and as `candidate.source` and loading do."""
    weights, source = weights or candidate.weights(), candidate.source()
    if original is not None:
        check_same_architecture(original, candidate)
    name = f"{label} {candidate.label}"
    advance(f"{name} weights")
    tensors = check_tensors(
        weights, source, None if original is None else WeightFiles(original), candidate.plan(weights)
    )
    out = Split(label, candidate.label, candidate.kind, tensors, None)
    reference = original or candidate.path
    for dtype in dict.fromkeys(("float32", *dtypes)):
        advance(f"{name} {dtype} reference")
        wanted = paths if dtype in dtypes else ()
        base = baseline(reference, tokens, DTYPES[dtype], device, stream, wanted, source)
        if dtype == "float32":
            if original is not None:
                out.damage = damage(original, base, device, stream)
            advance(f"{name} dequantized")
            ours = TorchCandidate(weights, torch.float32, device, dense=True)
            out.dense.append(Case(label, dtype, "full", judge(ours, base, "full"), f"{candidate.label} dequantized"))
            del ours
            gc.collect()
        if wanted:
            ours = TorchCandidate(weights, DTYPES[dtype], device)
            forms = packed_in(ours.model, weights)
            out.tensors = [
                replace(t, packed={**t.packed, dtype: forms[t.name]}) if t.name in forms else t for t in out.tensors
            ]
            for path in wanted:
                advance(f"{name} {dtype} {path}")
                out.packed.append(Case(label, dtype, path, judge(ours, base, path), candidate.label))
            del ours
            gc.collect()
    return out


def run(report: Report, target: Target, tokens: Sequence[int], *options: Any) -> None:
    """Adds `split` of a target to `report`; `options` are its, from `dtypes` on."""
    found = split(target.label, target.candidate, tokens, target.original, *options)
    report.splits.append(found)
    report.cases += found.cases
    fingerprint = target.candidate.weights().fingerprint()
    report.inputs[f"{target.label} {target.candidate.label}"] = {"fingerprint": fingerprint, "tokens": list(tokens)}


def steps(dtypes: Sequence[str], paths: Sequence[str]) -> int:
    """How often `split` tells `advance` what comes next."""
    return 2 + len({"float32", *dtypes}) + len(dtypes) * len(paths)


def damage(
    original: Path,
    base: Baseline,
    device: torch.device | str = "cpu",
    stream: bool = False,
    weights: Source | None = None,
) -> Damage:
    """Stage A, with the truth of `base` on the dequantized weights; or, on `weights`, what else `base` does to them."""
    where = "cpu" if torch.device(device).type == "mps" else device
    reference = HFReference(original, base.dtype, truth=True, device=where, stream=stream, weights=weights)
    truth = reference.capture([base.tokens])
    local = reference.capture([base.tokens], routing=base.routing, forced=base.forced)
    theirs = routing_of(truth, base.config.top_k_experts)
    changed = [(base.routing[at].sort(-1).values != theirs[at].sort(-1).values).any(-1) for at in theirs]
    names = tap_names(base.config)
    return Damage(
        taps={name: measure(base.truth[name], truth[name]).rel_l2 for name in names},
        created={name: measure(local[name], base.truth[name]).rel_l2 for name in names},
        logits=measure_logits(base.truth["logits"], truth["logits"]),
        perplexity=(perplexity(truth["logits"], base.tokens), perplexity(base.truth["logits"], base.tokens)),
        choices=sum(layer.numel() for layer in changed),
        flips=sum(int(layer.sum()) for layer in changed),
    )


def perplexity(logits: Tensor, tokens: Sequence[int]) -> float:
    """exp of the mean surprise, of logits [1, L, V], at each of `tokens` but the first; NaN if there is no other."""
    following = torch.tensor(list(tokens[1:]))
    size = max(1, _BLOCK // logits.shape[-1])
    parts = zip(logits[0, :-1].split(size), following.split(size), strict=True)
    surprise = [-rows.double().log_softmax(-1).gather(-1, ids[:, None]) for rows, ids in parts]
    return float(torch.cat(surprise).mean().exp()) if len(following) else math.nan
