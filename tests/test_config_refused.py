"""config.json: every malformed, contradictory or unknown key is refused by name, and a hostile file does no harm."""

import contextlib
import copy
import json
import re

import pytest
import torch
from configs import HUB, ROPE, hub, saved
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemma4_impl.config import FULL, SLIDING, ConfigError, TextConfig
from gemma4_impl.model.decoder import Gemma4

# Refused, by name

REFUSED = [
    *[({key: 0}, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "global_head_dim")],
    *[({key: -1}, key) for key in ("num_attention_heads", "num_key_value_heads", "sliding_window", "pad_token_id")],
    *[({key: 8.0}, key) for key in ("hidden_size", "num_experts", "max_position_embeddings", "num_kv_shared_layers")],
    *[({key: "8"}, key) for key in ("vocab_size", "top_k_experts", "hidden_size_per_layer_input", "bos_token_id")],
    *[({key: True}, key) for key in ("vocab_size", "rms_norm_eps", "final_logit_softcapping")],
    *[({key: 1}, key) for key in ("attention_k_eq_v", "enable_moe_block", "tie_word_embeddings")],
    *[({key: "yes"}, key) for key in ("use_double_wide_mlp", "attention_bias")],
    *[({"rms_norm_eps": v}, "rms_norm_eps") for v in (0, -1e-6, float("nan"), float("inf"), 10**400, [1e-6])],
    ({"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_activation": "gelu"}, "hidden_activation"),
    ({"hidden_activation": ["gelu_pytorch_tanh"]}, "hidden_activation"),
    ({"eos_token_id": -1}, "eos_token_id"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id"),
    ({"eos_token_id": [True]}, "eos_token_id"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    ({"pad_token_id": 64}, "pad_token_id"),
    ({"bos_token_id": 64}, "bos_token_id"),
    ({"layer_types": [SLIDING, FULL, "chunked_attention", FULL]}, "layer_types"),
    ({"layer_types": [SLIDING, FULL, [FULL], FULL]}, "layer_types"),
    ({"layer_types": [FULL, FULL, FULL, SLIDING]}, "layer_types"),
    ({"layer_types": []}, "num_hidden_layers"),
    ({"num_hidden_layers": 3}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_global_key_value_heads": 3}, "num_global_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"global_head_dim": 15}, "global_head_dim"),
    ({"num_kv_shared_layers": 4}, "num_kv_shared_layers"),
    ({"num_kv_shared_layers": 3}, "num_kv_shared_layers"),
    ({"num_experts": None}, "num_experts"),
    ({"top_k_experts": None}, "top_k_experts"),
    ({"moe_intermediate_size": None}, "moe_intermediate_size"),
    ({"top_k_experts": 5}, "top_k_experts"),
    ({"vocab_size_per_layer_input": 63}, "vocab_size_per_layer_input"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ({"use_bidirectional_attention": "images"}, "use_bidirectional_attention"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"altup_num_inputs": 4}, "altup_num_inputs"),
    ({"rope_scaling": {"factor": 8}}, "rope_scaling"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {SLIDING: ROPE[SLIDING]}}, "rope_parameters"),
    ({"rope_parameters": ROPE | {FULL: 10_000.0}}, f"rope_parameters.{FULL}"),
    ({"rope_parameters": ROPE | {FULL: {"rope_type": "default"}}}, f"rope_parameters.{FULL}"),
    ({"rope_parameters": ROPE | {FULL: {"rope_type": "default", "rope_theta": None}}}, f"rope_parameters.{FULL}"),
    ({"rope_parameters": ROPE | {FULL: {"rope_type": "yarn", "rope_theta": 1e4}}}, "rope_parameters"),
    ({"rope_parameters": ROPE | {FULL: ROPE[FULL] | {"factor": 8}}}, f"rope_parameters.{FULL}.factor"),
    ({"rope_parameters": ROPE | {SLIDING: ROPE[SLIDING] | {"partial_rotary_factor": 0.5}}}, "rope_parameters"),
    *[
        ({"rope_parameters": ROPE | {FULL: ROPE[FULL] | {"partial_rotary_factor": v}}}, "partial_rotary_factor")
        for v in (-0.1, 1.5, float("nan"), "0.25", True)
    ],
    *[
        ({"rope_parameters": ROPE | {FULL: ROPE[FULL] | {"rope_theta": v}}}, "rope_theta")
        for v in (0, -1.0, float("nan"), float("inf"), 10**400, "1e4", True)
    ],
    ({"per_layer_config": [1]}, "per_layer_config"),
    ({"per_layer_config": {"4": {"head_dim": 16}}}, "per_layer_config.4"),
    ({"per_layer_config": {"-1": {"head_dim": 16}}}, "per_layer_config.-1"),
    ({"per_layer_config": {"x": {"head_dim": 16}}}, "per_layer_config.x"),
    ({"per_layer_config": {"9" * 5000: {"head_dim": 16}}}, "per_layer_config.999"),
    ({"per_layer_config": {"1": 16}}, "per_layer_config.1"),
    ({"per_layer_config": {"1": {"sliding_window": 16}}}, "per_layer_config.1.sliding_window"),
    ({"per_layer_config": {"0": {"head_dim": 16}}}, "per_layer_config.0"),
    ({"per_layer_config": {"1": {"head_dim": 16}, "3": {"head_dim": 8}}}, "per_layer_config.3"),
    ({"per_layer_config": {"1": {"head_dim": 16}}}, "per_layer_config.3"),
    ({"per_layer_config": {"1": {"head_dim": None}, "3": {"head_dim": None}}}, "global_head_dim"),
    ({"model_type": "gemma3_text"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"model_type": ["gemma4_text"]}, "model_type"),
]


@pytest.mark.parametrize(("changes", "key"), REFUSED, ids=lambda value: re.sub(r"(.{60}).*", r"\1", str(value)))
def test_refused_by_name(changes, key, tmp_path):
    """With the file and the key in one short line, whether it is read from a file or given as an object."""
    raw = hub(**changes)
    with pytest.raises(ConfigError, match=rf"^model/config: .*{re.escape(key)}") as error:
        TextConfig.from_dict(raw, "model/config")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    try:
        (tmp_path / "config.json").write_text(json.dumps(raw))
    except ValueError:  # json refuses to write an integer that it also refuses to read
        return
    with pytest.raises(ConfigError, match=r"config\.json"):
        TextConfig.from_file(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "layer_types", "head_dim", "num_hidden_layers"])
@pytest.mark.parametrize("absent", [True, False])
def test_a_missing_key_is_named(key, absent):
    raw = hub(**{key: None})
    if absent:
        del raw[key]
    with pytest.raises(ConfigError, match=f"^here: missing key.*{key}"):
        TextConfig.from_dict(raw, "here")


def test_all_missing_keys_are_named_at_once():
    with pytest.raises(ConfigError, match="missing key") as error:
        TextConfig.from_dict({"model_type": "gemma4_text"})
    for key in ("vocab_size", "hidden_size", "num_attention_heads", "layer_types"):
        assert key in str(error.value)


def test_per_layer_heads_need_k_eq_v():
    with pytest.raises(ConfigError, match=r"per_layer_config\.1\.num_key_value_heads"):
        TextConfig.from_dict(saved(attention_k_eq_v=False))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "gemma4"}, "text_config is missing"),
        ({"model_type": "gemma4", "text_config": []}, "text_config is missing"),
        ({"model_type": "gemma4", "text_config": hub(head_dim=7)}, "here: text_config: head_dim = 7"),
        ({"model_type": "gemma4", "text_config": hub(model_type="gemma3_text")}, "text_config: model_type"),
        ({"model_type": "gemma4", "text_config": hub(), "tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        ([], "expected a JSON object, got list"),
        (None, "expected a JSON object, got NoneType"),
        ("gemma4", "expected a JSON object, got str"),
    ],
)
def test_the_outer_object(raw, message):
    with pytest.raises(ConfigError, match=f"^here: .*{message}|^{message}"):
        TextConfig.from_dict(raw, "here")


# Hostile files


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent" / "config.json"):
        with pytest.raises(FileNotFoundError, match="absent" if "absent" in str(path) else "config.json"):
            TextConfig.from_file(path)


def test_truncated_anywhere(tmp_path):
    file, whole = tmp_path / "config.json", json.dumps(saved())
    for end in range(0, len(whole), 3):
        file.write_text(whole[:end])
        with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
            TextConfig.from_file(file)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"\x00" * 100,
        b"\xef\xbb\xbf{}",
        b"null",
        b"[]",
        b"{}{}",
        b'{"vocab_size": ' + b"1" * 5000 + b"}",
    ],
)
def test_not_an_object(data, tmp_path):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"config\.json"):
        TextConfig.from_file(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "eos_token_id", "rope_parameters", "per_layer_config", "new_key"])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_deep_nesting(key, pair, tmp_path):
    """Just below the interpreter's limit a value parses, and then must not overflow while it is reported."""
    file, text = tmp_path / "config.json", json.dumps(hub(**{key: "HERE"}))
    opening = "[" if pair == "[]" else '{"a":'
    closing = pair[1]
    for depth in [*range(300, 1000, 3), 100_000]:
        file.write_text(text.replace('"HERE"', opening * depth + "0" + closing * depth))
        with pytest.raises(ConfigError) as error:
            TextConfig.from_file(file)
        assert len(str(error.value)) < 1000


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
LEAVES = SCALARS | st.sampled_from([SLIDING, FULL, "default", "proportional", 10**400, -(10**400), 0, 1, 2, 4, 8])
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.text(max_size=4)
            | st.sampled_from([SLIDING, FULL, "0", "1", "3", "²", "rope_type", "rope_theta", "head_dim"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KEYS = [*HUB, "per_layer_config", "text_config", "attention_bias", "hidden_activation", "use_double_wide_mlp", "new"]


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KEYS), JSON, st.sampled_from([hub, saved]))
@example("per_layer_config", {"²": {}}, hub)
@example("layer_types", {"a": []}, saved)
@example("rope_parameters", {FULL: {"rope_type": [], "rope_theta": {}}}, hub)
def test_any_value_in_any_field(key, value, form):
    for raw in (form(**{key: value}), {"model_type": "gemma4", "text_config": form(**{key: value}), key: value}):
        with contextlib.suppress(ConfigError):
            assert isinstance(TextConfig.from_dict(raw), TextConfig)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([SLIDING, FULL]), st.sampled_from(["rope_type", "rope_theta", "partial_rotary_factor"]), JSON)
def test_any_value_in_rope_parameters(kind, key, value):
    rope = copy.deepcopy(ROPE)
    rope[kind][key] = value
    try:
        config = TextConfig.from_dict(hub(rope_parameters=rope))
    except ConfigError:
        return
    with torch.device("meta"):
        Gemma4(config)


@given(JSON)
def test_any_value_as_the_whole(value):
    with pytest.raises(ConfigError):
        TextConfig.from_dict(value)
