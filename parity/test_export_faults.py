"""Every fault of exported programs is found: by the tap where it begins, or by a message before anything is judged."""

import re
from pathlib import Path

import pytest

from parity.faults.export import EXPORT
from parity.faults.export_fault import ExportFault, Recipe, find

pytestmark = pytest.mark.parity

pytest.importorskip("executorch")
pytest.importorskip("mlx.core")

# Those of one program follow each other, so that few processes make it.
_FAULTS = sorted(EXPORT.values(), key=lambda fault: (fault.program.backend, fault.program.variant))
_HEALTHY = dict.fromkeys((fault.program, fault.path) for fault in _FAULTS)


@pytest.mark.parametrize(("recipe", "path"), [pytest.param(r, path, id=f"{r.name}-{path}") for r, path in _HEALTHY])
def test_a_healthy_program_is_green(recipe: Recipe, path: str, made, tmp_path: Path) -> None:
    found = find(None, made(recipe), tmp_path, path)
    assert not found.red, (found.first_divergence, found.missing, found.partial)


@pytest.mark.parametrize("fault", [pytest.param(f, id=f"{f.program.name}-{f.name}") for f in _FAULTS])
def test_a_fault_is_named(fault: ExportFault, made, tmp_path: Path) -> None:
    if fault.refused:
        with pytest.raises(ValueError, match=re.escape(fault.where)):
            find(fault, made(fault.program), tmp_path)
        return
    found = find(fault, made(fault.program), tmp_path)
    assert found.red
    assert found.first_divergence is not None
    assert found.first_divergence.tap == fault.where, found.first_divergence


def test_the_catalogue_is_whole() -> None:
    assert len(EXPORT) >= 24
    assert {fault.place for fault in EXPORT.values()} == {"manifest", "graph", "session"}
    assert {fault.program.backend for fault in EXPORT.values()} == {"mlx", "xnnpack"}
