"""Attention as the PyTorch operators `gemma4::sdpa_prefill` and `gemma4::sdpa_decode`.

torch.export keeps them whole; torch.compile and AOTInductor take in their Triton kernels. On the CPU they are
`naive.sdpa`."""

from torch import Tensor
from torch.library import custom_op, triton_op

from gemma4_impl.kernels.sdpa import naive


@triton_op("gemma4::sdpa_prefill", mutates_args=())
def sdpa_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    ends: Tensor | None = None,
    window: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`triton.prefill`, with its arguments."""
    if q.device.type == "cpu":
        at, keys = naive.known_positions(q, k)
        at, keys = at if q_positions is None else q_positions, keys if k_positions is None else k_positions
        return _naive(q, k, v, at, keys, ends, window, scale)
    from gemma4_impl.kernels.sdpa import triton

    return triton.prefill(
        q, k, v, q_positions=q_positions, k_positions=k_positions, ends=ends, window=window, scale=scale
    )


@triton_op("gemma4::sdpa_decode", mutates_args=())
def sdpa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    k_positions: Tensor | None = None,
    window: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`triton.decode`, with its arguments."""
    if q.device.type == "cpu":
        at, keys = naive.known_positions(q, k, length)
        return _naive(q, k, v, at, keys if k_positions is None else k_positions, None, window, scale)
    from gemma4_impl.kernels.sdpa import triton

    return triton.decode(q, k, v, length, k_positions=k_positions, window=window, scale=scale)


@custom_op("gemma4::sdpa_naive", mutates_args=())
def _naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    ends: Tensor | None = None,
    window: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    return naive.sdpa(q, k, v, q_positions, k_positions, ends=ends, window=window, scale=scale)


@sdpa_prefill.register_fake
@sdpa_decode.register_fake
@_naive.register_fake
def _(q: Tensor, *_: object, **__: object) -> Tensor:
    return naive.empty_out(q)
