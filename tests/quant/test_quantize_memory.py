"""Quantizing holds far less than the largest tensor, let alone the model."""

import json

import pytest
import torch
from measured_memory import MEASURABLE, run
from safetensors.torch import load_file, save_file

from reference.tiny import aligned, make_tiny

MEASURE = """
import sys, torch
from gemma4_impl.quant.recipe import RECIPES
from gemma4_impl.quant.save import quantize_checkpoint
from measured_memory import watched

torch.set_num_threads(2)
small, large, out, recipe = sys.argv[1:]
quantize_checkpoint(small, out + "-small", RECIPES[recipe])  # what is imported and allocated on first use
with watched("VmRSS") as memory:
    quantize_checkpoint(large, out, RECIPES[recipe])
print(memory.peak)
"""
ROWS, COLUMNS = 262_144, 576


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
def test_peak_memory(tmp_path):
    """Resident memory, mapped pages of the source among it, sampled every half millisecond while a checkpoint with an
    embedding of 302 MB is quantized. 2.5 times that may be used; blocks of 4M weights should need no more than 0.75."""
    small = make_tiny(
        "31B", tmp_path / "small", dtype="bfloat16", overrides=aligned("31B", 32) | {"hidden_size": COLUMNS}
    )
    large = tmp_path / "large"
    large.mkdir()
    tensors = load_file(small / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16).normal_()
    largest = max(tensor.nbytes for tensor in tensors.values()) / 2**20
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    del tensors
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": ROWS}
    (large / "config.json").write_text(json.dumps(config))
    peak = float(run(MEASURE, str(small), str(large), str(tmp_path / "q"), "default"))
    assert largest > 280
    assert (tmp_path / "q/model.safetensors").stat().st_size > 1.6 * ROWS * COLUMNS
    assert 8 < peak < 0.75 * largest
    for file in (large, tmp_path / "q"):
        (file / "model.safetensors").unlink()
