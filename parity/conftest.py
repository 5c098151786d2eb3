"""Fixtures of the parity tests of exported programs."""

import fcntl
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from parity.faults.export_fault import Made, Recipe


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[Recipe], Made]":
    """A small program by its recipe, exported once a session: an export takes longer than all that is done with it."""
    from parity.faults.export_fault import make

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Beside those of the other workers, which share what one of them exported.
        folder = folder.parent
    folder = folder / "programs"
    folder.mkdir(exist_ok=True)
    known: dict[Recipe, Made] = {}

    def get(recipe: "Recipe") -> "Made":
        if recipe not in known:
            (folder / recipe.name).mkdir(exist_ok=True)
            with (folder / f"{recipe.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                known[recipe] = make(recipe, folder / recipe.name)
        return known[recipe]

    return get
