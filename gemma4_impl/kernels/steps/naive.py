"""The small steps between matrix products and attention, in plain PyTorch: what the kernels compute, by definition.

They are the model's own operations in the model's order, so that every rounding is where the model has it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma4_impl.model.rope import apply_rotary
from gemma4_impl.model.sampler import allowed
from gemma4_impl.quant.tensor import QuantizedTensor


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_norm(
    h: Tensor, residual: Tensor, post_norm: Tensor, scalar: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """r = (residual + norm(h, post_norm)) * scalar, and norm(r, weight); without a weight the second is empty."""
    r = residual + norm(h, post_norm, eps)
    if scalar is not None:
        r = r * scalar
    return r, r.new_empty(0) if weight is None else norm(r, weight, eps)


def qkv_norm_rope(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    q_norm: Tensor,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    slots: Tensor | None,
    eps: float,
) -> Tensor:
    """Norms and turns q; does the same to k, norms v without a weight, and writes both into their cache slots."""
    if k is not None:
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        k_cache[rows, :, slots] = apply_rotary(norm(k, k_norm, eps), cos, sin)
        v_cache[rows, :, slots] = norm(v, None, eps)
    return apply_rotary(norm(q, q_norm, eps), cos, sin)


def gelu_mul(gate_up: Tensor, interleave: int) -> Tensor:
    """gelu_tanh(gate) * up; columns are gate | up, or runs of `interleave` of the one and the other in turn."""
    if interleave:
        gate, up = (t.flatten(-2) for t in gate_up.unflatten(-1, (-1, 2, interleave)).unbind(-2))
    else:
        gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def embed(
    tokens: Tensor,
    table: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    offset: int,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the table in `dtype`, times a factor that is one of its numbers; a row of NaN for an id outside it."""
    known = (tokens >= 0) & (tokens < table.shape[0])
    ids = tokens.where(known, 0)
    if scale is None:
        rows = F.embedding(ids, table)
    else:
        rows = QuantizedTensor(table, scale, zero, bits, offset)[ids.flatten()].dequantize(dtype)
        rows = rows.view(*ids.shape, -1)
    return (rows * factor).masked_fill(~known[..., None], torch.nan)


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, state: Tensor) -> Tensor:
    """`gemma4_impl.model.sampler.sample` with the random numbers of a counter, which a graph can go on counting."""
    logits = logits.float()
    scores = logits
    if temperature > 0:
        if top_k is not None or top_p is not None:
            scores = logits.masked_fill(~allowed(logits, temperature, top_k, top_p), -torch.inf)
        scores = scores + temperature * gumbel(*logits.shape, state)
        state[1] += 1
    return torch.where(logits.amax(dim=-1) > -torch.inf, scores.argmax(dim=-1), -1)


def gumbel(B: int, V: int, state: Tensor) -> Tensor:
    """Gumbel variates [B, V]: -log(-log(1 - u)), u = (random + 1) / 2^32, random the first word of Philox-4x32-10 under
    the seed state[0], its counter being (id, row, low and high word of state[1])."""
    seed, count = state.unbind()
    zero = torch.zeros(B, V, dtype=torch.int64, device=state.device)
    ids, rows = torch.arange(V, device=state.device), torch.arange(B, device=state.device)[:, None]
    # As a word, and no index any more: Inductor would multiply an index in 32 bits.
    counter = [zero + (ids & _WORD), zero + rows, zero + (count & _WORD), zero + (count >> 32 & _WORD)]
    random = _philox(counter, [seed & _WORD, seed >> 32 & _WORD])
    u = ((random.float() + 1) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


_WORD = 0xFFFFFFFF


def _philox(c: list[Tensor], key: list[Tensor]) -> Tensor:
    """The first word of Philox-4x32-10 (Salmon et al., 2011), 32-bit words in int64."""
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) & _WORD, (key[1] + i * 0xBB67AE85) & _WORD
        # The products have 64 bits: an arithmetic shift and a mask give the upper word whatever the sign.
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32 & _WORD) ^ c[1] ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c[3] ^ k1, p0 & _WORD]
    return c[0]
