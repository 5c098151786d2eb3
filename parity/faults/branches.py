"""Faults of the branches that some variants have: experts and per-layer inputs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.model.decoder import DecoderLayer, Gemma4, RMSNorm
from gemma4_impl.model.moe import Experts, Router
from parity.faults.fault import MOE, PLE, Fault, Inject, drop, each_layer, first, named, on_model, override, swap

_MLP, _ROUTER, _EXPERTS, _RESID_MLP, _RESID_PLE = (
    first(name) for name in ("mlp", "router", "experts", "resid_mlp", "resid_ple")
)
_INPUTS = named("per_layer_inputs")


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


def router_choice(choose: Callable[[Tensor, int], Tensor]) -> Inject:
    """`choose(probs [B, T, E], k)` gives the experts [B, T, k]."""
    return router_weights(scaled_after_renormalising, choose)


def router_weights(
    weigh: Callable[[Router, Tensor, Tensor], Tensor],
    choose: Callable[[Tensor, int], Tensor] = lambda probs, k: probs.topk(k).indices,
) -> Inject:
    """`weigh(router, probs [B, T, E], index [B, T, k])` makes the weights of the chosen experts."""

    def forward(self: Router, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.rms_norm(x, x.shape[-1:], self.scale, self.eps) * x.shape[-1] ** -0.5
        probs = taps.tap(self.prefix, "router", self.proj(x).softmax(dim=-1))
        index = taps.route(self.prefix, choose(probs, self.top_k))
        return weigh(self, probs, index), index

    return each_layer(lambda layer: override(layer.router, "forward", forward))


def scaled_after_renormalising(router: Router, probs: Tensor, index: Tensor) -> Tensor:
    weights = probs.gather(-1, index)
    return weights / weights.sum(dim=-1, keepdim=True) * router.per_expert_scale[index]


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


BRANCHES = [
    Fault(
        "router_input_normed", "the router reads the experts' normed input", each_layer(router_of_normed), _ROUTER, MOE
    ),
    Fault(
        "router_scale_missing",
        "the router's scale vector is left out",
        each_layer(lambda layer: layer.router.scale.fill_(1)),
        _ROUTER,
        MOE,
    ),
    Fault(
        "router_root_missing",
        "the router's D**-0.5 is left out",
        each_layer(lambda layer: layer.router.scale.mul_(len(layer.router.scale) ** 0.5)),
        _ROUTER,
        MOE,
    ),
    Fault(
        "router_takes_next",
        "the experts are counted from the second likeliest on",
        router_choice(lambda probs, k: probs.topk(k + 1).indices[..., 1:]),
        first("choice"),
        MOE,
    ),
    Fault(
        "router_takes_least",
        "the least likely experts are chosen: a sort in the wrong direction",
        router_choice(lambda probs, k: (-probs).topk(k).indices),
        first("choice"),
        MOE,
    ),
    Fault(
        "router_not_renormalised",
        "the chosen experts' probabilities are used as they are",
        router_weights(not_renormalised),
        _EXPERTS,
        MOE,
    ),
    Fault(
        "router_softmax_twice",
        "a second softmax over the chosen probabilities instead of dividing by their sum",
        router_weights(softmax_twice),
        _EXPERTS,
        MOE,
    ),
    Fault(
        "per_expert_scale_missing",
        "per_expert_scale is not applied",
        each_layer(lambda layer: layer.router.per_expert_scale.fill_(1)),
        _EXPERTS,
        MOE,
    ),
    Fault(
        "per_expert_scale_early",
        "per_expert_scale is applied before the weights are renormalised",
        router_weights(scaled_before_renormalising),
        _EXPERTS,
        MOE,
    ),
    Fault(
        "moe_pre_norms_swapped",
        "dense and sparse branch have each other's norm before them",
        swap("pre_feedforward_layernorm", "pre_feedforward_layernorm_2"),
        _MLP,
        MOE,
    ),
    Fault(
        "moe_post_norms_swapped",
        "dense and sparse branch have each other's norm after them",
        swap("post_feedforward_layernorm_1", "post_feedforward_layernorm_2"),
        _RESID_MLP,
        MOE,
    ),
    Fault(
        "experts_input_raw", "experts read the residual un-normed", drop("pre_feedforward_layernorm_2"), _EXPERTS, MOE
    ),
    Fault("dense_branch_missing", "only the experts are added", each_layer(dense_branch_missing), _RESID_MLP, MOE),
    Fault("experts_gelu_erf", "GELU by erf in the experts", each_layer(experts_erf), _EXPERTS, MOE),
    Fault("experts_up_first", "gate_up_proj is read as up, then gate", each_layer(up_before_gate), _EXPERTS, MOE),
    Fault(
        "experts_alternate",
        "gate_up_proj is read as alternating rows",
        each_layer(gate_and_up_alternate),
        _EXPERTS,
        MOE,
    ),
    Fault(
        "ple_sum_not_halved",
        "2**-0.5 of the sum of context and identity is missing",
        on_model(sum_not_halved),
        _INPUTS,
        PLE,
    ),
    Fault(
        "ple_root_missing",
        "D**-0.5 of the context is missing; the norm after it leaves a trace through its eps only",
        on_model(lambda model: model.per_layer_model_projection.weight.mul_(model.config.hidden_size**0.5)),
        _INPUTS,
        PLE,
    ),
    Fault("ple_table_unscaled", "the per-layer table lacks its sqrt(ple)", on_model(unscaled_table), _INPUTS, PLE),
    Fault("ple_table_layer_last", "the packed table row is read as [ple, L]", on_model(table_layer_last), _INPUTS, PLE),
    Fault("ple_norm_packed", "the context is normed over all layers at once", on_model(packed_norm), _INPUTS, PLE),
    Fault(
        "ple_without_context",
        "per-layer inputs are the token's identity only",
        on_model(lambda model: model.per_layer_projection_norm.weight.zero_()),
        _INPUTS,
        PLE,
    ),
    Fault(
        "ple_of_next_layer", "layer i is given the input of layer i + 1", on_model(ple_of_next_layer), _RESID_PLE, PLE
    ),
    Fault(
        "ple_of_hidden_state",
        "the context is projected from each layer's hidden state, not from the embedding",
        on_model(ple_of_hidden_state),
        named("layers.1.resid_ple"),
        PLE,
    ),
    Fault(
        "ple_gate_of_resid_mid",
        "the gate reads the residual before the MLP",
        each_layer(gate_of_resid_mid),
        _RESID_PLE,
        PLE,
    ),
    Fault("ple_gate_linear", "the gate has no activation", gate_activation(lambda gate: gate), _RESID_PLE, PLE),
    Fault("ple_gate_erf", "GELU by erf in the gate", gate_activation(F.gelu), _RESID_PLE, PLE),
]
