"""The parity run on accelerators: the same verdicts as on the CPU."""

import pytest
import torch

from parity import engine
from parity.inputs import default_tokens

VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("mps", marks=pytest.mark.mlx_device)],
)
def test_every_path_is_green(tiny, device: str, variant: str) -> None:
    report = engine.run({variant: tiny(variant)}, default_tokens, device=torch.device(device))
    red = [(c.dtype, c.path, c.comparison.first_divergence) for c in report.red]
    assert len(report.cases) == 12
    assert not red
