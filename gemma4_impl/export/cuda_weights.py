"""Quantized weights as the CUDA graphs hold them: codes and scales as they are stored, read by operators of ours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma4_impl.export.source import quantized_weights
from gemma4_impl.kernels.int4_linear import operators as linears
from gemma4_impl.model.decoder import Gemma4, ScaledEmbedding
from gemma4_impl.model.moe import Experts
from gemma4_impl.quant.tensor import QuantizedTensor


class QuantizedLinear(nn.Module):
    """x @ W.T with codes and scales as they are stored."""

    def __init__(self, weight: QuantizedTensor):
        super().__init__()
        self.bits, self.offset = weight.bits, weight.offset
        _keep(self, weight)

    def forward(self, x: Tensor) -> Tensor:
        return linears.quantized_linear(x, self.qdata, self.scale, self.zero, self.bits, self.offset)


class QuantizedEmbedding(nn.Module):
    """Rows dequantized as they are looked up, and scaled: element by element, which a compiler makes one kernel of."""

    def __init__(self, weight: QuantizedTensor, scale: float, dtype: torch.dtype):
        super().__init__()
        self.bits, self.offset, self.factor, self.dtype = weight.bits, weight.offset, scale, dtype
        _keep(self, weight)

    def forward(self, tokens: Tensor) -> Tensor:
        codes = self.qdata[tokens]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        rows = (codes.float() - self.offset).unflatten(-1, (self.scale.shape[-1], -1))
        rows = rows * self.scale[tokens].float()[..., None]
        if self.zero is not None:
            rows = rows + self.zero[tokens].float()[..., None]
        return rows.flatten(-2).to(self.dtype) * self.factor


class QuantizedStack(nn.Module):
    """The same matrix of every expert, [E, N, K]."""

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype):
        super().__init__()
        self.bits, self.offset, self.dtype = weight.bits, weight.offset, dtype
        _keep(self, weight)

    def dense(self) -> Tensor:
        return linears.dequantize(self.qdata, self.scale, self.zero, self.bits, self.offset, self.dtype)

    def chosen(self, x: Tensor, index: Tensor) -> Tensor:
        """x [1 or k, K], index [k] -> [k, N]."""
        return linears.quantized_experts(x, self.qdata, self.scale, self.zero, self.bits, self.offset, index)


class ProgramExperts(Experts):
    """A single token's own experts are read as they are stored. For several tokens quantized stacks are dequantized and
    all experts computed: ExecuTorch's CUDA runtime has no grouped product, nor AOTInductor's before PyTorch 2.13."""

    def __init__(self, experts: Experts, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.num_experts = experts.num_experts
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, "quantized", {}).get(name)
            setattr(self, f"{name}_stack", getattr(experts, name) if weight is None else QuantizedStack(weight, dtype))

    @property
    def gate_up_proj(self) -> Tensor:
        return _dense(self.gate_up_proj_stack)

    @property
    def down_proj(self) -> Tensor:
        return _dense(self.down_proj_stack)

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        if x.shape[1] > 1:
            return self._static(x, weights, index)
        x, weights, index = x[0], weights[0, 0], index[0, 0]
        gate, up = _chosen(self.gate_up_proj_stack, x, index).chunk(2, dim=-1)
        h = F.gelu(gate, approximate="tanh") * up
        y = _chosen(self.down_proj_stack, h, index)
        return (y * weights[:, None]).sum(0).type_as(x)[None, None]


def place_weights(model: Gemma4) -> None:
    """Replaces the modules of quantized weights by ones that hold codes and scales, and those of experts. A tied head
    has the embedding's."""
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    for path in dict.fromkeys([*experts, *(name.rpartition(".")[0] for name in quantized_weights(model))]):
        module, dtype = model.get_submodule(path), model.dtype
        if isinstance(module, Experts):
            new = ProgramExperts(module, dtype)
        elif isinstance(module, ScaledEmbedding):
            new = QuantizedEmbedding(module.quantized["weight"], module.scale[dtype], dtype)
        else:
            new = QuantizedLinear(module.quantized["weight"])
        model.set_submodule(path, new)


def _keep(module: nn.Module, weight: QuantizedTensor) -> None:
    for name in ("qdata", "scale", "zero"):
        module.register_buffer(name, getattr(weight, name))


def _dense(stack: Tensor | QuantizedStack) -> Tensor:
    return stack if isinstance(stack, Tensor) else stack.dense()


def _chosen(stack: Tensor | QuantizedStack, x: Tensor, index: Tensor) -> Tensor:
    if not isinstance(stack, Tensor):
        return stack.chosen(x, index)
    return torch.einsum("kd,knd->kn", x.expand(index.shape[0], -1), stack[index])
