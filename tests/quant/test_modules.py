"""Modules with packed weights against their dense namesakes on the dequantized weights."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import nearest, weights
from torch import nn

from gemma4_impl.config import VARIANTS
from gemma4_impl.model.decoder import ScaledEmbedding
from gemma4_impl.model.moe import Experts
from gemma4_impl.quant.modules import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from gemma4_impl.quant.pack import can_pack, install, pack_weight
from gemma4_impl.quant.packed import DequantizedWeight
from gemma4_impl.quant.tensor import QuantizedTensor

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype):
    q = nearest(torch.randn(32, 64), 4, 32, zero=True)
    linear = QuantizedLinear(pack_weight(q, dtype))
    assert (linear.in_features, linear.out_features) == (64, 32)
    x = torch.randn(2, 3, 64).to(dtype)
    assert torch.equal(linear(x), linear.weight.linear(x))
    assert linear(x).shape == (2, 3, 32)


@given(weights(stacks=False), st.sampled_from(DTYPES), st.floats(1, 100))
@settings(max_examples=40, deadline=None)
def test_embedding_is_that_of_the_dequantized_table(q, dtype, scale):
    dense = ScaledEmbedding(*q.shape, scale=scale).requires_grad_(False)
    dense.weight.copy_(q.dequantize())
    dense.to(dtype)
    quantized = QuantizedEmbedding(DequantizedWeight(q, dtype), dense.scale)
    tokens = torch.randint(0, len(q.qdata), (2, 5))
    assert quantized.weight.dtype == dense.weight.dtype
    assert torch.equal(quantized(tokens), dense(tokens))
    # As anything that changes a model in place would find it.
    quantized.scale[dtype] = dense.scale[dtype] = 0.3
    assert torch.equal(quantized(tokens), dense(tokens))


def experts() -> Experts:
    sizes = {"num_experts": 4, "top_k_experts": 2, "hidden_size": 64, "moe_intermediate_size": 32}
    module = Experts(dataclasses.replace(VARIANTS["26B-A4B"], **sizes))
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return module.requires_grad_(False)


def packed_experts(dense: Experts, which: tuple[str, ...], dtype: torch.dtype) -> nn.Module:
    """A model of nothing but experts; the dense one gets the dequantized weights."""
    model = nn.ModuleDict({"experts": experts()})
    for name, weight in dense.named_parameters():
        q = nearest(weight, *((4, 32) if name == "gate_up_proj" else (8, None)), zero=False)
        if name in which:
            weight.copy_(q.dequantize())
            install(model, f"experts.{name}", q, dtype, CPU)
        else:
            setattr(model.experts, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    return model.experts


@pytest.mark.parametrize("which", [("gate_up_proj",), ("down_proj",), ("down_proj", "gate_up_proj")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(which, dtype):
    torch.manual_seed(0)
    dense = experts()
    quantized = packed_experts(dense, which, dtype)
    assert isinstance(quantized, QuantizedExperts)
    x, chosen = torch.randn(2, 7, 64), torch.rand(2, 7, 4).topk(2).indices
    gains = torch.rand(2, 7, 2)
    truth = dense.double()(x.to(dtype).double(), gains.double(), chosen)
    error = (quantized(x.to(dtype), gains, chosen).double() - truth).norm() / truth.norm()
    reference = (dense.to(dtype)(x.to(dtype), gains, chosen).double() - truth).norm() / truth.norm()
    # Rounding the scales of a group is as bad as rounding its weights, at most, as these errors are all alike.
    assert error <= 2 * reference
    assert 0 < reference < 4 * torch.finfo(dtype).eps


def test_experts_refuse_to_be_compiled():
    quantized = packed_experts(experts(), ("down_proj",), torch.float32)
    arguments = torch.randn(1, 3, 64), torch.rand(1, 3, 2), torch.tensor([[[0, 1]] * 3])
    with pytest.raises(Exception, match="run eagerly only"):
        torch.export.export(quantized, arguments, strict=True)


def model_of_everything() -> nn.Module:
    router = nn.ModuleDict({"proj": nn.Linear(64, 4, bias=False)})
    layer = nn.ModuleDict({"experts": experts(), "router": router, "q_proj": nn.Linear(64, 64, bias=False)})
    return nn.ModuleDict(
        {
            "embed_tokens": ScaledEmbedding(32, 64, scale=8),
            "layer": layer,
            "norm": nn.RMSNorm(64, elementwise_affine=True),
        }
    )


def test_what_may_be_quantized():
    model = model_of_everything()
    names = {name for name, _ in model.named_parameters()}
    dense = {"layer.router.proj.weight", "norm.weight"}
    assert {name for name in names if can_pack(model, name)} == names - dense
    for name in ("q_proj.weight", "layer.q_proj.bias", "layer.experts.other", "weight", ""):
        assert not can_pack(model, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_install_keeps_names_and_can_be_repeated(dtype):
    model = model_of_everything()
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    for _ in range(2):
        for name, shape in (
            ("embed_tokens.weight", (32, 64)),
            ("layer.q_proj.weight", (64, 64)),
            ("layer.experts.gate_up_proj", (4, 64, 64)),
        ):
            assert can_pack(model, name)
            packed = install(model, name, nearest(torch.randn(shape), 8, 32, zero=False), dtype, CPU)
            path, _, leaf = name.rpartition(".")
            assert getattr(model.get_submodule(path), leaf) is packed
            assert packed.shape == shape
    assert before.keys() <= {name for name, _ in model.named_modules()}
    assert model.embed_tokens.scale[torch.float32] == 8
    assert model.layer.experts.down_proj.shape == (4, 64, 32)
    assert "layer.experts.gate_up_proj" not in dict(model.named_parameters())


def test_install_refuses_another_shape():
    q = nearest(torch.randn(64, 32), 8, None, zero=False)
    for name in ("layer.q_proj.weight", "embed_tokens.weight", "layer.experts.down_proj"):
        model = model_of_everything()
        with pytest.raises(ValueError, match=rf"{name} is \[64, 32\], expected"):
            install(model, name, q, torch.float32, CPU)
        assert not any(isinstance(m, QuantizedLinear | QuantizedEmbedding | QuantizedExperts) for m in model.modules())


def test_a_model_on_meta_takes_weights():
    with torch.device("meta"):
        model = model_of_everything()
    q = nearest(torch.randn(4, 64, 32), 4, 32, zero=False)
    packed = install(model, "layer.experts.down_proj", q, torch.bfloat16, CPU)
    assert {t.device.type for t in packed.buffers()} == {"cpu"}
    assert isinstance(q, QuantizedTensor)
    assert model.layer.experts.gate_up_proj.is_meta
