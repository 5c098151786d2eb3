"""Linears of four- and eight-bit weights on NVIDIA GPUs: README.md has the format, the bytes and what was tried."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma4_impl.kernels.int4_linear import few, matvec
from gemma4_impl.kernels.int4_linear.matvec import AddNorm, can_norm
from gemma4_impl.kernels.int4_linear.tiles import Tiles

if TYPE_CHECKING:
    from gemma4_impl.quant.cuda import CudaWeight

__all__ = ["AddNorm", "Tiles", "experts_linear", "fused_linear", "int4_linear"]


def int4_linear(x: Tensor, weight: "CudaWeight", expert: int | None = None) -> Tensor:
    """x [..., K] bfloat16 on a GPU -> x @ W.T [..., N]: by one kernel for up to 16 tokens, by cuBLAS for more.

    For one token an |x| of 2^31 or more (2^27 times eight bits) overflows, for 2 to 16 a scale of that size.
    A weight must not be used on two streams at once, nor any weights of a device with 2 to 16 tokens: they share
    scratch. Raises ValueError for another K, RuntimeError if the first product with 2 to 16 tokens is captured."""
    w = weight.matrix(expert)
    if x.shape[-1] != w.K:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {w.K}")
    rows = x.reshape(-1, w.K).contiguous()
    out = torch.ops.gemma4.int4_linear(rows, w.tiles, w.scratch, w.N, w.group, w.offset, w.has_zero, w.split)
    return out.view(*x.shape[:-1], w.N)


@torch.library.custom_op("gemma4::int4_linear", mutates_args=())
def _int4_linear(
    x: Tensor, tiles: Tensor, scratch: Tensor, N: int, group: int, offset: int, has_zero: bool, split: bool
) -> Tensor:
    M, K = x.shape
    weight = Tiles(tiles, scratch, N, K, group, offset, has_zero, split)
    out = x.new_empty(M, N)
    if M == 1:
        matvec.matvec(weight, x, out)
    elif M <= few.MOST:
        few.few(weight, x, out)
    elif M:
        few.many(weight, x, out)
    return out


@_int4_linear.register_fake
def _(
    x: Tensor, tiles: Tensor, scratch: Tensor, N: int, group: int, offset: int, has_zero: bool, split: bool
) -> Tensor:
    return x.new_empty(x.shape[0], N)


def fused_linear(
    weight: "CudaWeight",
    x: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    add: AddNorm | None = None,
    act: str | None = None,
    times: Tensor | None = None,
    softcap: float | None = None,
    alone: bool = False,
) -> None:
    """One token [1, K] -> out [1, N] (N / 2 with `gelu_mul`), bfloat16 or float32, in one kernel that is launched while
    the one before it still runs. `naive.fused_linear` is the definition; |x|, normed, as in `int4_linear`.

    Args:
        add: what x is added to first, normed.
        norm: [K], the weight of the norm that follows.
        act: "gelu_mul" of a weight that is `gated`: gelu(gate) * up; "gelu": gelu(y) * `times` [1, N].
        softcap: cap * tanh(y / cap).
        alone: no two blocks of threads on a multiprocessor, for after a kernel that leaves some of them empty.
    Raises ValueError for shapes, dtypes or an activation that do not fit."""
    w = weight.matrix()
    N = w.N // 2 if act == "gelu_mul" else w.N
    if x.shape != (1, w.K) or out.shape != (1, N):
        raise ValueError(f"x {list(x.shape)} and out {list(out.shape)}: expected [1, {w.K}] and [1, {N}]")
    if (norm is not None or add is not None) and not can_norm(w.K):
        raise ValueError(f"K = {w.K}: a norm takes at most 8192 columns, a multiple of 8")
    if (act == "gelu_mul") != weight.gated or (act == "gelu") != (times is not None):
        raise ValueError("gelu_mul needs a gated weight and gelu needs `times`, and nothing else has them")
    tensors = [x, out, norm, times, *((add.residual, add.post_norm, add.scalar, add.out) if add else ())]
    if any(t is not None and not t.is_contiguous() for t in tensors):
        raise ValueError("all tensors must be contiguous")
    matvec.matvec(w, x, out, norm=norm, eps=eps, add=add, act=act, times=times, softcap=softcap, alone=alone)


def experts_linear(weight: "CudaWeight", x: Tensor, experts: Tensor, out: Tensor) -> None:
    """x [1, K], or [k, K] one for each of `experts` [k] int64 on the GPU, times those of a stack -> out [k, N].

    Raises ValueError for shapes that do not fit."""
    w = weight.stack()
    if x.shape not in ((1, w.K), (len(experts), w.K)) or out.shape != (len(experts), w.N):
        raise ValueError(f"x {list(x.shape)}, out {list(out.shape)}: expected K = {w.K}, N = {w.N}, k = {len(experts)}")
    matvec.matvec(w, x, out, experts=experts)
