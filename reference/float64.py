"""Real float64 from code that casts to float32 inside: the casts are promoted while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)
_FACTORIES = (torch.arange, torch.zeros, torch.ones, torch.tensor, torch.full)


_paused = False


@contextmanager
def unpromoted() -> Iterator[None]:
    """Inside, an active PromoteFloat32 does nothing: for what is no part of the model, such as reading weights."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


class PromoteFloat32(TorchFunctionMode):
    """Inside, `x.float()`, `x.to(torch.float32)`, `softmax(dtype=torch.float32)` and float32 factories give float64.

    transformers' RMSNorm, softmax, router and RoPE all cast that way, which leaves a `.double()` model at 1e-7. Only
    dtypes that the code names are promoted, so tensors must be float64 to begin with."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _paused:
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to or func in _SOFTMAX or func in _FACTORIES:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
