"""parity and capture with our JAX model: what they write, and one clear line where it cannot run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from gemma4_impl.cli import cli
from gemma4_impl.config import FULL, SLIDING
from parity import cli as _commands  # noqa: F401  registers them
from parity import tapfile, targets
from parity.images import PATHS as IMAGE_PATHS
from reference.tiny import make_tiny

EXTRA = "pip install 'gemma4-parity[jax]'"


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


def refused(result: Result, *words: str) -> None:
    """Exit code 2, and nothing but one line on stderr that holds every one of `words`."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("gemma4: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Two layers, because each path is compiled."""
    layers = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    return make_tiny("31B", tmp_path_factory.mktemp("cli") / "31B", overrides=layers)


@pytest.fixture
def without_jax(monkeypatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("gemma4_impl.nnx", "reference.jax", "parity.candidate_jax"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("jax", "flax"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("optimized")
def test_both_candidates_are_told_apart_and_set_beside_the_reference(checkpoint, tmp_path):
    options = ("--candidate", "jax", "--candidate", "torch", "--dtype", "float32", "--path", "full")
    result = run("parity", checkpoint, *options, "--device", "cpu", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "report.json").read_text())
    assert [(c["candidate"], c["reference"], c["path"]) for c in data["cases"]] == [
        ("torch", "hf", "full"),
        ("jax", "hf", "full"),
    ]
    (entry,) = data["three_way"]
    assert set(entry["implementations"]) == {"torch", "jax", "hf"}
    assert entry["truths"]["rel_l2"] < 1e-12
    assert {"jax", "flax"} <= set(data["meta"]["versions"])
    lines = [line.split()[:3] for line in result.stdout.splitlines()]
    assert ["31B", "float32", "jax"] in lines
    assert "31B float32 jax" in (tmp_path / "report.html").read_text()


def test_jax_as_the_reference(checkpoint, tmp_path):
    options = ("--reference", "jax", "--dtype", "bfloat16", "--path", "full", "--device", "cpu")
    result = run("parity", checkpoint, *options, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "report.json").read_text())
    assert [(c["candidate"], c["reference"]) for c in data["cases"]] == [("torch", "jax")]
    assert data["three_way"] == []
    assert "31B bfloat16 torch/jax" in result.stdout


def test_jax_captured_apart_is_green(checkpoint, tmp_path):
    made = {name: tmp_path / f"{name}.safetensors" for name in ("truth", "reference", "candidate")}
    common = ("capture", checkpoint, "--length", "20", "--device", "cpu")
    for name, options in {
        "truth": ("--impl", "jax", "--dtype", "float64", "--weights", "bfloat16"),
        "reference": ("--impl", "hf", "--dtype", "bfloat16"),
        "candidate": ("--impl", "jax", "--dtype", "bfloat16", "--path", "chunked"),
    }.items():
        result = run(*common, *options, "-o", made[name])
        assert result.exit_code == 0, result.output
    meta = tapfile.load(made["candidate"]).meta
    assert (meta.impl, meta.dtype, meta.path) == ("jax", "bfloat16", "chunked")
    result = run("compare", made["candidate"], made["reference"], "--truth", made["truth"])
    assert result.exit_code == 0, result.output


def test_what_cannot_be_is_refused(checkpoint, tmp_path):
    out = ("-o", tmp_path / "out")
    refused(
        run("parity", checkpoint, "--candidate", "jax", "--reference", "jax", *out), "jax", "nothing against itself"
    )
    refused(run("parity", checkpoint, "--reference", "jax", "--stream", *out), "--reference jax", "--stream")
    refused(run("parity", checkpoint, "--reference", "jax", "--candidate", "gguf:x.gguf", *out), "--reference jax")
    refused(run("parity", checkpoint, "--candidate", "flax", *out), "flax", "torch, jax")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("parity", "--candidate", "jax"), ("parity", "--reference", "jax")])
def test_without_jax_there_is_one_line(checkpoint, tmp_path, without_jax, arguments):
    command, *options = arguments
    refused(run(command, checkpoint, *options, "-o", tmp_path / "out"), "jax and flax not installed", EXTRA)
    assert not (tmp_path / "out").exists()


def test_without_jax_nothing_is_captured(checkpoint, tmp_path, without_jax):
    refused(run("capture", checkpoint, "--impl", "jax", "-o", tmp_path / "out"), "not installed", EXTRA)


def test_without_jax_the_default_run_leaves_it_out_and_says_so(tmp_path, without_jax, monkeypatch):
    told = []

    def nothing(candidates, reference, device, everything):
        told.append(targets_of(candidates, reference, device, everything))
        return told[0]

    targets_of = targets.implementations
    monkeypatch.setattr(targets, "implementations", nothing)
    monkeypatch.setattr(targets, "targets", lambda *_: targets.Targets({}, []))
    monkeypatch.setattr(targets, "default_paths", lambda *_: ({}, {}))
    result = run("parity", "--device", "cpu", "-o", tmp_path)
    assert told[0][0] == ("torch",)
    line = next(line for line in result.stdout.splitlines() if line.startswith("without JAX: "))
    assert EXTRA in line


def test_which_of_our_models_run():
    cpu = torch.device("cpu")
    both, mine = ("torch", "jax"), ("torch",)
    for candidates, reference, everything, wanted in [
        ((), "hf", True, both),
        ((), "hf", False, mine),
        ((), "jax", True, mine),
        (("jax", "torch"), "hf", False, both),
        (("jax",), "hf", False, ("jax",)),
        (("quantized:default",), "hf", False, ()),
        (("quantized:default", "torch"), "hf", False, mine),
    ]:
        assert targets.implementations(candidates, reference, cpu, everything) == (wanted, None)
    meta = torch.device("meta")
    ours, why = targets.implementations((), "hf", meta, True)
    assert ours == mine
    assert "--device" in why
    with pytest.raises(ValueError, match="--device"):
        targets.implementations(("jax",), "hf", meta, True)


def test_the_paths_of_the_default_run():
    text, shown = targets.default_paths(("torch", "jax"), ())
    assert {"full", "chunked", "generate"} <= set(text["jax"]) < set(text["torch"])
    assert {"full", "generate"} == set(shown["jax"]) < set(shown["torch"])
    text, shown = targets.default_paths(("torch",), ())
    assert list(text) == list(shown) == ["torch"]
    text, shown = targets.default_paths(("torch", "jax"), ("decode",))
    assert text == {"torch": ("decode",), "jax": ("decode",)}
    assert shown == ({"torch": ["decode"]} if "decode" in IMAGE_PATHS else {})
