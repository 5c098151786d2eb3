"""config.json: both forms are read alike, the released sizes, and what an absent key means."""

import copy
import dataclasses
import json

import pytest
import torch
import transformers
from configs import HUB, hub, saved

from gemma4_impl.config import FULL, SLIDING, VARIANTS, RopeParameters, TextConfig
from gemma4_impl.model.decoder import Gemma4
from reference.tiny import TINY, make_tiny

# Released sizes


@pytest.mark.parametrize(
    ("variant", "facts"),
    [
        (
            "E2B",
            {
                "num_hidden_layers": 35,
                "hidden_size": 1536,
                "intermediate_size": 6144,
                "num_kv_shared_layers": 20,
                "use_double_wide_mlp": True,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
                "hidden_size_per_layer_input": 256,
                "sliding_window": 512,
                "max_position_embeddings": 131_072,
            },
        ),
        (
            "E4B",
            {
                "num_hidden_layers": 42,
                "hidden_size": 2560,
                "intermediate_size": 10_240,
                "num_kv_shared_layers": 18,
                "use_double_wide_mlp": False,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "hidden_size_per_layer_input": 256,
                "sliding_window": 512,
            },
        ),
        (
            "26B-A4B",
            {
                "num_hidden_layers": 30,
                "hidden_size": 2816,
                "intermediate_size": 2112,
                "enable_moe_block": True,
                "num_experts": 128,
                "top_k_experts": 8,
                "moe_intermediate_size": 704,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "num_global_key_value_heads": 2,
                "attention_k_eq_v": True,
                "sliding_window": 1024,
                "max_position_embeddings": 262_144,
            },
        ),
        (
            "31B",
            {
                "num_hidden_layers": 60,
                "hidden_size": 5376,
                "intermediate_size": 21_504,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "num_global_key_value_heads": 4,
                "attention_k_eq_v": True,
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 0,
                "sliding_window": 1024,
            },
        ),
    ],
)
def test_released_sizes(variant, facts):
    config = VARIANTS[variant]
    assert {key: getattr(config, key) for key in facts} == facts
    assert (config.vocab_size, config.head_dim, config.global_head_dim) == (262_144, 256, 512)
    assert (config.final_logit_softcapping, config.eos_token_id, config.bos_token_id) == (30.0, (1, 106), 2)
    sliding = 4 if variant == "E2B" else 5
    assert config.layer_types == (*[SLIDING] * sliding, FULL) * (config.num_hidden_layers // (sliding + 1))
    assert config.rope_parameters == {
        SLIDING: RopeParameters("default", 1e4),
        FULL: RopeParameters("proportional", 1e6, 0.25),
    }


def _attention(D, heads, kv_heads, head_dim, projections=2):
    """q, o, q_norm; then k and v (or k alone) and k_norm. No projection of its own in a KV-shared layer."""
    return 2 * D * heads * head_dim + head_dim + (projections > 0) * (projections * D * kv_heads * head_dim + head_dim)


def _mlp(D, ffn):
    return 3 * D * ffn


# Written out from the shapes, without the code under test: one term a kind of layer.
PARAMETERS = {
    "E2B": (
        262_144 * 1536 + 262_144 * 35 * 256 + 1536 * 35 * 256 + 256 + 1536
        + 35 * (4 * 1536 + 2 * 1536 * 256 + 1536)
        + 12 * (_attention(1536, 8, 1, 256) + _mlp(1536, 6144))
        + 3 * (_attention(1536, 8, 1, 512) + _mlp(1536, 6144))
        + 16 * (_attention(1536, 8, 1, 256, projections=0) + _mlp(1536, 12_288))
        + 4 * (_attention(1536, 8, 1, 512, projections=0) + _mlp(1536, 12_288)),
        4_628_569_344,
    ),
    "E4B": (
        262_144 * 2560 + 262_144 * 42 * 256 + 2560 * 42 * 256 + 256 + 2560
        + 42 * (4 * 2560 + 2 * 2560 * 256 + 2560 + _mlp(2560, 10_240))
        + 20 * _attention(2560, 8, 2, 256)
        + 4 * _attention(2560, 8, 2, 512)
        + 15 * _attention(2560, 8, 2, 256, projections=0)
        + 3 * _attention(2560, 8, 2, 512, projections=0),
        7_463_013_376,
    ),
    "26B-A4B": (
        262_144 * 2816 + 2816
        + 30 * (7 * 2816 + _mlp(2816, 2112) + 128 * _mlp(2816, 704) + 128 * 2816 + 2816 + 128)
        + 25 * _attention(2816, 16, 8, 256)
        + 5 * _attention(2816, 16, 2, 512, projections=1),
        25_233_141_760,
    ),
    "31B": (
        262_144 * 5376 + 5376
        + 60 * (4 * 5376 + _mlp(5376, 21_504))
        + 50 * _attention(5376, 32, 16, 256)
        + 10 * _attention(5376, 32, 4, 512, projections=1),
        30_697_345_280,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count(variant):
    with torch.device("meta"):
        model = Gemma4(VARIANTS[variant])
    from_shapes, known = PARAMETERS[variant]
    assert sum(p.numel() for p in model.parameters()) == from_shapes == known


# Two forms, one model


def test_both_forms_are_equal():
    assert TextConfig.from_dict(hub()) == TextConfig.from_dict(saved())


def test_both_forms_without_k_eq_v():
    flat = hub(attention_k_eq_v=False, num_global_key_value_heads=None)
    per_layer = saved(attention_k_eq_v=False) | {"per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 16}}}
    assert TextConfig.from_dict(flat) == TextConfig.from_dict(per_layer)


def test_no_per_layer_entry_means_one_head_dim():
    raw = saved(attention_k_eq_v=False) | {"per_layer_config": {"0": {"head_dim": 8, "num_key_value_heads": 2}}}
    assert TextConfig.from_dict(raw).global_head_dim == 8


@pytest.mark.parametrize("per_layer", [{}, None])
def test_per_layer_config_decides_even_when_empty(per_layer):
    """transformers writes an empty one where full layers differ in nothing, and then reads neither flat key."""
    config = TextConfig.from_dict(hub(per_layer_config=per_layer))
    assert config.global_head_dim == config.head_dim == 8
    assert [layer.num_key_value_heads for layer in config.layers] == [2, 2, 2, 2]


def test_equal_head_dims_survive_transformers(tmp_path):
    folder = make_tiny("31B", tmp_path / "m", overrides={"global_head_dim": 16, "num_global_key_value_heads": 2})
    assert TextConfig.from_file(folder).global_head_dim == 16
    Gemma4.from_pretrained(folder)


def test_multimodal_wraps_the_text_model():
    whole = {"model_type": "gemma4", "text_config": hub(), "vision_config": {"hidden_size": 3}, "image_token_id": 9}
    assert TextConfig.from_dict(whole) == TextConfig.from_dict(hub())
    outer = TextConfig.from_dict(whole | {"tie_word_embeddings": False, "eos_token_id": 7})
    assert outer == dataclasses.replace(TextConfig.from_dict(hub()), tie_word_embeddings=False, eos_token_id=(7,))


@pytest.mark.parametrize("variant", TINY)
def test_what_transformers_writes(variant, tiny, tmp_path):
    """Its own file, the released form of it, and the multimodal one, read from the folder or the file."""
    want = TextConfig.from_file(tiny(variant))
    assert want == TextConfig.from_file(tiny(variant) / "config.json")
    for name, options in {"hub": {"hub_form": True}, "images": {"multimodal": True}}.items():
        assert TextConfig.from_file(make_tiny(variant, tmp_path / name, **options)) == want


def test_absent_keys_mean_what_they_mean_to_transformers():
    required = {f.name for f in dataclasses.fields(TextConfig) if f.default is f.default_factory is dataclasses.MISSING}
    # 5.23 has no global_head_dim field, yet reads one and defaults it to 512.
    raw = {key: HUB[key] for key in required - {"global_head_dim"}}
    theirs = transformers.Gemma4TextConfig(**copy.deepcopy(raw)).to_dict()
    del theirs["per_layer_config"]
    ours = dataclasses.asdict(TextConfig.from_dict(raw | {"model_type": "gemma4_text"}))
    assert ours.pop("global_head_dim") == 512
    assert ours.pop("num_global_key_value_heads") is None
    assert ours.pop("eos_token_id") == (theirs.pop("eos_token_id"),)
    ours["layer_types"] = list(ours["layer_types"])
    ours["rope_parameters"][SLIDING].pop("partial_rotary_factor")
    assert ours == {key: theirs[key] for key in ours}


def test_keys_without_effect_are_ignored():
    raw = hub(use_cache=True, transformers_version="5.23.0", architectures=["X"], _name_or_path="x", some_switch=False)
    assert TextConfig.from_dict(raw) == TextConfig.from_dict(hub())


# Layers


def test_layers():
    shared = TextConfig.from_dict(hub(num_kv_shared_layers=2, use_double_wide_mlp=True, attention_k_eq_v=False))
    assert [layer.kv_source for layer in shared.layers] == [0, 1, 0, 1]
    assert [layer.kv_shared for layer in shared.layers] == [False, False, True, True]
    assert [layer.intermediate_size for layer in shared.layers] == [48, 48, 96, 96]
    assert [layer.head_dim for layer in shared.layers] == [8, 16, 8, 16]
    assert [layer.num_key_value_heads for layer in shared.layers] == [2, 2, 2, 2]
    assert [layer.is_sliding for layer in shared.layers] == [True, False, True, False]
    k_eq_v = TextConfig.from_dict(hub(num_kv_shared_layers=0))
    assert [layer.k_eq_v for layer in k_eq_v.layers] == [False, True, False, True]
    assert [layer.num_key_value_heads for layer in k_eq_v.layers] == [2, 1, 2, 1]


def test_a_shared_layer_reads_the_last_unshared_one_of_its_type():
    types = [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL]
    config = TextConfig.from_dict(hub(num_hidden_layers=8, layer_types=types, num_kv_shared_layers=3))
    assert [layer.kv_source for layer in config.layers[5:]] == [3, 3, 4]


def test_ten_layers_survive_transformers(tmp_path):
    """It writes the layers' indices with leading zeros then."""
    layers = {"num_hidden_layers": 12, "layer_types": [SLIDING, SLIDING, FULL] * 4}
    folder = make_tiny("31B", tmp_path / "m", overrides=layers)
    assert "02" in json.loads((folder / "config.json").read_text())["per_layer_config"]
    assert TextConfig.from_file(folder).global_head_dim == 32
