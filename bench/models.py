"""Whole models to time: the same checkpoint and tokens for ours, Hugging Face's and JAX."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import needs, scratch
from gemma4_impl.config import LayerConfig, TextConfig
from gemma4_impl.generate import bytes_per_token, prefill
from gemma4_impl.model.decoder import Gemma4

PROMPT, NEW = 128, 16
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "head_dim": 64,
        "global_head_dim": 128,
        "sliding_window": 64,
    },
}
"""Tiny is 0.3 million parameters, where Python is most of the time; small is one where reading the weights is."""
VARIANTS = ("E2B", "26B-A4B", "31B")
TRANSFORMERS, JAX = needs("transformers"), needs("jax", "flax")


@functools.cache
def checkpoint(variant: str, size: str, dtype: str = "float32", **overrides: int) -> Path:
    """Folder of a random checkpoint, made once a run."""
    from reference.tiny import make_tiny

    name = "-".join([variant, size, dtype, *overrides])
    return make_tiny(variant, scratch() / name, dtype=dtype, overrides=SIZES[size] | overrides)


@dataclass(frozen=True)
class Text:
    """A checkpoint and what is fed to it: prompt [1, PROMPT], continuation [1, NEW]."""

    path: Path
    prompt: Tensor
    rest: Tensor


@functools.cache
def text(path: Path) -> Text:
    tokens = torch.randint(107, 512, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    return Text(path, tokens[:, :PROMPT], tokens[:, PROMPT:])


class Ours:
    """`prefill` gives the last token's logits [1, V]; `decode` feeds tokens [1, n] one by one: logits [1, n, V]."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32):
        self.model = Gemma4.from_pretrained(path, dtype)

    def prefill(self, tokens: Tensor) -> Tensor:
        self.cache = self.model.make_cache(1, PROMPT + NEW, max_chunk=PROMPT)
        return prefill(self.model, tokens, self.cache)

    # As `decode_one_token` runs it; transformers' own generate runs under no_grad.
    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.model(t, cache=self.cache, logits="last") for t in tokens.split(1, dim=1)], dim=1)


class HuggingFace:
    """The same, with transformers' model and its growing cache."""

    def __init__(self, path: Path, attention: str):
        from reference.hf import HFReference

        self.model = HFReference(path, torch.float32).model
        self.model.set_attn_implementation(attention)

    def prefill(self, tokens: Tensor) -> Tensor:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        return self._step(tokens)[:, -1]

    def decode(self, tokens: Tensor) -> Tensor:
        return torch.cat([self._step(t) for t in tokens.split(1, dim=1)], dim=1)

    @torch.no_grad()
    def _step(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits


class InJAX:
    """Our NNX model, jitted."""

    def __init__(self, path: Path):
        from flax import nnx

        from gemma4_impl.nnx.load import from_pretrained

        self.model = from_pretrained(path, "float32")
        self._step = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache, logits="last"))

    def prefill(self, tokens: Tensor) -> Tensor:
        import jax.numpy as jnp

        from gemma4_impl.nnx.cache import make_cache

        cache = make_cache(self.model.config, 1, PROMPT + NEW)
        logits, _ = self._step(self.model, jnp.asarray(tokens.numpy()), cache)
        return torch.from_dlpack(logits.block_until_ready())[:, -1]


@functools.cache
def runner(kind: str, path: Path) -> Any:
    """One model of a kind for prefill and decode."""
    return {
        "ours": Ours,
        "eager": lambda path: HuggingFace(path, "eager"),
        "sdpa": lambda path: HuggingFace(path, "sdpa"),
        "jax": InJAX,
    }[kind](path)


@functools.cache
def truth(path: Path) -> tuple[Tensor, Tensor]:
    """Logits [1, NEW + 1, V] after the prompt and after each token that follows, in float64, and eager's in float32."""
    from reference.hf import HFReference

    given = text(path)
    tokens = torch.cat((given.prompt, given.rest), dim=1)[0].tolist()
    exact = HFReference(path, torch.float32, truth=True).capture([tokens], glob="logits")["logits"][:, PROMPT - 1 :]
    eager = runner("eager", path)
    return exact, torch.cat([eager.prefill(given.prompt)[:, None], eager.decode(given.rest)], dim=1)


def decode_bytes(model: Gemma4, first: int, count: int) -> int:
    """What `count` steps must read at batch 1, the first of them with `first` positions in the cache."""
    return sum(bytes_per_token(model, first + i + 1) for i in range(count))


def flops(config: TextConfig, first: int, count: int, logits: int) -> int:
    """Of `count` tokens fed to a cache that holds `first`, whose output the head needs for `logits` of them: products
    with weights, of which KV-shared layers see those tokens only, and attention."""
    total = 2 * logits * config.vocab_size * config.hidden_size
    for layer in config.layers:
        tokens = logits if layer.kv_shared else count
        end = first + count
        seen = sum(min(p + 1, config.sliding_window if layer.is_sliding else end) for p in range(end - tokens, end))
        total += 2 * tokens * _weights(config, layer) + 4 * config.num_attention_heads * layer.head_dim * seen
    return total


def _weights(config: TextConfig, layer: LayerConfig) -> int:
    """Elements of a layer's matrices that one token is multiplied with."""
    D, H = config.hidden_size, layer.head_dim
    kv = 0 if layer.kv_shared else layer.num_key_value_heads * (1 if layer.k_eq_v else 2)
    total = D * H * (2 * config.num_attention_heads + kv) + 3 * D * layer.intermediate_size
    if config.enable_moe_block:
        total += D * config.num_experts + 3 * D * config.top_k_experts * config.moe_intermediate_size
    return total + 2 * D * config.hidden_size_per_layer_input
