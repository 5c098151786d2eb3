"""Loading never holds more than the model and its largest tensor."""

import pytest
import torch
from configs import HUB, hub, save
from measured_memory import MEASURABLE, run

from gemma4_impl.config import TextConfig
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.names import to_hf

MEASURE = """
import sys, torch
from gemma4_impl.model.decoder import Gemma4
from measured_memory import watched

torch.set_num_threads(1)
Gemma4.from_pretrained(sys.argv[1])  # what torch itself imports and allocates on first use is not the loader's
for dtype in (None, torch.float32):
    with watched() as memory:
        model = Gemma4.from_pretrained(sys.argv[1], dtype)
    size = sum(t.nbytes for t in model.parameters()) / 2**20
    print(f"{size:.1f} {max(t.nbytes for t in model.parameters()) / 2**20:.1f} {memory.peak:.1f}")
    del model
"""


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
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
    mapped, copied = (tuple(map(float, line.split())) for line in run(MEASURE, str(folder)).splitlines())
    size, largest, peak = copied
    assert size > 300
    assert mapped[2] <= 16, mapped
    assert size - 1 <= peak <= size + largest + 16, copied
    (folder / "model.safetensors").unlink()
