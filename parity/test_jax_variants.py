"""Our JAX model, every variant: no tap is more than twice as wrong as transformers, whose truth is JAX's; and our
PyTorch model held against the JAX one instead."""

import random

import pytest
import torch

from gemma4_impl import taps
from gemma4_impl.config import TextConfig
from parity import PATHS, budget, engine
from parity.candidate import TorchCandidate
from parity.candidate_jax import JaxCandidate
from parity.engine import CANDIDATES, Report, baseline, judge, steps
from parity.inputs import default_tokens
from parity.test_random_configs import overrides
from reference.tiny import make_tiny

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("optimized")]
VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")
# Rounding in float64: 6e-15 is the most that was measured.
EXACT = 1e-12


def check(report: Report, path) -> None:
    names = taps.tap_names(TextConfig.from_file(path))
    for case in report.cases:
        result, what = case.comparison, (case.candidate, case.dtype, case.path)
        assert not result.red, (what, result.first_divergence, result.missing, result.partial, result.bugs)
        assert result.worst_ratio <= budget.K
        assert [tap.name for tap in result.taps] == names
        if case.dtype == "float32":
            assert result.logits.top1 == 1.0


@pytest.mark.parametrize(
    ("variant", "dtype", "paths"),
    [
        ("E2B", "float32", PATHS),
        *((variant, "float32", ("full", "generate")) for variant in VARIANTS[1:]),
        *((variant, "bfloat16", ("full",)) for variant in ("E2B", "26B-A4B")),
    ],
)
def test_every_tap_is_in_budget(short, variant: str, dtype: str, paths: tuple[str, ...]) -> None:
    """With few layers, as every path compiles each; `gemma4 parity` runs the deeper models' paths."""
    report = engine.run({variant: short(variant)}, default_tokens, [dtype], {"jax": paths})
    check(report, short(variant))
    assert [case.path for case in report.cases] == list(paths)
    assert not report.three_way


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_many_layers_and_three_implementations(tiny, variant: str) -> None:
    """Beside each other: two truths that share no code are one."""
    told: list[str] = []
    paths = {"torch": ("full",), "jax": ("full",)}
    report = engine.run({variant: tiny(variant)}, default_tokens, ["float32"], paths, advance=told.append)
    check(report, tiny(variant))
    assert [(case.candidate, case.path) for case in report.cases] == [(c, p) for c in paths for p in paths[c]]
    assert len(told) == len(set(told)) == steps(1, 1, paths, "hf")
    (entry,) = report.three_way
    assert entry.truths < EXACT, entry.truths_tap
    assert not report.failed
    for standing in entry.standings.values():
        assert 0 < standing.logits < 1e-5
        assert 0 < standing.ratio <= budget.K


def test_the_sequence_leaves_the_window_and_wraps_the_ring(tiny) -> None:
    for variant in VARIANTS:
        config = TextConfig.from_file(tiny(variant))
        length = len(default_tokens(config, tiny(variant)))
        assert length > 2 * (config.sliding_window - 1 + max(JaxCandidate(tiny(variant)).chunks))


@pytest.mark.parametrize(
    ("variant", "dtype", "paths"), [("E2B", "float32", ("full", "chunked")), ("26B-A4B", "bfloat16", ("full",))]
)
def test_the_pytorch_model_against_the_jax_one(short, variant: str, dtype: str, paths: tuple[str, ...]) -> None:
    """Truth and budget are JAX's: x64, and its own errors in `dtype`."""
    path = short(variant)
    report = engine.run({variant: path}, default_tokens, [dtype], paths, reference="jax")
    check(report, path)
    assert len(report.cases) == len(paths)
    assert {(case.candidate, case.reference) for case in report.cases} == {("torch", "jax")}


def test_a_wrong_pytorch_model_is_found_by_the_jax_one(short) -> None:
    path = short("31B")
    base = baseline(path, default_tokens(TextConfig.from_file(path), path), torch.float32, paths=(), reference="jax")
    assert all(value.dtype == torch.float64 for value in base.truth.values())
    candidate = TorchCandidate(path)
    assert not judge(candidate, base, "full").red
    candidate.model.layers[1].layer_scalar.mul_(1.01)
    first = judge(candidate, base, "full").first_divergence
    assert (first.tap, first.origin) == ("layers.1.out", "created")


def test_the_jax_reference_runs_plain_checkpoints_only(tiny) -> None:
    for options in ({"stream": True}, {"weights": object()}):
        with pytest.raises(ValueError, match="--reference jax"):
            baseline(tiny("31B"), [2, 300], torch.float32, reference="jax", **options)


@pytest.mark.parametrize("seed", [3, 11])
def test_a_healthy_model_is_never_red(tmp_path, seed: int) -> None:
    path = make_tiny("31B", tmp_path / "model", overrides=overrides(random.Random(seed)), seed=seed)
    rng = random.Random(seed)
    tokens = [2, *(rng.randrange(512) for _ in range(20))]
    paths = ("full", rng.choice(["chunked", "left_padded"]))
    report = engine.run({"random": path}, lambda *_: tokens, ["float32"], {"jax": paths})
    check(report, path)


def test_both_models_have_a_name() -> None:
    assert (TorchCandidate.name, JaxCandidate.name) == CANDIDATES
