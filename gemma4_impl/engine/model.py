"""The text model's weights as the engine takes them: streamed from a checkpoint, q/k/v and gate/up put together."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl.checkpoint import Weights, check_fits, open_checkpoint, tracked
from gemma4_impl.config import LayerConfig, TextConfig
from gemma4_impl.engine.linear import Linear, weight_bytes
from gemma4_impl.kernels import cuda, steps
from gemma4_impl.model.decoder import Gemma4, ScaledEmbedding
from gemma4_impl.model.rope import RotaryEmbedding
from gemma4_impl.quant.cuda import CudaWeight
from gemma4_impl.quant.modules import QuantizedEmbedding
from gemma4_impl.quant.pack import pack_weight
from gemma4_impl.quant.packed import DequantizedWeight, PackedWeight
from gemma4_impl.quant.tensor import QuantizedTensor

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class MoE:
    """The sparse branch of a layer."""

    router: Tensor
    """[E, D]."""
    router_scale: Tensor
    """[D], in float32 at least, times D ** -0.5."""
    per_expert_scale: Tensor
    """[E]."""
    gate_up: Tensor | PackedWeight
    """[E, 2 F, D]."""
    down: Tensor | PackedWeight
    """[E, D, F]."""
    pre_norm: Tensor
    dense_norm: Tensor
    sparse_norm: Tensor


@dataclass(frozen=True)
class PerLayerInput:
    """A layer's last branch: gate, times the per-layer input, projection, norm."""

    gate: Linear
    projection: Linear
    norm: Tensor


@dataclass(frozen=True)
class Layer:
    """One decoder layer; names are those of `DecoderLayer`, and of its parts."""

    config: LayerConfig
    qkv: Linear
    """q, k, v; q and k where v comes from k; q alone in a KV-shared layer."""
    q_norm: Tensor
    k_norm: Tensor | None
    o_proj: Linear
    gate_up: Linear
    down_proj: Linear
    input_layernorm: Tensor
    post_attention_layernorm: Tensor
    pre_feedforward_layernorm: Tensor
    post_feedforward_layernorm: Tensor
    layer_scalar: Tensor
    moe: MoE | None
    ple: PerLayerInput | None


@dataclass(frozen=True)
class PackedModel:
    """All that a decode step reads, but for the cache. `from_pretrained` makes one."""

    config: TextConfig
    dtype: torch.dtype
    device: torch.device
    embed_tokens: ScaledEmbedding | QuantizedEmbedding
    layers: tuple[Layer, ...]
    norm: Tensor
    lm_head: Linear
    rope: dict[str, RotaryEmbedding]
    embed_tokens_per_layer: ScaledEmbedding | QuantizedEmbedding | None = None
    per_layer_model_projection: Linear | None = None
    per_layer_projection_norm: Tensor | None = None
    nbytes: int = field(default=0)
    """Of all weights, those that are looked up among them."""
    nbytes_read: int = field(default=0)
    """Of the weights that one decode step at batch 1 reads: `top_k_experts` of the experts, one row of an embedding."""

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, D]."""
        return look_up(self.embed_tokens, tokens)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> "PackedModel":
        """Loads what `open_checkpoint` opens. Raises as it does, and as `from_weights`."""
        return cls.from_weights(open_checkpoint(path), dtype, device, progress)

    @classmethod
    @torch.inference_mode()
    def from_weights(
        cls,
        weights: Weights,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> "PackedModel":
        """Layer by layer: peak memory is the packed model and its largest tensor, as it comes and packed. `dtype`, to
        compute in, defaults to the checkpoint's own. Raises CheckpointError for tensors that do not fit."""
        return _Loader(weights, dtype or weights.dtype, torch.device(device)).model(progress)


class _Loader:
    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device):
        self.weights, self.dtype, self.device = weights, dtype, device
        self.config = weights.config
        with torch.device("meta"):
            self.skeleton = Gemma4(self.config)
        check_fits(self.skeleton, weights)
        self.nbytes = self.nbytes_read = 0

    def model(self, progress: bool) -> PackedModel:
        config, parts = self.config, {}
        rope = {}
        for layer in config.layers:
            if layer.layer_type not in rope:
                rope[layer.layer_type] = RotaryEmbedding(layer.head_dim, config.rope_parameters[layer.layer_type])
                rope[layer.layer_type].reset(self.dtype, self.device)
                self._count(rope[layer.layer_type].inv_freq.nbytes)
        if config.hidden_size_per_layer_input:
            parts["embed_tokens_per_layer"] = self._embedding("embed_tokens_per_layer")
            parts["per_layer_model_projection"] = self._linear("per_layer_model_projection.weight")
            parts["per_layer_projection_norm"] = self._tensor("per_layer_projection_norm.weight")
        embed_tokens = self._embedding("embed_tokens")
        head = self._head(embed_tokens)
        layers = tuple(self._layer(layer) for layer in tracked(config.layers, "loading", progress))
        norm = self._tensor("norm.weight")
        return PackedModel(
            config, self.dtype, self.device, embed_tokens, layers, norm, head, rope,
            nbytes=self.nbytes, nbytes_read=self.nbytes_read, **parts,
        )  # fmt: skip

    def _layer(self, layer: LayerConfig) -> Layer:
        prefix = f"layers.{layer.index}."
        attn, mlp = prefix + "self_attn.", prefix + "mlp."
        projections = "q" if layer.kv_shared else "qk" if layer.k_eq_v else "qkv"
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        return Layer(
            config=layer,
            qkv=self._linear(*(f"{attn}{p}_proj.weight" for p in projections)),
            q_norm=self._tensor(attn + "q_norm.weight"),
            k_norm=None if layer.kv_shared else self._tensor(attn + "k_norm.weight"),
            o_proj=self._linear(attn + "o_proj.weight"),
            gate_up=self._linear(mlp + "gate_proj.weight", mlp + "up_proj.weight", gated=True),
            down_proj=self._linear(mlp + "down_proj.weight"),
            **{f"{name}_layernorm": self._tensor(f"{prefix}{name}_layernorm.weight") for name in norms},
            layer_scalar=self._tensor(prefix + "layer_scalar"),
            moe=self._moe(prefix) if self.config.enable_moe_block else None,
            ple=self._per_layer_input(prefix) if self.config.hidden_size_per_layer_input else None,
        )

    def _moe(self, prefix: str) -> MoE:
        wide = torch.promote_types(self.dtype, torch.float32)
        return MoE(
            router=self._tensor(prefix + "router.proj.weight"),
            router_scale=self._tensor(prefix + "router.scale").to(wide),
            per_expert_scale=self._tensor(prefix + "router.per_expert_scale"),
            gate_up=self._experts(prefix + "experts.gate_up_proj"),
            down=self._experts(prefix + "experts.down_proj"),
            pre_norm=self._tensor(prefix + "pre_feedforward_layernorm_2.weight"),
            dense_norm=self._tensor(prefix + "post_feedforward_layernorm_1.weight"),
            sparse_norm=self._tensor(prefix + "post_feedforward_layernorm_2.weight"),
        )

    def _per_layer_input(self, prefix: str) -> PerLayerInput:
        return PerLayerInput(
            gate=self._linear(prefix + "per_layer_input_gate.weight"),
            projection=self._linear(prefix + "per_layer_projection.weight"),
            norm=self._tensor(prefix + "post_per_layer_input_norm.weight"),
        )

    def _tensor(self, name: str) -> Tensor:
        tensor = self.weights.tensor(name).to(device=self.device, dtype=self.dtype)
        self._count(tensor.nbytes)
        return tensor

    def _linear(self, *names: str, gated: bool = False) -> Linear:
        found = [self.weights.quantized(name) for name in names]
        if all(isinstance(weight, QuantizedTensor) for weight in found):
            linear = packed_linear(found, self.dtype, self.device, gated)
        elif not any(isinstance(weight, QuantizedTensor) for weight in found):
            linear = Linear([self._stacked(names)], gated)
        else:
            parts = [self._part(name, weight) for name, weight in zip(names, found, strict=True)]
            linear = Linear(parts, gated)
        self._count(linear.nbytes)
        return linear

    def _part(self, name: str, weight: QuantizedTensor | None) -> Tensor | PackedWeight:
        if weight is not None:
            return pack_weight(weight, self.dtype, self.device)
        return self.weights.tensor(name).to(device=self.device, dtype=self.dtype)

    def _stacked(self, names: Sequence[str]) -> Tensor:
        """The rows of dense weights, one after the other."""
        if len(names) == 1:
            return self.weights.tensor(names[0]).to(device=self.device, dtype=self.dtype)
        shapes = [self.weights.shape(name) for name in names]
        rows = [shape[0] for shape in shapes]
        out = torch.empty(sum(rows), shapes[0][1], dtype=self.dtype, device=self.device)
        for name, part in zip(names, out.split(rows), strict=True):
            part.copy_(self.weights.tensor(name))
        return out

    def _experts(self, name: str) -> Tensor | PackedWeight:
        stack = self._part(name, self.weights.quantized(name))
        size = weight_bytes(stack)
        self._count(size, size * self.config.top_k_experts // self.config.num_experts)
        return stack

    def _embedding(self, name: str) -> ScaledEmbedding | QuantizedEmbedding:
        skeleton = getattr(self.skeleton, name)
        weight = self.weights.quantized(name + ".weight")
        if weight is not None:
            table = QuantizedEmbedding(DequantizedWeight(weight.to(self.device), self.dtype), skeleton.scale)
        else:
            table = skeleton
            table.weight = torch.nn.Parameter(
                self.weights.tensor(name + ".weight").to(device=self.device, dtype=self.dtype), requires_grad=False
            )
        size = weight_bytes(table.weight)
        self._count(size, size // skeleton.num_embeddings)
        return table

    def _head(self, embedding: ScaledEmbedding | QuantizedEmbedding) -> Linear:
        if not self.config.tie_word_embeddings:
            return self._linear(HEAD)
        if isinstance(embedding, ScaledEmbedding):
            head, shared = Linear([embedding.weight]), True
        else:
            head = packed_linear([embedding.weight.quantized], self.dtype, self.device)
            codes = getattr(head.parts[0], "qdata", None)
            shared = codes is not None and codes.data_ptr() == embedding.weight.qdata.data_ptr()
        if shared:  # a row of it was counted
            self._count(0, head.nbytes - head.nbytes // self.config.vocab_size)
        else:
            self._count(head.nbytes)
        return head

    def _count(self, size: int, read: int | None = None) -> None:
        self.nbytes += size
        self.nbytes_read += size if read is None else read


def look_up(table: ScaledEmbedding | QuantizedEmbedding, tokens: Tensor) -> Tensor:
    """tokens [T] -> rows [T, D], scaled."""
    weight, factor = table.weight, table.scale[table.weight.dtype]
    if isinstance(weight, Tensor):
        return steps.embed(tokens, weight, None, None, 16, 0, factor, weight.dtype)
    return steps.embed(
        tokens, weight.qdata, weight.scale, weight.zero, weight.bits, weight.offset, factor, weight.dtype
    )


def packed_linear(
    weights: Sequence[QuantizedTensor], dtype: torch.dtype, device: torch.device, gated: bool = False
) -> Linear:
    """Weights on the same input, packed for the device."""
    weights = [weight.to(device) for weight in weights]
    if device.type == "cuda" and dtype == torch.bfloat16 and cuda.available(weights[0].device.index):
        with contextlib.suppress(ValueError):  # of weights that do not go together, or not at all
            one = CudaWeight(weights[0], dtype, gated=weights[1]) if gated else CudaWeight.stacked(weights, dtype)
            return Linear([one], gated)
    return Linear([pack_weight(weight, dtype, device) for weight in weights], gated)
