"""A backend whose program is the model's weights, run eagerly: what surrounds backends can be tested without one."""

from pathlib import Path

import torch
from torch import Tensor

from gemma4_impl.config import TextConfig
from gemma4_impl.export.folder import PROGRAM, Manifest
from gemma4_impl.export.program import Lowered, Method, Settings, Value, cache_sizes, constants
from gemma4_impl.export.source import dequantize
from gemma4_impl.model.decoder import Gemma4


def check(config: TextConfig, settings: Settings, vision: bool) -> None:
    if settings.dtype == torch.float16:
        raise ValueError("fake programs do not compute in float16: they have no such numbers")


def lower(model: Gemma4, settings: Settings, tower=None, report=print) -> Lowered:
    check(model.config, settings, tower is not None)
    dequantize(model)
    report("lowering decode")
    length, C = {"min": 2, "max": settings.max_prefill_chunk}, settings.max_prefill_chunk

    def method(length) -> Method:
        inputs = [Value(name, torch.int64, (1, length)) for name in ("tokens", "positions")]
        return Method(inputs, [Value("logits", settings.dtype, (1, 1, model.config.vocab_size))])

    return Lowered(
        write=lambda folder: torch.save(model.state_dict(), folder / PROGRAM),
        methods={"decode": method(1)} | ({"prefill": method(length if C > 2 else C)} if C > 1 else {}),
        constants=constants(model.config, settings),
        caches=cache_sizes(model.make_cache(1, settings.max_seq_len, C)),
    )


def open_session(folder: Path, manifest: Manifest) -> "Session":
    return Session(folder, manifest)


class Session:
    taps = False

    def __init__(self, folder: Path, manifest: Manifest):
        self.model = Gemma4(TextConfig.from_file(folder)).to(manifest.dtype)
        self.model.load_state_dict(torch.load(folder / PROGRAM, weights_only=True))
        self.cache = self.model.make_cache(1, manifest.max_seq_len, manifest.max_prefill_chunk)
        self.calls: list[int] = []

    @property
    def length(self) -> int:
        return self.cache.lengths[0]

    @torch.no_grad()
    def forward(self, tokens: Tensor, position: int) -> Tensor:
        self.calls.append(tokens.shape[1])
        positions = torch.arange(position, position + tokens.shape[1])[None]
        return self.model(tokens, positions, self.cache, "last")[:, -1]

    def reset(self) -> None:
        self.cache.reset()
