"""The small steps of a layer as PyTorch operators: one kernel each on a GPU, their definition in naive.py elsewhere."""

import torch
from torch import Tensor

from gemma4_impl.generation import check_sampling
from gemma4_impl.kernels.steps import naive
from gemma4_impl.model.sampler import allowed

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@torch.library.custom_op("gemma4::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of x [..., D]; weight [D] multiplies as it is. Raises ValueError for shapes that do not match."""
    _check_rows(x, weight=weight)
    return _backend(x).norm(x, weight, eps)


@torch.library.custom_op("gemma4::add_norm", mutates_args=())
def add_norm(
    h: Tensor, residual: Tensor, post_norm: Tensor, scalar: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The end of one block and the start of the next: r = (residual + norm(h)) * scalar, and x = norm(r).

    Args:
        h, residual: [..., D], what a block gives and what it is added to.
        post_norm, weight: [D], the weights of the two norms.
        scalar: [1]; None is 1.
    Returns r and x like h; without `weight` x is empty. Raises ValueError for shapes or dtypes that do not match."""
    _check_rows(h, post_norm=post_norm, weight=weight)
    if residual.shape != h.shape or residual.dtype != h.dtype:
        raise ValueError(f"residual is {_like(residual)}; h is {_like(h)}")
    if scalar is not None and scalar.shape != (1,):
        raise ValueError(f"scalar is {list(scalar.shape)}; must be [1]")
    return _backend(h).add_norm(h, residual, post_norm, scalar, weight, eps)


@torch.library.custom_op("gemma4::qkv_norm_rope", mutates_args=("k_cache", "v_cache"))
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
    """From projections to attention: norms and turns q and k, norms v without a weight, writes k and v to the cache.

    Args:
        q: [B, T, N, H]. k, v: [B, T, K, H], the same one if values start from keys. All may be views of one product.
        q_norm, k_norm: [H].
        cos, sin: float32 [B, T, 1, H] of `RotaryEmbedding`.
        k_cache, v_cache: [B, K, C + 1, H] of q's dtype, any strides but the last.
        slots: int64 [B, T], the cache slot of each token; padding has slot C.
    Without k, which KV-shared layers do not have, only q is made. Returns q [B, T, N, H], contiguous.
    Raises ValueError for shapes or dtypes that do not match."""
    _check_qkv(q, k, v, q_norm, k_norm, cos, sin, k_cache, v_cache, slots)
    return _backend(q).qkv_norm_rope(q, k, v, q_norm, k_norm, cos, sin, k_cache, v_cache, slots, eps)


@torch.library.custom_op("gemma4::gelu_mul", mutates_args=())
def gelu_mul(gate_up: Tensor, interleave: int = 0) -> Tensor:
    """gelu_tanh(gate) * up, [..., 2 F] -> [..., F]. Columns are gate | up; with `interleave` = n they are n of gate, n
    of up, and so on. Raises ValueError for columns that do not divide so."""
    columns = gate_up.shape[-1]
    if interleave < 0 or columns % (2 * max(1, interleave)):
        raise ValueError(f"{columns} columns do not divide into gate and up by interleave = {interleave}")
    _check_rows(gate_up)
    return _backend(gate_up).gelu_mul(gate_up, interleave)


@torch.library.custom_op("gemma4::embed", mutates_args=())
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
    """Rows of a dense or quantized table, rounded to `dtype`, times `factor`, a number of that dtype.

    Args:
        tokens: int64 of any shape.
        table: [V, D] in `dtype` with bits = 16; or the `qdata` of a `QuantizedTensor` of 4 or 8 bits.
        scale, zero, offset: of the `QuantizedTensor`.
    Returns [..., D]; an id that the table does not have (-1: nothing could be drawn) gives a row of NaN.
    Raises ValueError for a table that is not what `bits` says."""
    dtypes = {4: torch.uint8, 8: torch.int8, 16: dtype}
    whole = all(t is None or t.is_contiguous() for t in (table, scale, zero))
    if dtypes.get(bits) != table.dtype or (scale is None) != (bits == 16) or not whole:
        kind = "without" if scale is None else "with"
        raise ValueError(f"the table is {_like(table)} {kind} scales, which is not {bits} bits of {dtype} in one piece")
    return _backend(table).embed(tokens, table, scale, zero, bits, offset, factor, dtype)


def sampling_state(seed: int, device: torch.device | str) -> Tensor:
    """int64 [2]: the seed, 0 .. 2^64 - 1, and how many draws it has served."""
    return torch.tensor([seed - (seed >> 63 << 64), 0], device=device)


@torch.library.custom_op("gemma4::sample", mutates_args=("state",))
def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, state: Tensor) -> Tensor:
    """Draws one id a row, logits [B, V] -> int64 [B], as `gemma4_impl.model.sampler.sample` does, from a state on the
    device: a captured graph draws anew in every replay, and equal states draw equal ids.

    Args:
        state: of `sampling_state`, on the logits' device; counts up with every draw, but not at temperature 0.
    Raises ValueError for a parameter out of its range, or another state."""
    check_sampling(temperature, top_k, top_p)
    if logits.dim() != 2 or logits.dtype not in FLOATS:
        raise ValueError(f"logits is {_like(logits)}; must be [B, V] in bfloat16, float16 or float32")
    if state.shape != (2,) or state.dtype != torch.int64 or state.device != logits.device:
        raise ValueError(f"state is {_like(state)} on {state.device}; must be int64 [2] on {logits.device}")
    if not logits.is_cuda:
        return naive.sample(logits, temperature, top_k, top_p, state)
    from gemma4_impl.kernels.steps import triton_sampling

    if temperature > 0 and top_k is not None and top_k <= triton_sampling.MAX_TOP_K:
        return triton_sampling.draw_top_k(logits, temperature, top_k, top_p, state)
    if temperature > 0 and (top_k is not None or top_p is not None):
        # Many may stay: sorting them takes all the time, and PyTorch sorts well.
        kept = logits.float().masked_fill(~allowed(logits.float(), temperature, top_k, top_p), -torch.inf)
        logits = torch.where(logits.isnan(), torch.nan, kept)
    return triton_sampling.draw(logits, temperature, state)


@sample.register_fake
def _(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, state: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@add_norm.register_fake
def _(
    h: Tensor, residual: Tensor, post_norm: Tensor, scalar: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(0 if weight is None else h.shape)


@qkv_norm_rope.register_fake
def _(
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
    return q.new_empty(q.shape)


@gelu_mul.register_fake
def _(gate_up: Tensor, interleave: int = 0) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@embed.register_fake
def _(
    tokens: Tensor,
    table: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    offset: int,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    return table.new_empty((*tokens.shape, table.shape[1] * (2 if bits == 4 else 1)), dtype=dtype)


def _backend(x: Tensor):
    if not x.is_cuda:
        return naive
    # Triton comes with PyTorch for GPUs only.
    from gemma4_impl.kernels.steps import triton

    return triton


def _check_rows(x: Tensor, **weights: Tensor | None) -> None:
    if x.dtype not in FLOATS or x.dim() < 1:
        raise ValueError(f"the input is {_like(x)}; must be [..., D] in bfloat16, float16 or float32")
    for name, weight in weights.items():
        if weight is not None and (weight.shape != x.shape[-1:] or not weight.is_contiguous()):
            raise ValueError(f"{name} is {_like(weight)}; must be [{x.shape[-1]}] in one piece")


def _check_qkv(q, k, v, q_norm, k_norm, cos, sin, k_cache, v_cache, slots) -> None:
    if q.dim() != 4 or q.shape[-1] % 2 or q.dtype not in FLOATS:
        raise ValueError(f"q is {_like(q)}; must be [B, T, N, H] with an even H, in bfloat16, float16 or float32")
    B, T, _, H = q.shape
    if q_norm.shape != (H,) or (k_norm is not None and k_norm.shape != (H,)):
        raise ValueError(f"the norms' weights must be [{H}]")
    for name, table in {"cos": cos, "sin": sin}.items():
        if table.shape != (B, T, 1, H) or table.dtype != torch.float32 or table.stride(-1) != 1:
            raise ValueError(f"{name} is {_like(table)}; must be float32 [{B}, {T}, 1, {H}]")
    if k is None:
        return
    if None in (v, k_norm, k_cache, v_cache, slots):
        raise ValueError("k comes with v, k_norm, both caches and slots")
    if k.dim() != 4 or k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (B, T, H):
        raise ValueError(f"k is {_like(k)} and v {_like(v)}; must be [{B}, {T}, K, {H}]")
    for name, cache in {"k_cache": k_cache, "v_cache": v_cache}.items():
        if cache.dim() != 4 or (*cache.shape[:2], cache.shape[3]) != (B, k.shape[2], H) or cache.stride(-1) != 1:
            raise ValueError(f"{name} is {_like(cache)}; must be [{B}, {k.shape[2]}, C + 1, {H}]")
        if cache.dtype != q.dtype or k.dtype != q.dtype or v.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype}; k, v and the caches must be too")
    if slots.shape != (B, T) or slots.dtype != torch.int64:
        raise ValueError(f"slots is {_like(slots)}; must be int64 [{B}, {T}]")


def _like(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
