"""What transformers' `from_pretrained` makes of our folders: the same tensors, the same logits; and what it cannot."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from gemma4_impl.checkpoint import open_checkpoint
from gemma4_impl.names import from_hf
from gemma4_impl.quant.checkpoint import QuantizedCheckpoint
from gemma4_impl.quant.convert import from_torchao, int4_to_intx
from gemma4_impl.quant.recipe import RECIPES, QuantConfig, QuantRecipe, QuantRule
from gemma4_impl.quant.save import quantize_checkpoint
from reference.tiny import aligned, make_tiny

TOKENS = torch.randint(107, 512, (2, 24), generator=torch.Generator().manual_seed(0))
LINEARS = ("*_proj.weight", "*_projection.weight", "*_input_gate.weight", "lm_head.weight")


def linears(config: QuantConfig) -> tuple[QuantRule, ...]:
    return tuple(QuantRule(pattern, config) for pattern in LINEARS)


EMBEDDINGS = QuantRule("embed_tokens*.weight", QuantConfig(8, None))
KEEP = QuantRule("*", None)
MINE = {
    "int8": QuantRecipe("int8", (EMBEDDINGS, *linears(QuantConfig(8, 32)), KEEP)),
    "int8 linears": QuantRecipe("int8 linears", (*linears(QuantConfig(8, None)), KEEP)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(variant, recipe, multimodal) -> our folder in several files, and one of plain weights with the same values."""
    made = {}

    def make(variant: str, recipe: str, multimodal: bool = False) -> tuple[Path, Path]:
        key = variant, recipe, multimodal
        if key not in made:
            base = tmp_path_factory.mktemp("folders")
            source = make_tiny(variant, base / "source", multimodal=multimodal, overrides=aligned(variant, 32))
            out = base / "quantized"
            quantize_checkpoint(source, out, MINE.get(recipe) or RECIPES[recipe], shard_bytes=300_000)
            made[key] = out, dequantized(out, base / "plain")
        return made[key]

    return make


def dequantized(path: Path, out: Path) -> Path:
    checkpoint = open_checkpoint(path)
    tensors = {checkpoint.hf_names[name]: checkpoint.tensor(name).clone() for name in checkpoint.files}
    tensors |= {name: checkpoint.tower(name).clone() for name in checkpoint.towers}
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def load(path: Path, **kwargs) -> nn.Module:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    assert not any(info.values()), info
    return model


def set_embedding_scales(model: nn.Module) -> nn.Module:
    """What transformers forgets: see `test_the_scale_of_a_quantized_embedding_is_not_set`."""
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale.fill_(module.scalar_embed_scale)
    return model


def replace(model: nn.Module, change) -> None:
    """`change(name, parameter)` gives a new tensor, or None."""
    for name, parameter in list(model.named_parameters()):
        if (new := change(name, parameter.data)) is not None:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(new, requires_grad=False))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize(
    ("variant", "recipe", "multimodal"),
    [
        ("E2B", "default", False),
        ("E2B", "sensitive", True),
        ("26B-A4B", "default", False),
        ("26B-A4B", "sensitive", True),
        ("31B", "default", True),
        ("31B", "sensitive", False),
    ],
)
def test_every_tensor_is_the_one_in_the_files(folders, variant, recipe, multimodal):
    path, _ = folders(variant, recipe, multimodal)
    model, checkpoint = load(path), QuantizedCheckpoint(path)
    assert not model.config.get_text_config().tie_word_embeddings
    found = {from_hf(name): tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name in checkpoint.files:
        stored, tensor = checkpoint.quantized(name), found[name].data
        if stored is None:
            assert type(tensor) is Tensor
            assert torch.equal(tensor, checkpoint.tensor(name))
            continue
        assert isinstance(tensor, Int4Tensor if stored.bits == 4 else IntxUnpackedToInt8Tensor)
        theirs = from_torchao(tensor)
        assert torch.equal(theirs.qdata, stored.qdata)
        assert torch.equal(theirs.scale, stored.scale)
        assert (theirs.zero is None) == (stored.zero is None)
        assert stored.zero is None or torch.equal(theirs.zero, stored.zero)


@pytest.mark.parametrize(("variant", "multimodal"), [("E2B", False), ("E4B", False), ("31B", False), ("31B", True)])
def test_int8_gives_the_same_logits(folders, variant, multimodal):
    """Bit for bit: torchao dequantizes a weight and multiplies, as a plain linear multiplies."""
    path, plain = folders(variant, "int8", multimodal)
    model = set_embedding_scales(load(path))
    assert isinstance(model.lm_head.weight.data, IntxUnpackedToInt8Tensor)
    assert isinstance(model.get_input_embeddings().weight.data, IntxUnpackedToInt8Tensor)
    assert torch.equal(logits(model), logits(load(plain)))


@pytest.mark.parametrize("multimodal", [False, True])
def test_with_the_embeddings_kept_nothing_needs_to_be_set(folders, multimodal):
    path, plain = folders("E2B", "int8 linears", multimodal)
    assert torch.equal(logits(load(path)), logits(load(plain)))


def test_the_multimodal_model_reads_a_row_of_the_embedding(folders):
    """With per-layer inputs it takes the pad token's row by indexing, which torchao's class cannot."""
    path, plain = folders("E2B", "int8", multimodal=True)
    model = set_embedding_scales(load(path))
    with pytest.raises(NotImplementedError, match=r"aten\.select"):
        logits(model)
    replace(model, lambda name, tensor: tensor.dequantize() if "embed_tokens" in name else None)
    assert torch.equal(logits(model), logits(load(plain)))


def test_the_scale_of_a_quantized_embedding_is_not_set(folders):
    """transformers takes a module with a torchao weight as initialised, and so never fills the buffer `embed_scale`,
    which no checkpoint holds: it is whatever was in memory, here made NaN. Once this fails, the docs' remedy may go."""
    path, plain = folders("E2B", "int8")
    torch.use_deterministic_algorithms(True)
    try:
        model, right = load(path), load(plain)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("embed_tokens", "embed_tokens_per_layer"):
        assert model.get_submodule(f"model.{name}").embed_scale.isnan()
        assert not right.get_submodule(f"model.{name}").embed_scale.isnan()


@pytest.mark.skipif(importlib.util.find_spec("mslk") is not None, reason="mslk brings the missing kernel")
def test_int4_does_not_run_on_a_cpu(folders):
    model = set_embedding_scales(load(folders("31B", "default")[0]))
    with pytest.raises(AttributeError, match="'mslk' object has no attribute 'bf16i4bf16_rowwise'"):
        logits(model)


@pytest.mark.parametrize(("variant", "multimodal"), [("E2B", False), ("31B", False), ("31B", True)])
def test_int4_gives_the_same_logits_once_converted(folders, variant, multimodal):
    """One line a weight makes the model run anywhere; without zeros, int4_to_intx changes no bit."""
    path, plain = folders(variant, "default", multimodal)
    model = set_embedding_scales(load(path))
    replace(model, lambda _, tensor: int4_to_intx(tensor) if isinstance(tensor, Int4Tensor) else None)
    assert torch.equal(logits(model), logits(load(plain)))


@pytest.mark.parametrize("experts", [None, "eager"])
def test_experts_do_not_run(folders, experts):
    """transformers transposes or indexes the stack of experts; torchao's classes can do neither."""
    model = set_embedding_scales(load(folders("26B-A4B", "default")[0], experts_implementation=experts))

    def convert(name: str, tensor: Tensor) -> Tensor | None:
        return int4_to_intx(tensor) if isinstance(tensor, Int4Tensor) else None

    replace(model, convert)
    with pytest.raises(NotImplementedError, match=r"aten\.(transpose|select)"):
        logits(model)


def test_experts_give_the_same_logits_once_dequantized(folders):
    path, plain = folders("26B-A4B", "default")
    model = set_embedding_scales(load(path))

    def convert(name: str, tensor: Tensor) -> Tensor | None:
        if "experts" in name:
            return from_torchao(tensor).dequantize()
        return int4_to_intx(tensor) if isinstance(tensor, Int4Tensor) else None

    replace(model, convert)
    assert torch.equal(logits(model), logits(load(plain)))


def test_bfloat16_is_what_it_loads_as(tmp_path):
    source = make_tiny("31B", tmp_path / "source", dtype="bfloat16", overrides=aligned("31B", 32))
    quantize_checkpoint(source, tmp_path / "q", RECIPES["default"])
    model = load(tmp_path / "q")
    assert model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
