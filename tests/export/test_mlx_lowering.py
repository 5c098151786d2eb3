"""MLX programs: lowered whole, every quantized weight in a quantized product, taps found without a trace of them."""

import contextlib
import json
import re
from collections import Counter

import pytest
import torch
from configs import hub, random_model
from test_mlx_weights import quantized_model

from gemma4_impl import taps
from gemma4_impl.config import FULL, TextConfig
from gemma4_impl.export.program import Lowered, Settings
from gemma4_impl.export.source import quantized_weights

pytest.importorskip("executorch")
from gemma4_impl.export.mlx import lower, lowering, marks, model
from gemma4_impl.export.mlx.bindings import import_mlx_backend

CHUNK, LENGTH = 6, 40
ONE = {"num_hidden_layers": 1, "layer_types": [FULL], "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[TextConfig, set[str], Lowered, bytes]:
    """A program with every feature: its config, its quantized weights, what `lower` says, the file."""
    source = quantized_model()
    lines = []
    lowered = lower(source, Settings(LENGTH, CHUNK, torch.float32), report=lines.append)
    assert lines == ["tracing", "lowering to MLX"]
    folder = tmp_path_factory.mktemp("program")
    lowered.write(folder)
    (file,) = folder.iterdir()
    return source.config, set(quantized_weights(source)), lowered, file.read_bytes()


def graph(program: bytes) -> dict:
    import_mlx_backend()
    from executorch.backends.mlx import pte_inspector

    return pte_inspector.parse_mlx_flatbuffer(pte_inspector._load_mlx_payload(program).fb_data)


def named_data(program: bytes) -> dict[str, bytes]:
    from executorch.exir._serialize._program import deserialize_pte_binary

    data = deserialize_pte_binary(program).named_data
    return {name: bytes(data.buffers[entry.buffer_index]) for name, entry in data.pte_data.items()}


def test_what_the_program_says_of_itself(made):
    config, _, lowered, program = made
    (method,) = lowered.methods.values()
    assert [(value.name, value.shape) for value in (*method.inputs, *method.outputs)] == [
        ("tokens", (1, {"min": 1, "max": CHUNK})),
        ("input_pos", (1,)),
        ("logits", (1, 1, config.vocab_size)),
    ]
    assert lowered.constants["get_max_prefill_chunk"] == CHUNK
    json.dumps(lowered.extra)
    kinds = Counter(node["op_name"] for chain in graph(program)["instruction_chains"] for node in chain["instructions"])
    assert dict(kinds) == lowered.extra["nodes"]


def test_every_weight_is_in_a_quantized_product(made):
    config, quantized, lowered, _ = made
    nodes = lowered.extra["nodes"]
    experts = {name for name in quantized if ".experts." in name}
    embeddings = {name for name in quantized if name.startswith("embed_tokens")}
    assert len(experts) == 2 * config.num_hidden_layers
    assert len(embeddings) == 2
    assert nodes["QuantizedMatmulNode"] == len(quantized - experts - embeddings)
    assert nodes["GatherQmmNode"] == len(experts)
    assert nodes["DequantizeNode"] == 2
    # The routers' products are dense.
    assert nodes["AddmmNode"] == config.num_hidden_layers
    assert nodes["SdpaNode"] == config.num_hidden_layers
    assert nodes["RopeNode"] == 2 * config.num_hidden_layers - config.num_kv_shared_layers


def test_caches_are_the_programs_only_state(made):
    config, _, lowered, program = made
    ring, flat = config.sliding_window - 1 + CHUNK, LENGTH
    assert [cache["shape"][2] for cache in lowered.caches.values()] == [ring, ring, flat, flat]
    own = graph(program)
    assert own["num_mutable_buffer_tensors"] == len(lowered.caches)
    stored = named_data(program)
    assert not [name for name in stored if "cache" in name]


def test_constants_are_weights_once(made):
    """No mask among them, and nothing twice: the tied head reads the embedding's codes."""
    _, quantized, _, program = made
    stored = named_data(program)
    large = [data for data in stored.values() if len(data) >= 64]
    assert len(set(large)) == len(large)
    packed = [name for name in stored if name.endswith("_to_packed")]
    assert len(packed) == len(quantized) - 1
    computed = [name for name in stored if "lifted_tensor" in name or "_scalar_" in name]
    assert computed
    # What is neither a parameter nor a period of the rotation holds one number.
    assert max(len(stored[name]) for name in computed) <= 8


def test_every_tap_has_a_place(made):
    config, _, lowered, program = made
    found = lowered.extra["taps"]
    assert set(found) == {*taps.tap_names(config), *taps.choice_names(config)}
    chains = [chain["instructions"] for chain in graph(program)["instruction_chains"]]
    at = []
    for name, tap in found.items():
        node = chains[tap["chain"]][tap["instruction"]]
        assert {"tid": tap["tensor"]} in node.values(), name
        at.append((tap["chain"], tap["instruction"]))
        assert tap["last"] == (name in ("norm", "logits") or name.startswith("layers.2.")), name
        assert (tap["axes"] is not None) == (name.split(".")[-1] in "qkv"), name
    order = [name for name in found if not name.endswith(taps.CHOICE)]
    assert order == taps.tap_names(config)
    assert at == sorted(at)
    assert len(set(at)) == len(at)


def test_taps_leave_no_trace(tmp_path, monkeypatch):
    """The program without marks is the same to the last byte, but for what its constants' names begin with: a hash of
    the graph as text."""
    small = random_model(TextConfig.from_dict(hub(**ONE, enable_moe_block=False)), torch.float32)
    programs = []
    for name in ("marked", "plain"):
        (tmp_path / name).mkdir()
        lowered = lower(small, Settings(16, 2, torch.float32))
        lowered.write(tmp_path / name)
        program = (tmp_path / name / "model.pte").read_bytes()
        prefix = re.search(rb"([0-9a-f]{4}/)model\.norm\.weight", program)[1]
        programs.append(program.replace(prefix, b""))
        assert bool(lowered.extra["taps"]) == (name == "marked")
        monkeypatch.setattr(marks, "marking", contextlib.nullcontext)
    assert programs[0] == programs[1]


def test_what_is_not_lowered_is_named(monkeypatch):
    """The router as it is gathers, which the backend does not."""
    monkeypatch.setattr(model, "MlxRouter", lambda router: router)
    small = random_model(TextConfig.from_dict(hub(**ONE)), torch.float32)
    with pytest.raises(ValueError, match=r"MLX backend did not take, of forward: .*aten\.gather"):
        lower(small, Settings(16, 2, torch.float32))


def test_a_product_that_is_not_quantized_is_an_error():
    nodes = Counter(QuantizedMatmulNode=2, DequantizeNode=1)
    kept = {"layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight", "embed_tokens.weight"}
    lowering._check_quantized(nodes, kept)
    with pytest.raises(ValueError, match="3 quantized weights need a QuantizedMatmulNode, but the MLX program has 2"):
        lowering._check_quantized(nodes, {*kept, "lm_head.weight"})
    with pytest.raises(ValueError, match="1 quantized weights need a GatherQmmNode"):
        lowering._check_quantized(nodes, {*kept, "layers.0.experts.down_proj"})
