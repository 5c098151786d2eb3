"""The engine's random models as exported programs: AOTInductor packages on a GPU, decode as a CUDA graph."""

import functools

import torch
from torch import Tensor

from bench.engine_models import DTYPE, NEW, Given, weights
from bench.harness import Backend, needs, scratch
from bench.timing import Call
from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.export.cuda_aoti import (
    Session,
    compile_packages,
    link_packages,
    new_state,
    shared_constants,
    state_sizes,
)
from gemma4_impl.export.cuda_graph import export_programs
from gemma4_impl.export.program import Limits
from gemma4_impl.export.source import open_source
from gemma4_impl.model.cache import KVCache

ON_GPU = needs("triton", cuda=True)


class Exported:
    """`engine_models.Engine` with programs; `logits` is what `decode`'s first step makes of the first token."""

    def __init__(self, name: str, context: int):
        given = Given(name, context)
        device, chunk = given.device, min(context, 2048)
        model = open_source(weights(name), DTYPE).model
        for rope in model.rope.values():
            rope.reset(DTYPE, device)
        cache = KVCache(given.config, 1, context + NEW, chunk, DTYPE, device)
        programs = export_programs(model, cache)
        folder = scratch() / f"exported-{name.replace(' ', '-')}-{context}"
        folder.mkdir()
        tensors = shared_constants(programs, device)
        compile_packages(programs, folder)
        self.capacity, self.chunk = cache.capacity, chunk
        self.state = new_state(state_sizes(cache, given.config.vocab_size), device)
        limits = Limits(context + NEW, chunk, given.config.vocab_size)
        self.session = Session(link_packages(folder, {**tensors, **self.state}), self.state, limits)

    def prefill(self, given: Given) -> Tensor:
        """[V]."""
        self.session.reset()
        for part in given.tokens[None, :-1].split(self.chunk, dim=1):
            logits = self.session.forward(part, self.session.length)
        return logits[0]

    def fill(self, given: Given) -> None:
        """Puts the cache's contents in their slots: position p in slot p % capacity."""
        for i, layer in enumerate(given.config.layers):
            capacity = self.capacity[SLIDING if layer.is_sliding else FULL]
            k, v = given.cache(i, DTYPE)
            slots = torch.arange(given.context - k.shape[2], given.context, device=given.device) % capacity
            self.state[f"cache.layers_{i}_k"][:, :, slots] = k
            self.state[f"cache.layers_{i}_v"][:, :, slots] = v

    def begin(self, given: Given) -> None:
        """Ready to decode: the next token is the one after the context."""
        self.session.length = given.context
        self.session.start(int(given.tokens[-1]))

    def decode(self) -> list[int]:
        return list(self.session.decode(NEW))

    def logits(self, given: Given) -> Tensor:
        """[V]."""
        self.begin(given)
        next(self.session.decode(1))
        return self.state["logits"][0].clone()


@functools.lru_cache(maxsize=1)
def exported(name: str, context: int) -> Exported:
    return Exported(name, context)


def prefill_backend() -> Backend:
    return Backend(
        "gemma4 exported",
        lambda g: lambda: exported(g.name, g.context).prefill(g),
        ours=True,
        absent=ON_GPU,
        wall=True,
    )


def decode_backend(given: Given) -> Backend:
    def prepare(g: Given) -> Call:
        found = exported(g.name, g.context)
        found.fill(g)
        return Call(found.decode, before=lambda: found.begin(g))

    def read(_: list[int]) -> Tensor:
        return exported(given.name, given.context).logits(given)

    return Backend("gemma4 exported", prepare, ours=True, absent=ON_GPU, wall=True, read=read)
