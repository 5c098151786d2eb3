"""Runs an MLX program of an exported folder node by node with `mlx.core`: on the CPU on Linux, with Metal on a Mac."""

from gemma4_impl.export.replay.machine import Machine, Tap
from gemma4_impl.export.replay.pte import Pte, open_pte
from gemma4_impl.export.replay.session import Session, open_session

__all__ = ["Machine", "Pte", "Session", "Tap", "open_pte", "open_session"]
