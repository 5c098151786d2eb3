"""A healthy model is never red: 60 random small models, each through a full forward and one cache path."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4_impl.config import FULL, SLIDING
from parity import PATHS
from parity.candidate import TorchCandidate
from parity.compare import Comparison
from parity.engine import baseline, judge
from reference.tiny import make_tiny

pytestmark = pytest.mark.parity

COUNT = 60
EVERY_BFLOAT16 = 4
CACHED = tuple(path for path in PATHS if path != "full")


def overrides(rng: random.Random) -> dict[str, Any]:
    """A model of 2 to 5 layers with any combination of the features of the released ones."""
    count = rng.randint(2, 5)
    types = [*rng.choices([SLIDING, FULL], [2, 1], k=count - 1), FULL]
    most = max(s for s in range(count) if set(types[: count - s]) == set(types))
    heads = rng.choice([2, 4])
    ple = rng.choice([0, 4, 8])
    k_eq_v, moe = rng.random() < 0.4, rng.random() < 0.4
    experts = rng.choice([4, 8])
    return {
        "hidden_size": rng.choice([16, 24, 40, 48]),
        "intermediate_size": rng.choice([16, 32, 48]),
        "num_hidden_layers": count,
        "layer_types": types,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([h for h in (1, 2, 4) if heads % h == 0]),
        "num_global_key_value_heads": rng.choice([1, 2]) if k_eq_v else None,
        "attention_k_eq_v": k_eq_v,
        "head_dim": rng.choice([8, 16]),
        "global_head_dim": rng.choice([8, 16, 32]),
        # transformers 5.23 cannot run a window of 1 from its cache, nor shared layers without per-layer inputs.
        "sliding_window": rng.randint(2, 12),
        "num_kv_shared_layers": rng.randint(0, most) if ple else 0,
        "use_double_wide_mlp": rng.random() < 0.5,
        "hidden_size_per_layer_input": ple,
        "enable_moe_block": moe,
        "num_experts": experts if moe else None,
        "top_k_experts": rng.randint(1, experts - 1) if moe else None,
        "moe_intermediate_size": rng.choice([8, 16]) if moe else None,
        "final_logit_softcapping": rng.choice([30.0, None]),
        "tie_word_embeddings": rng.random() < 0.8,
    }


def compare_all(seed: int, folder: Path) -> list[tuple[str, Comparison]]:
    """Every comparison made for one model, with its name."""
    rng = random.Random(seed)
    path = make_tiny("31B", folder, overrides=overrides(rng), seed=seed)
    tokens = [2, *(rng.randrange(512) for _ in range(rng.randint(15, 23)))]
    paths = ("full", random.Random(f"{seed}/path").choice(CACHED))
    out = []
    for dtype in [torch.float32, torch.bfloat16] if seed % EVERY_BFLOAT16 == 0 else [torch.float32]:
        base, candidate = baseline(path, tokens, dtype, paths=paths), TorchCandidate(path, dtype)
        out += [(f"{dtype} {cache_path}", judge(candidate, base, cache_path)) for cache_path in paths]
    return out


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A good part of the time would go to a tokenizer that nobody reads."""
    monkeypatch.setattr("reference.tiny._write_tokenizer", lambda folder: None)


@pytest.mark.parametrize("tens", range(COUNT // 10))
def test_a_healthy_model_is_never_red(tens, tmp_path):
    red = []
    for seed in range(10 * tens, 10 * tens + 10):
        for what, comparison in compare_all(seed, tmp_path / str(seed)):
            if comparison.red:
                red.append(
                    f"seed {seed} {what}: {comparison.first_divergence or comparison.bugs or comparison.missing}"
                )
    assert not red, "\n".join(red)
