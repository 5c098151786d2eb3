"""Gradient parity: gradients of a loss for every parameter against transformers' in float64, by the budget of taps."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_impl import taps
from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.config import TextConfig
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.vision.processing import ImageSource, ProcessedImages
from parity import budget
from parity.candidate import TorchCandidate, pad
from parity.candidate import batch as rows_of
from parity.compare import Comparison, TapResult, Taps, routing_of
from parity.engine import DTYPES, Case, Report
from parity.images import place
from parity.metrics import measure
from reference.gradients import StraightThrough, gradients
from reference.hf import HFReference

PATH = "grad"
"""What stands in the place of a cache path in a report."""
_DRAWS = (4, 32)
"""How often the reference is run with what enters it moved by one roundoff: always, and before bad luck is red."""
_BAD_LUCK = 10
"""How many budgets an error may come to and still be that: more is no matter of a few draws."""

# In execution order.
_MODEL = (
    "vision_tower.patch_embedder.position_embedding_table",
    "vision_tower.patch_embedder.input_proj.weight",
    "vision_tower.encoder.layers",
    "embed_vision.embedding_projection.weight",
    "embed_tokens.weight",
    "embed_tokens_per_layer.weight",
    "per_layer_model_projection.weight",
    "per_layer_projection_norm.weight",
    "layer_scalar",
    "layers",
    "norm.weight",
    "lm_head.weight",
)
_LAYER = (
    "input_layernorm",
    "self_attn.v_proj",
    "self_attn.k_proj",
    "self_attn.k_norm",
    "self_attn.q_proj",
    "self_attn.q_norm",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "post_feedforward_layernorm_1",
    "router.scale",
    "router.proj",
    "router.per_expert_scale",
    "pre_feedforward_layernorm_2",
    "experts.gate_up_proj",
    "experts.down_proj",
    "post_feedforward_layernorm_2",
    "post_feedforward_layernorm",
    "per_layer_input_gate",
    "per_layer_projection",
    "post_per_layer_input_norm",
)


def backward_order(names: Sequence[str]) -> list[str]:
    """Parameters from the loss back to the input: the order in which their gradients are complete. A tied embedding
    comes as late as the look-up, although the head gives the first part of its gradient; so do the layers' scalars."""

    def place_of(name: str) -> tuple[int, int, int]:
        head, layers, rest = name.rpartition("layers.")
        if not layers:
            return _MODEL.index(name), 0, 0
        index, _, leaf = rest.partition(".")
        leaf = leaf.removesuffix(".weight").removesuffix(".linear")
        return _MODEL.index(head + "layers"), int(index), _LAYER.index(leaf)

    return sorted(names, key=place_of, reverse=True)


@dataclass(frozen=True)
class Batch:
    """What the loss is taken over: sequences of different lengths, of which a part are targets."""

    rows: list[list[int]]
    targets: list[list[bool]]
    images: ProcessedImages | None = None
    """What stands at each row's image tokens, from the first image on."""
    image_token: int | None = None

    @property
    def total(self) -> int:
        return sum(map(sum, self.targets))

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions (-1 in padding) and targets [B, L], padded on the right."""
        tokens, positions = pad(self.rows, left=False, device="cpu")
        targets, _ = pad(self.targets, left=False, device="cpu")
        return tokens, positions, targets.bool()


def make_batch(tokens: Sequence[int], images: ProcessedImages | None = None, image_token: int | None = None) -> Batch:
    """The sequence and a prefix of it, as the padded cache paths have them. The first quarter of a row, as if it were a
    prompt, and image tokens are no targets."""
    shown = None if images is None else (image_token, images)
    rows, _ = rows_of(tokens, "right_padded", "", None, None, shown)
    targets = [[i > len(row) // 4 and token != image_token for i, token in enumerate(row)] for row in rows]
    return Batch(rows, targets, images, image_token)


class Candidate(Protocol):
    """An implementation whose gradients are judged."""

    name: str

    def gradients(self, batch: Batch, routing: Taps, forced: Taps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Canonical name -> gradient of the batch's loss, in the checkpoint's shape: freely, and with `forced` in the
        place of the values of taps, through which gradients flow on. `routing` replaces the experts chosen in both."""


class TorchGradients:
    """Our PyTorch model; the batch is padded on the right."""

    name = "torch"

    def __init__(self, candidate: TorchCandidate):
        self.candidate = candidate

    def gradients(self, batch: Batch, routing: Taps, forced: Taps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Candidate`."""
        return self._gradients(batch, routing, {}), self._gradients(batch, routing, forced)

    def _gradients(self, batch: Batch, routing: Taps, forced: Taps) -> dict[str, Tensor]:
        model = self.candidate.model
        leaves = dict(model.named_parameters())
        leaves |= {f"layers.{i}.layer_scalar": layer.layer_scalar for i, layer in enumerate(model.layers)}
        if batch.images is not None:
            leaves |= dict(self.candidate.encoder.model.named_parameters())
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        tokens, positions, targets = (part.to(model.device) for part in batch.padded())
        with taps.recording(StraightThrough(*tokens.shape, "", forced, routing)):
            images = None if batch.images is None else self._soft_tokens(tokens, batch.images)
            logits = model(tokens, positions, images=images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))[:, :-1]
        labels = tokens.masked_fill(~targets, -100)[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / batch.total
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {
            name: (torch.zeros_like(leaf) if gradient is None else gradient).cpu()
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
        }

    def _soft_tokens(self, tokens: Tensor, images: ProcessedImages) -> SoftTokens:
        # Not by `encode`, through which no gradient flows.
        encoder = self.candidate.encoder
        encoded = encoder.model(images.pixel_values.to(tokens.device), images.positions.to(tokens.device))
        features = [row[:n] for row, n in zip(encoded, images.num_soft_tokens, strict=True)]
        return self.candidate._soft(tokens, features)


@dataclass
class Baseline:
    """What gradients in one dtype are held against: the truth's, and the errors of the reference's own."""

    dtype: torch.dtype
    batch: Batch
    truth: dict[str, Tensor]
    """`as_taps`, in backward order."""
    forced: dict[str, Tensor]
    routing: dict[str, Tensor]
    open: Callable[[], HFReference]
    total: dict[str, list[float]] = field(default_factory=dict)
    """Parameter -> relative error of each run of the reference."""
    local: dict[str, list[float]] = field(default_factory=dict)
    """The same with the truth forced into every tap."""
    draws: int = 0

    def add(self, reference: HFReference, seed: int | None = None) -> None:
        """Runs the reference; if `seed` is given with the embedding, that of the patches, and what enters the backward
        pass moved by a roundoff: stochastic arithmetic, as in `engine.Baseline.draw`."""
        moved: dict[str, Tensor] = {}
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for name in ("embed",) if self.batch.images is None else ("embed", "vision.patch_embed"):
                sign = torch.randint(0, 2, self.forced[name].shape, generator=generator) * 2 - 1
                moved[name] = self.forced[name] * (1 + torch.finfo(self.dtype).eps / 2 * sign)
            if self.batch.images is not None:
                # What moved patches become stays.
                moved["embed"][self.batch.padded()[0] == self.batch.image_token] = torch.nan
        for errors, forced in ((self.total, moved), (self.local, self.forced)):
            found, _ = run_batch(reference, self.batch, forced=forced, routing=self.routing, seed=seed)
            for name, gradient in found.items():
                errors.setdefault(name, []).append(measure(gradient, self.truth[name]).rel_l2)

    def draw(self, count: int, reference: HFReference | None = None) -> None:
        """Adds moved runs until there are `count`."""
        reference = reference or self.open()
        reference.use("eager")
        while self.draws < count:
            self.add(reference, self.draws)
            self.draws += 1


def run_batch(
    reference: HFReference,
    batch: Batch,
    *,
    glob: str = "",
    forced: Taps | None = None,
    routing: Taps | None = None,
    seed: int | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The batch's gradients `as_taps`, summed over its rows without padding, and its taps [B, L, ...], NaN past a row's
    end. `forced` and `routing` [B, L, ...] are those of the whole batch."""
    total: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    length = max(map(len, batch.rows))
    roundoffs = None if seed is None else torch.Generator().manual_seed(seed)
    for b, (row, targets) in enumerate(zip(batch.rows, batch.targets, strict=True)):
        own = {n: v if n.startswith(taps.VISION) else v[b : b + 1, : len(row)] for n, v in (forced or {}).items()}
        routes = {n: v[b : b + 1, : len(row)] for n, v in (routing or {}).items()}
        options = {"glob": glob, "forced": own, "routing": routes, "roundoffs": roundoffs, "images": batch.images}
        part = gradients(reference, row, targets, batch.total, **options)
        for name, gradient in part.parameters.items():
            total[name] = total[name].add_(gradient) if name in total else gradient
        for name, value in part.taps.items():
            if name.startswith(taps.VISION):
                values[name] = value
                continue
            if name not in values:
                values[name] = value.new_full((len(batch.rows), length, *value.shape[2:]), torch.nan)
            values[name][b, : len(row)] = value[0]
    return as_taps(total), values


def baseline(
    checkpoint: str | Path,
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    images: ProcessedImages | None = None,
) -> Baseline:
    """Runs the reference forward and backward: in float64 for the truth, then in `dtype` with eager and sdpa attention
    and a few times moved by a roundoff, each freely and with the truth forced into every tap.

    The float64 model with the gradients of two rows (24 bytes a parameter) is the most that is held at a time."""
    # Metal has no float64.
    where = "cpu" if torch.device(device).type == "mps" else device
    reference = HFReference(checkpoint, dtype, truth=True, device=where)
    batch = make_batch(tokens, images, None if images is None else reference.vision.image_token_id)
    found, values = run_batch(reference, batch, glob="*")
    truth = {name: found[name] for name in backward_order(found)}
    forced = {name: value for name, value in values.items() if reference.forceable(name)}
    config = reference.config
    del reference
    gc.collect()
    base = Baseline(
        dtype,
        batch,
        truth,
        forced,
        routing_of(values, config.top_k_experts),
        lambda: HFReference(checkpoint, dtype, device=device),
    )
    reference = base.open()
    for attention in ("eager", "sdpa"):
        reference.use(attention)
        base.add(reference)
    base.draw(_DRAWS[0], reference)
    return base


def judge(candidate: Candidate, base: Baseline) -> Comparison:
    """Compares the candidate's gradients with the truth's, parameter by parameter, from the loss back to the input: the
    first divergence is the parameter *closest to the loss* that is out of budget, and the fault lies between it and
    the parameters that come before it in that order.

    "total" is the error of gradient and activations together; "local" is that of the backward pass alone, with the
    truth forced into every tap of the forward pass: an error is inherited if only the activations are to blame."""
    free, local = candidate.gradients(base.batch, base.routing, base.forced)
    result = compare_gradients(free, local, base)
    if result.red and result.worst_ratio < _BAD_LUCK * budget.K and base.draws < _DRAWS[1]:
        base.draw(_DRAWS[1])
        result = compare_gradients(free, local, base)
    return result


def compare_gradients(free: Mapping[str, Tensor], local: Mapping[str, Tensor], base: Baseline) -> Comparison:
    """Gradients by name, and the same with the truth forced into every tap. Raises ValueError for a wrong shape."""
    free, local = as_taps(free), as_taps(local)
    results = []
    for name, truth in base.truth.items():
        if name not in free:
            continue
        if free[name].shape != truth.shape:
            raise ValueError(f"{name}: the candidate's is {list(free[name].shape)}, the truth's {list(truth.shape)}")
        total, backward = measure(free[name], truth), measure(local[name], truth)
        checks = budget.check_total(total.rel_l2, base.total[name], base.dtype)
        checks["local"] = budget.check(backward.rel_l2, base.local[name], budget.floor(base.dtype))
        results.append(TapResult(name, tuple(truth.shape), total, backward, checks))
    return Comparison(
        taps=results,
        missing=[name for name in base.truth if name not in free],
        partial=[],
        unexpected=[name for name in free if name not in base.truth],
        logits=None,
    )


def open_candidate(name: str, checkpoint: Path, dtype: torch.dtype, device: torch.device | str) -> Candidate:
    """Our PyTorch (`torch`) or JAX (`jax`) model. Raises as they do."""
    if name == "torch":
        return TorchGradients(TorchCandidate(checkpoint, dtype, device))
    from parity.grad_jax import JaxGradients
    from reference.jax import TappedModel

    return JaxGradients(TappedModel(checkpoint, dtype, device))


def run(
    checkpoints: Mapping[str, Path],
    tokens: Callable[[TextConfig, Path], list[int]],
    candidates: Sequence[str],
    dtypes: Sequence[str] = tuple(DTYPES),
    device: torch.device | str = "cpu",
    advance: Callable[[str], None] = lambda what: None,
    images: Sequence[ImageSource] = (),
) -> Report:
    """`engine.run` for gradients: every checkpoint in every dtype with every candidate. `advance` is told what comes
    next, as often as `steps` says."""
    report = Report()
    for label, path in checkpoints.items():
        sequence, shown = place(path, tokens(TextConfig.from_file(path), path), images)
        if shown is not None:
            report.images[label] = shown
        report.inputs[label] = {"fingerprint": Checkpoint(path).fingerprint(), "tokens": sequence}
        for dtype in dtypes:
            advance(f"{label} {dtype} reference gradients")
            base = baseline(path, sequence, DTYPES[dtype], device, shown)
            for name in candidates:
                advance(f"{label} {dtype} {name} gradients")
                result = judge(open_candidate(name, path, DTYPES[dtype], device), base)
                report.cases.append(Case(label, dtype, PATH, result, candidate=name))
                gc.collect()
    return report


def steps(checkpoints: int, dtypes: int, candidates: Sequence[str]) -> int:
    """How often `run` tells `advance` what comes next."""
    return checkpoints * dtypes * (1 + len(candidates))


def as_taps(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients as [rows, positions, features], so that what is worst has a name: of a matrix a position is an output
    feature (of an embedding a token), of stacked experts a row is an expert.

    The layers' scalars are one tap, whose positions are the layers: the last one's gradient all but vanishes, since a
    norm follows, and of a single number that cancels no relative error means anything. There is no NaN, which would be
    taken for a position that was not computed, but inf."""
    scalars = sorted((n for n in gradients if n.endswith(".layer_scalar")), key=lambda n: int(n.split(".")[1]))
    found = {name: gradient for name, gradient in gradients.items() if name not in scalars}
    if scalars:
        found["layer_scalar"] = torch.cat([gradients[name] for name in scalars])
    found = {name: value.nan_to_num(torch.inf, torch.inf, -torch.inf) for name, value in found.items()}
    return {name: g if g.dim() == 3 else g.reshape(1, len(g), -1) for name, g in found.items()}
