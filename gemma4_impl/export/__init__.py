"""torch.export of the cached model: prefill of up to max_chunk tokens and decode of one, two programs on one cache."""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4


class Step(nn.Module):
    """A model and its cache as one module, whose state the parameters and the cache's buffers are."""

    def __init__(self, model: Gemma4, cache: KVCache):
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens and positions [B, T], -1 for padding -> logits [B, 1, V] of each row's last token."""
        return self.model(tokens, positions, self.cache, "last")


def export_prefill(model: Gemma4, cache: KVCache) -> ExportedProgram:
    """`Step` for 2 to `cache.max_chunk` tokens a row; the batch size is the cache's.

    `program.module()` of this and of `export_decode` hold `cache`'s own buffers, so what one writes the other reads,
    and `cache.reset()` starts both over. A program saved to a file has its own. Programs check nothing and leave
    `cache.lengths` alone: the caller counts positions, which must go on from the last call and stay below
    `cache.max_seq_len`. Raises ValueError for a cache that takes one token at a time."""
    if cache.max_chunk < 2:
        raise ValueError(f"max_chunk = {cache.max_chunk}: prefill takes at least 2 tokens; use export_decode alone")
    length = Dim("length", min=2, max=cache.max_chunk) if cache.max_chunk > 2 else None
    return _export(model, cache, 2 if length is None else 3, length)


def export_decode(model: Gemma4, cache: KVCache) -> ExportedProgram:
    """`Step` for one token a row; see `export_prefill` for the cache that the two share."""
    return _export(model, cache, 1, None)


@torch.no_grad()
def _export(model: Gemma4, cache: KVCache, length: int, dim: Dim | None) -> ExportedProgram:
    tokens = torch.zeros(cache.batch_size, length, dtype=torch.long, device=model.device)
    positions = torch.arange(length, device=model.device).repeat(cache.batch_size, 1)
    dynamic = {name: {1: dim} for name in ("tokens", "positions")} if dim else None
    return torch.export.export(Step(model, cache), (tokens, positions), dynamic_shapes=dynamic, strict=True)
