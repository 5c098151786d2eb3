"""Faults of the decoder block and of its ends: embedding, norms, residuals, MLP, head."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl.config import TextConfig
from gemma4_impl.model.decoder import MLP, DecoderLayer, Gemma4, RMSNorm
from parity.candidate import TorchCandidate
from parity.faults.fault import PLE, Fault, Inject, drop, each_layer, first, in_shared, named, on_model, override, swap

_Q, _MID, _MLP, _RESID_MLP, _RESID_PLE, _LAYER_OUT = (
    first(name) for name in ("self_attn.q", "resid_mid", "mlp", "resid_mlp", "resid_ple", "out")
)


def _first_norm(config: TextConfig) -> str:
    return "per_layer_inputs" if config.hidden_size_per_layer_input else "layers.0.self_attn.q"


def _last_sum(config: TextConfig) -> str:
    return "layers.0.resid_ple" if config.hidden_size_per_layer_input else "layers.0.resid_mlp"


def norms(change: Callable[[RMSNorm], None]) -> Inject:
    return on_model(lambda model: [change(m) for m in model.modules() if isinstance(m, RMSNorm)])


def one_plus(norm: RMSNorm) -> None:
    if norm.weight is not None:
        norm.weight.add_(1)


def loose_eps(norm: RMSNorm) -> None:
    norm.eps = 1e-5


def in_its_own_dtype(norm: RMSNorm) -> None:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight

    override(norm, "forward", forward)


def llama_norm_names(layer: DecoderLayer) -> None:
    layer.pre_feedforward_layernorm = layer.post_attention_layernorm
    layer.post_attention_layernorm = nn.Identity()


def normed_in_place(layer: DecoderLayer) -> None:
    layer.pre_feedforward_layernorm.register_forward_hook(lambda norm, args, out: args[0].copy_(out))


def scalar_on_branch(layer: DecoderLayer) -> None:
    scalar = layer.layer_scalar.clone()
    last = "post_per_layer_input_norm" if hasattr(layer, "per_layer_input_gate") else "post_feedforward_layernorm"
    getattr(layer, last).register_forward_hook(lambda norm, args, out: out * scalar)
    layer.layer_scalar.fill_(1)


def scalar_before_ple(layer: DecoderLayer) -> None:
    scalar = layer.layer_scalar.clone()
    # In place: the layer goes on adding to the tensor that the gate reads.
    layer.per_layer_input_gate.register_forward_pre_hook(lambda gate, args: (args[0].mul_(scalar),))
    layer.layer_scalar.fill_(1)


def mlp_activation(act: Callable[[Tensor], Tensor]) -> Inject:
    def forward(self: MLP, x: Tensor) -> Tensor:
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))

    return each_layer(lambda layer: override(layer.mlp, "forward", forward))


def single_width(candidate: TorchCandidate) -> None:
    width = candidate.config.intermediate_size
    for layer in candidate.model.layers:
        mlp = layer.mlp
        mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[:width].detach())
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[:width].detach())
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :width].detach())


def unscaled_embedding(model: Gemma4) -> None:
    model.embed_tokens.scale = dict.fromkeys(model.embed_tokens.scale, 1.0)


def unrounded_scale(model: Gemma4) -> None:
    model.embed_tokens.scale = dict.fromkeys(model.embed_tokens.scale, model.config.hidden_size**0.5)


def scale_in_tied_weight(model: Gemma4) -> None:
    scale = model.config.hidden_size**0.5
    model.lm_head.register_forward_hook(lambda head, args, scores: scores * scale)


def configured(**fields: Any) -> Inject:
    """Changes fields of the model's config that every forward reads."""

    def change(model: Gemma4) -> None:
        model.config = replace(model.config, **fields)

    return on_model(change)


def no_final_norm(model: Gemma4) -> None:
    override(model.norm, "forward", lambda self, x: x)


def one_position_late(model: Gemma4) -> None:
    model.lm_head.register_forward_hook(lambda head, args, scores: scores.roll(1, dims=1))


BLOCKS = [
    Fault(
        "final_norm_in_bfloat16",
        "the last norm is computed in bfloat16 instead of float32",
        on_model(lambda model: in_its_own_dtype(model.norm)),
        named("norm"),
        dtype="bfloat16",
    ),
    Fault("embed_unscaled", "sqrt(D) is missing", on_model(unscaled_embedding), named("embed")),
    Fault(
        "embed_scale_unrounded",
        "sqrt(D) is not rounded to bfloat16",
        on_model(unrounded_scale),
        named("embed"),
        dtype="bfloat16",
    ),
    Fault("final_norm_missing", "the head reads the last residual", on_model(no_final_norm), named("norm")),
    Fault(
        "embed_scale_in_head",
        "sqrt(D) was folded into the embedding, which is also the head",
        on_model(scale_in_tied_weight),
        named("logits"),
    ),
    Fault("softcap_missing", "logits are not softcapped", configured(final_logit_softcapping=None), named("logits")),
    Fault(
        "softcap_of_50",
        "logits are softcapped at 50 instead of 30",
        configured(final_logit_softcapping=50.0),
        named("logits"),
    ),
    Fault("logits_late", "the logits are those of the position before", on_model(one_position_late), named("logits")),
    Fault("norm_one_plus_w", "norms multiply by 1 + w, as in Gemma 1 to 3", norms(one_plus), _first_norm),
    Fault("norm_eps", "norms have eps = 1e-5 instead of 1e-6", norms(loose_eps), _first_norm),
    Fault("input_norm_missing", "attention reads the residual un-normed", drop("input_layernorm"), _Q),
    Fault(
        "llama_norm_names",
        "post_attention_layernorm is taken for the norm before the MLP, as in Llama",
        each_layer(llama_norm_names),
        _MID,
    ),
    Fault(
        "post_mlp_norm_missing",
        "the sum of branches is added without post_feedforward_layernorm",
        drop("post_feedforward_layernorm"),
        _RESID_MLP,
    ),
    Fault(
        "normed_in_place",
        "the norm before the MLP overwrites the residual that is added later",
        each_layer(normed_in_place),
        _RESID_MLP,
        ("E2B", "E4B", "31B"),
    ),
    Fault(
        "layer_scalar_missing",
        "layer_scalar is not applied",
        each_layer(lambda layer: layer.layer_scalar.fill_(1)),
        _LAYER_OUT,
    ),
    Fault(
        "layer_scalar_on_branch",
        "layer_scalar multiplies the last branch, not its sum with the residual",
        each_layer(scalar_on_branch),
        _last_sum,
    ),
    Fault(
        "layer_scalar_before_ple",
        "layer_scalar is applied before the per-layer-input branch",
        each_layer(scalar_before_ple),
        _RESID_PLE,
        PLE,
    ),
    Fault("gelu_erf", "GELU by erf instead of its tanh approximation", mlp_activation(F.gelu), _MLP),
    Fault("silu", "SiLU instead of GELU", mlp_activation(F.silu), _MLP),
    Fault("gate_up_swapped", "gate_proj and up_proj are exchanged", swap("mlp.gate_proj", "mlp.up_proj"), _MLP),
    Fault(
        "mlp_single_width",
        "the double-wide MLP of shared layers is cut to the single width",
        single_width,
        in_shared("mlp"),
        ("E2B",),
    ),
]
