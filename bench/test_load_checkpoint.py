"""A checkpoint from its folder up to the logits of a first token: what is mapped has to be read by then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import models
from bench.harness import Backend, Case, close_to, grid, publish, timed
from bench.models import SIZES
from bench.timing import CORES
from gemma4_impl.model.decoder import Gemma4

TOKEN = [[107]]


def _ours(path: Path) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        return Gemma4.from_pretrained(path, torch.float32)(torch.tensor(TOKEN))

    return run


def _theirs(path: Path) -> Callable[[], Tensor]:
    from transformers import AutoModelForCausalLM

    @torch.no_grad()
    def run() -> Tensor:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.tensor(TOKEN)).logits

    return run


def _judge(path: Path) -> Callable[[Any], Any]:
    from reference.hf import HFReference

    exact, eager = (
        HFReference(path, torch.float32, truth=truth).capture(TOKEN, glob="logits")["logits"] for truth in (True, False)
    )
    return close_to([exact], [eager], torch.float32)


BACKENDS = [
    Backend("gemma4", _ours, ours=True, absent=models.TRANSFORMERS),
    Backend("Hugging Face", _theirs, absent=models.TRANSFORMERS),
]
CASES = [
    Case(
        suite="load",
        operation="load a checkpoint, first token",
        shape=f"{size} E2B float32",
        backends=BACKENDS,
        make=lambda i, size=size: models.checkpoint("E2B", size),
        judge=_judge,
        rotate=False,
        threads=CORES,
    )
    for size in SIZES
]


@timed
@grid(CASES)
def test_checkpoint(benchmark: Any, rows: Callable, case: Case, backend: str) -> None:
    publish(benchmark, rows(case)[backend])
