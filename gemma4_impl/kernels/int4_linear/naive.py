"""The definition of the four-bit linears: dequantize, multiply; and of the norms and activations fused with them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_impl.quant.tensor import QuantizedTensor


def int4_linear(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """x [..., K] -> x @ W.T [..., N], with W dequantized and rounded to x's dtype."""
    return F.linear(x, weight.dequantize(x.dtype))


def fused_linear(
    weight: Tensor,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    post_norm: Tensor | None = None,
    scalar: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    act: str | None = None,
    times: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A dense weight [N, K] and x [..., K] -> (output, what x became before `norm`), step by step as the model's
    modules compute it. `gelu_mul` takes rows that are 8 of the gate and 8 of up in turn."""
    if residual is not None:
        x = residual + F.rms_norm(x, x.shape[-1:], post_norm, eps)
        x = x if scalar is None else x * scalar
    r = x
    if norm is not None:
        x = F.rms_norm(x, x.shape[-1:], norm, eps)
    y = F.linear(x, weight)
    if act == "gelu_mul":
        gate, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
        y = F.gelu(gate.flatten(-2), approximate="tanh") * up.flatten(-2)
    elif act == "gelu":
        y = F.gelu(y, approximate="tanh") * times
    if softcap is not None:
        y = torch.tanh(y / softcap) * softcap
    return y, r
