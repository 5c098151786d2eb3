"""What an export starts from: the same model as `Gemma4.from_pretrained`'s, with the integers as they are stored."""

from dataclasses import replace

import pytest
import torch
from configs import HUB, hub
from measured_memory import MEASURABLE, run

from gemma4_impl.checkpoint import CheckpointError, open_checkpoint
from gemma4_impl.config import TextConfig
from gemma4_impl.engine.random_checkpoint import random_checkpoint
from gemma4_impl.export.source import EMBEDDING, HEAD, dequantize, hold, open_source, quantized_weights
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.recipe import load_recipe
from gemma4_impl.quant.save import quantize_checkpoint
from reference.tiny import ALIGNED, make_tiny
from reference.tiny_gguf import make_tiny_gguf

TOKENS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module", params=["E2B", "26B-A4B"])
def sources(request, tmp_path_factory):
    """A dense folder, a quantized one, and a GGUF file, of one model."""
    root = tmp_path_factory.mktemp("sources")
    dense = make_tiny(request.param, root / "dense", overrides=ALIGNED[32])
    quantize_checkpoint(dense, root / "quantized", load_recipe("default"))
    return {"dense": dense, "quantized": root / "quantized", "gguf": make_tiny_gguf(dense, root / "m.gguf", "Q8_0")}


@pytest.mark.parametrize("kind", ["dense", "quantized", "gguf"])
@torch.no_grad()
def test_the_same_model(sources, kind):
    path = sources[kind]
    source = open_source(path, torch.float32)
    weights, model = open_checkpoint(path), Gemma4.from_pretrained(path, torch.float32)
    assert source.path == path
    assert (source.fingerprint, source.config) == (weights.fingerprint(), weights.config)
    assert not source.model.training
    assert set(source.quantized) - {HEAD} == {n for n in weights.files if weights.quantized(n) is not None} - {HEAD}
    for name, held in source.quantized.items():
        stored = weights.quantized(name if name in weights.files else EMBEDDING)
        assert torch.equal(held.qdata, stored.qdata), name
        assert torch.equal(held.scale, stored.scale), name
        tensor = source.model.get_parameter(name)
        assert (tensor.is_meta, tensor.dtype, tensor.shape) == (True, torch.float32, held.shape), name
    if kind == "gguf":
        assert source.quantized[HEAD] is source.quantized[EMBEDDING]
    dequantize(source.model)
    assert source.quantized == {}
    assert (source.model.lm_head.weight is source.model.embed_tokens.weight) == source.config.tie_word_embeddings
    assert torch.equal(source.model(TOKENS), model(TOKENS))


def test_some_become_dense(sources):
    model = open_source(sources["quantized"]).model
    names = {name for name in quantized_weights(model) if ".self_attn." in name}
    before = set(quantized_weights(model))
    dequantize(model, torch.bfloat16, names)
    assert set(quantized_weights(model)) == before - names
    assert {model.get_parameter(name).dtype for name in names} == {torch.bfloat16}


def test_the_dtype_is_the_weights_own_unless_told(sources):
    assert open_source(sources["dense"]).dtype == torch.float32
    assert open_source(sources["gguf"]).dtype == torch.bfloat16
    opened = open_source(sources["gguf"], torch.float16)
    assert {opened.model.dtype, opened.model.get_parameter(EMBEDDING).dtype} == {torch.float16}


def test_what_does_not_fit_is_refused(sources):
    weights = open_checkpoint(sources["quantized"])
    name = "layers.0.mlp.down_proj.weight"
    with torch.device("meta"):
        model = Gemma4(weights.config)
    other = weights.quantized(name)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.weight is \[96, 32\], expected \[96, 64\]"):
        hold(model, name, replace(other, qdata=other.qdata[:, :16], scale=other.scale[:, :1]), torch.float32)
    weights.files.pop(name)
    with pytest.raises(CheckpointError, match=r"1 missing: layers.0.mlp.down_proj.weight"):
        open_source(weights)


MEASURE = """
import sys, torch
from gemma4_impl.export.source import open_source
from measured_memory import watched

torch.set_num_threads(1)
open_source(sys.argv[1])
with watched() as memory:
    source = open_source(sys.argv[1], torch.float32)
dense = {id(t): t.nbytes for t in source.model.parameters() if not t.is_meta}
sizes = [*dense.values(), *(q.nbytes for q in source.quantized.values())]
print(sum(sizes) / 2**20, max(sizes) / 2**20, memory.peak)
"""


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux's /proc")
def test_peak_memory(tmp_path):
    """Of a model of 4-bit weights: itself, as stored, and no more than its largest tensor besides."""
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2}
    sizes |= {"layer_types": HUB["layer_types"][:2], "num_kv_shared_layers": 0}
    sizes |= {"enable_moe_block": False, "hidden_size_per_layer_input": 0, "head_dim": 128, "global_head_dim": 256}
    random_checkpoint(TextConfig.from_dict(hub(**sizes)), tmp_path / "m")
    size, largest, peak = map(float, run(MEASURE, str(tmp_path / "m")).split())
    assert size > 15
    assert peak <= size + largest + 8, (size, largest, peak)
