"""Linears as the engine multiplies with them: several on one input as one, and the small steps around them fused."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_impl.kernels import steps
from gemma4_impl.kernels.int4_linear import AddNorm, can_norm, fused_linear
from gemma4_impl.quant.cuda import GATED_ROWS, CudaWeight
from gemma4_impl.quant.packed import PackedWeight


class Linear:
    """x @ W.T, W being the rows of several weights [n, K] one after the other; `gated`: they are a gate's and as many
    of an up-projection, and gelu_tanh(gate) * up is what comes out."""

    def __init__(self, parts: Sequence[Tensor | PackedWeight], gated: bool = False):
        self.parts, self.gated = tuple(parts), gated
        self.in_features = parts[0].shape[-1]
        self.out_features = sum(part.shape[0] for part in parts) // (2 if gated else 1)
        self.fused = len(parts) == 1 and isinstance(parts[0], CudaWeight)

    @property
    def nbytes(self) -> int:
        return sum(weight_bytes(part) for part in self.parts)

    @property
    def kernels(self) -> set[str]:
        """Names of the ways of computing."""
        return {part.kernel if isinstance(part, PackedWeight) else "dense" for part in self.parts}

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, out_features], gated or not."""
        out = [part.linear(x) if isinstance(part, PackedWeight) else F.linear(x, part) for part in self.parts]
        if not self.gated:
            return out[0] if len(out) == 1 else torch.cat(out, dim=-1)
        if len(out) == 1:
            return steps.gelu_mul(out[0], GATED_ROWS if self.fused else 0)
        return F.gelu(out[0], approximate="tanh") * out[1]

    def __call__(
        self,
        x: Tensor,
        out: Tensor,
        *,
        norm: Tensor | None = None,
        eps: float = 1e-6,
        add: AddNorm | None = None,
        times: Tensor | None = None,
        softcap: float | None = None,
        alone: bool = False,
    ) -> None:
        """x [B, K] -> out [B, out_features]. In this order:

        - add: x ends a branch; what `AddNorm` describes is written to `add.out` and stands in for x.
        - norm [K]: x = rms_norm(x) * norm.
        - the product.
        - times [B, out_features]: out = gelu_tanh(out) * times.
        - softcap: out = tanh(out / softcap) * softcap.

        `alone` as in `fused_linear`."""
        if (
            self.fused
            and len(x) == 1
            and x.is_cuda
            and x.dtype == torch.bfloat16
            and ((norm is None and add is None) or can_norm(self.in_features))
        ):
            act = "gelu_mul" if self.gated else None if times is None else "gelu"
            options = {"act": act, "times": times, "softcap": softcap, "alone": alone}
            fused_linear(self.parts[0], x, out, norm=norm, eps=eps, add=add, **options)
            return
        if add is not None:
            r, normed = steps.add_norm(x, add.residual, add.post_norm, add.scalar, norm, eps)
            add.out.copy_(r)
            x = r if norm is None else normed
        elif norm is not None:
            x = steps.norm(x, norm, eps)
        y = self.product(x)
        if times is not None:
            y = F.gelu(y, approximate="tanh") * times
        if softcap is not None:
            y = torch.tanh(y / softcap) * softcap
        out.copy_(y)


def linear_experts(weight: Tensor | PackedWeight, x: Tensor, index: Tensor) -> Tensor:
    """x [k, K] or [1, K], index [k] on the device -> row i times matrix index[i] of a stack [E, N, K], [k, N]. On a GPU
    nothing waits for the index."""
    if isinstance(weight, Tensor):
        chosen = weight[index]
    elif hasattr(weight, "linear_experts"):
        return weight.linear_experts(x, index)
    elif x.is_cpu:
        rows = x.expand(len(index), -1).split(1)
        return torch.cat([weight.linear(row, e) for row, e in zip(rows, index.tolist(), strict=True)])
    else:
        chosen = weight.quantized[index].dequantize(x.dtype)
    return torch.einsum("kd,knd->kn", x.expand(len(index), -1), chosen)


def weight_bytes(weight: Tensor | PackedWeight) -> int:
    """Of what is multiplied with; a kernel's scratch is not."""
    if isinstance(weight, Tensor):
        return weight.nbytes
    return sum(buffer.nbytes for name, buffer in weight.named_buffers() if name != "scratch")
