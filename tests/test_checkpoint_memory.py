"""Loading never holds more than the model and its largest tensor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from configs import HUB, hub, save

from gemma4_impl.config import TextConfig
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.names import to_hf

MEASURE = """
import sys, threading, time, torch
from gemma4_impl.model.decoder import Gemma4

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":")) / 1024

torch.set_num_threads(1)
sys.setswitchinterval(1e-4)
Gemma4.from_pretrained(sys.argv[1])  # what torch itself imports and allocates on first use is not the loader's
for dtype in (None, torch.float32):
    done, peak, start = threading.Event(), 0.0, status("RssAnon")

    def watch():
        global peak
        while not done.wait(0.0005):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = Gemma4.from_pretrained(sys.argv[1], dtype)
    peak = max(peak, status("RssAnon"))
    done.set()
    watcher.join()
    size = sum(t.nbytes for t in model.parameters()) / 2**20
    print(f"{size:.1f} {max(t.nbytes for t in model.parameters()) / 2**20:.1f} {peak - start:.1f}")
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory(tmp_path):
    """RssAnon, the memory that a process owns, sampled every half millisecond while a 160 MB bfloat16 file is loaded.

    The pages of the file itself, which is mapped, are the kernel's to drop and not counted. As bfloat16 the model is
    the mapped file and owns next to nothing; as float32 it owns itself and at most its largest tensor besides."""
    changes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 7}
    changes |= {"layer_types": [*HUB["layer_types"][:1] * 6, "full_attention"], "num_kv_shared_layers": 0}
    changes |= {"enable_moe_block": False, "hidden_size_per_layer_input": 0, "head_dim": 128, "global_head_dim": 256}
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Gemma4(TextConfig.from_dict(hub(**changes))).state_dict().items()}
    del shapes["lm_head.weight"]
    tensors = {to_hf(name): torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    folder = save(tmp_path / "m", tensors, **changes)
    del tensors
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    mapped, copied = (tuple(map(float, line.split())) for line in done.stdout.splitlines())
    size, largest, peak = copied
    assert size > 300
    assert mapped[2] <= 16, mapped
    assert size - 1 <= peak <= size + largest + 16, copied
    (folder / "model.safetensors").unlink()
