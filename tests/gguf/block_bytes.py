"""Random blocks, and their values as gguf-py gives them."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import gguf
import numpy
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from gemma4_impl.gguf import pieces
from gemma4_impl.gguf.blocks import GGML_TYPES, BlockType

QUANTIZED = [t for t in GGML_TYPES.values() if t.quantized]
PLAIN = [t for t in GGML_TYPES.values() if not t.quantized]
MODEST = settings(max_examples=25, deadline=None)


def by_name(types):
    return pytest.mark.parametrize("type", types, ids=[t.name for t in types])


def peer(data: Tensor, type: BlockType) -> Tensor:
    with numpy.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(type.id)).copy())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """float32, equal to the bit; of a NaN only that it is one."""
    return a.shape == b.shape and bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def random_bytes(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@contextmanager
def split(weights: int, threads: int) -> Iterator[None]:
    """Pieces of that many weights, and threads however small the tensor."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with patch.object(pieces, "PIECE", weights), patch.object(pieces, "LEAST", 1):
            yield
    finally:
        torch.set_num_threads(before)
