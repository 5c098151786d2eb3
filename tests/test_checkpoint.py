"""Checkpoints: every form loads the same weights, and what does not fit, or points elsewhere, is refused by name."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from configs import hub, random_model, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma4_impl.checkpoint import Checkpoint, CheckpointError
from gemma4_impl.config import ConfigError, TextConfig
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.names import from_hf, to_hf
from reference.tiny import TINY, make_tiny

# One of each kind of layer that loading treats apart: shared keys, k_eq_v, experts, per-layer inputs, a tied head.
CONFIG = TextConfig.from_dict(hub())
INDEX = "model.safetensors.index.json"


def state() -> dict[str, torch.Tensor]:
    """The tensors of a random model as the released files name them."""
    tensors = random_model(CONFIG, torch.float32).state_dict()
    del tensors["lm_head.weight"]
    return {to_hf(name): tensor.clone() for name, tensor in tensors.items()}


def same(a: Gemma4, b: Gemma4) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save(tmp_path / "m", state())


# Every form


@pytest.mark.parametrize("variant", TINY)
def test_all_forms_load_the_same(variant, tiny, tmp_path):
    want = Gemma4.from_pretrained(tiny(variant))
    assert not any(t.is_meta for t in [*want.parameters(), *want.buffers()])
    for i, options in enumerate(({"shards": 3}, {"hub_form": True}, {"multimodal": True, "shards": 2})):
        made = make_tiny(variant, tmp_path / str(i), **options)
        assert same(Gemma4.from_pretrained(made), want), options
        assert Checkpoint(made).fingerprint() == Checkpoint(tiny(variant)).fingerprint()


def test_values_and_dtype(folder):
    tensors = state()
    model = Gemma4.from_pretrained(folder)
    assert model.dtype == torch.float32
    loaded = {to_hf(name): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    half = Gemma4.from_pretrained(folder, torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in half.state_dict().values())
    assert all(rope.inv_freq.dtype == torch.float32 for rope in half.rope.values())
    assert Gemma4.from_pretrained(folder, torch.float64).rope["full_attention"].inv_freq.dtype == torch.float64


def test_linked_shards(tmp_path):
    """The hub's cache keeps the files elsewhere and links to them."""
    save(tmp_path / "m", state(), shards=2)
    (tmp_path / "blobs").mkdir()
    for file in (tmp_path / "m").glob("*.safetensors"):
        file.rename(tmp_path / "blobs" / file.stem)
        file.symlink_to(os.path.relpath(tmp_path / "blobs" / file.stem, file.parent))
    assert same(Gemma4.from_pretrained(tmp_path / "m"), Gemma4.from_pretrained(save(tmp_path / "n", state())))


@given(st.text(max_size=40) | st.sampled_from(["model.", "language_model.model.", "model.vision_tower.x", "model"]))
def test_names_of_any_tensor(name):
    canonical = from_hf(name)
    assert canonical is None or isinstance(canonical, str)


@pytest.mark.parametrize("multimodal", [False, True])
def test_names_round_trip(multimodal):
    for name in Gemma4(CONFIG).state_dict():
        assert from_hf(to_hf(name, multimodal)) == name
    for name in ("model.vision_tower.x.weight", "model.embed_vision.x", "audio_tower.x", "embed_audio.x"):
        assert from_hf(name) is None


# Tied, shared, unused


def test_tied_weights_share_storage(folder):
    model = Gemma4.from_pretrained(folder)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == sum(
        t.numel() for name, t in state().items() if not name.endswith("layer_scalar")
    )


def test_an_equal_head_may_be_stored(tmp_path):
    tensors = state()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = Gemma4.from_pretrained(save(tmp_path / "m", tensors))
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("head", ["last value", "fewer rows", "scalar"])
def test_an_unequal_tied_head_is_refused(head, tmp_path):
    tensors = state()
    stored = tensors["model.embed_tokens.weight"].clone()
    stored[-1, -1] += 1e-3
    tensors["lm_head.weight"] = {"last value": stored, "fewer rows": stored[:-1], "scalar": stored[0, 0]}[head].clone()
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        Gemma4.from_pretrained(save(tmp_path / "m", tensors))


def test_an_untied_head_is_needed(tmp_path):
    tensors = state()
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        Gemma4.from_pretrained(save(tmp_path / "m", tensors, tie_word_embeddings=False))
    tensors["lm_head.weight"] = torch.ones(64, 32)
    model = Gemma4.from_pretrained(save(tmp_path / "m", tensors, tie_word_embeddings=False))
    assert torch.equal(model.lm_head.weight, torch.ones(64, 32))
    assert not torch.equal(model.embed_tokens.weight, torch.ones(64, 32))


def test_unused_weights_of_shared_layers_are_ignored(tmp_path, folder):
    tensors = state()
    for part, shape in {"k_proj": (32, 32), "v_proj": (32, 32), "k_norm": (16,)}.items():
        assert CONFIG.layers[3].kv_shared
        tensors[f"model.layers.3.self_attn.{part}.weight"] = torch.full(shape, torch.nan)
    assert same(Gemma4.from_pretrained(save(tmp_path / "n", tensors)), Gemma4.from_pretrained(folder))


# What does not fit


def test_everything_wrong_is_listed_at_once(tmp_path):
    tensors = state()
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.bias"] = torch.ones(2)
    tensors["model.layers.9.layer_scalar"] = torch.ones(1)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(3, 4)
    tensors["model.layers.2.layer_scalar"] = torch.ones(())
    with pytest.raises(CheckpointError, match=r"do not fit config\.json") as error:
        Gemma4.from_pretrained(save(tmp_path / "m", tensors))
    for part in (
        "2 missing: layers.0.mlp.up_proj.weight, norm.weight",
        "2 unexpected: layers.0.mlp.bias, layers.9.layer_scalar",
        "2 mis-shaped: layers.1.self_attn.q_proj.weight is [3, 4], expected [64, 32]",
        "layers.2.layer_scalar is [], expected [1]",
    ):
        assert part in str(error.value)


def test_long_lists_are_cut(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: .*, and \d+ more") as error:
        Gemma4.from_pretrained(save(tmp_path / "m", {"x": torch.ones(1)}))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_integers_are_refused_by_name(dtype, tmp_path):
    tensors = state()
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 32).to(dtype)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is stored as"):
        Gemma4.from_pretrained(save(tmp_path / "m", tensors))


def test_one_tensor_under_two_names(tmp_path):
    tensors = state()
    tensors["model.language_model.norm.weight"] = torch.ones(32)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' and .*are the same tensor"):
        Checkpoint(save(tmp_path / "m", tensors))


# Damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, bytes, int]:
    """A folder to damage, the intact bytes of its weight file, and the length of their header."""
    folder = save(tmp_path_factory.mktemp("damaged") / "m", state())
    data = (folder / "model.safetensors").read_bytes()
    return folder, data, 8 + int.from_bytes(data[:8], "little")


def damaged(folder: Path, data: bytes) -> Path:
    # A new file each time: an open mapping of the old one must not be cut.
    file = folder / "model.safetensors"
    file.unlink()
    file.write_bytes(data)
    return folder


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_truncated_anywhere(whole, data):
    folder, intact, header = whole
    end = data.draw(st.integers(0, header + 8) | st.integers(0, len(intact) - 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
        Gemma4.from_pretrained(damaged(folder, intact[:end]))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_one_byte_of_the_header_wrong(whole, data):
    folder, intact, header = whole
    at, value = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
    damaged(folder, intact[:at] + bytes([value]) + intact[at + 1 :])
    model = None
    with contextlib.suppress(CheckpointError, ConfigError, FileNotFoundError):
        model = Gemma4.from_pretrained(folder)
    assert model is None or not any(t.is_meta for t in model.state_dict().values())


def test_no_weights(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            Checkpoint(path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="neither"):
        Checkpoint(tmp_path)


# Indices


def with_index(folder: Path, index) -> Path:
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a\\b",
        "sub/x.safetensors",
        "",
        ".",
        "..",
        "x\0y",
        "model.safetensors/",
        "./m",
    ],
)
def test_an_index_that_points_outside(file, folder):
    (folder.parent / "x.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="points outside the folder"):
        Checkpoint(with_index(folder, {"weight_map": {"a": "model.safetensors", "b": file}}))


@pytest.mark.parametrize("file", ["absent.safetensors", "sub", "x" * 300, "\ud800", 7, None, ["a"]])
def test_an_index_that_names_no_file(file, folder):
    (folder / "sub").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{INDEX}: 'b' is in .* which does not exist"):
        Checkpoint(with_index(folder, {"weight_map": {"a": "model.safetensors", "b": file}}))


@pytest.mark.parametrize(
    "index",
    [
        *("", "{", "[]", "7", "null", "{}", '{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": null}'),
        *('{"weight_map": {}}', '{"weight_map": {"a": ' + "1" * 5000 + "}}", "[" * 100_000),
    ],
)
def test_not_an_index(index, folder):
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint(with_index(folder, index))


def test_an_index_of_the_wrong_file(folder):
    with pytest.raises(CheckpointError, match=r"the index lists 'model\.absent' here"):
        Checkpoint(with_index(folder, {"weight_map": {"model.absent": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"config\.json: not a complete safetensors file"):
        Checkpoint(with_index(folder, {"weight_map": {"model.absent": "config.json"}}))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("model.safetensors"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_any_index(folder, index):
    with pytest.raises((CheckpointError, FileNotFoundError)):
        Checkpoint(with_index(folder, index))


# Fingerprint


def test_fingerprint_is_that_of_the_tensors(tmp_path):
    one = Checkpoint(save(tmp_path / "1", state())).fingerprint()
    assert len(one) == 64
    assert Checkpoint(save(tmp_path / "3", state(), shards=3)).fingerprint() == one
    renamed = {to_hf(from_hf(name), multimodal=True): tensor for name, tensor in state().items()}
    renamed["model.vision_tower.x"] = torch.ones(3)
    assert Checkpoint(save(tmp_path / "m", renamed)).fingerprint() == one


@pytest.mark.parametrize("at", [0, 1, 31, 1023, -1, -2, -32, -1024])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.experts.down_proj"])
def test_fingerprint_changes_with_a_value_near_either_end(name, at, tmp_path):
    tensors = state()
    before = Checkpoint(save(tmp_path / "a", tensors)).fingerprint()
    flat = tensors[name].view(-1)
    flat[max(-len(flat), min(at, len(flat) - 1))] += 1
    assert Checkpoint(save(tmp_path / "b", tensors)).fingerprint() != before


def test_fingerprint_changes_with_name_shape_and_dtype(tmp_path):
    tensors = {"a": torch.zeros(4, 8)}
    others = [
        {"b": torch.zeros(4, 8)},
        {"a": torch.zeros(8, 4)},
        {"a": torch.zeros(4, 8).int()},
        {"a": torch.tensor(0.0)},
    ]
    prints = [Checkpoint(save(tmp_path / str(i), t)).fingerprint() for i, t in enumerate([tensors, *others])]
    assert len(set(prints)) == len(prints)


def test_fingerprint_samples_large_tensors(tmp_path):
    """It reads both ends only, so that a 60 GB checkpoint takes no time; this is what it cannot see."""
    tensors = {"a": torch.zeros(100, 100)}
    before = Checkpoint(save(tmp_path / "a", tensors)).fingerprint()
    tensors["a"][50, 50] = 1
    assert Checkpoint(save(tmp_path / "b", tensors)).fingerprint() == before
