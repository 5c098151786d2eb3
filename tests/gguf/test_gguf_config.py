"""Config from GGUF metadata and back: every released size, every variant as converted, and what contradicts itself."""

import dataclasses
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_gguf import shapes_of, write_config, write_hollow

from gemma4_impl.config import FULL, SLIDING, VARIANTS, ConfigError, RopeParameters, TextConfig
from gemma4_impl.gguf.config import config_from_file, config_from_metadata, metadata_from_config, rope_freqs
from gemma4_impl.gguf.reader import GGUFError, GGUFFile
from reference.tiny import TINY, make_tiny
from reference.tiny_gguf import make_tiny_gguf

SMALL = TextConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=16,
    layer_types=(SLIDING, FULL, SLIDING, FULL, SLIDING, FULL),
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    sliding_window=5,
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=64,
    enable_moe_block=True,
    num_experts=4,
    top_k_experts=2,
    moe_intermediate_size=16,
    max_position_embeddings=128,
    eos_token_id=(1, 3),
)
"""One of everything that a key can contradict."""


# Both ways


@pytest.mark.parametrize("variant", VARIANTS)
def test_real_sizes_round_trip(variant, tmp_path):
    config = VARIANTS[variant]
    assert config_from_file(write_config(tmp_path / "x.gguf", config)) == config
    assert TextConfig.from_file(tmp_path / "x.gguf") == config


@pytest.mark.parametrize("variant", TINY)
def test_converted_checkpoints(variant, tiny, tmp_path):
    """Ids that end a reply come from the vocabulary here: the converter writes the first only."""
    file = GGUFFile(make_tiny_gguf(tiny(variant), tmp_path / "x.gguf"))
    assert "tokenizer.ggml.eot_token_id" not in file.metadata
    assert config_from_metadata(file) == TextConfig.from_file(tiny(variant))


def test_an_untied_head(tmp_path):
    folder = make_tiny("31B", tmp_path / "m", overrides={"tie_word_embeddings": False})
    config = config_from_file(make_tiny_gguf(folder, tmp_path / "x.gguf"))
    assert config == TextConfig.from_file(folder)
    assert not config.tie_word_embeddings


@st.composite
def configs(draw) -> TextConfig:
    layers = draw(st.integers(1, 8))
    kinds = (*draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers - 1, max_size=layers - 1)), FULL)
    shared = draw(st.integers(0, max(s for s in range(layers) if set(kinds[: layers - s]) == set(kinds))))
    k_eq_v, moe, ple = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0, 8]))
    heads = draw(st.sampled_from([2, 4]))
    global_head_dim = draw(st.sampled_from([8, 32]))
    rotated = draw(st.integers(1, global_head_dim // 2))
    decimals = st.decimals(min_value="0.000001", max_value=9_999_999, allow_nan=False).map(lambda d: float(f"{d:.6e}"))
    vocab = draw(st.integers(8, 64))
    return TextConfig(
        vocab_size=vocab,
        hidden_size=draw(st.sampled_from([16, 24])),
        intermediate_size=draw(st.integers(1, 64)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([1, 2])),
        head_dim=draw(st.sampled_from([4, 8])),
        global_head_dim=global_head_dim,
        layer_types=kinds,
        # A file without sliding layers can only hold the full layers' heads.
        num_global_key_value_heads=draw(st.sampled_from([None, 1, 2])) if k_eq_v and SLIDING in kinds else None,
        attention_k_eq_v=k_eq_v,
        sliding_window=draw(st.integers(1, 2000)),
        num_kv_shared_layers=shared,
        use_double_wide_mlp=draw(st.booleans()) and shared > 0,
        hidden_size_per_layer_input=ple,
        vocab_size_per_layer_input=vocab + (draw(st.integers(0, 3)) if ple else 0),
        enable_moe_block=moe,
        num_experts=8 if moe else None,
        top_k_experts=draw(st.integers(1, 8)) if moe else None,
        moe_intermediate_size=draw(st.integers(1, 64)) if moe else None,
        rope_parameters={
            SLIDING: RopeParameters("default", draw(decimals)),
            FULL: RopeParameters("proportional", draw(decimals), 2 * rotated / global_head_dim),
        },
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 3e-7])),
        final_logit_softcapping=draw(st.sampled_from([None, 30.0, 12.3])),
        max_position_embeddings=draw(st.integers(1, 1 << 20)),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=draw(st.integers(0, 7)),
        bos_token_id=draw(st.integers(0, 7)),
        eos_token_id=tuple(sorted(draw(st.sets(st.integers(0, 7), min_size=1, max_size=2)))),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs())
def test_any_config_round_trips(config, tmp_path):
    assert config_from_file(write_config(tmp_path / "x.gguf", config)) == config


# What the converter writes

E2B = {
    "general.architecture": "gemma4",
    "gemma4.context_length": 131_072,
    "gemma4.embedding_length": 1536,
    "gemma4.block_count": 35,
    "gemma4.feed_forward_length": [6144] * 15 + [12_288] * 20,
    "gemma4.attention.head_count": 8,
    "gemma4.attention.head_count_kv": 1,
    "gemma4.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma4.attention.key_length": 512,
    "gemma4.attention.value_length": 512,
    "gemma4.attention.key_length_swa": 256,
    "gemma4.attention.value_length_swa": 256,
    "gemma4.attention.sliding_window": 512,
    "gemma4.attention.sliding_window_pattern": [True, True, True, True, False] * 7,
    "gemma4.attention.shared_kv_layers": 20,
    "gemma4.embedding_length_per_layer_input": 256,
    "gemma4.rope.freq_base": 1e6,
    "gemma4.rope.freq_base_swa": 1e4,
    "gemma4.rope.dimension_count": 512,
    "gemma4.rope.dimension_count_swa": 256,
    "gemma4.final_logit_softcapping": 30.0,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 106,
}
E4B = E2B | {
    "gemma4.embedding_length": 2560,
    "gemma4.block_count": 42,
    "gemma4.feed_forward_length": 10_240,
    "gemma4.attention.head_count_kv": 2,
    "gemma4.attention.sliding_window_pattern": [True, True, True, True, True, False] * 7,
    "gemma4.attention.shared_kv_layers": 18,
}
A4B = E2B | {
    "gemma4.context_length": 262_144,
    "gemma4.embedding_length": 2816,
    "gemma4.block_count": 30,
    "gemma4.feed_forward_length": 2112,
    "gemma4.attention.head_count": 16,
    "gemma4.attention.head_count_kv": [8, 8, 8, 8, 8, 2] * 5,
    "gemma4.attention.sliding_window": 1024,
    "gemma4.attention.sliding_window_pattern": [True, True, True, True, True, False] * 5,
    "gemma4.attention.shared_kv_layers": 0,
    "gemma4.embedding_length_per_layer_input": 0,
    "gemma4.expert_count": 128,
    "gemma4.expert_used_count": 8,
    "gemma4.expert_feed_forward_length": 704,
}
B31 = E2B | {
    "gemma4.context_length": 262_144,
    "gemma4.embedding_length": 5376,
    "gemma4.block_count": 60,
    "gemma4.feed_forward_length": 21_504,
    "gemma4.attention.head_count": 32,
    "gemma4.attention.head_count_kv": [16, 16, 16, 16, 16, 4] * 10,
    "gemma4.attention.sliding_window": 1024,
    "gemma4.attention.sliding_window_pattern": [True, True, True, True, True, False] * 10,
    "gemma4.attention.shared_kv_layers": 0,
    "gemma4.embedding_length_per_layer_input": 0,
}


@pytest.mark.parametrize(("variant", "expected"), {"E2B": E2B, "E4B": E4B, "26B-A4B": A4B, "31B": B31}.items())
def test_what_the_converter_writes(variant, expected):
    """Its values for the released models, as its source says; the end of a turn it leaves to the vocabulary."""
    found = metadata_from_config(VARIANTS[variant])
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


def test_rope_freqs():
    assert rope_freqs(VARIANTS["E2B"]).tolist() == [1.0] * 64 + [torch.tensor(1e30).item()] * 192
    assert rope_freqs(VARIANTS["31B"]).dtype == torch.float32


# Where a value comes from


def test_an_absent_key_means_what_llama_cpp_takes_it_to_mean(tmp_path):
    absent = {
        "gemma4.rope.freq_base_swa": 1e4,
        "gemma4.attention.value_length": None,
        "gemma4.rope.dimension_count": None,
        "gemma4.rope.dimension_count_swa": None,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.bos_token_id": None,
    }
    file = write_config(tmp_path / "x.gguf", SMALL, **dict.fromkeys(absent))
    assert config_from_file(file) == SMALL


def test_a_model_without_softcapping(tmp_path):
    """The converter leaves the key out, or the value 0; llama.cpp itself would then cap at 30."""
    for value in (None, 0.0):
        file = write_config(tmp_path / "x.gguf", SMALL, **{"gemma4.final_logit_softcapping": value})
        assert config_from_file(file).final_logit_softcapping is None


def test_keys_that_change_nothing(tmp_path):
    same = {
        "gemma4.vocab_size": 64,
        "gemma4.attention.causal": True,
        "gemma4.attention.scale": 1.0,
        "gemma4.rope.scaling.type": "none",
        "gemma4.nextn_predict_layers": 0,
        "gemma4.expert_group_count": 0,
        "quantize.imatrix.file": "x",
        "general.finetune": "it",
    }
    assert config_from_file(write_config(tmp_path / "x.gguf", SMALL, **same)) == SMALL


def test_numbers_that_float32_rounds(tmp_path):
    """1e-6 is stored as 9.999999974752427e-07; the model is computed with what was meant."""
    file = write_config(tmp_path / "x.gguf", SMALL)
    stored = GGUFFile(file).metadata["gemma4.attention.layer_norm_rms_epsilon"]
    assert stored == float(np.float32(1e-6)) != 1e-6
    assert config_from_file(file).rms_norm_eps == 1e-6


@pytest.mark.parametrize("stop", ["<turn|>", "<end_of_turn>"])
def test_stop_tokens_are_looked_up(stop, tmp_path):
    tokens = [f"t{i}" for i in range(64)]
    tokens[1], tokens[9] = "<eos>", stop
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eot_token_id": None, "tokenizer.ggml.eos_token_id": 9}
    assert config_from_file(write_config(tmp_path / "x.gguf", SMALL, **changes)).eos_token_id == (1, 9)
    changes = dict.fromkeys(("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eos_token_id"))
    assert config_from_file(write_config(tmp_path / "x.gguf", SMALL, **changes)).eos_token_id == (1,)


# What is missing or contradicts itself


@pytest.mark.parametrize("key", [key for key in A4B if key.startswith("gemma4.")])
def test_missing_keys_are_named(key, tmp_path):
    optional = {
        "gemma4.attention.value_length", "gemma4.attention.value_length_swa", "gemma4.rope.freq_base_swa",
        "gemma4.rope.dimension_count", "gemma4.rope.dimension_count_swa", "gemma4.final_logit_softcapping",
    }  # fmt: skip
    file = write_config(tmp_path / "x.gguf", SMALL, **{key: None})
    if key in optional:
        assert config_from_file(file)
    elif key == "gemma4.attention.shared_kv_layers":
        with pytest.raises(ConfigError, match=r"gemma4\.feed_forward_length differs among the layers"):
            config_from_file(file)
    elif key == "gemma4.expert_count":
        assert not config_from_file(file).enable_moe_block
    else:
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: {re.escape(key)} is missing$"):
            config_from_file(file)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("block_count", 5, r"gemma4\.attention\.sliding_window_pattern has 6 entries for 5 layers"),
        ("block_count", 0, r"gemma4\.block_count = 0: must lie between 1 and"),
        ("block_count", 1 << 30, r"gemma4\.block_count = 1073741824: must lie between 1 and"),
        ("block_count", "six", r"gemma4\.block_count = 'six': must be an integer"),
        ("block_count", True, r"gemma4\.block_count = True: must be an integer"),
        ("block_count", 6.0, r"gemma4\.block_count = 6\.0: must be an integer"),
        ("attention.sliding_window_pattern", 6, r"sliding_window_pattern must be an array"),
        ("attention.sliding_window_pattern", [1, 0, 2, 0, 1, 0], r"sliding_window_pattern must say true or false"),
        ("attention.sliding_window_pattern", [0.0] * 6, r"sliding_window_pattern must hold integers"),
        ("attention.sliding_window_pattern", ["a"] * 6, r"sliding_window_pattern must hold integers"),
        ("attention.head_count", 3, r"head_count.*must divide num_attention_heads = 3"),
        ("attention.head_count", [4, 4, 4, 4, 4, 2], r"head_count differs among the layers"),
        ("attention.head_count_kv", [2, 1, 2, 1, 2, 2], r"head_count_kv differs among the full layers"),
        ("attention.head_count_kv", [2, 1, 1, 1, 2, 1], r"head_count_kv differs among the sliding layers"),
        ("attention.head_count_kv", [2, 1], r"head_count_kv has 2 entries for 6 layers"),
        ("attention.head_count_kv", [2, -1, 2, -1, 2, -1], r"head_count_kv must hold integers >= 0"),
        ("attention.head_count_kv", 0, r"head_count_kv gives num_key_value_heads = 0"),
        ("attention.key_length", 15, r"value_length = 16 differs from gemma4\.attention\.key_length = 15"),
        ("attention.value_length_swa", 16, r"value_length_swa = 16 differs from gemma4\.attention\.key_length_swa = 8"),
        ("rope.dimension_count", 8, r"rope\.dimension_count = 8 differs from gemma4\.attention\.key_length = 16"),
        ("rope.dimension_count_swa", 4, r"rope\.dimension_count_swa = 4 differs"),
        ("attention.shared_kv_layers", 6, r"shared_kv_layers = 6 of 6 leaves no layers to share from"),
        ("attention.shared_kv_layers", 5, r"shared_kv_layers = 5 of 6 leaves no layers to share from"),
        ("attention.shared_kv_layers", 3, r"feed_forward_length differs among the KV-shared layers"),
        ("feed_forward_length", [48] * 4 + [97] * 2, r"feed_forward_length = 97 on KV-shared layers: must be 48 or"),
        ("feed_forward_length", [48, 49, 48, 48, 96, 96], r"feed_forward_length differs among the layers"),
        ("vocab_size", 63, r"gemma4\.vocab_size = 63, but token_embd\.weight has 64 rows"),
        ("context_length", 0, r"context_length gives max_position_embeddings = 0"),
        (
            "attention.layer_norm_rms_epsilon",
            0.0,
            r"layer_norm_rms_epsilon gives rms_norm_eps = 0\.0: must be a positive",
        ),
        ("attention.layer_norm_rms_epsilon", float("nan"), r"layer_norm_rms_epsilon = nan: must be a number"),
        ("rope.freq_base", float("inf"), r"rope\.freq_base = inf: must be a number"),
        ("rope.freq_base", "1e6", r"rope\.freq_base = '1e6': must be a number"),
        ("final_logit_softcapping", -1.0, r"final_logit_softcapping gives .* must be a positive number"),
        ("expert_used_count", 5, r"expert_used_count gives top_k_experts = 5: exceeds num_experts = 4"),
        ("expert_used_count", [2, 2, 2, 2, 2, 1], r"expert_used_count differs among the layers"),
        ("attention.causal", False, r"attention\.causal = False is not supported; expected True"),
        ("attention.scale", 0.5, r"attention\.scale = 0\.5 is not supported; expected 1\.0"),
        ("rope.scaling.type", "yarn", r"rope\.scaling\.type = 'yarn' is not supported"),
        ("rope.scaling.factor", 8.0, r"rope\.scaling\.factor = 8\.0 is not supported"),
        ("nextn_predict_layers", 1, r"'gemma4\.nextn_predict_layers' = 1 is unknown; it would be ignored"),
        ("attn_logit_softcapping", 50.0, r"'gemma4\.attn_logit_softcapping' = 50\.0 is unknown"),
        ("altup.lists", [1, 2], r"'gemma4\.altup\.lists' = <array of 2 int32> is unknown"),
    ],
)
def test_contradictions_are_named(key, value, why, tmp_path):
    file = write_config(tmp_path / "x.gguf", SMALL, **{f"gemma4.{key}": value})
    with pytest.raises(ConfigError, match=why) as error:
        config_from_file(file)
    assert str(error.value).startswith(f"{file}: gemma4.") or "'gemma4." in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_tensor_is_named(tmp_path):
    rope = rope_freqs(SMALL).numpy()
    shapes, metadata = shapes_of(SMALL), metadata_from_config(SMALL)
    del shapes["token_embd.weight"]
    with pytest.raises(ConfigError, match=r"tensor token_embd\.weight is missing"):
        config_from_file(write_hollow(tmp_path / "x.gguf", metadata, shapes, rope))
    shapes |= {"token_embd.weight": (64, 32), "blk.1.attn_v.weight": (16, 32)}
    with pytest.raises(ConfigError, match=r"tensor blk\.3\.attn_v\.weight is missing; other full layers have theirs"):
        config_from_file(write_hollow(tmp_path / "x.gguf", metadata, shapes, rope))
    shapes["blk.3.attn_v.weight"] = (16, 32)
    with pytest.raises(
        ConfigError, match=r"head_count_kv = 1 on full layers and 2 on others needs full layers without"
    ):
        config_from_file(write_hollow(tmp_path / "x.gguf", metadata, shapes, rope))


def test_tokens_and_embedding_agree(tmp_path):
    file = write_config(tmp_path / "x.gguf", SMALL, **{"tokenizer.ggml.tokens": ["a"] * 63})
    with pytest.raises(
        ConfigError, match=r"tokenizer\.ggml\.tokens is <array of 63 strings>; token_embd\.weight has 64 rows"
    ):
        config_from_file(file)
    file = write_config(tmp_path / "x.gguf", SMALL, **{"tokenizer.ggml.eos_token_id": 64})
    with pytest.raises(ConfigError, match=r"eos_token_id = 64 is outside the vocabulary of 64"):
        config_from_file(file)
    file = write_config(tmp_path / "x.gguf", SMALL, **{"tokenizer.ggml.bos_token_id": 64})
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.bos_token_id gives bos_token_id = 64: is outside"):
        config_from_file(file)


@pytest.mark.parametrize(
    ("factors", "why"),
    [
        ([1, 1, 1e30, 1e30, 1e30, 1e30, 1e30], r"is F32 \[7\]; expected F32 \[8\]"),
        ([1, 1e30, 1, 1e30, 1e30, 1e30, 1e30, 1e30], "must be 1 for the first dims"),
        ([1e30] * 8, "must be 1 for the first dims"),
        ([1, 2, 4, 8, 16, 32, 64, 128], "must be 1 for the first dims"),
        ([1, 1, *[float("nan")] * 6], "must be 1 for the first dims"),
    ],
)
def test_rope_factors_that_are_not_proportional(factors, why, tmp_path):
    file = write_hollow(tmp_path / "x.gguf", metadata_from_config(SMALL), shapes_of(SMALL), np.array(factors))
    with pytest.raises(ConfigError, match=rf"tensor rope_freqs\.weight {why}"):
        config_from_file(file)


def test_no_rope_factors(tmp_path, tiny):
    data = make_tiny_gguf(tiny("31B"), tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data.replace(b"rope_freqs.weight", b"rope_fregs.weight"))
    with pytest.raises(ConfigError, match=r"tensor rope_freqs\.weight is missing; it says which dims"):
        config_from_file(tmp_path / "x.gguf")


def test_what_gguf_cannot_say():
    partial = {SLIDING: RopeParameters("proportional", 1e4, 0.5), FULL: RopeParameters("proportional", 1e6, 0.25)}
    with pytest.raises(ConfigError, match="GGUF cannot say that sliding layers rotate only some dims"):
        metadata_from_config(dataclasses.replace(SMALL, rope_parameters=partial))


# Other files


def other(path: Path, architecture: str, **keys: object) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_string
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["gemma3", "gemma4-assistant", "llama", "gemma4\n"])
def test_other_architectures_are_named(architecture, tmp_path):
    file = other(tmp_path / "x.gguf", architecture)
    with pytest.raises(GGUFError, match="expected 'gemma4'") as error:
        config_from_file(file)
    assert str(error.value) == f"{file}: general.architecture = {architecture!r}; expected 'gemma4'"


def test_an_adapter_is_no_model(tmp_path):
    with pytest.raises(GGUFError, match=r"general\.type = 'adapter'; expected 'model'"):
        config_from_file(other(tmp_path / "x.gguf", "gemma4", **{"general.type": "adapter"}))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"general.name": "Gemma 4 E2B"}, "vision tower of 'Gemma 4 E2B'"),
        ({"clip.has_vision_encoder": True, "clip.has_audio_encoder": True}, "vision and audio towers"),
        ({"clip.has_vision_encoder": False, "clip.has_audio_encoder": True}, "audio tower"),
    ],
)
def test_mmproj_files_are_named(keys, what, tmp_path):
    expected = rf"holds the {what}, no text model; give the text model's \.gguf file, this one goes beside it"
    with pytest.raises(GGUFError, match=expected):
        config_from_file(other(tmp_path / "x.gguf", "clip", **keys))
    with pytest.raises(GGUFError, match=expected):
        config_from_file(other(tmp_path / "x.gguf", "gemma4", **keys, **{"general.type": "mmproj"}))


def test_no_such_file(tmp_path):
    for read in (config_from_file, TextConfig.from_file):
        with pytest.raises(FileNotFoundError, match=r"x\.gguf: no such file"):
            read(tmp_path / "x.gguf")


def test_any_file_name_but_that_of_json_will_do(tmp_path):
    write_config(tmp_path / "x.gguf", SMALL).rename(tmp_path / "blob")
    assert TextConfig.from_file(tmp_path / "blob") == SMALL
    (tmp_path / "blob").rename(tmp_path / "x.json")
    with pytest.raises(ConfigError, match=r"x\.json: not valid JSON"):
        TextConfig.from_file(tmp_path / "x.json")
