"""One decode step of the whole model, read top to bottom; nothing in it waits for the device: a graph can hold it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_impl.config import SLIDING
from gemma4_impl.engine import attention
from gemma4_impl.engine.linear import AddNorm, Linear, linear_experts
from gemma4_impl.engine.model import Layer, MoE, PackedModel, look_up
from gemma4_impl.generation import Sampling
from gemma4_impl.kernels import steps
from gemma4_impl.model.cache import KVCache

EMBED, LINEARS, ATTENTION, SMALL, HEAD, SAMPLING = PARTS = (
    "embedding", "linears", "attention", "small steps", "head", "sampling",
)  # fmt: skip
"""What a step consists of. The small steps are those that no linear or attention kernel has taken in."""

LAG = 8
"""How many of the last tokens are kept."""


class Step:
    """Feeds `token` at `position` and draws the next one, for B rows at once, on buffers that stay where they are.

    Args:
        cache: of which only the keys' and values' buffers are used: a slot's age follows from the position.
        watch: called with a part's name and what to do, in the place of doing it; for profiles."""

    def __init__(self, model: PackedModel, cache: KVCache):
        self.model, self.cache = model, cache
        self.batch_size = B = cache.batch_size
        self.watch: Callable[[str, Callable[[], None]], None] | None = None
        self._buffers: dict[str, Tensor] = {}
        with torch.device(model.device):
            self.token = torch.zeros(B, dtype=torch.long)
            self.position = torch.zeros(B, dtype=torch.long)
            self.count = torch.zeros(1, dtype=torch.long)
            """Tokens drawn so far."""
            self.history = torch.zeros(LAG, B, dtype=torch.long)
            """Token number i in row i % LAG."""
            self.state = steps.sampling_state(0, model.device)
            """Of the random numbers."""
            self.logits = torch.zeros(B, model.config.vocab_size, dtype=torch.float32)

    @property
    def moving(self) -> tuple[Tensor, ...]:
        """What a step changes and the next one starts from, but for the caches and the history."""
        return self.token, self.position, self.count, self.state

    def __call__(self, sampling: Sampling) -> None:
        """One step. Where a token cannot be drawn, because logits are NaN, it is -1, and 0 is fed instead."""
        model, config = self.model, self.model.config
        eps = config.rms_norm_eps
        self._do(EMBED, self._embed)
        h, add = self._buffer("residual_0", config.hidden_size), None
        for layer in model.layers:
            h, add = self._layer(layer, h, add)
        head = {"norm": model.norm, "eps": eps, "softcap": config.final_logit_softcapping}
        self._do(HEAD, model.lm_head, h, self.logits, add=add, **head)
        self._do(SAMPLING, self._draw, sampling)

    def _layer(self, layer: Layer, h: Tensor, add: AddNorm | None) -> tuple[Tensor, AddNorm]:
        """h [B, D]: the residual, or with `add` the branch that the layer before ends with. Returns the same."""
        config = layer.config
        D, B = self.model.config.hidden_size, self.batch_size
        # 1. Attention
        qkv = self._buffer(f"qkv_{config.layer_type}_{layer.qkv.out_features}", layer.qkv.out_features)
        heads = self._buffer(f"heads_{config.layer_type}", layer.o_proj.in_features)
        residual = h if add is None else add.out
        self._linear(layer.qkv, h, qkv, add=add, norm=layer.input_layernorm)
        self._do(ATTENTION, self._attend, layer, qkv, heads)
        h = self._buffer("attention_out", D)
        self._linear(layer.o_proj, heads, h, alone=True)
        # 2. MLP and experts
        add = AddNorm(residual, layer.post_attention_layernorm, None, self._other(residual))
        inner = self._buffer(f"inner_{config.intermediate_size}", config.intermediate_size)
        self._linear(layer.gate_up, h, inner, add=add, norm=layer.pre_feedforward_layernorm)
        h, residual = self._buffer("mlp_out", D), add.out
        self._linear(layer.down_proj, inner, h)
        if layer.moe is not None:
            self._do(SMALL, self._experts, layer.moe, residual, h)
        scalar = layer.layer_scalar
        if layer.ple is None:
            return h, AddNorm(residual, layer.post_feedforward_layernorm, scalar, self._other(residual))
        # 3. Per-layer input
        add = AddNorm(residual, layer.post_feedforward_layernorm, None, self._other(residual))
        gate = self._buffer("per_layer_gate", layer.ple.gate.out_features)
        times = self._buffer("per_layer_inputs", self.model.config.num_hidden_layers * gate.shape[1])
        times = times.view(-1, B, gate.shape[1])[config.index]
        self._linear(layer.ple.gate, h, gate, add=add, times=times)
        h = self._buffer("per_layer_out", D)
        self._linear(layer.ple.projection, gate, h)
        return h, AddNorm(add.out, layer.ple.norm, scalar, self._other(add.out))

    def _embed(self) -> None:
        """The token's row, and the per-layer inputs, which are kept as [L, B, ple]."""
        model, config = self.model, self.model.config
        token = self.token.clamp(min=0)
        x = self._buffer("residual_0", config.hidden_size)
        x.copy_(model.embed(token))
        if model.per_layer_model_projection is None:
            return
        context = self._buffer("per_layer_context", model.per_layer_model_projection.out_features)
        model.per_layer_model_projection(x, context)
        inputs = per_layer_inputs(model, context, token)
        self._buffer("per_layer_inputs", context.shape[1]).view(-1, *inputs[:, 0].shape).copy_(inputs.transpose(0, 1))

    def _attend(self, layer: Layer, qkv: Tensor, out: Tensor) -> None:
        config, source = layer.config, layer.config.kv_source
        k, v = (getattr(self.cache, f"layers_{source}_{name}") for name in "kv")
        attention.decode(
            qkv, layer.q_norm, layer.k_norm, self.position, k, v, out,
            rope=self.model.rope[config.layer_type],
            window=self.model.config.sliding_window if config.layer_type == SLIDING else None,
            k_eq_v=config.k_eq_v,
            eps=self.model.config.rms_norm_eps,
        )  # fmt: skip

    def _experts(self, moe: MoE, residual: Tensor, h: Tensor) -> None:
        """h [B, D], the dense branch, becomes the sum of the two."""
        eps = self.model.config.rms_norm_eps
        weights, index = route(moe, residual, self.model.config.top_k_experts, eps)
        x = steps.norm(residual, moe.pre_norm, eps)
        rows = [self._sparse(moe, *row) for row in zip(x.split(1), weights, index, strict=True)]
        add_experts(moe, h, torch.cat(rows), eps)

    def _sparse(self, moe: MoE, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [1, D], weights and index [k] -> [1, D]."""
        y = linear_experts(moe.down, steps.gelu_mul(linear_experts(moe.gate_up, x, index)), index)
        return (y * weights[:, None]).sum(0, keepdim=True).type_as(x)

    def _draw(self, sampling: Sampling) -> None:
        self.token.copy_(self.sample(self.logits, sampling))
        self.history.index_copy_(0, self.count % LAG, self.token[None])
        self.count += 1
        self.position += 1

    def sample(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """logits [B, V] -> [B]."""
        return steps.sample(logits, sampling.temperature, sampling.top_k, sampling.top_p, self.state)

    def _linear(self, linear: Linear, x: Tensor, out: Tensor, **fused: object) -> None:
        self._do(LINEARS, linear, x, out, eps=self.model.config.rms_norm_eps, **fused)

    def _do(self, part: str, work: Callable[..., None], *args: object, **kwargs: object) -> None:
        if self.watch is None:
            work(*args, **kwargs)
        else:
            self.watch(part, lambda: work(*args, **kwargs))

    def _buffer(self, name: str, width: int) -> Tensor:
        """[B, width] in the model's dtype, the same one for the same name."""
        if name not in self._buffers:
            self._buffers[name] = torch.zeros(self.batch_size, width, dtype=self.model.dtype, device=self.model.device)
        return self._buffers[name]

    def _other(self, residual: Tensor) -> Tensor:
        """The residual is read from one buffer and written to the other."""
        one, two = (self._buffer(f"residual_{i}", residual.shape[1]) for i in (0, 1))
        return two if residual is one else one


def per_layer_inputs(model: PackedModel, context: Tensor, tokens: Tensor) -> Tensor:
    """context [T, L ple], the projected embeddings of tokens [T] -> [T, L, ple]."""
    config = model.config
    shape = (len(tokens), config.num_hidden_layers, config.hidden_size_per_layer_input)
    norm = model.per_layer_projection_norm
    context = steps.norm((context * config.hidden_size**-0.5).view(shape), norm, config.rms_norm_eps)
    return (context + look_up(model.embed_tokens_per_layer, tokens).view(shape)) * 2**-0.5


def route(moe: MoE, x: Tensor, top_k: int, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D], the residual -> weights [T, k] (at least float32), experts [T, k]."""
    wide = moe.router_scale.dtype
    h = F.rms_norm(x.to(wide), moe.router_scale.shape, moe.router_scale, eps) * x.shape[-1] ** -0.5
    probs = F.linear(h.to(moe.router.dtype), moe.router).softmax(dim=-1, dtype=wide)
    weights, index = probs.topk(top_k)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * moe.per_expert_scale[index], index


def add_experts(moe: MoE, dense: Tensor, sparse: Tensor, eps: float) -> None:
    """dense [T, D] becomes the sum of the two branches, each normed."""
    torch.add(steps.norm(dense, moe.dense_norm, eps), steps.norm(sparse, moe.sparse_norm, eps), out=dense)
