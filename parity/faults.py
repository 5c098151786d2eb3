"""The fault catalogue: mistakes that porters make, each with the tap where the engine must find it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from gemma4_impl.config import FULL, LayerConfig, TextConfig
from parity import _fault_attention as attention
from parity import _fault_blocks as blocks
from parity.candidate import TorchCandidate
from parity.compare import Comparison
from parity.engine import DTYPES, Baseline, baseline, judge
from parity.inputs import default_tokens

Tap = Callable[[TextConfig], str]

_ALL = ("E2B", "E4B", "26B-A4B", "31B")
_PLE = ("E2B", "E4B")
_MOE = ("26B-A4B",)
_K_EQ_V = ("26B-A4B", "31B")


@dataclass(frozen=True)
class Fault:
    """A mistake that can be put into a loaded model."""

    name: str
    summary: str
    """What a porter gets wrong, in one line."""
    inject: Callable[[TorchCandidate], None]
    """Changes this candidate in place, and nothing else."""
    tap: Tap
    """Where it must be found as created here: the first divergence."""
    variants: tuple[str, ...] = _ALL
    """The tiny checkpoints that it applies to."""
    dtype: str = "float32"
    path: str = "full"
    """The cheapest of `parity.candidate.PATHS` that shows it."""


def find(fault: Fault, checkpoint: str | Path, base: Baseline | None = None) -> Comparison:
    """Loads the candidate, puts the fault in, and judges it through the fault's path.

    `base` must be of the fault's dtype; by default it is made here, on the tokens that a parity run takes."""
    dtype = DTYPES[fault.dtype]
    if base is None:
        tokens = default_tokens(TextConfig.from_file(checkpoint), Path(checkpoint))
        base = baseline(checkpoint, tokens, dtype)
    candidate = TorchCandidate(checkpoint, dtype)
    fault.inject(candidate)
    return judge(candidate, base, fault.path)


def _named(name: str) -> Tap:
    return lambda config: name


def _in_first(suffix: str, where: Callable[[LayerConfig], bool] = lambda layer: True) -> Tap:
    """The tap `suffix` of the first layer that `where` accepts."""
    return lambda config: f"layers.{next(layer.index for layer in config.layers if where(layer))}.{suffix}"


def _in_full(suffix: str) -> Tap:
    return _in_first(suffix, lambda layer: layer.layer_type == FULL)


def _in_shared(suffix: str) -> Tap:
    return _in_first(suffix, lambda layer: layer.kv_shared)


def _first_norm(config: TextConfig) -> str:
    return "per_layer_inputs" if config.hidden_size_per_layer_input else "layers.0.self_attn.q"


def _last_sum(config: TextConfig) -> str:
    return "layers.0.resid_ple" if config.hidden_size_per_layer_input else "layers.0.resid_mlp"


_Q, _K, _V, _ATTENTION = (_in_first(f"self_attn.{name}") for name in ("q", "k", "v", "out"))
_MID, _MLP, _ROUTER, _EXPERTS, _RESID_MLP, _RESID_PLE, _OUT = (
    _in_first(name) for name in ("resid_mid", "mlp", "router", "experts", "resid_mlp", "resid_ple", "out")
)

_WINDOWS = [
    Fault("window_too_small", "the window is W - 1 keys", attention.window(lambda w: w - 1), _ATTENTION),
    Fault("window_too_large", "the window is W + 1 keys: q - W itself is seen", attention.window(lambda w: w + 1), _ATTENTION),
    Fault("window_ignored", "sliding layers see everything", attention.window(lambda w: 10**6), _ATTENTION),
    Fault("window_on_full_layers", "full layers are given the window too", attention.masks(attention.window_on_full_layers), _in_full("self_attn.out")),
    Fault("not_causal", "every query also sees the future", attention.masks(attention.future_visible), _ATTENTION),
    Fault("own_key_hidden", "kv < q instead of kv <= q", attention.masks(attention.diagonal_excluded), _ATTENTION),
    Fault("causal_from_first_key", "a chunk's causal mask is aligned to the oldest key, as is_causal=True does when T != S", attention.masks(attention.causal_from_first_key), _in_full("self_attn.out"), path="chunked"),
]

_CACHES = [
    Fault("ring_of_two_windows", "2W slots and chunks of 2W: a chunk overwrites keys that its first queries need", attention.ring(lambda w, chunk: 2 * w, chunk=lambda w: 2 * w), _ATTENTION, path="chunked"),
    Fault("ring_of_window", "W slots and chunks of W, right for single tokens only", attention.ring(lambda w, chunk: w, chunk=lambda w: w), _ATTENTION, path="chunked"),
    Fault("ring_one_slot_short", "W - 2 + max_chunk slots: the first query of a whole chunk lacks its oldest key", attention.ring(lambda w, chunk: w - 2 + chunk), _ATTENTION, path="chunked"),
    Fault("ring_masked_by_slot", "the mask compares slot numbers, not the positions in the slots", attention.masks(attention.masked_by_slot), _ATTENTION, path="decode"),
    Fault("empty_slots_attended", "slots that a shorter row has not filled yet are seen as keys", attention.masks(attention.empty_slots_visible), _ATTENTION, path="right_padded"),
    Fault("padding_attended", "padding takes cache slots and is seen as a key", attention.padding_attended, _ATTENTION, path="left_padded"),
    Fault("positions_count_padding", "one row of positions for the whole batch: RoPE of a padded row starts at its padding", attention.rope_positions(attention.positions_of_longest_row), _Q, path="left_padded"),
    Fault("positions_after_chunk", "positions are one too high from the second chunk on", attention.rope_positions(attention.one_late_after_first_chunk), _Q, path="chunked"),
]

_SHARING = [
    Fault("kv_previous_producer", "a shared layer reads the last but one unshared layer of its type", attention.kv_from_previous_producer, _in_shared("self_attn.out"), _PLE),
    Fault("kv_of_chunk_only", "a shared layer reads its producer's new keys and values, not the cached ones", attention.kv_of_chunk_only, _in_shared("self_attn.out"), _PLE, path="chunked"),
    Fault("kv_sharing_dropped", "a shared layer computes keys and values of its own", attention.kv_computed_by_shared_layer, _in_shared("self_attn.out"), _PLE),
    Fault("last_position_rope", "prefill sends only the last position through the shared layers, with the first one's RoPE", attention.last_position_rotated_as_first, _in_shared("self_attn.q"), _PLE, path="generate"),
]

_ROPE = [
    Fault("rope_full", "full layers rotate all dims instead of the first quarter of the pairs", attention.frequencies(attention.full_rope, FULL), _in_full("self_attn.q")),
    Fault("rope_over_rotary_dim", "frequencies of full layers are divided by the number of rotated dims, not by head_dim", attention.frequencies(attention.rotary_dim_rope, FULL), _in_full("self_attn.q")),
    Fault("rope_first_quarter", "the first quarter of the dims is rotated by itself instead of pairing across the halves", attention.rotation(attention.first_quarter_rotated, FULL), _in_full("self_attn.q")),
    Fault("rope_bases_swapped", "each layer type has the other's theta", attention.rope_bases_swapped, _Q),
    Fault("rope_linear_scaling", "full layers divide positions by 8, as Gemma 3 does", attention.frequencies(lambda rope: rope.inv_freq[: rope.head_dim // 2] / 8, FULL), _in_full("self_attn.q")),
    Fault("rope_backwards", "the sign of the rotated half is wrong", attention.frequencies(lambda rope: -rope.inv_freq[: rope.head_dim // 2]), _Q),
    Fault("rope_interleaved", "dims are paired 2i, 2i + 1 (GPT-J) instead of i, i + H / 2", attention.rotation(attention.interleaved), _Q),
    Fault("rope_before_norm", "q and k are normed after RoPE", attention.rotation(attention.norm_after_rotation), _Q),
    Fault("rope_in_bfloat16", "angles are computed in bfloat16", attention.rope_angles_in_bfloat16, _Q, dtype="bfloat16"),
]

_ATTEND = [
    Fault("attention_scale", "scores are scaled by 1/sqrt(H)", attention.attend(attention.scaled), _ATTENTION),
    Fault("attention_softcap", "scores are softcapped at 50, as in Gemma 2", attention.attend(attention.capped_scores), _ATTENTION),
    Fault("attention_in_bfloat16", "a float32 model runs its attention kernel in bfloat16", attention.attend(attention.in_bfloat16), _ATTENTION),
    Fault("kv_heads_tiled", "kv heads are repeated as 0 1 0 1 instead of 0 0 1 1", attention.attend(attention.tiled), _ATTENTION, ("E4B", "26B-A4B", "31B")),
    Fault("q_norm_missing", "queries are not normed", blocks.drop("self_attn.q_norm"), _Q),
    Fault("k_norm_missing", "keys are not normed", blocks.drop("self_attn.k_norm"), _K),
    Fault("v_norm_missing", "values are not normed", blocks.drop("self_attn.v_norm"), _V),
    Fault("v_norm_weighted", "values are normed with k_norm's weight", attention.v_norm_weighted, _V),
    Fault("v_rotated", "RoPE is applied to the values too", attention.values(attention.rotated_v), _V, _PLE),
    Fault("v_after_k_norm", "with attention_k_eq_v, V is taken after k_norm", attention.values(attention.normed_k_as_v, FULL), _in_full("self_attn.v"), _K_EQ_V),
    Fault("v_is_cached_k", "with attention_k_eq_v, V is K as cached: normed, weighted and rotated", attention.values(lambda self, x, k, rotary: k, FULL), _in_full("self_attn.v"), _K_EQ_V),
]

_BLOCKS = [
    Fault("norm_one_plus_w", "norms multiply by 1 + w, as in Gemma 1 to 3", blocks.norms(blocks.one_plus), _first_norm),
    Fault("norm_eps", "norms have eps = 1e-5 instead of 1e-6", blocks.norms(blocks.loose_eps), _first_norm),
    Fault("norm_in_bfloat16", "norms are computed in bfloat16", blocks.norms(blocks.in_own_dtype), _first_norm, dtype="bfloat16"),
    Fault("input_norm_missing", "attention reads the residual un-normed", blocks.drop("input_layernorm"), _Q),
    Fault("llama_norm_names", "post_attention_layernorm is taken for the norm before the MLP, as in Llama", blocks.each_layer(blocks.llama_norm_names), _MID),
    Fault("post_mlp_norm_missing", "the sum of branches is added without post_feedforward_layernorm", blocks.drop("post_feedforward_layernorm"), _RESID_MLP),
    Fault("normed_in_place", "the norm before the MLP overwrites the residual that is added later", blocks.each_layer(blocks.normed_in_place), _RESID_MLP, ("E2B", "E4B", "31B")),
    Fault("layer_scalar_missing", "layer_scalar is not applied", blocks.each_layer(lambda layer: layer.layer_scalar.fill_(1)), _OUT),
    Fault("layer_scalar_on_branch", "layer_scalar multiplies the last branch, not its sum with the residual", blocks.each_layer(blocks.scalar_on_branch), _last_sum),
    Fault("layer_scalar_before_ple", "layer_scalar is applied before the per-layer-input branch", blocks.each_layer(blocks.scalar_before_ple), _RESID_PLE, _PLE),
    Fault("gelu_erf", "GELU by erf instead of its tanh approximation", blocks.mlp_activation(F.gelu), _MLP),
    Fault("silu", "SiLU instead of GELU", blocks.mlp_activation(F.silu), _MLP),
    Fault("gate_up_swapped", "gate_proj and up_proj are exchanged", blocks.swap("mlp.gate_proj", "mlp.up_proj"), _MLP),
    Fault("mlp_single_width", "the double-wide MLP of shared layers is cut to the single width", blocks.single_width, _in_shared("mlp"), ("E2B",)),
]

_MIXTURE = [
    Fault("router_input_normed", "the router reads the experts' normed input", blocks.each_layer(blocks.router_of_normed), _ROUTER, _MOE),
    Fault("router_scale_missing", "the router's scale vector is left out", blocks.each_layer(lambda layer: layer.router.scale.fill_(1)), _ROUTER, _MOE),
    Fault("router_root_missing", "the router's D**-0.5 is left out", blocks.each_layer(lambda layer: layer.router.scale.mul_(len(layer.router.scale) ** 0.5)), _ROUTER, _MOE),
    Fault("router_not_renormalised", "the chosen experts' probabilities are used as they are", blocks.router_weights(blocks.not_renormalised), _EXPERTS, _MOE),
    Fault("router_softmax_twice", "a second softmax over the chosen probabilities instead of dividing by their sum", blocks.router_weights(blocks.softmax_twice), _EXPERTS, _MOE),
    Fault("per_expert_scale_missing", "per_expert_scale is not applied", blocks.each_layer(lambda layer: layer.router.per_expert_scale.fill_(1)), _EXPERTS, _MOE),
    Fault("per_expert_scale_early", "per_expert_scale is applied before the weights are renormalised", blocks.router_weights(blocks.scaled_before_renormalising), _EXPERTS, _MOE),
    Fault("moe_pre_norms_swapped", "dense and sparse branch have each other's norm before them", blocks.swap("pre_feedforward_layernorm", "pre_feedforward_layernorm_2"), _MLP, _MOE),
    Fault("moe_post_norms_swapped", "dense and sparse branch have each other's norm after them", blocks.swap("post_feedforward_layernorm_1", "post_feedforward_layernorm_2"), _RESID_MLP, _MOE),
    Fault("experts_input_raw", "experts read the residual un-normed", blocks.drop("pre_feedforward_layernorm_2"), _EXPERTS, _MOE),
    Fault("dense_branch_missing", "only the experts are added", blocks.each_layer(blocks.dense_branch_missing), _RESID_MLP, _MOE),
    Fault("experts_gelu_erf", "GELU by erf in the experts", blocks.each_layer(blocks.experts_erf), _EXPERTS, _MOE),
    Fault("experts_up_first", "gate_up_proj is read as up, then gate", blocks.each_layer(blocks.up_before_gate), _EXPERTS, _MOE),
    Fault("experts_alternate", "gate_up_proj is read as alternating rows", blocks.each_layer(blocks.gate_and_up_alternate), _EXPERTS, _MOE),
]

_PER_LAYER = [
    Fault("ple_sum_not_halved", "2**-0.5 of the sum of context and identity is missing", blocks.on_model(blocks.sum_not_halved), _named("per_layer_inputs"), _PLE),
    Fault("ple_root_missing", "D**-0.5 of the context is missing; the norm after it leaves a trace through its eps only", blocks.on_model(lambda model: model.per_layer_model_projection.weight.mul_(model.config.hidden_size**0.5)), _named("per_layer_inputs"), _PLE),
    Fault("ple_table_unscaled", "the per-layer table lacks its sqrt(ple)", blocks.on_model(blocks.unscaled_table), _named("per_layer_inputs"), _PLE),
    Fault("ple_table_layer_last", "the packed table row is read as [ple, L]", blocks.on_model(blocks.table_layer_last), _named("per_layer_inputs"), _PLE),
    Fault("ple_norm_packed", "the context is normed over all layers at once", blocks.on_model(blocks.packed_norm), _named("per_layer_inputs"), _PLE),
    Fault("ple_without_context", "per-layer inputs are the token's identity only", blocks.on_model(lambda model: model.per_layer_projection_norm.weight.zero_()), _named("per_layer_inputs"), _PLE),
    Fault("ple_of_next_layer", "layer i is given the input of layer i + 1", blocks.on_model(blocks.ple_of_next_layer), _RESID_PLE, _PLE),
    Fault("ple_of_hidden_state", "the context is projected from each layer's hidden state, not from the embedding", blocks.on_model(blocks.ple_of_hidden_state), _named("layers.1.resid_ple"), _PLE),
    Fault("ple_gate_of_resid_mid", "the gate reads the residual before the MLP", blocks.each_layer(blocks.gate_of_resid_mid), _RESID_PLE, _PLE),
    Fault("ple_gate_linear", "the gate has no activation", blocks.gate_activation(lambda gate: gate), _RESID_PLE, _PLE),
    Fault("ple_gate_erf", "GELU by erf in the gate", blocks.gate_activation(F.gelu), _RESID_PLE, _PLE),
]

_ENDS = [
    Fault("embed_unscaled", "sqrt(D) is missing", blocks.on_model(blocks.unscaled_embedding), _named("embed")),
    Fault("embed_scale_unrounded", "sqrt(D) is not rounded to bfloat16", blocks.on_model(blocks.unrounded_scale), _named("embed"), dtype="bfloat16"),
    Fault("final_norm_missing", "the head reads the last residual", blocks.on_model(blocks.no_final_norm), _named("norm")),
    Fault("embed_scale_in_head", "sqrt(D) was folded into the embedding, which is also the head", blocks.on_model(blocks.scale_in_tied_weight), _named("logits")),
    Fault("softcap_missing", "logits are not softcapped", blocks.final(final_logit_softcapping=None), _named("logits")),
    Fault("softcap_of_50", "logits are softcapped at 50 instead of 30", blocks.final(final_logit_softcapping=50.0), _named("logits")),
    Fault("logits_late", "the logits are those of the position before", blocks.on_model(blocks.one_position_late), _named("logits")),
]

FAULTS = {f.name: f for f in (*_WINDOWS, *_CACHES, *_SHARING, *_ROPE, *_ATTEND, *_BLOCKS, *_MIXTURE, *_PER_LAYER, *_ENDS)}
