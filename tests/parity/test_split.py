"""Quantized candidates, piece by piece: tensors against another reader and the original, and what is said of them."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma4_impl.config import TextConfig
from gemma4_impl.quant.quantize import quantize
from gemma4_impl.quant.recipe import QuantConfig
from gemma4_impl.quant.tensor import QuantizedTensor
from parity import quantized
from parity.quantized import Quantized, check_same_architecture, perplexity
from parity.weights import STEPS, TensorCheck, _check
from reference.tiny import TINY, aligned, make_tiny
from reference.weights import WeightFiles, stored_as

NAME = "layers.0.mlp.up_proj.weight"
FOUR_BITS = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
"""An uneven set of codes, denser around zero."""


class Held:
    """One tensor, as `Weights` and as `Source`, quantized or not."""

    def __init__(self, tensor: Tensor, packed: QuantizedTensor | None = None, name: str = NAME):
        self.values, self.packed, self.name = tensor, packed, name
        self.files = {name: Path("file")}

    def __contains__(self, name: str) -> bool:
        return name == self.name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def quantized(self, name: str) -> QuantizedTensor | None:
        return self.packed

    def is_quantized(self, name: str) -> bool:
        return self.packed is not None

    def kind(self, name: str) -> str:
        return "int4, group 32" if self.packed else "F32"

    def stored_bytes(self, name: str) -> int:
        return self.values.nbytes


def held(packed: QuantizedTensor) -> Held:
    return Held(packed.dequantize(), packed)


def check(ours: Held, original: Tensor, theirs: Held | None = None) -> TensorCheck:
    return _check(NAME, ours, theirs or ours, Held(original))


def weights(seed: int, rows: int = 16, columns: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator) + 0.1
    return torch.randn(rows, columns, generator=generator) * spread


# Tensors


@given(
    st.integers(0, 10**6),
    st.sampled_from([4, 8]),
    st.sampled_from([None, 16, 32]),
    st.booleans(),
    st.floats(1e-6, 1e6),
)
@settings(max_examples=40, deadline=None)
def test_rounding_to_nearest_is_within_half_a_step(seed, bits, group_size, symmetric, scale):
    original = weights(seed) * scale
    packed = quantize(original, QuantConfig(bits, group_size, symmetric), torch.float32)
    found = check(held(packed), original)
    assert found.misread == 0
    # The bound is of every weight; its root mean square cannot be larger. 1e-3: codes and scales are rounded too.
    assert found.steps <= STEPS * (1 + 1e-3)
    assert found.sqnr_db > 10
    assert not found.why


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_steps_of_uneven_codes_are_the_distances_between_them(seed):
    original = weights(seed)
    scale = original.unflatten(-1, (-1, 32)).abs().amax(-1) / 113
    apart = (original.unflatten(-1, (-1, 32)) / scale[..., None])[..., None] - FOUR_BITS
    codes = FOUR_BITS[apart.abs().argmin(-1)].flatten(-2).to(torch.int8)
    found = check(held(QuantizedTensor(codes, scale, None, 8)), original)
    assert 0.1 < found.steps <= STEPS


@pytest.mark.parametrize("bits", [4, 8])
def test_a_code_off_by_one_everywhere_is_no_rounding(bits):
    original = weights(0)
    packed = quantize(original, QuantConfig(bits, 32), torch.float32)
    found = check(held(replace(packed, offset=packed.offset - 1)), original)
    # A whole step, and the rounding that is there anyway.
    assert found.steps == pytest.approx(math.sqrt(1 + 1 / 12), rel=0.05)
    assert found.why[0].startswith("not a rounding of the original: off by 1.0")


def test_values_that_another_reader_finds_otherwise_are_counted():
    packed = quantize(weights(0), QuantConfig(4, 32), torch.float32)
    theirs = held(packed)
    theirs.values = theirs.values.clone()
    theirs.values[3, 5:8] += 1e-6
    found = check(held(packed), weights(0), theirs)
    assert found.misread == 3
    assert found.why == ["misread: 3 of 1024 values are not what the reference's reader finds"]
    nan = Held(torch.full((2, 2), torch.nan))
    assert _check(NAME, nan, nan, None).misread == 4


def test_a_tensor_that_the_other_reader_lacks_is_misread_altogether():
    assert _check(NAME, Held(weights(0)), Held(weights(0), name="other"), None).why[0].startswith("misread: all")


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.bfloat16, False), (torch.float16, False), (None, True)])
def test_floats_may_be_rounded_to_bfloat16_and_no_further(dtype, wrong):
    original = weights(0)
    stored = Held(original.to(dtype).float() if dtype else original * 1.01)
    found = check(stored, original)
    assert found.steps is None
    assert bool(found.why) == wrong
    assert check(Held(original), original).sqnr_db == math.inf


def test_zeros_are_exact_and_no_division_by_zero():
    zeros = torch.zeros(4, 32)
    packed = QuantizedTensor(torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 1), None, 4, 8)
    found = check(held(packed), zeros)
    assert (found.steps, found.sqnr_db, found.why) == (0.0, math.inf, [])
    assert check(held(packed), zeros + 1).steps == math.inf
    assert check(Held(zeros + 1), zeros).sqnr_db == -math.inf


def test_what_the_recipe_says_is_compared():
    tensor = TensorCheck(NAME, (4, 32), True, "int4, group 32", 0, 0)
    assert quantized_why(tensor, "int4, group 32") == []
    assert quantized_why(tensor, "int8, a row") == ["is int4, group 32, but the recipe says int8, a row"]
    assert quantized_why(tensor, None) == ["is int4, group 32, but the recipe says floats"]
    plain = replace(tensor, quantized=False, kind="bfloat16")
    assert quantized_why(plain, None) == []
    assert quantized_why(plain, "int8, a row") == ["is bfloat16, but the recipe says int8, a row"]
    assert stored_as(4, 32, (4, 32)) == stored_as(4, None, (4, 32)) == "int4, a row"


def quantized_why(tensor: TensorCheck, planned: str | None) -> list[str]:
    from parity.weights import _planned

    return _planned(tensor, planned).why


# Architecture


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sliding_window": 8}, "sliding_window"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping"),
        ({"use_double_wide_mlp": False}, "layer 7's intermediate_size"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers"),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, "num_attention_heads"),
        ({"global_head_dim": 16}, "global_head_dim"),
    ],
)
def test_another_architecture_is_refused_and_the_difference_named(tiny, monkeypatch, change, word):
    refused = pytest.raises(ValueError, match=f"somewhere: .*{word} = .* not made from this checkpoint")
    with refused as caught:
        compare_with(tiny("E2B"), monkeypatch, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": False},
        {"eos_token_id": (1,)},
        {"rms_norm_eps": float(torch.tensor(1e-6))},
        {"max_position_embeddings": 1024},
        {"attention_k_eq_v": False, "num_global_key_value_heads": 2},
    ],
)
def test_what_makes_no_difference_is_none(tiny, monkeypatch, change):
    compare_with(tiny("E2B"), monkeypatch, **change)


def compare_with(original: Path, monkeypatch, **change) -> None:
    class Changed:
        config = replace(TextConfig.from_file(original), **change)

    monkeypatch.setattr(Quantized, "weights", lambda self: Changed)
    check_same_architecture(original, Quantized("gguf", Path("somewhere"), "gguf:x"))


# Figures


def test_perplexity_of_known_logits():
    even = torch.zeros(1, 5, 8)
    assert perplexity(even, [0, 1, 2, 3, 4]) == pytest.approx(8)
    sure = torch.full((1, 3, 8), -1e4)
    sure[0, 0, 5] = sure[0, 1, 6] = 0
    assert perplexity(sure, [1, 5, 6]) == pytest.approx(1)
    assert math.isnan(perplexity(even[:, :1], [3]))


def test_perplexity_is_summed_over_blocks(monkeypatch):
    logits, tokens = torch.randn(1, 7, 11), [3, 1, 4, 1, 5, 9, 2]
    whole = perplexity(logits, tokens)
    monkeypatch.setattr(quantized, "_BLOCK", 22)
    assert perplexity(logits, tokens) == pytest.approx(whole)


def test_steps_of_progress():
    assert quantized.steps(("float32", "bfloat16"), ("full", "decode")) == 2 + 2 + 4
    assert quantized.steps(("bfloat16",), ("full",)) == 2 + 2 + 1


# Sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple]:
    """What is quantized, and by what: (our weights, the reference's source)."""
    from gemma4_impl.quant.recipe import RECIPES
    from gemma4_impl.quant.save import quantize_checkpoint
    from reference.tiny_gguf import make_tiny_gguf

    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for variant in TINY:
        original = make_tiny(
            variant, folder / variant, overrides=aligned(variant, 32), dtype="bfloat16", multimodal=variant == "E4B"
        )
        for recipe in ("default", "sensitive"):
            out = folder / f"{variant}-{recipe}"
            quantize_checkpoint(original, out, RECIPES[recipe])
            made[f"{variant} {recipe}"] = Quantized("quantized", out, recipe)
        file = make_tiny_gguf(
            original,
            folder / f"{variant}.gguf",
            "Q4_0" if variant != "31B" else "Q5_1",
            separate_experts=True,
            max_tensors=40,
        )
        made[f"{variant} gguf"] = Quantized("gguf", file, "gguf")
    return made


@pytest.mark.parametrize("how", ["default", "sensitive", "gguf"])
@pytest.mark.parametrize("variant", TINY)
def test_both_readers_agree_to_the_last_bit(sources, variant, how):
    candidate = sources[f"{variant} {how}"]
    ours, theirs = candidate.weights(), candidate.source()
    names = sorted(ours.files)
    assert any(theirs.is_quantized(name) for name in names)
    for name in names:
        assert name in theirs
        whole = theirs.tensor(name)
        assert torch.equal(whole.float(), ours.tensor(name).float()), name
        assert torch.equal(theirs.rows(name, 0, 1), whole[:1]), name
        assert torch.equal(theirs.rows(name, whole.shape[0] - 1, whole.shape[0]), whole[-1:]), name
        assert theirs.is_quantized(name) == (ours.quantized(name) is not None), name
        assert theirs.stored_bytes(name) > 0
        assert theirs.kind(name)
    assert "layers.99.layer_scalar" not in theirs
    with pytest.raises(KeyError):
        theirs.tensor("layers.99.layer_scalar")


def test_the_files_of_a_plain_checkpoint(tiny):
    files = WeightFiles(tiny("26B-A4B"))
    whole = files.tensor("layers.0.experts.down_proj")
    assert torch.equal(files.rows("layers.0.experts.down_proj", 2, 4), whole[2:4])
    assert files.stored_bytes("layers.0.experts.down_proj") == whole.nbytes
    assert files.kind("norm.weight") == "F32"
    assert "lm_head.weight" not in files
    assert not files.is_quantized("norm.weight")


@pytest.mark.parametrize(
    ("module", "kind", "extra"),
    [
        ("gguf", "gguf", "gguf-py"),
        ("torchao.prototype.safetensors.safetensors_support", "quantized", "torchao"),
    ],
)
def test_a_missing_package_is_named(sources, monkeypatch, module, kind, extra):
    candidate = sources["E2B gguf" if kind == "gguf" else "E2B default"]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{extra}.*not installed.*pip install") as caught:
        candidate.source()
    assert "\n" not in str(caught.value)
