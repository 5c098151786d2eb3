"""Random weights of real shapes: in memory and on disk, the same ones, within the memory of one tensor."""

import json

import pytest
import torch
from click.testing import CliRunner
from engine_models import NAMES, small, tokens
from measured_memory import MEASURABLE, run
from safetensors.torch import load_file

from gemma4_impl import engine
from gemma4_impl.checkpoint import open_checkpoint
from gemma4_impl.cli import cli
from gemma4_impl.config import VARIANTS
from gemma4_impl.engine import PackedModel, RandomWeights, Session, random_model
from gemma4_impl.engine.random_checkpoint import random_checkpoint
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.recipe import RECIPES, untied_shapes
from gemma4_impl.tokenizer import Tokenizer

MEASURE = """
import sys, torch
sys.path.append("tests/engine")
from gemma4_impl.engine.random_checkpoint import random_checkpoint
from engine_models import small
from measured_memory import watched
import dataclasses

torch.set_num_threads(1)
random_checkpoint(small("31B"), sys.argv[1] + "-small")  # what is imported and allocated on first use
config = dataclasses.replace(small("31B"), vocab_size=262_144, hidden_size=512)
with watched("RssAnon") as memory:
    size = random_checkpoint(config, sys.argv[1])
print(memory.peak, size / 2**20)
"""


@pytest.mark.parametrize("recipe", ["default", "compact", "sensitive", None])
@pytest.mark.parametrize("variant", NAMES)
def test_logits_are_finite_and_spread(variant, recipe):
    model = random_model(small(variant), recipe=recipe, dtype=torch.float32)
    logits = Session(model, 1, 64).prefill(tokens(40))
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 6
    probabilities = logits.softmax(0)
    assert probabilities.max() < 0.9
    other = Session(model, 1, 64).prefill(tokens(40, seed=1))
    assert torch.corrcoef(torch.stack([logits, other]))[0, 1] < 0.9


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B", "31B"])
@pytest.mark.parametrize("recipe", ["default", "sensitive", None])
def test_a_checkpoint_holds_what_is_made_in_memory(tmp_path, variant, recipe):
    config, out = small(variant), tmp_path / "out"
    size = random_checkpoint(config, out, recipe, seed=3, shard_bytes=100_000)
    weights, checkpoint = RandomWeights(config, recipe=recipe, seed=3), open_checkpoint(out)
    assert checkpoint.config == weights.config
    assert set(checkpoint.files) == set(weights.files)
    for name in weights.files:
        mine, theirs = weights.quantized(name), checkpoint.quantized(name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.equal(mine.qdata, theirs.qdata)
            assert torch.equal(mine.scale, theirs.scale)
        assert torch.equal(checkpoint.tensor(name), weights.tensor(name))
    files = list(out.glob("*.safetensors"))
    assert len(files) > 1
    assert size == sum(t.nbytes for file in files for t in load_file(file).values())
    Gemma4.from_pretrained(out)


def test_the_shapes_are_the_released_ones():
    for variant, config in VARIANTS.items():
        weights = RandomWeights(variant.lower())
        assert {name: weights.shape(name) for name in weights.files} == untied_shapes(config)
        assert weights.config.num_hidden_layers == config.num_hidden_layers


def test_the_seed_and_the_name_decide():
    one, same, other = (RandomWeights(small("31B"), seed=seed) for seed in (0, 0, 1))
    name, sibling = "layers.0.mlp.gate_proj.weight", "layers.1.mlp.gate_proj.weight"
    assert torch.equal(one.tensor(name), same.tensor(name))
    assert not torch.equal(one.tensor(name), other.tensor(name))
    assert not torch.equal(one.tensor(name), one.tensor(sibling))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert torch.equal(one.rows(name, 3, 9), one.tensor(name)[3:9])


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
def test_peak_memory(tmp_path):
    """The largest tensor is the embedding, 134 MB as stored; a whole checkpoint of 217 MB is written."""
    peak, size = map(float, run(MEASURE, str(tmp_path / "out")).split())
    assert size > 200
    assert 100 < peak < 134 * 1.25


def test_generates_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "E2B", small("E2B"))
    out = tmp_path / "e2b"
    made = CliRunner().invoke(cli, ["random-checkpoint", "--variant", "e2b", "-o", str(out), "--seed", "5"])
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith(f"{out}: E2B, ")
    result = CliRunner().invoke(
        cli, ["generate", str(out), "--tokens", "2,110", "--max-new-tokens", "3", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    assert "new 3 tokens" in result.stderr
    chat = CliRunner().invoke(cli, ["generate", str(out), "--prompt", "hé", "--max-new-tokens", "2", "--device", "cpu"])
    assert chat.exit_code == 0, chat.output
    tokenizer = Tokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer.encode("naïve\n")) == "naïve\n"
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_is_refused(tmp_path):
    runs = {
        "unknown variant '32B'; known: E2B, E4B, 26B-A4B, 31B": ["--variant", "32B", "-o", str(tmp_path / "a")],
        "already exists": ["--variant", "31B", "-o", str(tmp_path)],
        "no such recipe file": ["--variant", "31B", "-o", str(tmp_path / "b"), "--recipe", "none"],
        "--shard-size": ["--variant", "31B", "-o", str(tmp_path / "c"), "--shard-size", "x"],
    }
    for message, args in runs.items():
        result = CliRunner().invoke(cli, ["random-checkpoint", *args])
        assert result.exit_code == 2
        assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_it_fails(tmp_path, monkeypatch):
    def fail(self, name):
        raise MemoryError

    monkeypatch.setattr(RandomWeights, "quantized", fail)
    with pytest.raises(MemoryError):
        random_checkpoint(small("31B"), tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_object_and_the_packed_sizes():
    model = random_model(small("31B"), recipe=RECIPES["compact"])
    assert isinstance(model, PackedModel)
    assert 0 < model.nbytes_read < model.nbytes
    assert engine.Engine(model).bytes_per_token(10) > model.nbytes_read
