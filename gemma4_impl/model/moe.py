"""The sparse branch of a mixture-of-experts layer: router and experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.config import TextConfig


class Router(nn.Module):
    """Chooses `top_k_experts` experts for each token and weighs them."""

    def __init__(self, config: TextConfig, prefix: str):
        super().__init__()
        self.prefix, self.top_k, self.eps = prefix, config.top_k_experts, config.rms_norm_eps
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D], the residual itself, un-normed -> weights [B, T, k] (at least float32), experts [B, T, k]."""
        probs = self.probabilities(x)
        index = taps.route(self.prefix, probs.topk(self.top_k).indices)
        return self.weigh(probs.gather(-1, index), index), index

    def probabilities(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, E], at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = F.rms_norm(x.to(wide), x.shape[-1:], self.scale.to(wide), self.eps) * x.shape[-1] ** -0.5
        probs = self.proj(x.to(self.proj.weight.dtype)).softmax(dim=-1, dtype=wide)
        return taps.tap(self.prefix, "router", probs)

    def weigh(self, probs: Tensor, index: Tensor) -> Tensor:
        """The chosen experts' probabilities and indices [B, T, k] -> their weights."""
        return probs / probs.sum(dim=-1, keepdim=True) * self.per_expert_scale[index]


class Experts(nn.Module):
    """E gated MLPs in two stacked weights; each token passes through its k chosen ones."""

    def __init__(self, config: TextConfig):
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [B, T, D], weights and index [B, T, k] -> [B, T, D]. Tokens are sorted by expert, so that each expert
        is one matrix product; the weighted sum is in the dtype of `weights`."""
        if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
            return self._static(x, weights, index)
        k, flat = index.shape[-1], index.flatten()
        order = flat.argsort(stable=True)
        token = order // k
        y = self._mlp(x.flatten(0, 1)[token], flat[order])
        y = y * weights.flatten()[order, None]
        out = torch.zeros_like(x.flatten(0, 1), dtype=y.dtype).index_add_(0, token, y)
        return out.type_as(x).view_as(x)

    def _mlp(self, x: Tensor, expert: Tensor) -> Tensor:
        """x [n, D] sorted by `expert` [n] -> [n, D]."""
        counts = (expert[:, None] == torch.arange(self.num_experts, device=x.device)).sum(0)
        if torch.compiler.is_compiling():
            # One operator with the group bounds on the device: no data-dependent control flow in a graph.
            ends = counts.cumsum(0).to(torch.int32)
            gate, up = F.grouped_mm(x, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
            h = F.gelu(gate, approximate="tanh") * up
            return F.grouped_mm(h, self.down_proj.transpose(1, 2), offs=ends)
        out = []
        for e, rows in enumerate(x.split(counts.tolist())):
            if len(rows):
                gate, up = self._linear(rows, self.gate_up_proj, e).chunk(2, dim=-1)
                out.append(self._linear(F.gelu(gate, approximate="tanh") * up, self.down_proj, e))
        return torch.cat(out)

    def _linear(self, x: Tensor, weight: Tensor, expert: int) -> Tensor:
        return F.linear(x, weight[expert])

    def _static(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """The same for a graph in a dtype that grouped_mm refuses there: a single token's own experts are gathered,
        several tokens go through all experts, the unchosen ones with weight 0."""
        if index.shape[1] == 1:
            gate_up, down = self.gate_up_proj[index[:, 0]], self.down_proj[index[:, 0]]
        else:
            gate_up, down = self.gate_up_proj[None], self.down_proj[None]
            weights = weights.new_zeros(*index.shape[:2], down.shape[1]).scatter(-1, index, weights)
        gate, up = torch.einsum("btd,bkfd->btkf", x, gate_up).chunk(2, dim=-1)
        h = F.gelu(gate, approximate="tanh") * up * weights[..., None]
        return torch.einsum("btkf,bkdf->btd", h.type_as(x), down)
