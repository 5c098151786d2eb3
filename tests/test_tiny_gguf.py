"""The tiny GGUF files that tests are made with: types as llama.cpp chooses them, the same bytes each time."""

import fnmatch
import json
from pathlib import Path

import gguf
import pytest

from reference.tiny import aligned, make_tiny
from reference.tiny_gguf import TYPES, make_tiny_gguf


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wide")
    return {v: make_tiny(v, folder / v, overrides=aligned(v, 256)) for v in ("E2B", "26B-A4B")}


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def matching(types: dict[str, str], pattern: str) -> list[str]:
    found = [kind for name, kind in types.items() if fnmatch.fnmatchcase(name, pattern)]
    assert found, pattern
    return found


def test_q4_k_m_mixes_as_llama_cpp_does(folders, tmp_path):
    """Values and downs get more bits in the first and last eighth of the layers and every third between."""
    dense = types_of(make_tiny_gguf(folders["E2B"], tmp_path / "e.gguf", "Q4_K_M"))
    assert dense["token_embd.weight"] == "Q6_K"
    assert dense["per_layer_token_embd.weight"] == "Q8_0", "rows of 288: Q6_K's replacement"
    assert dense["per_layer_model_proj.weight"] == "BF16"
    assert set(matching(dense, "blk.*.attn_[qk].weight")) == {"Q4_K"}
    assert set(matching(dense, "blk.*.ffn_up.weight")) == {"Q4_K"}
    assert [dense[f"blk.{i}.ffn_down.weight"] == "Q6_K" for i in range(9)] == [i in (0, 3, 6, 7, 8) for i in range(9)]
    assert [dense[f"blk.{i}.attn_v.weight"] == "Q6_K" for i in range(7)] == [i in (2, 5, 6) for i in range(7)]
    assert set(matching(dense, "blk.*.proj.weight")) == {"Q5_0"}, "rows of 32: Q4_K's replacement"
    assert set(matching(dense, "blk.*norm.weight")) == {"F32"}
    moe = types_of(make_tiny_gguf(folders["26B-A4B"], tmp_path / "m.gguf", "Q4_K_M"))
    assert set(matching(moe, "blk.*.ffn_gate_up_exps.weight")) == {"Q4_K"}
    assert set(matching(moe, "blk.*.ffn_down_exps.weight")) == {"Q4_K", "Q6_K"}
    assert set(matching(moe, "blk.*.ffn_gate_inp.*")) == {"F32"}
    assert set(matching(moe, "blk.*.ffn_down_exps.scale")) == {"F32"}


@pytest.mark.parametrize("kind", TYPES)
def test_one_type_for_all(kind, folders, tmp_path):
    types = types_of(make_tiny_gguf(folders["26B-A4B"], tmp_path / "x.gguf", kind))
    assert types["blk.2.ffn_down_exps.weight"] == types["token_embd.weight"] == kind
    assert types["blk.2.ffn_gate_inp.weight"] == types["blk.2.ffn_gate_inp.scale"] == "F32"


def test_types_by_pattern_and_by_function(folders, tmp_path):
    by_pattern = {"blk.1.*": "Q4_0", "blk.*.ffn_up.weight": "Q8_0"}
    types = types_of(make_tiny_gguf(folders["E2B"], tmp_path / "x.gguf", {**by_pattern, "blk.1.*norm*": "F32"}))
    assert (types["blk.0.ffn_up.weight"], types["blk.1.ffn_up.weight"]) == ("Q8_0", "Q4_0")
    assert types["blk.0.ffn_gate.weight"] == "F32"
    types = types_of(
        make_tiny_gguf(folders["E2B"], tmp_path / "y.gguf", lambda name, shape: "F16" if len(shape) == 2 else "F32")
    )
    assert set(types.values()) == {"F16", "F32"}


def test_rows_that_no_block_divides(tmp_path):
    folder = make_tiny("E2B", tmp_path / "m")
    types = types_of(make_tiny_gguf(folder, tmp_path / "x.gguf", "Q6_K"))
    assert types["blk.0.ffn_down.weight"] == "Q8_0", "rows of 64"
    assert types["blk.0.ffn_up.weight"] == "F16", "rows of 40"


def test_the_same_bytes_each_time(folders, tmp_path):
    a, b, c = (
        make_tiny_gguf(folders["E2B"], tmp_path / f"{i}.gguf", "Q4_K_M", seed=seed).read_bytes()
        for i, seed in enumerate((0, 0, 1))
    )
    assert a == b != c


def test_the_vocabulary(folders, tmp_path):
    fields = gguf.GGUFReader(make_tiny_gguf(folders["E2B"], tmp_path / "x.gguf")).fields
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    vocab = json.loads((folders["E2B"] / "tokenizer.json").read_text())["model"]["vocab"]
    assert {token: i for i, token in enumerate(tokens)} == vocab
    names = {token: gguf.TokenType(kind).name for token, kind in zip(tokens, kinds, strict=True)}
    assert [names[t] for t in ("<bos>", "<turn|>", "a", "<0x0A>")] == ["CONTROL", "CONTROL", "NORMAL", "BYTE"]
    assert fields["tokenizer.chat_template"].contents() == (folders["E2B"] / "chat_template.jinja").read_text()


def test_what_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"unknown type 'Q9_K'; known: F32, F16"):
        make_tiny_gguf(folders["E2B"], tmp_path / "x.gguf", "Q9_K")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((folders["E2B"] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"m: holds no \*\.safetensors"):
        make_tiny_gguf(tmp_path / "m", tmp_path / "x.gguf")
