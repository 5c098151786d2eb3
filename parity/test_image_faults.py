"""The engine catches every fault of images and names the tap where it was put."""

from collections.abc import Callable
from pathlib import Path

import pytest

from parity.candidate import TorchCandidate
from parity.engine import Baseline
from parity.faults import FAULTS, IMAGE_FAULTS, Fault, baseline_of, find
from parity.faults.images import IMAGES, KINDS

pytestmark = pytest.mark.parity

_CASES = [
    pytest.param(fault, variant, id=f"{name}-{variant}")
    for name, fault in IMAGE_FAULTS.items()
    for variant in dict.fromkeys((fault.variants[0], fault.variants[-1]))
]


@pytest.fixture(scope="module")
def base_of(short_images: Callable[[str], Path]) -> Callable[[str], Baseline]:
    """One baseline a variant: the faults differ in nothing else that it depends on."""
    made: dict[str, Baseline] = {}

    def make(variant: str) -> Baseline:
        if variant not in made:
            made[variant] = baseline_of(IMAGES[0], short_images(variant))
        return made[variant]

    return make


@pytest.mark.parametrize(("fault", "variant"), _CASES)
def test_fault_is_named_where_it_is(fault: Fault, variant: str, short_images, base_of) -> None:
    base = base_of(variant)
    found = find(fault, short_images(variant), base)
    assert found.red
    first = found.first_divergence
    assert first is not None
    assert (first.tap, first.origin) == (fault.tap(base.config), "created"), first


@pytest.mark.parametrize("variant", KINDS)
def test_faults_stay_in_their_own_model(variant: str, short_images, base_of) -> None:
    for fault in IMAGES:
        if variant in fault.variants:
            fault.inject(TorchCandidate(short_images(variant)))
    healthy = Fault("none", "nothing is wrong", lambda candidate: None, IMAGES[0].tap)
    found = find(healthy, short_images(variant), base_of(variant))
    assert not found.red, found.first_divergence


def test_catalogue_is_whole() -> None:
    assert len(IMAGE_FAULTS) == len(IMAGES) >= 30
    assert not IMAGE_FAULTS.keys() & FAULTS.keys()
    assert {(f.dtype, f.path, f.length, f.images) for f in IMAGES} == {("float32", "full", None, True)}
