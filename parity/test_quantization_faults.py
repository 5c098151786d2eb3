"""Every fault of quantized models is found in the stage that it was put into, and at its tensor or tap."""

from collections.abc import Callable
from pathlib import Path

import pytest

from parity.faults.quantization import QUANTIZATION, Made, QuantizationFault, Recipe, find, make

pytestmark = pytest.mark.parity

_STAGES = ("load", "file", "read", "pack")
_BY_STAGE = {stage: [fault for fault in QUANTIZATION.values() if fault.stage == stage] for stage in _STAGES}
_RECIPES = list(dict.fromkeys(fault.recipe for fault in QUANTIZATION.values()))


def cases(stage: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fault", [pytest.param(f, id=f.name) for f in _BY_STAGE[stage]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Made]:
    """One healthy candidate a recipe."""
    known: dict[Recipe, Made] = {}

    def get(recipe: Recipe) -> Made:
        if recipe not in known:
            known[recipe] = make(recipe, tmp_path_factory.mktemp("made"))
        return known[recipe]

    return get


@pytest.mark.parametrize("recipe", [pytest.param(r, id=f"{r.variant}-{r.how}") for r in _RECIPES])
def test_healthy_candidate_is_green_in_every_stage(recipe: Recipe, made) -> None:
    found = find(None, made(recipe))
    assert [tensor.why for tensor in found.tensors if tensor.why] == []
    assert any(tensor.quantized for tensor in found.tensors)
    assert not found.dense.red, found.dense.first_divergence
    assert not found.packed.red, found.packed.first_divergence


@cases("read")
def test_what_is_misread_is_named_by_tensor_and_by_tap(fault: QuantizationFault, made) -> None:
    found = find(fault, made(fault.recipe))
    wrong = [tensor for tensor in found.tensors if tensor.why]
    assert wrong[0].name == fault.where
    assert wrong[0].why[0].startswith("misread")
    first = found.dense.first_divergence
    assert first is not None
    assert (first.tap, first.origin) == (fault.tap, "created"), first


@cases("file")
def test_what_is_wrong_in_the_file_is_named_there_alone(fault: QuantizationFault, tmp_path: Path) -> None:
    found = find(fault, make(fault.recipe, tmp_path, fault))
    wrong = [tensor for tensor in found.tensors if tensor.why]
    assert wrong[0].name == fault.where, wrong
    assert not any(why.startswith("misread") for tensor in wrong for why in tensor.why)
    assert not found.dense.red, found.dense.first_divergence
    assert not found.packed.red, found.packed.first_divergence


@cases("pack")
def test_what_packing_does_is_named_in_its_stage_alone(fault: QuantizationFault, made) -> None:
    found = find(fault, made(fault.recipe))
    assert [tensor.why for tensor in found.tensors if tensor.why] == []
    assert not found.dense.red, found.dense.first_divergence
    first = found.packed.first_divergence
    assert first is not None
    assert (first.tap, first.origin) == (fault.tap, "created"), first


@cases("load")
def test_what_does_not_fit_is_refused(fault: QuantizationFault, made) -> None:
    with pytest.raises(ValueError, match=fault.where):
        find(fault, made(fault.recipe))


def test_catalogue_is_whole() -> None:
    assert sum(map(len, _BY_STAGE.values())) == len(QUANTIZATION) >= 30
    assert all(_BY_STAGE.values())
