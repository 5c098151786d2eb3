"""The model's modules with packed weights in the place of dense ones; they compute what their namesakes do."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl.model.moe import Experts
from gemma4_impl.quant.packed import DequantizedWeight, PackedWeight


class QuantizedLinear(nn.Module):
    """x @ W.T, without a bias."""

    def __init__(self, weight: PackedWeight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        return self.weight.linear(x)


class QuantizedEmbedding(nn.Module):
    """Looked-up rows, dequantized and rounded to the model's dtype, times a scale that is rounded to it too."""

    def __init__(self, weight: DequantizedWeight, scale: Mapping[torch.dtype, float]):
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.scale = weight, dict(scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens, of any shape -> [..., embedding_dim]."""
        return self.weight.rows(tokens) * self.scale[self.weight.dtype]


class QuantizedExperts(Experts):
    """Experts of which one stack of weights is packed, or both. Runs eagerly only."""

    def __init__(self, experts: Experts):
        nn.Module.__init__(self)
        self.num_experts = experts.num_experts
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """As `Experts.forward`. Raises NotImplementedError when it is being compiled or exported."""
        if torch.compiler.is_compiling():
            raise NotImplementedError("quantized experts run eagerly only; export or compile the dense model")
        return super().forward(x, weights, index)

    def _linear(self, x: Tensor, weight: Tensor | PackedWeight, expert: int) -> Tensor:
        return weight.linear(x, expert) if isinstance(weight, PackedWeight) else F.linear(x, weight[expert])
