"""Export to ExecuTorch's MLX backend, and the session that replays such a program."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gemma4_impl.export.folder import Manifest
from gemma4_impl.export.program import Lowered, Settings
from gemma4_impl.model.decoder import Gemma4

if TYPE_CHECKING:
    from gemma4_impl.export.replay import Session
    from gemma4_impl.vision.images import ImageEncoder


def lower(
    model: Gemma4,
    settings: Settings,
    tower: "ImageEncoder | None" = None,
    report: Callable[[str], None] | None = None,
) -> Lowered:
    """See `gemma4_impl.export.mlx.lowering.lower`."""
    from gemma4_impl.export.mlx import lowering

    return lowering.lower(model, settings, tower, report)


def open_session(folder: Path, manifest: Manifest) -> "Session":
    """See `gemma4_impl.export.replay.open_session`."""
    from gemma4_impl.export import replay

    return replay.open_session(folder, manifest)
