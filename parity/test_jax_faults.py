"""The engine catches every fault of the JAX model and names the tap where it was put; it names none elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.nnx.tapped import Tapped
from gemma4_impl.taps import Recorder
from parity.candidate_jax import JaxCandidate
from parity.compare import Comparison
from parity.engine import Baseline
from parity.faults import FAULTS, IMAGE_FAULTS, Fault, baseline_of, find
from parity.faults.fault import ALL, Inject, named
from parity.faults.images import KINDS
from parity.faults.jax import JAX_FAULTS, JAX_IMAGE_FAULTS
from parity.faults.jax_attention import steps
from parity.faults.jax_blocks import sorting
from parity.faults.jax_cache import ring
from reference.tiny import make_tiny

pytestmark = pytest.mark.parity

# Each kind of layer once, for each fault is compiled anew; but two producers of sliding keys where the wrong one is to
# be read, and square weights where they are to be transposed.
_LAYERS = {
    "E2B": {"layer_types": [SLIDING, FULL, FULL], "num_kv_shared_layers": 1},
    "E4B": {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL], "num_kv_shared_layers": 2},
    "26B-A4B": {"layer_types": [SLIDING, FULL]},
    "31B": {"layer_types": [SLIDING, FULL], "hidden_size": 64},
}


def _in_turn(faults: dict[str, Fault]) -> list[tuple[Fault, str]]:
    """Each fault with one of the variants that it applies to: through the cache with the one of fewest layers, else in
    turn, where of all four those do that differ in kind."""
    cases = []
    for i, fault in enumerate(faults.values()):
        variants = KINDS if fault.variants == ALL else fault.variants
        if fault.images:
            # Its tower and its masks are those of 31B.
            variants = [variant for variant in variants if variant != "26B-A4B"]
        shallowest = min(reversed(variants), key=lambda variant: len(_LAYERS[variant]["layer_types"]))
        cases.append((fault, variants[i % len(variants)] if fault.path == "full" else shallowest))
    return cases


_CASES = _in_turn(JAX_FAULTS) + _in_turn(JAX_IMAGE_FAULTS)
_RUNS = {(v, f.dtype, f.path, f.length, f.images): replace(f, inject=lambda model: None) for f, v in _CASES}


class _Quick(Tapped):
    """Compiled in less time, and once for models that differ in their weights only. No fault changes a tap's shape, for
    which models of the same weights' shapes are traced once."""

    def __init__(self, model: nnx.Module, effort: int, compiled: dict, traced: dict):
        super().__init__(model)
        options = {"xla_backend_optimization_level": effort, "xla_cpu_use_fusion_emitters": False}
        own = jax.jit(self._traced, static_argnames="static", compiler_options=options)
        self._jitted = compiled.setdefault((self._graphdef, effort), own)
        self._traced_before, self._weights = traced, _shapes(self._state)

    def _forced(self, recorder: Recorder, args: tuple) -> tuple[dict, dict]:
        key = self._weights, _shapes(args)
        self._shapes = self._traced_before.get(key)
        out = super()._forced(recorder, args)
        self._traced_before[key] = self._shapes
        return out


def _shapes(tree: Any) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(leaf.shape for leaf in leaves)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Fault, str], Path]:
    """One checkpoint of few layers a variant, with and without images."""
    checkpoints: dict[tuple, Path] = {}

    def make(fault: Fault, variant: str) -> Path:
        key = variant, fault.images
        if key not in checkpoints:
            layers = _LAYERS[variant] | {"num_hidden_layers": len(_LAYERS[variant]["layer_types"])}
            folder = tmp_path_factory.mktemp("jax") / variant
            checkpoints[key] = make_tiny(variant, folder, multimodal=fault.images, overrides=layers)
        return checkpoints[key]

    return make


@pytest.fixture(scope="module")
def base_of(checkpoint_of: Callable[[Fault, str], Path]) -> Callable[[Fault, str], tuple[Path, Baseline]]:
    """One baseline a checkpoint, dtype and length."""
    baselines: dict[tuple, Baseline] = {}

    def make(fault: Fault, variant: str) -> tuple[Path, Baseline]:
        path, key = checkpoint_of(fault, variant), (variant, fault.images, fault.dtype, fault.length)
        if key not in baselines:
            baselines[key] = baseline_of(fault, path)
        return path, baselines[key]

    return make


@pytest.fixture(scope="module")
def compiled() -> dict:
    """Graph of a model, and effort -> its jitted function."""
    return {}


@pytest.fixture(scope="module")
def traced() -> dict:
    """Shapes of weights and arguments -> shapes of the taps."""
    return {}


Find = Callable[[Fault, str], Comparison]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, base_of, compiled: dict, traced: dict) -> Find:
    def run(fault: Fault, variant: str) -> Comparison:
        # With no effort at all, the tower's roundings are not those that a healthy model is judged by.
        quick = partial(_Quick, effort=int(fault.images), compiled=compiled, traced=traced)
        monkeypatch.setattr("reference.jax.Tapped", quick)
        return find(fault, *base_of(fault, variant), JaxCandidate)

    return run


@pytest.mark.parametrize(("fault", "variant"), [pytest.param(f, v, id=f"{f.name}-{v}") for f, v in _CASES])
def test_fault_is_named_where_it_is(fault: Fault, variant: str, base_of, found: Find) -> None:
    comparison = found(fault, variant)
    assert comparison.red
    first = comparison.first_divergence
    assert first is not None
    assert (first.tap, first.origin) == (fault.tap(base_of(fault, variant)[1].config), "created"), first


@pytest.mark.parametrize("run", _RUNS, ids=lambda run: "-".join(map(str, run)))
def test_healthy_model_is_green(run: tuple, found: Find) -> None:
    comparison = found(_RUNS[run], run[0])
    assert not comparison.red, comparison.first_divergence


@pytest.mark.parametrize(
    ("inject", "variant", "path"),
    [
        pytest.param(steps(), "31B", "chunked", id="attention"),
        pytest.param(sorting(), "26B-A4B", "decode", id="experts"),
        pytest.param(ring(lambda window, capacity: capacity), "31B", "chunked", id="cache"),
    ],
)
def test_what_faults_are_put_into_is_green_without_them(inject: Inject, variant: str, path: str, found: Find) -> None:
    comparison = found(Fault("none", "nothing is wrong", inject, named("embed"), path=path), variant)
    assert not comparison.red, comparison.first_divergence


@pytest.mark.parametrize("variant", ALL)
def test_faults_stay_in_their_own_model(variant: str, checkpoint_of, found: Find, compiled: dict) -> None:
    for fault in (JAX_FAULTS | JAX_IMAGE_FAULTS).values():
        if variant == ("E2B" if "E2B" in fault.variants else fault.variants[-1]):
            fault.inject(JaxCandidate(checkpoint_of(fault, variant)))
    # What was compiled before would hide a class that is broken now.
    compiled.clear()
    healthy = Fault("none", "nothing is wrong", lambda candidate: None, named("embed"), images=variant == "E2B")
    comparison = found(healthy, variant)
    assert not comparison.red, comparison.first_divergence


def test_catalogue_is_whole() -> None:
    both = JAX_FAULTS | JAX_IMAGE_FAULTS
    assert len(JAX_FAULTS) >= 70
    assert len(JAX_IMAGE_FAULTS) >= 15
    assert {variant for _, variant in _CASES} == set(ALL)
    known = FAULTS | IMAGE_FAULTS
    for name in both.keys() & known.keys():
        assert both[name].summary == known[name].summary
    assert len(both.keys() - known.keys()) >= 18
