"""`gemma4 gguf inspect`: the tensors, what they are, the sums, the model; and one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from raw_gguf import STRING, header, key, tensor, text, write_config

from gemma4_impl.cli import cli
from gemma4_impl.config import VARIANTS
from gemma4_impl.gguf.reader import GGUFFile
from reference.tiny import aligned, make_tiny
from reference.tiny_gguf import make_tiny_gguf


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["gguf", "inspect", *map(str, args)])


def as_json(*args: object) -> dict:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("file")
    checkpoint = make_tiny("26B-A4B", folder / "m", overrides=aligned("26B-A4B", 256))
    return make_tiny_gguf(checkpoint, folder / "x.gguf", "Q4_K_M")


def test_what_a_file_holds(file):
    found, tensors = as_json(file), GGUFFile(file).tensors
    assert (found["architecture"], found["name"], found["holds"]) == ("gemma4", "m", "text model")
    assert (found["files"], found["problem"], found["tokens"], found["chat_template"]) == ([str(file)], None, 512, True)
    assert [t["name"] for t in found["tensors"]] == list(tensors)
    by_name = {t["name"]: t for t in found["tensors"]}
    assert by_name["token_embd.weight"] == {
        "name": "token_embd.weight",
        "type": "Q6_K",
        "shape": [512, 256],
        "weights": 512 * 256,
        "bytes": 512 * 210,
        "is": ["embed_tokens.weight"],
        "note": "",
    }
    assert by_name["blk.3.ffn_gate_up_exps.weight"]["is"] == ["layers.3.experts.gate_up_proj"]
    assert by_name["rope_freqs.weight"]["is"] == []
    assert by_name["rope_freqs.weight"]["note"] == "(which dims rotate)"
    assert found["bytes"] == sum(info.nbytes for info in tensors.values())
    assert found["bits_per_weight"] == round(8 * found["bytes"] / found["weights"], 3)
    assert set(found["types"]) == {"Q4_K", "Q6_K", "F32"}
    assert found["types"]["Q4_K"]["bits_per_weight"] == 4.5
    for what in ("weights", "bytes", "tensors"):
        total = len(tensors) if what == "tensors" else found[what]
        assert sum(sums[what] for sums in found["types"].values()) == total
    config = found["config"]
    assert config["variant"] is None
    assert (config["num_experts"], config["top_k_experts"], config["full_layers"]) == (8, 3, [2, 5])
    assert (config["attention_k_eq_v"], config["tie_word_embeddings"], config["eos_token_id"]) == (True, True, [1, 106])


def test_as_text(file):
    result = run(file)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["tensor", "type", "shape", "size", "is"]
    rows = {line.split()[0]: line for line in lines if line.startswith(("blk.", "token_embd", "rope_freqs"))}
    assert len(rows) == len(GGUFFile(file).tensors) - 1
    assert rows["blk.0.attn_q.weight"].split() == (
        ["blk.0.attn_q.weight", "Q4_K", "512", "x", "256", "72.0", "KiB", "layers.0.self_attn.q_proj.weight"]
    )
    assert rows["rope_freqs.weight"].endswith("(which dims rotate)")
    for part in (
        "Q4_K       46  12,058,624    6.5 MiB           4.50",
        "gemma4 (m): text model",
        "  no released size",
        "  6 layers, 2 of them full; window 6, context 512",
        "  8 heads of 64, on full layers of 128; 4 for keys and values, on full layers 2, whose values are their keys",
        "  hidden size 256, MLP 256, 8 experts of 256, 3 a token",
        "  vocabulary of 512, tied head; tokenizer of 512, chat template, stops at 1, 106",
    ):
        assert part in lines
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_sizes_are_recognised(variant, tmp_path):
    path = write_config(tmp_path / "x.gguf", VARIANTS[variant])
    assert as_json(path)["config"]["variant"] == variant
    text_form = run(path).stdout
    assert f"  the size of {variant}\n" in text_form
    assert "; no tokenizer, no chat template, stops at 1, 106" in text_form
    assert ("the last 20 with others' keys and values" in text_form) == (variant == "E2B")
    assert ("double where keys are shared" in text_form) == (variant == "E2B")
    assert ("per-layer inputs of 256" in text_form) == variant.startswith("E")


def test_a_split_file(tiny, tmp_path):
    first = make_tiny_gguf(tiny("E2B"), tmp_path / "x.gguf", max_tensors=60)
    found = as_json(first)
    assert len(found["files"]) == 3
    assert len(found["tensors"]) == len(as_json(make_tiny_gguf(tiny("E2B"), tmp_path / "y.gguf"))["tensors"])


def test_parts_and_joined_tensors(tiny, tmp_path):
    path = make_tiny_gguf(tiny("26B-A4B"), tmp_path / "x.gguf", separate_experts=True, join_qkv=True)
    found = {t["name"]: t["is"] for t in as_json(path)["tensors"]}
    assert found["blk.1.ffn_gate_exps.weight"] == found["blk.1.ffn_up_exps.weight"] == ["layers.1.experts.gate_up_proj"]
    assert found["blk.1.attn_qkv.weight"] == [f"layers.1.self_attn.{part}_proj.weight" for part in "qkv"]


def other(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.name", "Gemma 4 E2B")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_tensor("v.patch_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_mmproj_files_are_named(tmp_path):
    path = other(tmp_path / "mmproj.gguf", "clip")
    found = as_json(path)
    assert (found["holds"], found["problem"], found["config"]) == ("vision tower of 'Gemma 4 E2B'", None, None)
    assert found["tensors"][0]["is"] == []
    result = run(path)
    assert result.exit_code == 0
    assert "clip (Gemma 4 E2B): vision tower of 'Gemma 4 E2B'" in result.stdout.splitlines()
    assert any(
        line.startswith("v.patch_embd.weight") and line.endswith("not used") for line in result.stdout.splitlines()
    )


# What is wrong


def assert_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("gemma4: error: ")
    for part in parts:
        assert part in lines[0]


def test_a_model_of_another_architecture(tmp_path):
    """Its tensors are shown all the same."""
    path = other(tmp_path / "x.gguf", "llama")
    result = run(path)
    assert_error(result, f"{path}: general.architecture = 'llama'; expected 'gemma4'")
    assert "v.patch_embd.weight" in result.stdout
    assert "unknown" in result.stdout
    result = run(path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["problem"] in result.stderr


def test_a_model_that_lacks_something(tmp_path):
    path = write_config(tmp_path / "x.gguf", VARIANTS["31B"], **{"gemma4.block_count": None})
    assert_error(run(path), f"{path}: gemma4.block_count is missing")
    path = write_config(tmp_path / "y.gguf", VARIANTS["31B"], **{"gemma4.embedding_length": 5000})
    assert_error(run(path), f"{path}: the tensors do not fit the metadata; ", "is [5376], expected [5000]")


def test_no_gguf_file(tmp_path):
    assert_error(run(tmp_path / "absent.gguf"), "absent.gguf: no such file")
    assert_error(run(tmp_path), "no such file")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert_error(run(tmp_path / "x.gguf"), "x.gguf: not a GGUF file")
    assert_error(run(), "Missing argument 'FILE'")


def test_nothing_in_a_file_reaches_the_terminal_as_it_is(tmp_path):
    keys = [key("general.architecture", STRING, text("a\x1b[2J\n")), key("general.name", STRING, text("n\x07"))]
    (tmp_path / "x.gguf").write_bytes(header(keys, [tensor("t\x1b[31m", [8])], bytes(32)))
    result = run(tmp_path / "x.gguf")
    assert result.exit_code == 2
    assert r"'t\x1b[31m'" in result.stdout
    for stream in (result.stdout, result.stderr):
        assert all(c.isprintable() or c == "\n" for c in stream)


def test_help_does_not_wait_for_torch():
    code = "import sys; from gemma4_impl.cli import cli; cli(['gguf', 'inspect', '-h'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mmproj" in run.stdout
    assert run.stdout.endswith("False\n")
