"""XNNPACK programs: what the model computes, in any chunks, with shared caches; what cannot be is refused."""

import dataclasses
import functools
import importlib

import pytest
import torch
from configs import hub, random_model
from exported import write_lowered
from torch import Tensor, nn

pytest.importorskip("executorch")

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.export import xnnpack
from gemma4_impl.export.folder import Manifest
from gemma4_impl.export.inspect import inspect
from gemma4_impl.export.program import Settings
from gemma4_impl.export.source import hold
from gemma4_impl.export.xnnpack_weights import check_linears, install, refusal
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.tensor import QuantizedTensor

# Several windows of 5, so that the ring wraps.
LENGTHS = (5, 6, 2, 1, 1, 6, 1, 3, 6, 1)
DENSE = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "num_kv_shared_layers": 0, "enable_moe_block": False}
ONE = DENSE | {"num_hidden_layers": 1, "layer_types": [FULL], "hidden_size_per_layer_input": 0}


def lowered(model: Gemma4, folder, lines: list[str] | None = None, taps: bool = False) -> Manifest:
    report = None if lines is None else lines.append
    made = xnnpack.lower(model, Settings(64, 6, torch.float32, taps), report=report)
    return write_lowered(made, folder, "xnnpack", torch.float32, taps)


def prompt(seed: int = 1) -> Tensor:
    return torch.randint(0, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))


def run(session: xnnpack.Session, tokens: Tensor) -> Tensor:
    """The logits after each chunk, [len(LENGTHS), V]."""
    out = []
    for chunk in tokens.split(LENGTHS, dim=1):
        out.append(session.forward(chunk, session.length))
    assert session.length == sum(LENGTHS)
    return torch.cat(out)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def ends(logits: Tensor) -> Tensor:
    return logits[0, torch.tensor(LENGTHS).cumsum(0) - 1]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """PLE, k_eq_v, a sliding and a full layer; also the taps."""
    model = random_model(TextConfig.from_dict(hub(**DENSE)), torch.float32)
    folder = tmp_path_factory.mktemp("dense")
    return model, folder, lowered(model, folder, taps=True)


@torch.no_grad()
def test_any_chunks_equal_the_model(dense):
    model, folder, manifest = dense
    session = xnnpack.open_session(folder, manifest)
    # Between correct implementations in float32 there are 3e-6.
    assert error(run(session, prompt()), ends(model(prompt()))) <= 6e-6
    session.reset()
    assert session.length == 0
    assert error(run(session, prompt(2)), ends(model(prompt(2)))) <= 6e-6


@torch.no_grad()
def test_taps(dense):
    model, folder, manifest = dense
    from gemma4_impl import taps

    tokens = prompt()[:, :5]
    with taps.recording(taps.Recorder(1, 5)) as recorder:
        model(tokens)
    logits, values = xnnpack.open_session(folder, manifest).forward(tokens, 0, taps=True)
    assert set(values) == set(taps.tap_names(model.config))
    assert torch.equal(values["logits"][:, -1], logits)
    for name, value in values.items():
        assert error(value, recorder.values[name][:, -value.shape[1] :]) <= 6e-6, name


def test_sessions_do_not_bleed(dense):
    _, folder, manifest = dense
    alone = [run(xnnpack.open_session(folder, manifest), prompt(seed)) for seed in (1, 2)]
    one, two = (xnnpack.open_session(folder, manifest) for _ in range(2))
    for i, (a, b) in enumerate(zip(*(prompt(seed).split(LENGTHS, dim=1) for seed in (1, 2)), strict=True)):
        assert torch.equal(one.forward(a, one.length)[0], alone[0][i])
        assert torch.equal(two.forward(b, two.length)[0], alone[1][i])


def test_wrong_inputs(dense):
    _, folder, manifest = dense
    session = xnnpack.open_session(folder, manifest)
    ones = torch.ones(1, 6, dtype=torch.long)
    for tokens, position, words in (
        (ones, 1, "position 1 does not continue the sequence, which ends at 0"),
        (ones * 64, 0, "token id 64 is outside the vocabulary of 64"),
    ):
        with pytest.raises(ValueError, match=words):
            session.forward(tokens, position)
    assert session.length == 0
    for start in range(0, 60, 6):
        session.forward(ones, start)
    with pytest.raises(ValueError, match="past the end"):
        session.forward(ones, 60)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_programs(dense, damage, tmp_path):
    _, folder, manifest = dense
    data = (folder / "model.pte").read_bytes()
    data = {"cut": data[: len(data) // 2], "noise": bytes(range(256)) * 64, "empty": b""}[damage]
    (tmp_path / "model.pte").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.pte"):
        xnnpack.open_session(tmp_path, manifest)


def test_constants_are_stored_once(dense):
    """Prefill and decode share them; XNNPACK has a copy of its own of the embedding, which is the head."""
    model, folder, _ = dense
    sizes = inspect(folder / "model.pte")["bytes"]
    weights = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values()) + model.lm_head.weight.nbytes
    # Each tensor begins at a multiple of 16 bytes, and there are scalars beside the weights.
    assert weights <= sizes["constants"] + sizes["delegates' constants"] <= 1.05 * weights


def test_what_is_left_outside(dense):
    """No product with a weight, and no copy of a cache: keys and values are written where they lie."""
    _, folder, _ = dense
    for method in inspect(folder / "model.pte")["methods"].values():
        assert "aten::index_put_" in method["operators"]
        assert not {"aten::linear.out", "aten::mm.out", "aten::addmm.out", "aten::bmm.out"} & set(method["operators"])
        assert not {"aten::copy_", "aten::index_put.out"} & set(method["operators"])


def quantize(shape, bits: int, group: int, seed: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    n, k = shape
    codes = torch.randint(0 if bits == 4 else -127, 16 if bits == 4 else 128, (n, k), generator=generator)
    scale = (0.5 + torch.rand(n, k // group, generator=generator)) / k**0.5 / (4.6 if bits == 4 else 73)
    qdata = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8) if bits == 4 else codes.to(torch.int8)
    return QuantizedTensor(qdata, scale, None, bits, 8 if bits == 4 else 0)


def as_xnnpack(weight: QuantizedTensor) -> QuantizedTensor:
    """XNNPACK holds the scales of groups in bfloat16."""
    return dataclasses.replace(weight, scale=weight.scale.bfloat16().float()) if weight.bits == 4 else weight


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """int4 and int8 linears, a quantized embedding that the head shares; beside it the same model dequantized."""
    config = TextConfig.from_dict(hub(**ONE, hidden_size=64, intermediate_size=64, head_dim=16, global_head_dim=32))
    model, dense_model = random_model(config, torch.float32), random_model(config, torch.float32)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for i, name in enumerate(names):
        bits, group = (8, 0) if "down_proj" in name else (4, 32)
        weight = quantize(model.get_submodule(name).weight.shape, bits, group or 64, i)
        weight.scale[1, 0] = 0  # a group of zeros, as files of llama.cpp have them
        hold(model, f"{name}.weight", weight, torch.float32)
        dense_model.get_submodule(name).weight.data = as_xnnpack(weight).dequantize()
    embedding = quantize(model.embed_tokens.weight.shape, 4, 32, 99)
    for name, weight in (("embed_tokens.weight", embedding), ("lm_head.weight", as_xnnpack(embedding))):
        hold(model, name, embedding, torch.float32)
        path, _, leaf = name.rpartition(".")
        setattr(dense_model.get_submodule(path), leaf, nn.Parameter(weight.dequantize(), requires_grad=False))
    folder, lines = tmp_path_factory.mktemp("quantized"), []
    return dense_model, folder, lowered(model, folder, lines), lines


def fake_quantized(x: Tensor) -> Tensor:
    """Each token's values on the int8 grid that XNNPACK puts them on."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale


@torch.no_grad()
def test_quantized_program(quantized):
    dense_model, folder, manifest, lines = quantized
    assert not any("becomes dense" in line for line in lines)
    assert len(manifest.extra["quantized"]) == 8
    got = run(xnnpack.open_session(folder, manifest), prompt())
    exact = ends(dense_model(prompt()))
    for module in dense_model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: (fake_quantized(args[0]),))
    rounded = ends(dense_model(prompt()))
    # What rounding activations to 8 bits does is far more than how either side rounds them.
    assert error(got, rounded) <= 0.25 * error(rounded, exact)
    assert error(rounded, exact) <= 5e-2


def test_quantized_constants(quantized):
    """A byte or less for each code of linears and embedding, and the scales; no dense copy of a weight."""
    dense_model, folder, _, _ = quantized
    sizes = inspect(folder / "model.pte")["bytes"]
    count = sum(m.weight.numel() for m in dense_model.modules() if isinstance(m, nn.Linear | nn.Embedding))
    assert sizes["constants"] + sizes["delegates' constants"] <= 1.25 * count
    for method in inspect(folder / "model.pte")["methods"].values():
        assert "quantized_decomposed::embedding_4bit.out" in method["operators"], method["operators"]


def test_what_becomes_dense():
    linear, embedding = nn.Linear(64, 4, bias=False), nn.Embedding(4, 64)
    fine = quantize((4, 64), 4, 32, 0)
    assert refusal(fine, linear) is None
    assert refusal(quantize((4, 64), 8, 64, 0), linear) is None
    assert refusal(quantize((4, 64), 4, 16, 0), embedding) is None
    assert "groups of a multiple of 32" in refusal(quantize((4, 64), 4, 16, 0), linear)
    assert "one scale for each row" in refusal(quantize((4, 64), 8, 32, 0), linear)
    asymmetric = QuantizedTensor(fine.qdata, fine.scale, fine.scale, 4, 8)
    assert "symmetric" in refusal(asymmetric, linear)
    assert "symmetric" in refusal(QuantizedTensor(fine.qdata, fine.scale, None, 4, 0), embedding)
    assert "experts" in refusal(fine, nn.Module())
    for scale, reason in ((-0.1, "positive scales only"), (1e-39, "positive scales only"), (0, None)):
        odd = dataclasses.replace(fine, scale=fine.scale.clone())
        odd.scale[2, 1] = scale
        assert refusal(odd, linear) == (reason and f"XNNPACK takes {reason}")
        assert refusal(odd, embedding) is None


def test_a_head_is_dense_beside_its_quantized_embedding():
    """They are one tensor, of which the one's product is there and the other's is not."""
    config = TextConfig.from_dict(hub(**ONE, hidden_size=64, intermediate_size=64, head_dim=16, global_head_dim=32))
    model, lines = random_model(config, torch.float32), []
    embedding = quantize(model.embed_tokens.weight.shape, 8, 32, 0)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        hold(model, name, embedding, torch.float32)
    assert install(model, lines.append) == {"embed_tokens.weight"}
    check_linears(model)
    assert type(model.lm_head.weight.data) is Tensor
    assert torch.equal(model.lm_head.weight, embedding.dequantize())
    assert lines == ["lm_head.weight becomes dense: XNNPACK takes int8 with one scale for each row, not for 32 values"]


def test_refused():
    model = random_model(TextConfig.from_dict(hub(**ONE)), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"xnnpack: {dtype} is not supported"):
            xnnpack.lower(model, Settings(64, 6, dtype))


@torch.no_grad()
def test_without_shared_caches_decode_is_wrong(tmp_path, monkeypatch):
    """That is why they are shared."""
    passes = importlib.import_module("executorch.exir.passes")
    unshared = functools.partial(passes.MemoryPlanningPass)
    monkeypatch.setattr(passes, "MemoryPlanningPass", lambda share_mutable_buffers: unshared())
    model = random_model(TextConfig.from_dict(hub(**ONE)), torch.float32)
    session = xnnpack.open_session(tmp_path, lowered(model, tmp_path))
    tokens = prompt()[:, :6]
    want = model(tokens)[0]
    assert error(session.forward(tokens[:, :5], 0), want[4:5]) <= 6e-6
    assert error(session.forward(tokens[:, 5:], 5), want[5:]) > 1e-2


def test_weight_only_linears_lose_their_scale():
    """XNNPACK takes a linear whose weight alone is quantized, and multiplies with the bare codes; ours is refused."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization import IntxUnpackedToInt8Tensor

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=generator)
    scale, zero = 0.005 + 0.01 * torch.rand(16, 2, generator=generator), torch.zeros(16, 2, dtype=torch.int8)
    weight = IntxUnpackedToInt8Tensor(codes, scale, zero, torch.int4, (1, 32), torch.float32, None)
    model = nn.Sequential(nn.Linear(64, 16, bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(1, 3, 64, generator=generator)
    edge = to_edge_transform_and_lower(
        torch.export.export(model, (x,)),
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    program = Runtime.get().load_program(edge.to_executorch().buffer)
    got = program.load_method("forward").execute((x,))[0]
    assert error(got, x @ codes.float().T) <= 1e-6
    with pytest.raises(ValueError, match=r"0\.weight is quantized, but not what it is multiplied with"):
        check_linears(model)
