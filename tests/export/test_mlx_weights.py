"""Quantized weights in MLX's form: the same codes, no value changed where float32 holds it, and what stays dense."""

import dataclasses
from itertools import cycle

import pytest
import torch
from configs import hub, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.export.source import EMBEDDING, HEAD, dequantize, hold, quantized_weights
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.pack import can_pack
from gemma4_impl.quant.tensor import QuantizedTensor

pytest.importorskip("executorch")
from gemma4_impl.export.mlx import weights
from gemma4_impl.export.mlx.model import MlxGemma4

# Everything that MLX multiplies with must have rows of a multiple of 32.
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size_per_layer_input": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "layer_types": [SLIDING, FULL, FULL],
}


def random_weight(
    shape: tuple[int, ...], bits: int, group: int, zero: str = "none", dtype=torch.float32, seed: int = 0
) -> QuantizedTensor:
    """`zero`: "none", "whole" (scale times an integer) or "any"."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 4:
        qdata = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    else:
        qdata = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(*shape[:-1], shape[-1] // group, generator=generator) + 0.5
    scale = (scale / (shape[-1] ** 0.5 * (4 if bits == 4 else 64))).to(dtype)
    whole = torch.randint(-4, 5, scale.shape, generator=generator)
    zeros = {"none": None, "whole": scale * whole, "any": scale * (whole + 0.3)}[zero]
    return QuantizedTensor(qdata, scale, None if zeros is None else zeros.to(dtype), bits, 8 if bits == 4 else 0)


def quantized_model(**changes) -> Gemma4:
    """Every tensor that may be is quantized, in 4 and 8 bits, by groups and by rows; head and embedding are one."""
    model = random_model(TextConfig.from_dict(hub(**WIDE | changes)), torch.float32)
    kinds = cycle([(4, 32), (8, 32), (8, None), (4, None)])
    for seed, (name, parameter) in enumerate(list(model.named_parameters())):
        if can_pack(model, name):
            bits, group = next(kinds)
            weight = random_weight(tuple(parameter.shape), bits, group or parameter.shape[-1], seed=seed)
            hold(model, name, weight, torch.float32)
    hold(model, HEAD, quantized_weights(model)[EMBEDDING], torch.float32)
    model.lm_head.weight = model.embed_tokens.weight
    return model


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 96, 128, 384]),
    zero=st.sampled_from(["none", "whole", "any"]),
    offset=st.sampled_from([None, 0, 200]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_values_stay(bits, group, zero, offset, dtype, seed):
    weight = random_weight((3, 384), bits, group, zero, dtype, seed)
    if offset is not None:
        weight = dataclasses.replace(weight, offset=offset)
    scale, zeros = weights.affine(weight, torch.float32)
    assert 384 // scale.shape[-1] in weights.GROUPS
    assert group % (384 // scale.shape[-1]) == 0
    codes = weights.signed_codes(weight)
    assert codes.dtype == torch.int8
    half = 8 if bits == 4 else 128
    assert -half <= int(codes.min()) <= int(codes.max()) < half
    repeat = 384 // scale.shape[-1]
    got = (codes.double() - zeros.double().repeat_interleave(repeat, -1)) * scale.double().repeat_interleave(repeat, -1)
    want = weight.dequantize(torch.float64)
    if zero == "none" and offset != 200:
        assert zeros.dtype == torch.int8
        assert torch.equal(got, want)
    # A zero that is no multiple of its scale is a quotient, rounded to float32 once.
    assert float((got - want).abs().max() / want.abs().max()) <= 2**-22


def test_rounding_is_reported_as_it_is():
    """The loss is that of the weights which the program multiplies with."""
    weight = random_weight((16, 64), 4, 32, "any", torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        scale, zero = weights.affine(weight, dtype)
        bias = -scale * (zero.to(dtype) + 8)
        codes = torch.arange(16).repeat(16, 2, 1)
        held = codes * scale.double()[..., None] + bias.double()[..., None]
        true = (codes - 8) * weight.scale.double()[..., None] + weight.zero.double()[..., None]
        want = float((held - true).abs().max() / true.abs().max())
        assert weights._loss(weight, scale, zero) == pytest.approx(want, rel=1e-9, abs=1e-15)
        assert (want > 1e-4) == (dtype == torch.bfloat16)


def test_the_quantized_model_is_the_dequantized_one():
    model, dense, lines = quantized_model(), quantized_model(), []
    dequantize(dense)
    program = MlxGemma4(model, 40, 6)
    kept = weights.install(program, quantized_weights(model), torch.float32, lines.append)
    assert kept == set(quantized_weights(model))
    assert lines == []
    assert program.model.lm_head.weight is program.model.embed_tokens.weight
    assert model.embed_tokens.weight.is_meta
    tokens = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full, at = dense(tokens), 0
        for length in (5, 6, 1, 1, 6, 5):
            got = program(tokens[:, at : at + length], torch.tensor([at]))
            at += length
            want = full[:, at - 1 : at]
            # 1e-6 at most was measured.
            assert float((got - want).norm() / want.norm()) <= 5e-6


def test_what_mlx_cannot_multiply_with_becomes_dense():
    model, lines = quantized_model(), []
    config = model.config
    wrong = {
        "layers.0.mlp.up_proj.weight": (random_weight((96, 64), 4, 16), "groups of 32, 64, 128; 16 is no multiple"),
        "layers.0.experts.down_proj": (
            random_weight((config.num_experts, 64, 32), 4, 32, "whole"),
            "has symmetric weights only",
        ),
        HEAD: (random_weight((64, 64), 8, 8), "8 is no multiple"),
    }
    flat = random_weight((96, 64), 4, 32, "any")
    flat.scale[3, 1] = 0
    wrong["layers.1.mlp.up_proj.weight"] = flat, "a group has scale 0 and a value that is not 0"
    for name, (weight, _) in wrong.items():
        if name == HEAD:
            hold(model, EMBEDDING, weight, torch.float32)
            model.lm_head.weight = model.embed_tokens.weight
        hold(model, name, weight, torch.float32)
    program = MlxGemma4(model, 40, 6)
    kept = weights.install(program, quantized_weights(model), torch.float32, lines.append)
    assert kept == set(quantized_weights(model)) - set(wrong) - {EMBEDDING}
    assert len(lines) == len(wrong) + 1
    for name, (weight, reason) in wrong.items():
        (line,) = (line for line in lines if line.startswith(f"{name} becomes dense: "))
        assert reason in line
        assert torch.equal(program.model.get_parameter(name), weight.dequantize())
    assert program.model.lm_head.weight is program.model.embed_tokens.weight
    assert not any(p.is_meta for p in program.parameters())
