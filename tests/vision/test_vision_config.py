"""vision_config and the image processor's file: read as transformers reads them, refused by name when malformed."""

import contextlib
import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4Config

from gemma4_impl.config import ConfigError
from gemma4_impl.vision.config import VisionConfig, processor_sizes
from gemma4_impl.vision.processing import ImageProcessor
from reference.tiny import TINY
from reference.tiny_vision import MAX_SOFT_TOKENS, VISION

VISION_KEYS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def outer(**vision) -> dict:
    """A multimodal config with `vision` on top of the required keys; None deletes one."""
    keys = {key: value for key, value in (VISION_KEYS | vision).items() if value is not None}
    return {"model_type": "gemma4", "text_config": {"hidden_size": 24}, "vision_config": keys}


def write(folder: Path, name: str, content: object) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("variant", TINY)
def test_reads_what_transformers_reads(variant, tiny_images):
    path = tiny_images(variant)
    config, theirs = VisionConfig.from_file(path), Gemma4Config.from_pretrained(path)
    for name in VisionConfig.__dataclass_fields__:
        if name.endswith("_token_id"):
            want = getattr(theirs, name)
        elif name == "text_hidden_size":
            want = theirs.text_config.hidden_size
        elif name == "use_bidirectional_attention":
            want = theirs.text_config.use_bidirectional_attention
        elif name == "rope_theta":
            want = theirs.vision_config.rope_parameters["rope_theta"]
        else:
            want = getattr(theirs.vision_config, name)
        assert getattr(config, name) == want, name
    assert config == VisionConfig.from_file(path / "config.json")
    assert config.use_clipped_linears is variant.startswith("E")
    assert config.standardize is not config.use_clipped_linears
    assert {key: getattr(config, key) for key in VISION[variant]} == VISION[variant]


def test_defaults_are_those_of_transformers():
    """What an absent key means."""
    config = VisionConfig.from_dict(outer())
    theirs = Gemma4Config.from_dict(outer())
    for name in ("patch_size", "pooling_kernel_size", "position_embedding_size", "rms_norm_eps", "standardize"):
        assert getattr(config, name) == getattr(theirs.vision_config, name), name
    assert config.use_clipped_linears is theirs.vision_config.use_clipped_linears is False
    assert config.rope_theta == theirs.vision_config.rope_parameters["rope_theta"] == 100.0
    for name in ("image_token_id", "boi_token_id", "eoi_token_id"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.use_bidirectional_attention is None


def test_the_released_form():
    """Keys that were written before the RoPE was called axial, and ones that change nothing."""
    extra = {
        "model_type": "gemma4_vision",
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "default_output_length": 280,
        "global_head_dim": 8,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "id2label": {"0": "LABEL_0"},
        "return_dict": True,
        "some_new_switch": False,
        "some_new_size": None,
    }
    config = VisionConfig.from_dict(outer(**extra) | {"vision_soft_tokens_per_image": 280, "image_token_id": 7})
    assert config.rope_theta == 50.0
    assert config.image_token_id == 7


REFUSED = [
    *[({key: 0}, key) for key in (*VISION_KEYS, "patch_size", "position_embedding_size")],
    *[({key: 2**40}, key) for key in ("hidden_size", "position_embedding_size", "patch_size")],
    *[({key: 2.0}, key) for key in ("hidden_size", "pooling_kernel_size", "patch_size")],
    *[({key: True}, key) for key in ("num_hidden_layers", "rms_norm_eps")],
    *[({key: "8"}, key) for key in ("head_dim", "rms_norm_eps", "standardize")],
    *[({key: 1}, key) for key in ("use_clipped_linears", "standardize", "attention_bias")],
    *[({"rms_norm_eps": v}, "rms_norm_eps") for v in (0, -1e-6, float("nan"), float("inf"), [1])],
    *[({key: None}, key) for key in VISION_KEYS],
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_activation": "gelu"}, "hidden_activation"),
    ({"head_dim": 6}, "head_dim"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"pooling_kernel_size": 1}, "pooling_kernel_size"),
    ({"global_head_dim": 16}, "global_head_dim"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"vision_use_head": True}, "vision_use_head"),
    ({"model_type": "siglip_vision_model"}, "siglip_vision_model"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type"),
    ({"rope_parameters": {"rope_type": ["axial"]}}, "rope_parameters.rope_type"),
    ({"rope_parameters": {"rope_theta": 10.0, "factor": 2}}, "rope_parameters.factor"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
    ({"rope_parameters": {"rope_theta": "100"}}, "rope_theta"),
]


@pytest.mark.parametrize(("keys", "named"), REFUSED)
def test_refused_by_name(keys, named, tmp_path):
    path = write(tmp_path, "config.json", outer(**keys)) / "config.json"
    with pytest.raises(ConfigError, match=re.escape(named)) as caught:
        VisionConfig.from_file(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_config": None}, "text_config.hidden_size"),
        ({"text_config": {"hidden_size": "24"}}, "text_hidden_size"),
        ({"text_config": {"hidden_size": 24, "use_bidirectional_attention": "all"}}, "use_bidirectional_attention"),
        ({"image_token_id": -1}, "image_token_id"),
        ({"boi_token_id": 1.5}, "boi_token_id"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"vision_config": [1]}, "vision_config"),
        ({"vision_config": None}, "takes text only, no images"),
    ],
)
def test_outer_keys_refused_by_name(change, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        VisionConfig.from_dict(outer() | change)


def test_a_text_only_checkpoint(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"config.json: vision_config is missing; this checkpoint takes text only"):
        VisionConfig.from_file(tiny("31B"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        VisionConfig.from_file(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        VisionConfig.from_file(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*VISION_KEYS, "rope_parameters", "standardize", "global_head_dim", "model_type", "x"]), JSON)
def test_any_value_is_read_or_refused(key, value):
    raw = outer()
    raw["vision_config"][key] = copy.deepcopy(value)
    with contextlib.suppress(ConfigError):
        config = VisionConfig.from_dict(raw)
        # null means the same as no key.
        assert value is None or not hasattr(config, key) or getattr(config, key) == value


# The image processor's file


def test_the_processor_of_a_tiny_checkpoint(tiny_images):
    processor = ImageProcessor.from_pretrained(tiny_images("31B"))
    assert processor == ImageProcessor(4, 2, MAX_SOFT_TOKENS, 150)
    assert processor.max_patches == 280


def test_where_the_sizes_come_from(tmp_path):
    assert processor_sizes(tmp_path) == {}
    write(tmp_path, "preprocessor_config.json", {"max_soft_tokens": 70, "do_normalize": False, "resample": 3})
    assert processor_sizes(tmp_path) == {"max_soft_tokens": 70}
    write(tmp_path, "processor_config.json", {"image_seq_length": 280})
    assert processor_sizes(tmp_path) == {"max_soft_tokens": 70}
    write(tmp_path, "processor_config.json", {"image_processor": {"max_soft_tokens": 140, "size": {"height": 1}}})
    assert processor_sizes(tmp_path) == {"max_soft_tokens": 140}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"do_normalize": True}, "do_normalize"),
        ({"do_resize": False}, "do_resize"),
        ({"do_resize": 1}, "do_resize"),
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"max_soft_tokens": 0}, "max_soft_tokens"),
        ({"max_soft_tokens": "70"}, "max_soft_tokens"),
        ({"patch_size": True}, "patch_size"),
        ({"do_pan_and_scan": True}, "do_pan_and_scan"),
        ([1], "expected a JSON object"),
    ],
)
def test_processor_files_refused_by_name(content, named, tmp_path):
    for name, whole in (
        ("preprocessor_config.json", content),
        ("processor_config.json", {"image_processor": content}),
    ):
        write(tmp_path, name, whole)
        with pytest.raises(ConfigError, match=re.escape(named)) as caught:
            processor_sizes(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_a_processor_that_contradicts_the_model(tmp_path):
    write(tmp_path, "config.json", outer())
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor()
    write(tmp_path, "processor_config.json", {"image_processor": {"patch_size": 14}})
    with pytest.raises(ConfigError, match="patch_size is 14, but the tower's is 16"):
        ImageProcessor.from_pretrained(tmp_path)
