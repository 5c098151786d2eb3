"""A model with its caches and buffers, ready to go on: prefill, then tokens, each one replay of a CUDA graph."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gemma4_impl.engine.model import PackedModel
from gemma4_impl.engine.prefill import prefill
from gemma4_impl.engine.step import LAG, Step
from gemma4_impl.generation import Sampling
from gemma4_impl.kernels.steps import sampling_state
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.soft_tokens import SoftTokens


class Session:
    """B rows of up to `max_seq_len` tokens, of which at most `max_chunk` of a prompt are computed at a time.

    `prefill`, then `start`, then `decode`; `reset` begins anew in the same memory. Raises ValueError as `KVCache`
    does."""

    def __init__(self, model: PackedModel, batch_size: int = 1, max_seq_len: int = 4096, max_chunk: int | None = None):
        on_gpu = model.device.type == "cuda"
        self.model = model
        chunk = max_chunk or chunk_size(model.device)
        self.cache = KVCache(model.config, batch_size, max_seq_len, chunk, model.dtype, model.device)
        self.step = Step(model, self.cache)
        self.lengths = [0] * batch_size
        """Tokens in each row's caches, those of steps that run ahead among them."""
        self.sampling: Sampling | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        """A step that samples so; None on a CPU, where the step runs as it is."""
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._on_gpu, self._launched = on_gpu, 0
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._drawn = torch.zeros(LAG, batch_size, dtype=torch.long, pin_memory=on_gpu)
        self._events = [torch.cuda.Event() for _ in range(LAG)] if on_gpu else []

    @property
    def max_seq_len(self) -> int:
        return self.cache.max_seq_len

    def reset(self) -> None:
        """Forgets what is in the caches."""
        self.lengths = [0] * len(self.lengths)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, images: SoftTokens | None = None, row: int = 0) -> Tensor:
        """Feeds tokens [T], which go on where row `row` ends; returns the last one's logits [V], float32.

        Raises ValueError for no tokens, one outside the vocabulary (on the CPU), and as prefill.prefill does."""
        config = self.model.config
        if tokens.dim() != 1 or not len(tokens):
            raise ValueError(f"tokens must be [T] with T >= 1, got shape {tuple(tokens.shape)}")
        if tokens.is_cpu and not bool(((tokens >= 0) & (tokens < config.vocab_size)).all()):
            raise ValueError(f"a token id is outside the vocabulary of {config.vocab_size}")
        tokens = tokens.to(self.model.device)
        logits = prefill(self.model, tokens, self.cache, row, self.lengths[row], images)
        self.lengths[row] += len(tokens)
        return logits

    @torch.inference_mode()
    def start(self, logits: Tensor, sampling: Sampling | None = None) -> list[int]:
        """Draws each row's first token from logits [B, V], greedily without `sampling`; -1 as in `sample`."""
        self.sampling = sampling or Sampling(temperature=0)
        step = self.step
        seed = self.sampling.generator("cpu").initial_seed()
        step.state.copy_(sampling_state(seed, self.model.device))
        step.token.copy_(step.sample(logits, self.sampling))
        step.position.copy_(torch.tensor(self.lengths))
        step.count.zero_()
        self._launched = 0
        self.graph = self._captured() if self._on_gpu else None
        return step.token.tolist()

    @torch.inference_mode()
    def decode(self, steps: int) -> Iterator[list[int]]:
        """The next token of each row, `steps` times. On a GPU the step that follows has begun when a token comes out,
        so that one more may have been computed than is asked for. Raises ValueError for more steps than there is
        room for, and before `start`."""
        if self.sampling is None:
            raise ValueError("a session decodes from what `start` drew")
        if max(self.lengths) + steps > self.max_seq_len:
            raise ValueError(f"{steps} more tokens do not fit the cache (max_seq_len = {self.max_seq_len})")
        first, ahead = self._launched, 1 if self._on_gpu else 0
        for i in range(first, first + steps):
            while self._launched < min(i + 1 + ahead, first + steps):
                self._launch()
            yield self._token(i)

    def _launch(self) -> None:
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        if self._on_gpu:
            self._events[self._launched % LAG].record()
        self._launched += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _run(self) -> None:
        self.step(self.sampling)
        self._drawn.copy_(self.step.history, non_blocking=True)

    def _token(self, number: int) -> list[int]:
        if self._on_gpu:
            self._events[number % LAG].synchronize()
        return self._drawn[number % LAG].tolist()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A graph of one step that samples in this way. The step runs twice before: it compiles what it needs, and
        what it writes is put back, or is written again by the first replay."""
        key = (self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)
        if key in self._graphs:
            return self._graphs[key]
        kept = [(t, t.clone()) for t in self.step.moving]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run()
                for tensor, value in kept:
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run()
        self._graphs = {key: graph}
        return graph


def chunk_size(device: torch.device) -> int:
    """How many tokens of a prompt to compute at a time by default."""
    return 2048 if device.type == "cuda" else 512
