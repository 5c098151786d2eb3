"""Tiny multimodal checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """variant -> folder of its tiny multimodal checkpoint in float32, made once a session."""
    from reference.tiny import make_tiny

    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            made[variant] = make_tiny(variant, tmp_path_factory.mktemp("images") / variant, multimodal=True)
        return made[variant]

    return make
