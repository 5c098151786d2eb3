"""Quantized candidates of every variant: what quantizing costs is found, and B and C are in budget on every path."""

import math
from pathlib import Path

import pytest
import torch

from gemma4_impl import taps
from gemma4_impl.config import TextConfig
from gemma4_impl.quant.recipe import RECIPES
from gemma4_impl.quant.save import quantize_checkpoint
from parity import PATHS, budget, engine, quantized
from parity.inputs import default_tokens
from parity.quantized import Quantized, Split
from reference.hf import HFReference
from reference.tiny import SHORT, aligned, make_tiny
from reference.tiny_gguf import make_tiny_gguf
from reference.weights import WeightFiles

pytestmark = pytest.mark.parity
VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")
_SOME = ("full", "generate", "left_padded")


def original_of(variant: str, folder: Path, layers: dict | None = None, **options) -> Path:
    overrides = aligned(variant, 32) | (layers or {})
    return make_tiny(variant, folder / "original", overrides=overrides, **options)


def split(candidate: Quantized, original: Path | None, **options) -> Split:
    at = original or candidate.path
    tokens = default_tokens(TextConfig.from_file(at), at)
    return quantized.split("tiny", candidate, tokens, original, **options)


def check_green(found: Split, paths: tuple[str, ...], dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> None:
    assert [tensor.why for tensor in found.tensors if tensor.why] == []
    for case in found.cases:
        result = case.comparison
        assert not result.red, (case.dtype, case.path, result.first_divergence, result.bugs)
        assert result.worst_ratio <= budget.K
    assert [(case.dtype, case.path) for case in found.dense] == [("float32", "full")]
    assert [(case.dtype, case.path) for case in found.packed] == [(d, p) for d in dtypes for p in paths]
    assert not found.red


@pytest.mark.parametrize(
    ("variant", "recipe", "dtype"),
    [("E2B", "sensitive", "bfloat16"), ("26B-A4B", "default", "bfloat16"), ("31B", "default", "float32")],
)
def test_a_quantized_folder_is_green_after_the_weights(tmp_path, variant: str, recipe: str, dtype: str) -> None:
    # Errors add up over the nine layers of E2B; the others show each kind of layer.
    original = original_of(variant, tmp_path, {} if variant == "E2B" else SHORT[variant], dtype=dtype)
    quantize_checkpoint(original, tmp_path / "q", RECIPES[recipe])
    found = split(Quantized("quantized", tmp_path / "q", "q"), original, paths=_SOME)
    check_green(found, _SOME)
    assert list(found.damage.taps) == taps.tap_names(TextConfig.from_file(original))
    assert 0.01 < found.damage.taps["logits"] < 1
    assert found.damage.created["logits"] < found.damage.taps["logits"]
    assert 0 < found.damage.logits.kl_mean < math.inf
    kinds = {tensor.kind for tensor in found.tensors if tensor.quantized}
    assert {"int4, group 32", "int8, a row"} <= kinds <= {"int4, group 32", "int4, a row", "int8, a row"}
    assert all(set(t.packed) == {"float32", "bfloat16"} for t in found.tensors if t.quantized)
    # In float32 nothing is rounded; in bfloat16 no more than one rounding of each weight, or of its scale, and zero.
    assert all(t.packed["float32"].error == 0 for t in found.tensors if t.quantized)
    assert all(t.packed["bfloat16"].error <= 2**-8 for t in found.tensors if t.quantized)


def test_a_gguf_file_is_green_on_every_path(tmp_path) -> None:
    original = original_of("E4B", tmp_path, multimodal=True, dtype="bfloat16")
    mixture = {"*attn_v*": "Q8_0", "*ffn_down*": "Q5_1", "token_embd*": "Q5_0", "*norm*": "F32", "*.weight": "Q4_0"}
    file = make_tiny_gguf(
        original,
        tmp_path / "m.gguf",
        lambda name, shape: "F32" if len(shape) < 2 else next(v for k, v in mixture.items() if Path(name).match(k)),
        max_tensors=50,
    )
    found = split(Quantized("gguf", file, "gguf"), original)
    check_green(found, PATHS)
    assert {tensor.kind for tensor in found.tensors} >= {"Q8_0", "Q5_0", "Q5_1", "Q4_0", "F32"}


def test_a_gguf_file_alone_has_no_first_stage(tmp_path) -> None:
    original = make_tiny(
        "26B-A4B",
        tmp_path / "o",
        overrides=aligned("26B-A4B", 256)
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    )
    file = make_tiny_gguf(original, tmp_path / "m.gguf", "Q4_K_M", separate_experts=True)
    found = split(Quantized("gguf", file, "gguf"), None, paths=("full",), dtypes=("bfloat16",))
    check_green(found, ("full",), ("bfloat16",))
    assert found.damage is None
    assert {tensor.sqnr_db for tensor in found.tensors} == {None}
    assert {tensor.kind for tensor in found.tensors} >= {"Q4_K", "Q6_K", "F32"}
    assert found.bits_per_weight < 5.5


def test_floats_in_a_gguf_file_cost_nothing(tmp_path) -> None:
    original = original_of("26B-A4B", tmp_path)
    file = make_tiny_gguf(original, tmp_path / "m.gguf", "F32")
    found = split(Quantized("gguf", file, "gguf"), original, paths=("full",), dtypes=("float32",))
    check_green(found, ("full",), ("float32",))
    assert max(found.damage.taps.values()) == max(found.damage.created.values()) == 0
    assert found.damage.logits.kl_mean == 0
    assert found.damage.flips == 0 < found.damage.choices
    assert found.damage.perplexity[0] == found.damage.perplexity[1]
    assert {tensor.sqnr_db for tensor in found.tensors} == {math.inf}


def test_another_checkpoint_of_this_size_is_not_the_original(tmp_path) -> None:
    original = original_of("31B", tmp_path)
    quantize_checkpoint(original, tmp_path / "q", RECIPES["default"])
    other = make_tiny("31B", tmp_path / "other", overrides=aligned("31B", 32), seed=1)
    found = split(Quantized("quantized", tmp_path / "q", "q"), other, paths=("full",), dtypes=("float32",))
    assert found.red
    assert all(why.startswith(("not a rounding", "stored as floats")) for t in found.wrong for why in t.why)
    assert {t.name for t in found.wrong} >= {t.name for t in found.tensors if t.quantized}
    assert not any(case.comparison.red for case in found.cases)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_from_a_source_are_the_checkpoints_own_to_the_last_bit(tiny, variant: str) -> None:
    path = tiny(variant)
    tokens, files = default_tokens(TextConfig.from_file(path), path), WeightFiles(path)
    for truth in (True, False):
        runs = [{}, {"weights": files}, {"weights": files, "stream": True}]
        own, *others = (HFReference(path, torch.bfloat16, truth=truth, **run).capture([tokens]) for run in runs)
        for other in others:
            assert list(own) == list(other)
            assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_streamed_reference_of_a_quantized_model_is_the_same_to_the_last_bit(tmp_path) -> None:
    original = original_of("E2B", tmp_path, dtype="bfloat16")
    quantize_checkpoint(original, tmp_path / "q", RECIPES["default"])
    candidate = Quantized("quantized", tmp_path / "q", "q")
    tokens = [2, *range(110, 150)]
    held, streamed = (
        engine.baseline(original, tokens, torch.bfloat16, stream=s, paths=(), weights=candidate.source())
        for s in (False, True)
    )
    for a, b in [(held.truth, streamed.truth), *zip(held.references, streamed.references, strict=True)]:
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_truth_keeps_dequantized_values_and_rounds_the_others(tmp_path) -> None:
    original = original_of("31B", tmp_path)
    quantize_checkpoint(original, tmp_path / "q", RECIPES["default"])
    source = Quantized("quantized", tmp_path / "q", "q").source()
    truth = HFReference(original, torch.bfloat16, truth=True, weights=source)
    narrow = HFReference(original, torch.bfloat16, weights=source)
    state = {name.removeprefix("model."): value for name, value in truth.model.state_dict().items()}
    rounded = {name.removeprefix("model."): value for name, value in narrow.model.state_dict().items()}
    for name, value in state.items():
        dense = source.tensor(name)
        assert value.dtype == torch.float64
        assert torch.equal(rounded[name], dense.bfloat16()), name
        kept = dense if source.is_quantized(name) else dense.bfloat16()
        assert torch.equal(value, kept.double()), name
    assert truth.model.lm_head.weight is not truth.text.embed_tokens.weight
