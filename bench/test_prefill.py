"""A prompt through the whole model, up to the logits of its last token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import models
from bench.engine_models import NAMES, Given, prefill_case
from bench.exported_models import prefill_backend
from bench.harness import Backend, Case, close_to, grid, publish, timed
from bench.models import PROMPT, SIZES, VARIANTS, Text
from bench.timing import CORES


def _backend(name: str, kind: str, **options: Any) -> Backend:
    def prepare(given: Text) -> Callable[[], Tensor]:
        runner = models.runner(kind, given.path)
        return lambda: runner.prefill(given.prompt)

    return Backend(name, prepare, **options)


def _judge(given: Text) -> Callable[[Any], Any]:
    exact, eager = models.truth(given.path)
    return close_to([exact[:, 0]], [eager[:, 0]], torch.float32)


BACKENDS = [
    _backend("gemma4", "ours", ours=True),
    _backend("Hugging Face eager", "eager", absent=models.TRANSFORMERS),
    _backend("Hugging Face sdpa", "sdpa", absent=models.TRANSFORMERS),
]
# Compiling more of them takes longer than all the rest.
IN_JAX = _backend("JAX, our model", "jax", absent=models.JAX, wall=True)


def _case(size: str, variant: str) -> Case:
    def cost() -> tuple[float, float]:
        config = models.runner("ours", models.checkpoint(variant, size)).model.config
        return 0, models.flops(config, 0, PROMPT, 1)

    return Case(
        suite="prefill",
        operation=f"prefill of {PROMPT} tokens",
        shape=f"{size} {variant} float32",
        backends=[*BACKENDS, IN_JAX] if (size, variant) == ("tiny", "E2B") else BACKENDS,
        make=lambda i: models.text(models.checkpoint(variant, size)),
        judge=_judge,
        cost=cost,
        tokens=PROMPT,
        rotate=False,
        threads=1 if size == "tiny" else CORES,
    )


ENGINE = [prefill_case(Given(name, 40 if name.startswith("tiny") else 2048), prefill_backend()) for name in NAMES]


@timed
@grid([_case(size, variant) for size in SIZES for variant in VARIANTS] + ENGINE)
def test_prefill(benchmark: Any, rows: Any, case: Case, backend: str) -> None:
    publish(benchmark, rows(case)[backend])
