"""The decoder in operations that XNNPACK computes as PyTorch does, for one row without padding: cache, norm, attention.

Letters: T query length, S key length, N query heads, K kv heads, G = N / K, H head dim, D model dim."""

import torch
from torch import Tensor, nn

from gemma4_impl import taps
from gemma4_impl.config import LayerConfig, TextConfig
from gemma4_impl.model.cache import Keys, KVCache
from gemma4_impl.model.decoder import KV, Attention, RMSNorm


class XnnCache(KVCache):
    """`KVCache` for one row that is fed without gaps, whose only state are keys and values, written in place.

    Which position a slot holds follows from the last one fed: a program's buffers have no initial values, and nothing
    of an earlier sequence can show. No slot is for padding; keys lie transposed, [1, K, H, C], as the product with the
    queries takes them."""

    def __init__(self, config: TextConfig, max_seq_len: int, max_chunk: int, dtype: torch.dtype):
        super().__init__(config, 1, max_seq_len, max_chunk, dtype)
        del self.rows
        for name, buffer in list(self.named_buffers()):
            if name.endswith("_positions"):
                delattr(self, name)
            else:
                kept = buffer[:, :, :-1]
                setattr(self, name, (kept.transpose(2, 3) if name.endswith("_k") else kept).contiguous())

    def reserve(self, positions: Tensor, unpadded: bool = False) -> dict[str, Keys]:
        keys, last = {}, positions[:, -1:]
        for kind, capacity in self.capacity.items():
            slots = torch.arange(capacity, device=positions.device)[None]
            keys[kind] = Keys(last - (last - slots) % capacity, positions[0] % capacity)
        return keys

    def update(self, layer: LayerConfig, keys: Keys, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [1, T, K, H] -> keys [1, K, H, S], values [1, K, S, H]."""
        all_k, all_v = (getattr(self, f"layers_{layer.index}_{name}") for name in "kv")
        all_k.index_copy_(3, keys.write, torch.permute_copy(k, (0, 2, 3, 1)))
        all_v.index_copy_(2, keys.write, torch.permute_copy(v, (0, 2, 1, 3)))
        return all_k, all_v


class XnnRMSNorm(nn.Module):
    """`RMSNorm` with eps as a tensor: XNNPACK takes no numbers."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.weight = norm.weight
        self.register_buffer("eps", torch.tensor([norm.eps]))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight


class XnnAttention(Attention):
    """`Attention` whose query heads are rows of their kv head's product: keys and values are never repeated."""

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, keys: Keys, kv: KV, cache: KVCache | None
    ) -> Tensor:
        q = taps.tap(self.prefix, "q", _rotate(self.q_norm(self._heads(self.q_proj(x))), *rotary))
        if not self.config.kv_shared:
            kv[self.config.index] = cache.update(self.config, keys, *self.project_kv(x, rotary))
        out = self.attend(q, *kv[self.config.kv_source], mask)
        return taps.tap(self.prefix, "out", self.o_proj(out))

    def project_kv(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k = self._heads(self.k_proj(x))
        v = k if self.config.k_eq_v else self._heads(self.v_proj(x))
        k = taps.tap(self.prefix, "k", _rotate(self.k_norm(k), *rotary))
        return k, taps.tap(self.prefix, "v", self.v_norm(v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q [1, T, N, H], k [1, K, H, S], v [1, K, S, H], an additive mask [1, 1, T, S] -> [1, T, N * H]."""
        _, length, N, H = q.shape
        K, S = v.shape[1:3]
        rows = N // K * length
        q = torch.permute_copy(q[0], (1, 0, 2)).view(K, rows, H)
        hidden = mask[0].expand(N // K, length, S).reshape(1, rows, S)
        out = torch.bmm((torch.bmm(q, k[0]) + hidden).softmax(-1), v[0])
        # A product's strides cannot be told from its length, so it is copied before it is split: no view of it is.
        out = torch.permute_copy(out, (1, 0, 2)).view(N // K, length, K, H)
        return torch.permute_copy(out, (1, 2, 0, 3)).view(1, length, N * H)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary` with the roll by half as a concatenation."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin


def prepare(model: nn.Module) -> None:
    """Replaces, in place, the modules of a `Gemma4` that XNNPACK needs otherwise; parameters stay the same objects."""
    for name, module in list(model.named_children()):
        if type(module) is RMSNorm:
            setattr(model, name, XnnRMSNorm(module))
            continue
        if type(module) is Attention:
            module.__class__ = XnnAttention
        prepare(module)
