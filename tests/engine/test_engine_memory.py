"""Loading the engine's model holds no more than what is packed and its largest tensor."""

import dataclasses

import pytest
from engine_models import small
from measured_memory import MEASURABLE, run

from gemma4_impl.engine.random_checkpoint import random_checkpoint

MEASURE = """
import sys, torch
from gemma4_impl.engine import PackedModel
from measured_memory import watched

torch.set_num_threads(1)
PackedModel.from_pretrained(sys.argv[1], torch.bfloat16)  # what is imported and allocated on first use
with watched() as memory:
    model = PackedModel.from_pretrained(sys.argv[2], torch.bfloat16)
print(memory.peak, model.nbytes / 2**20)
"""


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
def test_peak_memory(tmp_path):
    """RssAnon, sampled every half millisecond. The head is the largest tensor: 37.7 MB as it comes, and packed."""
    config = dataclasses.replace(small("31B"), vocab_size=65_536, hidden_size=1024, intermediate_size=4096)
    random_checkpoint(small("31B"), tmp_path / "small")
    random_checkpoint(config, tmp_path / "large")
    peak, size = map(float, run(MEASURE, str(tmp_path / "small"), str(tmp_path / "large")).split())
    assert size > 500
    assert peak < size + 37.7 + 16
    for file in (tmp_path / "large").glob("*.safetensors"):
        file.unlink()
