"""Small models for tests: a config with every feature, in both forms of config.json, and random weights for any."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.model.decoder import Gemma4

ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
# As the released files spell it, with every feature that a key can contradict.
HUB = {
    "model_type": "gemma4_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "attention_k_eq_v": True,
    "sliding_window": 5,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "rope_parameters": ROPE,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": [1, 3],
    "dtype": "bfloat16",
    "use_bidirectional_attention": None,
}


def hub(**changes) -> dict:
    return copy.deepcopy(HUB) | changes


def saved(**changes) -> dict:
    """The same model as transformers saves it."""
    raw = hub(**changes)
    heads = {"num_key_value_heads": raw.pop("num_global_key_value_heads")}
    raw["per_layer_config"] = {str(i): {"head_dim": raw["global_head_dim"], **heads} for i in (1, 3)}
    del raw["global_head_dim"]
    return raw


def random_model(config: TextConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Gemma4:
    """A model whose every branch counts: weights of about unit gain, norms and scales well away from 1."""
    model = Gemma4(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.normal_(generator=generator)
            if weight.dim() == 1:
                weight.mul_(0.2).add_(0.4 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0)
            elif not name.startswith(("embed_tokens", "lm_head")):
                weight.mul_(weight.shape[-1] ** -0.5)
    model = model.to(dtype).eval().requires_grad_(False)
    for rope in model.rope.values():
        rope.reset(dtype, torch.device("cpu"))
    return model


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **changes) -> Path:
    """Writes a checkpoint folder: `hub(**changes)` and these tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub(**changes)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
