"""The engine catches every fault of the catalogue and names the tap where it was put; it names none elsewhere."""

from collections.abc import Callable
from pathlib import Path

import pytest

from parity import PATHS
from parity.candidate import TorchCandidate
from parity.engine import Baseline, judge
from parity.faults import FAULTS, Fault, baseline_of, find
from parity.faults.attention import ATTENTION
from parity.faults.blocks import BLOCKS
from parity.faults.branches import BRANCHES
from parity.faults.masks import MASKS

pytestmark = pytest.mark.parity

# Where a fault applies to more than two variants, the first and the last stand for all.
_CASES = [
    pytest.param(fault, variant, id=f"{name}-{variant}")
    for name, fault in FAULTS.items()
    for variant in dict.fromkeys((fault.variants[0], fault.variants[-1]))
]
_FAULTY = {(variant, fault.dtype, fault.length) for fault, variant in (case.values for case in _CASES)}
_HEALTHY = {(variant, f.dtype, f.path, f.length): f for f in FAULTS.values() for variant in f.variants}

Bases = Callable[[Fault, str], Baseline]


@pytest.fixture(scope="module")
def base_of(tiny: Callable[[str], Path]) -> Bases:
    """One baseline a variant, dtype and length. Where no fault is judged by it, but healthy models alone, the reference
    runs through their paths only: the stricter for it, and without 300 tokens fed one by one."""
    made: dict[tuple, Baseline] = {}

    def make(fault: Fault, variant: str) -> Baseline:
        key = (variant, fault.dtype, fault.length)
        if key not in made:
            healthy = [path for v, dtype, path, length in _HEALTHY if (v, dtype, length) == key]
            made[key] = baseline_of(fault, tiny(variant), PATHS if key in _FAULTY else healthy)
        return made[key]

    return make


@pytest.mark.parametrize(("fault", "variant"), _CASES)
def test_fault_is_named_where_it_is(fault: Fault, variant: str, tiny: Callable[[str], Path], base_of: Bases) -> None:
    base = base_of(fault, variant)
    found = find(fault, tiny(variant), base)
    assert found.red
    first = found.first_divergence
    assert first is not None
    assert (first.tap, first.origin) == (fault.tap(base.config), "created"), first


@pytest.mark.parametrize(("variant", "dtype", "path", "length"), _HEALTHY)
def test_healthy_model_is_green(
    variant: str, dtype: str, path: str, length: int | None, tiny: Callable[[str], Path], base_of: Bases
) -> None:
    base = base_of(_HEALTHY[variant, dtype, path, length], variant)
    found = judge(TorchCandidate(tiny(variant), base.dtype), base, path)
    assert not found.red, found.first_divergence


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("variant", FAULTS["ring_of_two_windows"].variants)
def test_healthy_ring_takes_whole_windows(
    variant: str, windows: int, tiny: Callable[[str], Path], base_of: Bases
) -> None:
    base = base_of(FAULTS["ring_of_two_windows"], variant)
    candidate = TorchCandidate(tiny(variant), base.dtype)
    candidate.chunks = (windows * candidate.config.sliding_window,)
    found = judge(candidate, base, "chunked")
    assert not found.red, found.first_divergence


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B"])
def test_faults_stay_in_their_own_model(variant: str, tiny: Callable[[str], Path], base_of: Bases) -> None:
    faults = [fault for fault in FAULTS.values() if variant in fault.variants]
    for fault in faults:
        fault.inject(TorchCandidate(tiny(variant)))
    base = base_of(FAULTS["window_too_small"], variant)
    found = judge(TorchCandidate(tiny(variant)), base, "chunked")
    assert not found.red, found.first_divergence


def test_catalogue_is_whole() -> None:
    assert len(FAULTS) == sum(len(part) for part in (ATTENTION, BLOCKS, BRANCHES, MASKS)) >= 80
    assert {fault.path for fault in FAULTS.values()} == set(PATHS)
