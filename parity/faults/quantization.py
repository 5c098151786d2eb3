"""Faults of quantized models: in the file, in what is read from it, and in what is computed with that.

Each belongs to one of the stages that a quantized candidate's error is split into, and must be found in that one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.quant.recipe import load_recipe
from gemma4_impl.quant.save import quantize_checkpoint
from parity.candidate import TorchCandidate
from parity.compare import Comparison
from parity.engine import Baseline, baseline, judge
from parity.faults import mispacked, misread, miswritten
from parity.inputs import default_tokens
from parity.quantized import Quantized
from parity.weights import TensorCheck, check_tensors
from reference.tiny import aligned, make_tiny
from reference.tiny_gguf import DRAWN, make_tiny_gguf
from reference.weights import WeightFiles

Stage = Literal["load", "file", "read", "pack"]

_TWO = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
_FOUR = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}
_LAYERS = {"31B": _TWO, "26B-A4B": _TWO, "E2B": _FOUR}
"""So few that a fault takes a second."""


@dataclass(frozen=True)
class Recipe:
    """A small quantized candidate: of which variant, and how it is made."""

    variant: str
    how: str
    """`quantized:RECIPE` or `gguf:TYPE`."""
    rows: int = 32
    """What the size of its rows is a multiple of."""


@dataclass(frozen=True)
class QuantizationFault:
    """A mistake in one stage, and where it must be found.

    load: loading raises an error whose text holds `where`. file: the tensor `where` is not what quantizing the original
    by the recipe gives, and stages B and C are green, because both readers find what is there. read: the tensor `where`
    is misread, and stage B is red, created at `tap`. pack: every tensor and stage B are green, and stage C is red,
    created at `tap`."""

    name: str
    summary: str
    stage: Stage
    recipe: Recipe
    inject: Callable[..., Any]
    """load, read: the candidate's weights -> those that a wrong reader finds. file: changes what is on disk, given as
    (candidate, folder of the original). pack: changes the loaded `TorchCandidate`."""
    where: str = ""
    tap: str | None = None


@dataclass
class Made:
    """A candidate made for faults, and what its stages are held against."""

    candidate: Quantized
    original: Path
    """Folder of the checkpoint it was made from."""
    new: bool
    """Whether its weights are its own: some GGUF types cannot be quantized to, only read."""
    base: Baseline = field(init=False)

    def __post_init__(self) -> None:
        config = TextConfig.from_file(self.original)
        tokens = default_tokens(config, self.original)
        source = self.candidate.source()
        self.base = baseline(self.original, tokens, torch.float32, paths=("full",), weights=source)


@dataclass
class Found:
    """The stages of a faulty candidate, in float32 and as one full forward."""

    tensors: list[TensorCheck]
    dense: Comparison
    packed: Comparison


def make(recipe: Recipe, folder: Path, fault: QuantizationFault | None = None) -> Made:
    """Makes the candidate in `folder`, with what `fault` does to files."""
    overrides = aligned(recipe.variant, recipe.rows) | _LAYERS[recipe.variant]
    original = make_tiny(recipe.variant, folder / "original", overrides=overrides)
    kind, _, how = recipe.how.partition(":")
    candidate = Quantized(kind, folder / ("model.gguf" if kind == "gguf" else "quantized"), recipe.how)
    if kind == "gguf":
        make_tiny_gguf(original, candidate.path, how)
    else:
        quantize_checkpoint(original, candidate.path, load_recipe(how))
    if fault and fault.stage == "file":
        fault.inject(candidate, original)
    return Made(candidate, original, how in DRAWN)


def find(fault: QuantizationFault | None, made: Made) -> Found:
    """What the stages say of the candidate with `fault` in it. Raises what loading it does."""
    weights, source = made.candidate.weights(), made.candidate.source()
    if fault and fault.stage in ("load", "read"):
        weights = fault.inject(weights)
    original = None if made.new else WeightFiles(made.original)
    tensors = check_tensors(weights, source, original, made.candidate.plan(weights))
    dense = judge(TorchCandidate(weights, dense=True), made.base, "full")
    candidate = TorchCandidate(weights)
    if fault and fault.stage == "pack":
        fault.inject(candidate)
    return Found(tensors, dense, judge(candidate, made.base, "full"))


_DENSE = Recipe("31B", "quantized:default")
_SENSITIVE = Recipe("E2B", "quantized:sensitive")
_MOE = Recipe("26B-A4B", "quantized:default")
_Q4_0 = Recipe("E2B", "gguf:Q4_0")
_Q4_K = Recipe("31B", "gguf:Q4_K", 256)
_MOE_Q4_0 = Recipe("26B-A4B", "gguf:Q4_0")

_Q, _Q_PROJ = "layers.0.self_attn.q", "layers.0.self_attn.q_proj.weight"
_PLE, _PLE_PROJ = "per_layer_inputs", "per_layer_model_projection.weight"
_EXPERTS, _GATE_UP = "layers.0.experts", "layers.0.experts.gate_up_proj"
_HEAD = "lm_head.weight"

QUANTIZATION = {
    fault.name: fault
    for fault in (
        QuantizationFault(
            "nibble_order",
            "even weights are taken from the high nibble",
            "read",
            _DENSE,
            misread.of_quantized(misread.nibbles_swapped, 4),
            _Q_PROJ,
            _Q,
        ),
        QuantizationFault(
            "halves_as_pairs",
            "a GGUF block's nibbles are read in pairs, not as two halves",
            "read",
            _Q4_0,
            misread.of_quantized(misread.halves_as_pairs, 4),
            "embed_tokens.weight",
            "embed",
        ),
        QuantizationFault(
            "forgotten_zero_point",
            "the zero of an asymmetric group is not added",
            "read",
            _SENSITIVE,
            misread.of_quantized(misread.no_zero),
            _PLE_PROJ,
            _PLE,
        ),
        QuantizationFault(
            "zero_point_subtracted",
            "the zero is subtracted instead of added",
            "read",
            _SENSITIVE,
            misread.of_quantized(misread.negative_zero),
            _PLE_PROJ,
            _PLE,
        ),
        QuantizationFault(
            "symmetric_shift",
            "4-bit codes are not shifted by 8",
            "read",
            _DENSE,
            misread.of_quantized(misread.no_offset),
            _Q_PROJ,
            _Q,
        ),
        QuantizationFault(
            "signed_nibbles_as_unsigned",
            "two's complement nibbles are taken for 0..15 with a zero at 8",
            "read",
            _DENSE,
            misread.of_quantized(misread.unsigned_nibbles, 4),
            _Q_PROJ,
            _Q,
        ),
        QuantizationFault(
            "scale_transposed",
            "scales [K / G, N] are reshaped instead of transposed",
            "read",
            _DENSE,
            misread.of_quantized(misread.scale_transposed, 4),
            _Q_PROJ,
            _Q,
        ),
        QuantizationFault(
            "group_off_by_one",
            "each group takes the scale of the next",
            "read",
            _Q4_0,
            misread.of_quantized(misread.neighbours_scale),
            "embed_tokens.weight",
            "embed",
        ),
        QuantizationFault(
            "row_padding",
            "rows are taken to be padded",
            "read",
            _DENSE,
            misread.of_quantized(misread.padded_rows, 4),
            _Q_PROJ,
            _Q,
        ),
        QuantizationFault(
            "k_quant_scale_bits",
            "the high bits of a K-quant's 6-bit scales are lost",
            "read",
            _Q4_K,
            misread.high_scale_bits_lost,
            "embed_tokens.weight",
            "embed",
        ),
        QuantizationFault(
            "k_quant_min_sign",
            "a K-quant's minimum is added instead of subtracted",
            "read",
            _Q4_K,
            misread.of_quantized(misread.negative_zero),
            "embed_tokens.weight",
            "embed",
        ),
        QuantizationFault(
            "scales_read_in_bfloat16",
            "a block's scale times its sub-scale is rounded to bfloat16",
            "read",
            _Q4_K,
            misread.of_quantized(misread.scales_in_bfloat16),
            "embed_tokens.weight",
            "embed",
        ),
        QuantizationFault(
            "layer_scalar_dropped",
            "layer_output_scale is not mapped, and stays 1",
            "read",
            _Q4_0,
            misread.of_named("layer_scalar", torch.ones_like),
            "layers.0.layer_scalar",
            "layers.0.out",
        ),
        QuantizationFault(
            "norm_plus_one",
            "1 is taken off norms, as for Gemma 3",
            "read",
            _Q4_0,
            misread.of_named("input_layernorm.weight", lambda w: w - 1),
            "layers.0.input_layernorm.weight",
            _Q,
        ),
        QuantizationFault(
            "per_expert_scale_dropped",
            "ffn_down_exps.scale is not mapped, and stays 1",
            "read",
            _MOE_Q4_0,
            misread.of_named("per_expert_scale", torch.ones_like),
            "layers.0.router.per_expert_scale",
            _EXPERTS,
        ),
        QuantizationFault(
            "q_k_unpermuted",
            "the rows of q and k are put back as if llama.cpp had permuted them",
            "read",
            _Q4_0,
            misread.permuted_as_llama,
            _Q_PROJ,
            _Q,
        ),
        QuantizationFault(
            "gate_up_swapped",
            "experts' gates and ups are exchanged",
            "read",
            _MOE_Q4_0,
            misread.of_named("gate_up_proj", misread.gate_and_up_swapped),
            _GATE_UP,
            _EXPERTS,
        ),
        QuantizationFault(
            "head_still_tied",
            "the head's own quantized tensor is overlooked",
            "read",
            _SENSITIVE,
            misread.head_still_tied,
            _HEAD,
            "logits",
        ),
        QuantizationFault(
            "double_wide_missed",
            "one feed-forward length is taken for all layers'",
            "load",
            _Q4_0,
            misread.single_width,
            "layers.2.mlp.down_proj.weight is",
        ),
        QuantizationFault(
            "groups_along_columns",
            "weights of a column share a scale instead of those of a row",
            "file",
            _DENSE,
            miswritten.groups_along_columns,
            _Q_PROJ,
        ),
        QuantizationFault(
            "zeros_not_written",
            "asymmetric codes are written with a zero of 0",
            "file",
            _SENSITIVE,
            miswritten.rewritten(miswritten.zeros_not_written),
            _PLE_PROJ,
        ),
        QuantizationFault(
            "unsigned_nibbles_written",
            "codes 0..15 are written where signed ones belong",
            "file",
            _DENSE,
            miswritten.rewritten(miswritten.written_unsigned),
            _Q_PROJ,
        ),
        QuantizationFault(
            "last_edge_forgotten",
            "a rule for the edge layers is followed in the first ones alone",
            "file",
            _SENSITIVE,
            miswritten.last_edge_forgotten,
            "layers.3.mlp.down_proj.weight",
        ),
        QuantizationFault(
            "q_permuted_by_converter",
            "the converter permutes the rows of q as it does for Llama",
            "file",
            _Q4_0,
            miswritten.converted(miswritten.permuted_by_converter),
            _Q_PROJ,
        ),
        QuantizationFault(
            "norms_less_one_by_converter",
            "the converter takes 1 off norms, as for Gemma 3",
            "file",
            _Q4_0,
            miswritten.converted(miswritten.norms_less_one),
            "per_layer_projection_norm.weight",
        ),
        QuantizationFault(
            "scales_packed_in_bfloat16",
            "scales are packed in bfloat16 for float32",
            "pack",
            _DENSE,
            mispacked.packed(mispacked.scales_in_bfloat16),
            tap="embed",
        ),
        QuantizationFault(
            "zero_not_packed",
            "packing leaves the zero out",
            "pack",
            _SENSITIVE,
            mispacked.packed(mispacked.zero_dropped),
            tap=_PLE,
        ),
        QuantizationFault(
            "offset_not_packed",
            "packing leaves the offset of 8 out",
            "pack",
            _DENSE,
            mispacked.packed(mispacked.offset_dropped),
            tap=_Q,
        ),
        QuantizationFault(
            "first_experts_scales",
            "every expert is multiplied with the first one's scales",
            "pack",
            _MOE,
            mispacked.packed(mispacked.scales_of_first_expert),
            tap=_EXPERTS,
        ),
        QuantizationFault(
            "next_expert",
            "a token gets the weights of the expert before its own",
            "pack",
            _MOE,
            mispacked.packed(mispacked.next_expert),
            tap=_EXPERTS,
        ),
        QuantizationFault(
            "dequantized_to_bfloat16",
            "the kernel dequantizes to bfloat16 in float32",
            "pack",
            _DENSE,
            mispacked.packed(mispacked.weights_in_bfloat16),
            tap=_Q,
        ),
        QuantizationFault(
            "inputs_in_bfloat16",
            "the kernel rounds its inputs to bfloat16",
            "pack",
            _DENSE,
            mispacked.linears(lambda x: x.bfloat16().float()),
            tap=_Q,
        ),
        QuantizationFault(
            "inputs_in_int8",
            "the kernel quantizes its inputs to int8, as llama.cpp does",
            "pack",
            _DENSE,
            mispacked.linears(mispacked.quantized_to_int8),
            tap=_Q,
        ),
        QuantizationFault(
            "head_packed_as_embedding",
            "the head is packed from the embedding",
            "pack",
            _SENSITIVE,
            mispacked.head_of_embedding,
            tap="logits",
        ),
    )
}
"""By name."""
