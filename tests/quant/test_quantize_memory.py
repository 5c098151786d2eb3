"""Quantizing holds far less than the largest tensor, let alone the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.tiny import aligned, make_tiny

MEASURE = """
import sys, threading, torch
from gemma4_impl.quant.recipe import RECIPES
from gemma4_impl.quant.save import quantize_checkpoint

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":")) / 1024

torch.set_num_threads(2)
sys.setswitchinterval(1e-4)
small, large, out, recipe = sys.argv[1:]
quantize_checkpoint(small, out + "-small", RECIPES[recipe])  # what is imported and allocated on first use
start, peak, done = status("VmRSS"), 0.0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, status("VmRSS"))

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
quantize_checkpoint(large, out, RECIPES[recipe])
done.set()
watcher.join()
print(peak - start)
"""
ROWS, COLUMNS = 262_144, 576


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
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
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(tmp_path / "q"), "default"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert largest > 280
    assert (tmp_path / "q/model.safetensors").stat().st_size > 1.6 * ROWS * COLUMNS
    assert 8 < float(done.stdout) < 0.75 * largest, done.stdout
    for file in (large, tmp_path / "q"):
        (file / "model.safetensors").unlink()
