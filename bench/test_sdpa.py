"""Attention of one layer: prefill and decode on the shapes of the 31B's layers, and on smaller ones for the CPU."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import Backend, Case, close_to, grid, needs, publish, timed
from bench.timing import CORES
from gemma4_impl.kernels.sdpa import naive


@dataclass(frozen=True)
class Shape:
    """N query heads, K kv heads of size H; T queries are the last of S positions, of which `window` are seen."""

    size: str
    N: int
    K: int
    H: int
    T: int
    S: int
    window: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def cuda(self) -> bool:
        return self.size == "31B"

    @property
    def operation(self) -> str:
        return "SDPA decode" if self.T == 1 else "SDPA prefill"

    @property
    def text(self) -> str:
        seen = "causal" if self.window is None else f"window {self.window}"
        length = f"S={self.S}" if self.T == 1 else f"T={self.T}"
        return f"{self.size}: N={self.N} K={self.K} H={self.H} {length} {'' if self.T == 1 else seen}".strip()

    @property
    def pairs(self) -> int:
        """How many (query, key) pairs there are."""
        seen = min(self.window or self.S, self.S)
        return sum(min(self.S - self.T + i + 1, seen) for i in range(self.T))


SHAPES = [
    Shape("tiny", 4, 2, 32, 24, 24),
    Shape("tiny", 4, 2, 32, 24, 24, 7),
    Shape("tiny", 4, 2, 32, 1, 40),
    Shape("small", 8, 2, 128, 512, 512),
    Shape("small", 8, 4, 64, 512, 512, 128),
    *(Shape("small", 8, 2, 128, 1, S, None, torch.bfloat16) for S in (1024, 4096, 16384)),
    Shape("small", 8, 4, 64, 1, 128, 128),
]
if torch.cuda.is_available():
    SHAPES += [
        *(Shape("31B", 32, 4, 512, 1, S, None, torch.bfloat16) for S in (1024, 4096, 32768, 131072)),
        Shape("31B", 32, 16, 256, 1, 1024, 1024, torch.bfloat16),
        *(Shape("31B", 32, 4, 512, T, T, None, torch.bfloat16) for T in (2048, 8192)),
        *(Shape("31B", 32, 16, 256, T, T, 1024, torch.bfloat16) for T in (2048, 8192)),
    ]


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    """[1, N, T, H]."""
    k: Tensor
    """[1, K, S, H]."""
    v: Tensor
    q_positions: Tensor
    k_positions: Tensor
    """[1, S]: position p is in slot p % S."""
    length: Tensor
    """[1], on the device: how many tokens there are; of a ring, more than it holds."""
    window: int | None

    @property
    def causal(self) -> bool:
        return self.q.shape[2] > 1

    def mask(self) -> Tensor | None:
        """bool [T, S] where `is_causal` does not say all."""
        if not self.causal or self.window is None:
            return None
        distance = self.q_positions[0, :, None] - self.k_positions[0]
        return (distance >= 0) & (distance < self.window)

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every query head."""
        times = self.q.shape[1] // self.k.shape[1]
        return self.k.repeat_interleave(times, 1), self.v.repeat_interleave(times, 1)


def _make(shape: Shape, i: int) -> Inputs:
    device = torch.device("cuda" if shape.cuda else "cpu")
    generator = torch.Generator(device).manual_seed(i)

    def random(heads: int, length: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(1, heads, length, shape.H, generator=generator, device=device, dtype=shape.dtype)
        return x.mul_(scale)

    # The scale of attention is 1: queries as large as keys would make every softmax a choice of one.
    q, k, v = random(shape.N, shape.T, shape.H**-0.5), random(shape.K, shape.S), random(shape.K, shape.S)
    # A ring has gone round three times and a third.
    end = shape.S * 10 // 3 if shape.T == 1 and shape.window else shape.S
    slots = torch.arange(shape.S, device=device)
    positions = (slots + (end - 1 - slots) // shape.S * shape.S)[None]
    last = torch.arange(end - shape.T, end, device=device)[None]
    return Inputs(q, k, v, last, positions, torch.full((1,), end, dtype=torch.int32, device=device), shape.window)


def _judge(inputs: Inputs) -> Callable[[Any], Any]:
    def attend(dtype: torch.dtype) -> Tensor:
        tensors = (t.to(dtype) for t in (inputs.q, inputs.k, inputs.v))
        return naive.sdpa(*tensors, inputs.q_positions, inputs.k_positions, window=inputs.window)

    return close_to([attend(torch.float64)], [attend(inputs.q.dtype)], inputs.q.dtype)


def _ours(inputs: Inputs) -> Callable[[], Tensor]:
    from gemma4_impl.kernels.sdpa.dispatch import sdpa

    q, k, v, window = inputs.q, inputs.k, inputs.v, inputs.window
    length = None if inputs.causal else inputs.length
    return lambda: sdpa(q, k, v, length=length, window=window)


def _ours_early(inputs: Inputs) -> Callable[[], Tensor]:
    """As the engine has it: the cache, which is not new, is read while the kernel ahead still runs."""
    from gemma4_impl.kernels.sdpa.decode import decode

    q, k, v, window = inputs.q, inputs.k, inputs.v, inputs.window
    return lambda: decode(q, k, v, inputs.length, window=window, overlap=True)


def _hopper() -> str | None:
    from gemma4_impl.kernels import cuda

    return None if cuda.available() else "needs a Hopper GPU and cuda-bindings"


def _torch(kind: SDPBackend, expand: bool = False) -> Callable[[Inputs], Callable[[], Tensor]]:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        k, v = inputs.expanded() if expand else (inputs.k, inputs.v)
        mask = inputs.mask()
        causal, grouped = inputs.causal and mask is None, k.shape[1] != inputs.q.shape[1]

        def run() -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(
                    inputs.q, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=grouped
                )

        return run

    return prepare


def _flex(inputs: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, blocks = torch.compile(flex_attention, dynamic=False), None
    if inputs.causal:
        far = inputs.window or inputs.k.shape[2]
        T, S = inputs.q.shape[2], inputs.k.shape[2]
        blocks = create_block_mask(
            lambda b, h, q, k: (q >= k) & (q - k < far), None, None, T, S, device=inputs.q.device, BLOCK_SIZE=128
        )
    return lambda: compiled(inputs.q, inputs.k, inputs.v, block_mask=blocks, scale=1.0, enable_gqa=True)


def _executorch(inputs: Inputs) -> Callable[[], Tensor]:
    from executorch.backends.cuda.triton import kernels

    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.mask()
    mask = None if mask is None else mask[None, None]
    if not inputs.causal:
        return lambda: kernels.sdpa_decode_splitk(q, k, v, None, 0.0, False, 1.0, True, kv_len=inputs.length)
    return lambda: kernels.sdpa(q, k, v, mask, 0.0, mask is None, 1.0, True)


@functools.cache
def _jitted(causal: bool, window: int | None) -> Callable[..., Any]:
    import jax

    attend = functools.partial(jax.nn.dot_product_attention, scale=1.0, is_causal=causal)
    return jax.jit(functools.partial(attend, local_window_size=None if window is None else (window - 1, 0)))


def _jax(inputs: Inputs) -> Callable[[], Any]:
    import jax

    q, k, v = (jax.dlpack.from_dlpack(t.transpose(1, 2).contiguous()) for t in (inputs.q, inputs.k, inputs.v))
    attend = _jitted(inputs.causal, inputs.window if inputs.causal else None)
    return lambda: attend(q, k, v).block_until_ready()


def _from_jax(output: Any) -> Tensor:
    return torch.from_dlpack(output).transpose(1, 2)


GPU_ONLY = needs(cuda=True)
BACKENDS = [
    Backend("gemma4", _ours, ours=True),
    Backend("PyTorch flash", _torch(SDPBackend.FLASH_ATTENTION)),
    Backend("PyTorch math", _torch(SDPBackend.MATH)),
    Backend("PyTorch cuDNN", _torch(SDPBackend.CUDNN_ATTENTION), absent=GPU_ONLY),
    Backend("PyTorch efficient, heads expanded", _torch(SDPBackend.EFFICIENT_ATTENTION, expand=True), absent=GPU_ONLY),
    Backend("FlexAttention, compiled", _flex, absent=GPU_ONLY),
    Backend("ExecuTorch Triton", _executorch, absent=needs("executorch.backends.cuda.triton.kernels", cuda=True)),
    Backend("JAX", _jax, absent=needs("jax"), wall=True, read=_from_jax),
]
# Only where there is a cache
EARLY = Backend("gemma4, early", _ours_early, ours=True, absent=_hopper)


def _case(shape: Shape) -> Case:
    moved = 2 * shape.dtype.itemsize * shape.H * (shape.N * shape.T + shape.K * shape.S)
    return Case(
        suite="sdpa",
        operation=shape.operation,
        shape=shape.text,
        backends=[*BACKENDS, EARLY] if shape.cuda and shape.T == 1 else BACKENDS,
        make=lambda i: _make(shape, i),
        judge=_judge,
        cost=lambda: (moved, 4 * shape.N * shape.H * shape.pairs),
        dtype=shape.dtype,
        device=torch.device("cuda" if shape.cuda else "cpu"),
        tokens=shape.T,
        context=None if shape.window else shape.S,
        series=f"{shape.size}: K={shape.K} H={shape.H}",
        threads=1 if shape.size == "tiny" else CORES,
    )


@timed
@grid([_case(shape) for shape in SHAPES])
def test_sdpa(benchmark: Any, rows: Any, case: Case, backend: str) -> None:
    publish(benchmark, rows(case)[backend])
