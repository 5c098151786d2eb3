"""Who can compute attention: our kernels and PyTorch's, what each of them refuses, and how it is called."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemma4_impl.kernels import cuda
from gemma4_impl.kernels.sdpa import naive

DECODE_TOKENS, DECODE_ROWS = 8, 64
"""Up to so many queries a row, and query rows a kv head, attention is a matter of reading keys: decode."""


@dataclass(frozen=True)
class Case:
    """A kind of call, as far as the choice of a backend depends on it."""

    device: torch.device
    dtype: torch.dtype
    B: int
    N: int
    K: int
    H: int
    T: int
    S: int
    window: int | None
    mask: Literal["causal", "length", "positions", "ends"]
    """What says which keys are seen: the queries are the last of the keys, or of a length on the device; position
    vectors; ends."""
    layout: Literal["packed", "aligned", "any"] = "packed"
    """Aligned: rows of H are contiguous and start at multiples of 16 bytes. Packed: also, a head's keys follow each
    other, and v lies as k does."""

    @property
    def op(self) -> Literal["prefill", "decode"]:
        few = self.T <= DECODE_TOKENS and self.N // self.K * self.T <= DECODE_ROWS
        return "decode" if few and self.mask != "ends" else "prefill"


@dataclass(frozen=True)
class Call:
    """The arguments of `dispatch.sdpa`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_positions: Tensor | None
    k_positions: Tensor | None
    length: Tensor | None
    ends: Tensor | None
    window: int | None
    scale: float

    @functools.cached_property
    def case(self) -> Case:
        (B, N, T, H), (_, K, S, _) = self.q.shape, self.k.shape
        mask = "causal"
        if self.ends is not None:
            mask = "ends"
        elif self.q_positions is not None or self.k_positions is not None:
            mask = "positions"
        elif self.length is not None:
            mask = "length"
        window = None if mask == "causal" and self.window is not None and self.window >= S else self.window
        layout = "any"
        if all(map(_aligned, (self.q, self.k, self.v))):
            packed = self.k.stride() == self.v.stride() and self.k.stride(2) == H
            layout = "packed" if packed else "aligned"
        return Case(self.q.device, self.q.dtype, B, N, K, H, T, S, window, mask, layout)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Of queries and keys, made if they were not given."""
        if self.q_positions is not None and self.k_positions is not None:
            return self.q_positions, self.k_positions
        at, keys = naive.known_positions(self.q, self.k, self.length)
        return (
            at if self.q_positions is None else self.q_positions,
            keys if self.k_positions is None else self.k_positions,
        )


def _aligned(x: Tensor) -> bool:
    return x.stride(3) == 1 and not any(n % 16 for n in (x.data_ptr(), *(s * x.element_size() for s in x.stride()[:3])))


@dataclass(frozen=True)
class Backend:
    refuses: Callable[[Case], str | None]
    """Why it cannot compute a case; None if it can."""
    run: Callable[[Call], Tensor]


def _cuda_refuses(case: Case) -> str | None:
    if case.device.type != "cuda" or not cuda.available(case.device.index or 0):
        return "needs a Hopper GPU and the package cuda-bindings"
    if case.dtype != torch.bfloat16:
        return f"takes bfloat16, not {case.dtype}"
    if case.H not in (64, 128, 256, 512):
        return f"head dim {case.H} is not 64, 128, 256 or 512"
    if case.layout == "any":
        return "needs contiguous rows at multiples of 16 bytes"
    if case.op == "decode" and case.layout != "packed":
        return "needs the keys of a head one after another"
    return None


def _cuda(call: Call) -> Tensor:
    if call.case.op == "decode":
        from gemma4_impl.kernels.sdpa.decode import decode

        if call.case.mask == "positions" or call.k_positions is not None:
            at, keys = call.positions()
            return decode(
                call.q, call.k, call.v, None, q_positions=at, k_positions=keys, window=call.window, scale=call.scale
            )
        length = call.length
        if length is None:
            B, _, S, _ = call.k.shape
            length = torch.full((B,), S, dtype=torch.int32, device=call.q.device)
        return decode(call.q, call.k, call.v, length, window=call.window, scale=call.scale)
    from gemma4_impl.kernels.sdpa.prefill import prefill

    at, keys = (None, None) if call.case.mask == "causal" else call.positions()
    return prefill(
        call.q, call.k, call.v, q_positions=at, k_positions=keys, ends=call.ends, window=call.window, scale=call.scale
    )


def _triton_refuses(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "needs a GPU"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if case.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"does not compute {case.dtype}"
    return None


def _triton(call: Call) -> Tensor:
    from gemma4_impl.kernels.sdpa import triton

    rest = {"window": call.window, "scale": call.scale}
    if call.case.op == "decode":
        if call.q_positions is None:
            return triton.decode(call.q, call.k, call.v, call.length, k_positions=call.k_positions, **rest)
        at, keys = call.positions()
        return triton.decode(call.q, call.k, call.v, q_positions=at, k_positions=keys, **rest)
    at, keys = (call.q_positions, call.k_positions) if call.length is None else call.positions()
    return triton.prefill(call.q, call.k, call.v, q_positions=at, k_positions=keys, ends=call.ends, **rest)


def _torch_refuses(kind: str) -> Callable[[Case], str | None]:
    def refuses(case: Case) -> str | None:
        if case.device.type != "cuda":
            return "needs a GPU"
        if kind == "efficient" and case.dtype == torch.float64:
            return "does not compute float64"
        if kind not in ("cudnn", "flash"):
            return None
        if case.H > 256:
            return f"head dim {case.H} is more than 256"
        if case.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16, not {case.dtype}"
        if case.window is not None or case.mask != "causal":
            return "knows no window, lengths, positions or ends"
        if case.T not in (1, case.S):
            return f"{case.T} queries are neither one nor as many as the {case.S} keys"
        return None

    return refuses


def _torch(kind: SDPBackend | None) -> Callable[[Call], Tensor]:
    def run(call: Call) -> Tensor:
        q, k, v, case = call.q, call.k, call.v, call.case
        mask = visible = None
        if case.window is not None or case.mask != "causal" or case.T not in (1, case.S):
            visible = visible_keys(call)
            mask = visible[:, None]
        if kind is SDPBackend.EFFICIENT_ATTENTION and case.K != case.N:
            k, v = (x.repeat_interleave(case.N // case.K, dim=1) for x in (k, v))
        with sdpa_kernel(kind) if kind is not None else sdpa_kernel(list(_ANY)):
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None and case.T > 1,
                scale=call.scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        # A row that sees nothing is zero, whatever the backend makes of it.
        return out if visible is None else out.masked_fill(~visible.any(-1)[:, None, :, None], 0)

    return run


def visible_keys(call: Call) -> Tensor:
    """bool [B, T, S], True where a query sees a key."""
    at, keys = call.positions()
    at, keys = at[..., None], keys[:, None]
    visible = (keys >= 0) & (keys <= (at if call.ends is None else call.ends[..., None])) & (at >= 0)
    return visible if call.window is None else visible & (keys > at - call.window)


def _naive(call: Call) -> Tensor:
    at, keys = call.positions()
    return naive.sdpa(call.q, call.k, call.v, at, keys, window=call.window, ends=call.ends, scale=call.scale)


_ANY = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
BACKENDS = {
    "cuda": Backend(_cuda_refuses, _cuda),
    "triton": Backend(_triton_refuses, _triton),
    "cudnn": Backend(_torch_refuses("cudnn"), _torch(SDPBackend.CUDNN_ATTENTION)),
    "flash": Backend(_torch_refuses("flash"), _torch(SDPBackend.FLASH_ATTENTION)),
    "efficient": Backend(_torch_refuses("efficient"), _torch(SDPBackend.EFFICIENT_ATTENTION)),
    "math": Backend(_torch_refuses("math"), _torch(SDPBackend.MATH)),
    "torch": Backend(
        lambda case: "is PyTorch's own choice where there is no CUDA" if case.device.type == "cuda" else None,
        _torch(None),
    ),
    "naive": Backend(lambda case: None, _naive),
}
"""By name."""
