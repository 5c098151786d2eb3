"""Inputs of the small steps, drawn by Hypothesis, and how a run of one is checked."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from kernel_checks import Guarded, assert_within_budget, normal, poisoned_memory
from torch import Tensor

from gemma4_impl.config import RopeParameters
from gemma4_impl.kernels.steps import naive
from gemma4_impl.model.rope import RotaryEmbedding

EPS = 1e-6


@dataclass
class Case:
    """One call of `step`, by name: tensors, some of them written to, and other arguments."""

    step: str
    args: tuple
    written: tuple[int, ...] = ()

    def to(self, device: str) -> "Case":
        return Case(self.step, tuple(_each(self.args, lambda t: t.to(device))), self.written)

    def check(self, backend: object) -> tuple[Tensor, ...]:
        """Runs the step of `backend` between canaries, where fresh memory is NaN; holds it to twice the error of the
        definition in the same dtype, both against float64. Returns what came out."""
        guard = Guarded()
        # Weights and tables are in one piece; what belongs to tokens may have any rows.
        args = [guard.around(a) if isinstance(a, Tensor) and a.dim() > 2 and a.is_floating_point() else a
                for a in self.args]  # fmt: skip
        with poisoned_memory():
            out = _outputs(getattr(backend, self.step)(*args), args, self.written)
        guard.assert_untouched()
        plain = list(_each(self.args, Tensor.clone))
        plain = _outputs(getattr(naive, self.step)(*plain), plain, self.written)
        wide = [torch.float64 if a in (torch.float16, torch.bfloat16, torch.float32) else a for a in self.args]
        wide = list(_each(wide, lambda t: t.double() if t.is_floating_point() else t.clone()))
        wide = _outputs(getattr(naive, self.step)(*wide), wide, self.written)
        for got, truth, reference in zip(out, wide, plain, strict=True):
            assert got.dtype == reference.dtype
            assert torch.equal(got.isnan(), truth.isnan())
            if truth.numel():
                assert_within_budget(got.nan_to_num(), truth.nan_to_num(), reference.nan_to_num())
        return out


def _each(args, change) -> list:
    return [change(a) if isinstance(a, Tensor) else a for a in args]


def _outputs(returned: Tensor | tuple[Tensor, ...], args: list, written: tuple[int, ...]) -> tuple[Tensor, ...]:
    returned = returned if isinstance(returned, tuple) else (returned,)
    return (*returned, *(args[i] for i in written if args[i] is not None))


@dataclass(frozen=True)
class Sizes:
    """What cases may be like: small for an interpreter, real for a GPU."""

    dtypes: tuple[torch.dtype, ...]
    dims: tuple[int, ...]
    rows: tuple[int, ...]
    head_dims: tuple[int, ...]


SMALL = Sizes((torch.float32, torch.float16), (8, 100, 2816), (1, 3), (8, 96, 256))
LARGE = Sizes((torch.bfloat16, torch.float32), (1000, 2816, 5376), (1, 65), (96, 256, 512))


@st.composite
def _leading(draw: st.DrawFn, sizes: Sizes) -> tuple[int, ...]:
    rows = draw(st.sampled_from(sizes.rows))
    return draw(st.sampled_from([(1, rows), (2, rows)]))


@st.composite
def norms(draw: st.DrawFn, sizes: Sizes) -> Case:
    dtype, D, seed = draw(st.sampled_from(sizes.dtypes)), draw(st.sampled_from(sizes.dims)), draw(st.integers(0, 999))
    x = normal(*draw(_leading(sizes)), D, seed=seed, dtype=dtype) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    weight = normal(D, seed=seed + 1, dtype=dtype) if draw(st.booleans()) else None
    return Case("norm", (x, weight, EPS))


@st.composite
def add_norms(draw: st.DrawFn, sizes: Sizes) -> Case:
    dtype, D, seed = draw(st.sampled_from(sizes.dtypes)), draw(st.sampled_from(sizes.dims)), draw(st.integers(0, 999))
    shape = (*draw(_leading(sizes)), D)
    h, residual = normal(*shape, seed=seed, dtype=dtype), normal(*shape, seed=seed + 1, dtype=dtype)
    post_norm, weight = normal(2, D, seed=seed + 2, dtype=dtype)
    scalar = torch.tensor([0.37], dtype=dtype) if draw(st.booleans()) else None
    weight = weight if draw(st.booleans()) else None
    return Case("add_norm", (h, residual, post_norm, scalar, weight, EPS))


@st.composite
def qkv_norm_ropes(draw: st.DrawFn, sizes: Sizes) -> Case:
    """Views of one product, cache slots in any order, padding, k_eq_v, KV-shared layers."""
    dtype, seed, H = (
        draw(st.sampled_from(sizes.dtypes)),
        draw(st.integers(0, 999)),
        draw(st.sampled_from(sizes.head_dims)),
    )
    B, T = draw(_leading(sizes))
    N, K = draw(st.sampled_from([(4, 1), (6, 2), (3, 3)]))
    kind = draw(st.sampled_from(["qkv", "k_eq_v", "shared"]))
    parts = {"qkv": N + 2 * K, "k_eq_v": N + K, "shared": N}[kind]
    heads = normal(B, T, parts * H, seed=seed, dtype=dtype).unflatten(-1, (-1, H))
    q_norm, k_norm = normal(2, H, seed=seed + 1, dtype=dtype)
    rope = RotaryEmbedding(H, RopeParameters("proportional", 1e6, draw(st.sampled_from([0.25, 1.0]))))
    generator = torch.Generator().manual_seed(seed)
    cos, sin = rope(torch.randint(0, 262_144, (B, T), generator=generator))
    if kind == "shared":
        return Case("qkv_norm_rope", (heads, None, None, q_norm, None, cos, sin, None, None, None, EPS))
    q, v = heads[:, :, :N], heads[:, :, -K:]
    k = v if kind == "k_eq_v" else heads[:, :, N : N + K]
    C = T + draw(st.integers(0, 3))
    slots = torch.stack([torch.randperm(C, generator=generator)[:T] for _ in range(B)])
    slots[:, 0] = C if draw(st.booleans()) else slots[:, 0]
    k_cache = torch.full((B, K, C + 1, H), torch.nan, dtype=dtype)
    args = (q, k, v, q_norm, k_norm, cos, sin, k_cache, k_cache.clone(), slots, EPS)
    return Case("qkv_norm_rope", args, written=(7, 8))


@st.composite
def gelu_muls(draw: st.DrawFn, sizes: Sizes) -> Case:
    dtype, seed, interleave = (
        draw(st.sampled_from(sizes.dtypes)),
        draw(st.integers(0, 999)),
        draw(st.sampled_from([0, 8])),
    )
    F = 8 * draw(st.sampled_from([1, 13, 200]))
    x = normal(*draw(_leading(sizes)), 2 * F, seed=seed, dtype=dtype) * draw(st.sampled_from([1.0, 8.0]))
    return Case("gelu_mul", (x, interleave))


@st.composite
def embeds(draw: st.DrawFn, sizes: Sizes) -> Case:
    """Dense and quantized tables, with ids that they do not have."""
    dtype, seed, bits = (
        draw(st.sampled_from(sizes.dtypes)),
        draw(st.integers(0, 999)),
        draw(st.sampled_from([4, 8, 16])),
    )
    V, D = 50, 32 * draw(st.sampled_from([1, 5, 44]))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, V + 1, draw(_leading(sizes)), generator=generator)
    factor = float(torch.tensor(D**0.5, dtype=dtype))
    if bits == 16:
        return Case("embed", (tokens, normal(V, D, seed=seed, dtype=dtype), None, None, bits, 0, factor, dtype))
    code = torch.uint8 if bits == 4 else torch.int8
    table = torch.randint(-128, 128, (V, D * bits // 8), generator=generator).to(code)
    scale = normal(V, draw(st.sampled_from([1, D // 32])), seed=seed, dtype=draw(st.sampled_from(sizes.dtypes)))
    zero = scale * 0.3 if draw(st.booleans()) else None
    return Case("embed", (tokens, table, scale, zero, bits, draw(st.sampled_from([0, 8])), factor, dtype))


STEPS = {"norm": norms, "add_norm": add_norms, "qkv_norm_rope": qkv_norm_ropes, "gelu_mul": gelu_muls, "embed": embeds}
