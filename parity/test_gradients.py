"""Gradients of every parameter: ours, PyTorch and JAX, as exact as transformers', equal in float64; faults named."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from gemma4_impl import names
from gemma4_impl.checkpoint import Checkpoint
from gemma4_impl.config import TextConfig
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.nnx import train
from parity import budget, grad
from parity.candidate import TorchCandidate
from parity.cli import cli
from parity.grad_jax import JaxGradients
from parity.images import drawn, place
from parity.inputs import default_tokens
from parity.metrics import measure
from reference.gradients import gradients, parameters
from reference.hf import HFReference
from reference.jax import TappedModel
from reference.tiny import SHORT, make_tiny

pytestmark = pytest.mark.parity

WITH_IMAGES = ("E2B", "26B-A4B")

# Rounding in float64 through a whole model and back: transformers' own two attentions differ by up to 4e-14.
EXACT = 1e-12

Bases = Callable[..., tuple[Path, grad.Baseline]]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory) -> Bases:
    """(variant, dtype) -> a checkpoint, and what gradients of it are held against; made once. With images, in float32:
    the command also takes them in bfloat16."""
    folders: dict[str, Path] = {}
    made: dict[tuple, grad.Baseline] = {}

    def make(variant: str, dtype: torch.dtype = torch.float32) -> tuple[Path, grad.Baseline]:
        shown = variant in WITH_IMAGES
        if variant not in folders:
            at = tmp_path_factory.mktemp("gradients") / variant
            folders[variant] = make_tiny(variant, at, multimodal=shown, overrides=SHORT[variant])
        path = folders[variant]
        if (variant, dtype) not in made:
            tokens = default_tokens(TextConfig.from_file(path), path)
            tokens, images = place(path, tokens, drawn() if shown and dtype == torch.float32 else ())
            made[variant, dtype] = grad.baseline(path, tokens, dtype, images=images)
        return path, made[variant, dtype]

    return make


def exact(found: dict[str, Tensor], base: grad.Baseline) -> None:
    found = grad.as_taps(found)
    assert found.keys() == base.truth.keys()
    errors = {name: measure(found[name], truth).rel_l2 for name, truth in base.truth.items()}
    assert max(errors.values()) < EXACT, max(errors.items(), key=lambda item: item[1])


# The truth


@pytest.mark.parametrize("variant", WITH_IMAGES)
def test_the_truth_has_every_parameter(variant, base_of):
    path, base = base_of(variant)
    checkpoint = Checkpoint(path)
    stored = {*checkpoint.files, *map(names.tower_from_hf, checkpoint.towers)}
    constants = (*names.CLIP_BOUNDS, "std_bias", "std_scale", "layer_scalar")
    trained = {name for name in stored if not name.endswith(constants)}
    assert base.truth.keys() == trained | {"layer_scalar"}
    assert all(value.dtype == torch.float64 and value.norm() > 0 for value in base.truth.values())
    # transformers' optimisers do not see the layers' scalars; they are parameters here, as in JAX.
    assert not [name for name, _ in HFReference(path).model.named_parameters() if name.endswith("layer_scalar")]


@pytest.mark.parametrize("variant", WITH_IMAGES)
def test_the_truth_is_the_slope_of_the_loss(variant, base_of):
    path, base = base_of(variant)
    reference, batch = HFReference(path, truth=True), base.batch
    leaves = parameters(reference, images=True)
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) * leaf.detach().square().mean().sqrt()
        for name, leaf in leaves.items()
    }
    # So small a step crosses no bound of a clipped linear, and takes 1e-8 of 15 digits.
    step, losses = 1e-8, []
    for move in (step, -2 * step):
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf += move * direction[name]
        rows = zip(batch.rows, batch.targets, strict=True)
        losses.append(sum(gradients(reference, *row, batch.total, images=batch.images).loss for row in rows))
    slope = (losses[0] - losses[1]) / (2 * step)
    moved = grad.as_taps(direction)
    expected = sum(float((base.truth[name] * moved[name]).sum()) for name in base.truth)
    assert abs(slope - expected) < 1e-5 * abs(expected)


# Ours


# JAX in bfloat16 compiles two of them here; `gemma4 parity --grad` runs all.
CASES = [("torch", variant, dtype) for variant in SHORT for dtype in (torch.float32, torch.bfloat16)]
CASES += [("jax", variant, torch.float32) for variant in SHORT]
CASES += [("jax", variant, torch.bfloat16) for variant in ("E2B", "26B-A4B")]


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("candidate", "variant", "dtype"), CASES, ids=str)
def test_every_gradient_is_in_budget(candidate, variant, dtype, base_of):
    path, base = base_of(variant, dtype)
    result = grad.judge(grad.open_candidate(candidate, path, dtype, "cpu"), base)
    assert not result.red, (result.first_divergence, result.missing)
    assert result.worst_ratio <= budget.K
    assert not result.unexpected
    assert [tap.name for tap in result.taps] == list(base.truth)


@pytest.mark.parametrize("variant", WITH_IMAGES)
def test_float64_is_exact(variant, base_of):
    path, base = base_of(variant)
    given = base.batch, base.routing, base.forced
    torches = grad.TorchGradients(TorchCandidate(path, torch.float64, weights=torch.float32))
    for found in torches.gradients(*given):
        exact(found, base)
    for found in JaxGradients(TappedModel(path, torch.float64, weights=torch.float32)).gradients(*given):
        exact(found, base)


# Faults


@dataclass(frozen=True)
class Fault:
    """A mistake in the backward pass only: the forward pass is right to the last bit."""

    variant: str
    named: str
    """The parameter that must be the first divergence, as created."""
    inject: Callable[[TorchCandidate], object]


def detached(module: torch.nn.Module, method: str = "forward") -> None:
    """No gradient through what this module returns."""
    original = getattr(module, method)

    def call(*args: object, **kwargs: object) -> object:
        out = original(*args, **kwargs)
        return tuple(part.detach() for part in out) if isinstance(out, tuple) else out.detach()

    setattr(module, method, call)


def shared_keys_detached(candidate: TorchCandidate) -> None:
    for layer in candidate.model.layers:
        if layer.config.kv_shared:
            own = layer.self_attn.attend
            layer.self_attn.attend = lambda q, k, v, mask, own=own: own(q, k.detach(), v.detach(), mask)


def values_detached(candidate: TorchCandidate) -> None:
    for layer in candidate.model.layers:
        if layer.config.k_eq_v:
            norm = layer.self_attn.v_norm
            norm.forward = lambda x, own=norm.forward: own(x.detach())


def unscaled(model: Gemma4) -> None:
    """The look-up's gradient lacks the embedding's scale."""
    table, own = model.embed_tokens, model.embed_tokens.forward

    def forward(tokens: Tensor) -> Tensor:
        rows = table.weight[tokens]
        return own(tokens).detach() + (rows - rows.detach())

    table.forward = forward


def head_untied(model: Gemma4) -> None:
    weight = model.embed_tokens.weight
    model.lm_head.forward = lambda x: torch.nn.functional.linear(x, weight.detach())


def constant_norm(norm: torch.nn.Module) -> None:
    """The norm's own scale is taken for a constant."""

    def forward(x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt().detach()
        y = x * scale * norm.weight
        return norm.__class__.forward(norm, x).detach() + (y - y.detach())

    norm.forward = forward


def uncapped(model: Gemma4) -> None:
    """The soft cap passes gradients on as if it were not there."""
    own = model.lm_head.forward

    def forward(x: Tensor) -> Tensor:
        scores = own(x)
        slope = 1 - torch.tanh(scores / model.config.final_logit_softcapping).square()
        scores.register_hook(lambda gradient: gradient / slope.detach())
        return scores

    model.lm_head.forward = forward


def no_scalars(candidate: TorchCandidate) -> None:
    for layer in candidate.model.layers:
        layer.layer_scalar.requires_grad_(True).register_hook(torch.zeros_like)


FAULTS = {
    "per-layer inputs detached": Fault(
        "E2B", "per_layer_projection_norm.weight", lambda c: detached(c.model, "per_layer_inputs")
    ),
    "tied head left out": Fault("E2B", "embed_tokens.weight", lambda c: head_untied(c.model)),
    "shared keys detached": Fault("E2B", "layers.1.self_attn.k_norm.weight", shared_keys_detached),
    "layer scalars left out": Fault("E2B", "layer_scalar", no_scalars),
    "vision detached": Fault("E2B", "embed_vision.embedding_projection.weight", lambda c: detached(c.encoder.model)),
    "routing weights detached": Fault(
        "26B-A4B", "layers.1.router.per_expert_scale", lambda c: [detached(layer.router) for layer in c.model.layers]
    ),
    "values of k_eq_v detached": Fault("26B-A4B", "layers.1.self_attn.k_proj.weight", values_detached),
    "pooling detached": Fault(
        "26B-A4B",
        "vision_tower.encoder.layers.2.post_feedforward_layernorm.weight",
        lambda c: detached(c.encoder.model.vision_tower.encoder),
    ),
    "embedding unscaled": Fault("31B", "embed_tokens.weight", lambda c: unscaled(c.model)),
    "scale of the norm constant": Fault(
        "31B", "layers.1.post_feedforward_layernorm.weight", lambda c: constant_norm(c.model.norm)
    ),
    "soft cap left out": Fault("31B", "norm.weight", lambda c: uncapped(c.model)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name, base_of):
    fault = FAULTS[name]
    path, base = base_of(fault.variant)
    candidate = TorchCandidate(path)
    fault.inject(candidate)
    result = grad.judge(grad.TorchGradients(candidate), base)
    first = result.first_divergence
    assert first is not None
    assert (first.tap, first.origin) == (fault.named, "created"), first


def test_padding_counted_in_the_mean_is_named(base_of, monkeypatch):
    path, base = base_of("31B")
    own = train.loss
    monkeypatch.setattr(train, "loss", lambda logits, *args: own(logits, *args[:2], logits[..., 0].size))
    first = grad.judge(JaxGradients(TappedModel(path)), base).first_divergence
    # All gradients are too small.
    assert (first.tap, first.origin) == (next(iter(base.truth)), "created")


def test_a_missing_gradient_and_nan_are_red(base_of):
    path, base = base_of("31B")
    found, local = grad.open_candidate("torch", path, torch.float32, "cpu").gradients(
        base.batch, base.routing, base.forced
    )
    del found["norm.weight"]
    assert grad.compare_gradients(found, local, base).missing == ["norm.weight"]
    found["embed_tokens.weight"][300] = torch.nan
    first = grad.compare_gradients(found, local, base).first_divergence
    assert (first.tap, first.row, first.position) == ("embed_tokens.weight", 0, 300)
    found["embed_tokens.weight"] = found["embed_tokens.weight"].mT
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: the candidate's is"):
        grad.compare_gradients(found, local, base)


# The command


def test_the_command_writes_a_report(base_of, tmp_path):
    path, _ = base_of("31B")
    args = ["parity", str(path), "--grad", "--candidate", "torch", "--dtype", "float32", "-o", str(tmp_path)]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    (case,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert (case["path"], case["candidate"], case["verdict"]) == ("grad", "torch", "green")
    assert case["taps"][0]["name"] == "norm.weight"
    assert "grad" in (tmp_path / "report.html").read_text()


def test_what_has_no_gradients_is_refused(tmp_path):
    for extra in (["--path", "full"], ["--stream"], ["--candidate", "quantized:default"]):
        result = CliRunner().invoke(cli, ["parity", "--grad", *extra, "-o", str(tmp_path)])
        assert result.exit_code == 2
        assert "--grad: only for our own models" in result.output
