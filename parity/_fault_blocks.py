"""Faults of embeddings, norms, MLP, experts, per-layer inputs and the head, as functions that put them into a loaded
candidate. As in `_fault_attention.py`, instances are changed, never classes or modules."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.model.decoder import MLP, DecoderLayer, Gemma4, RMSNorm
from gemma4_impl.model.moe import Experts, Router
from parity._fault_attention import Inject, override
from parity.candidate import TorchCandidate


def each_layer(change: Callable[[DecoderLayer], None]) -> Inject:
    def inject(candidate: TorchCandidate) -> None:
        with torch.no_grad():
            for layer in candidate.model.layers:
                change(layer)

    return inject


def on_model(change: Callable[[Gemma4], Any]) -> Inject:
    def inject(candidate: TorchCandidate) -> None:
        with torch.no_grad():
            change(candidate.model)

    return inject


def drop(name: str) -> Inject:
    """Replaces this submodule by the identity, in every layer that has it."""
    parent, _, leaf = name.rpartition(".")

    def change(layer: DecoderLayer) -> None:
        if hasattr(layer.get_submodule(parent), leaf):
            setattr(layer.get_submodule(parent), leaf, nn.Identity())

    return each_layer(change)


def swap(first: str, second: str) -> Inject:
    """Exchanges two submodules of every layer, such as `mlp.gate_proj` and `mlp.up_proj`."""
    parent, _, a = first.rpartition(".")
    b = second.rpartition(".")[2]

    def change(layer: DecoderLayer) -> None:
        module = layer.get_submodule(parent)
        one, other = getattr(module, a), getattr(module, b)
        setattr(module, a, other)
        setattr(module, b, one)

    return each_layer(change)


def final(**fields: Any) -> Inject:
    """Changes fields of the model's config that are read at every forward."""

    def change(model: Gemma4) -> None:
        model.config = replace(model.config, **fields)

    return on_model(change)


# Norms and residuals


def norms(change: Callable[[RMSNorm], None]) -> Inject:
    return on_model(lambda model: [change(m) for m in model.modules() if isinstance(m, RMSNorm)])


def one_plus(norm: RMSNorm) -> None:
    if norm.weight is not None:
        norm.weight.add_(1)


def loose_eps(norm: RMSNorm) -> None:
    norm.eps = 1e-5


def in_own_dtype(norm: RMSNorm) -> None:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight

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


# MLP and experts


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


def experts_erf(layer: DecoderLayer) -> None:
    def mlp(self: Experts, x: Tensor, expert: Tensor) -> Tensor:
        gate, up = torch.einsum("nd,nfd->nf", x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return torch.einsum("nf,ndf->nd", F.gelu(gate) * up, self.down_proj[expert])

    override(layer.experts, "_mlp", mlp)


def up_before_gate(layer: DecoderLayer) -> None:
    weight = layer.experts.gate_up_proj
    weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))


def gate_and_up_alternate(layer: DecoderLayer) -> None:
    weight = layer.experts.gate_up_proj
    weight.copy_(torch.cat([weight[:, ::2], weight[:, 1::2]], dim=1))


def router_weights(weigh: Callable[[Router, Tensor, Tensor], Tensor]) -> Inject:
    """`weigh(router, probs [B, T, E], index [B, T, k])` makes the weights of the chosen experts."""

    def forward(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.rms_norm(x, x.shape[-1:], self.scale, self.eps) * x.shape[-1] ** -0.5
        probs = taps.tap(self.prefix, "router", self.proj(x).softmax(dim=-1))
        index = taps.route(self.prefix, probs.topk(self.top_k).indices)
        return weigh(self, probs, index), index

    return each_layer(lambda layer: override(layer.router, "forward", forward))


def not_renormalised(router: Router, probs: Tensor, index: Tensor) -> Tensor:
    return probs.gather(-1, index) * router.per_expert_scale[index]


def softmax_twice(router: Router, probs: Tensor, index: Tensor) -> Tensor:
    return probs.gather(-1, index).softmax(dim=-1) * router.per_expert_scale[index]


def scaled_before_renormalising(router: Router, probs: Tensor, index: Tensor) -> Tensor:
    weights = probs.gather(-1, index) * router.per_expert_scale[index]
    return weights / weights.sum(dim=-1, keepdim=True)


def router_of_normed(layer: DecoderLayer) -> None:
    layer.router.register_forward_pre_hook(lambda router, args: (layer.pre_feedforward_layernorm_2(args[0]),))


def dense_branch_missing(layer: DecoderLayer) -> None:
    def feed_forward(self: DecoderLayer, x: Tensor) -> Tensor:
        weights, index = self.router(x)
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), weights, index)
        return self.post_feedforward_layernorm_2(taps.tap(self.prefix, "experts", sparse))

    override(layer, "feed_forward", feed_forward)


# Per-layer inputs


def unscaled_table(model: Gemma4) -> None:
    table = model.embed_tokens_per_layer
    table.scale = dict.fromkeys(table.scale, 1.0)


def sum_not_halved(model: Gemma4) -> None:
    table = model.embed_tokens_per_layer
    table.scale = {dtype: scale * 2**0.5 for dtype, scale in table.scale.items()}
    model.per_layer_projection_norm.weight.mul_(2**0.5)


def packed_norm(model: Gemma4) -> None:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-2:], None, self.eps) * self.weight

    override(model.per_layer_projection_norm, "forward", forward)


def table_layer_last(model: Gemma4) -> None:
    """The packed row is read as [ple, L] instead of [L, ple]."""
    layers = model.config.num_hidden_layers

    def hook(table: nn.Module, args: tuple, row: Tensor) -> Tensor:
        return row.unflatten(-1, (-1, layers)).transpose(-1, -2).flatten(-2)

    model.embed_tokens_per_layer.register_forward_hook(hook)


def ple_of_next_layer(model: Gemma4) -> None:
    def per_layer_inputs(self: Gemma4, tokens: Tensor, embed: Tensor) -> Tensor:
        return Gemma4.per_layer_inputs(self, tokens, embed).roll(-1, dims=2)

    override(model, "per_layer_inputs", per_layer_inputs)


def ple_of_hidden_state(model: Gemma4) -> None:
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size_per_layer_input)
    identity: list[Tensor] = []

    def keep(table: nn.Module, args: tuple, row: Tensor) -> None:
        identity[:] = [row.unflatten(-1, shape)]

    def hook(layer: nn.Module, args: tuple) -> tuple:
        context = model.per_layer_model_projection(args[0]) * config.hidden_size**-0.5
        context = model.per_layer_projection_norm(context.unflatten(-1, shape))
        ple = (context + identity[0])[:, :, layer.config.index] * 2**-0.5
        return (args[0], ple, *args[2:])

    model.embed_tokens_per_layer.register_forward_hook(keep)
    for layer in model.layers:
        layer.register_forward_pre_hook(hook)


def gate_of_resid_mid(layer: DecoderLayer) -> None:
    seen: list[Tensor] = []

    def keep(norm: nn.Module, args: tuple) -> None:
        seen[:] = [args[0]]

    layer.pre_feedforward_layernorm.register_forward_pre_hook(keep)
    layer.per_layer_input_gate.register_forward_pre_hook(lambda gate, args: (seen[0],))


def gate_activation(act: Callable[[Tensor], Tensor]) -> Inject:
    """The per-layer gate with another activation: the layer's own product is replaced on its way to the projection."""

    def change(layer: DecoderLayer) -> None:
        seen: dict[str, Tensor] = {}
        layer.register_forward_pre_hook(lambda layer, args: seen.update(ple=args[1]))
        layer.per_layer_input_gate.register_forward_hook(lambda gate, args, out: seen.update(gate=out))
        layer.per_layer_projection.register_forward_pre_hook(lambda p, args: (act(seen["gate"]) * seen["ple"],))

    return each_layer(change)


# Embedding and head


def unscaled_embedding(model: Gemma4) -> None:
    model.embed_tokens.scale = dict.fromkeys(model.embed_tokens.scale, 1.0)


def unrounded_scale(model: Gemma4) -> None:
    model.embed_tokens.scale = dict.fromkeys(model.embed_tokens.scale, model.config.hidden_size**0.5)


def scale_in_tied_weight(model: Gemma4) -> None:
    scale = model.config.hidden_size**0.5
    model.lm_head.register_forward_hook(lambda head, args, scores: scores * scale)


def no_final_norm(model: Gemma4) -> None:
    override(model.norm, "forward", lambda self, x: x)


def one_position_late(model: Gemma4) -> None:
    model.lm_head.register_forward_hook(lambda head, args, scores: scores.roll(1, dims=1))
