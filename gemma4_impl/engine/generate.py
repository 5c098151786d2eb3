"""A prompt turned into text and timings by the engine."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gemma4_impl.engine.model import PackedModel
from gemma4_impl.engine.profile import profile
from gemma4_impl.engine.session import Session, chunk_size
from gemma4_impl.generate import cache_bytes
from gemma4_impl.generation import Generation, Interrupted, Prompt, Sampling, Transcript, check_prompt, prompt_ids

if TYPE_CHECKING:
    from gemma4_impl.tokenizer import Tokenizer
    from gemma4_impl.vision.images import ImageEncoder
    from gemma4_impl.vision.processing import ImageSource


class Engine:
    """A model and the session it was last used in, which a prompt that fits goes on using."""

    def __init__(self, model: PackedModel):
        self.model = model
        self._session: Session | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> "Engine":
        """As `PackedModel.from_pretrained`."""
        return cls(PackedModel.from_pretrained(path, dtype, device, progress))

    def session(self, max_seq_len: int, max_chunk: int | None = None) -> Session:
        """An empty session of one row with this much room."""
        found = self._session
        if found is None or found.max_seq_len < max_seq_len or found.cache.max_chunk < min(max_chunk or 1, max_seq_len):
            self._session = found = None  # its memory first
            self._session = found = Session(self.model, 1, max_seq_len, max_chunk)
        found.reset()
        return found

    def bytes_per_token(self, context: int) -> int:
        """Bytes that one decode step at batch 1 must read when its token attends to `context` positions."""
        return self.model.nbytes_read + cache_bytes(self.model.config, self.model.dtype, context)


@torch.inference_mode()
def generate(
    engine: Engine,
    tokenizer: "Tokenizer",
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = True,
    stream: Callable[[str], None] | None = None,
    max_seq_len: int | None = None,
    max_chunk: int | None = None,
    images: Sequence["ImageSource"] = (),
    encoder: "ImageEncoder | None" = None,
    report: Callable[[str], None] | None = None,
) -> Generation:
    """Continues `prompt` until a stop token, `max_new_tokens`, or the end of the context; arguments and errors are
    those of `gemma4_impl.generate.generate`. The time to capture the graph counts for nothing.

    `report` is called at the end with the lines of a profile of the step that would come next."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    model, begin = engine.model, time.perf_counter()
    ids, processed = prompt_ids(tokenizer, prompt, chat, images, encoder)
    limit = check_prompt(model.config, ids, max_seq_len)
    stop = tokenizer.stop_ids | set(model.config.eos_token_id)
    transcript = Transcript(tokenizer, stop, max_new_tokens, limit - len(ids), stream)
    tokens, soft = torch.tensor(ids, device=model.device), None
    if processed is not None:
        soft = encoder.merge(tokens[None], encoder.encode(processed), model.dtype)
        max_chunk = max(max_chunk or chunk_size(model.device), soft.longest)
    session = engine.session(max_seq_len or min(len(ids) + max_new_tokens, limit), max_chunk)
    logits = session.prefill(tokens, soft)[None]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    prefilled = time.perf_counter()
    new = session.start(logits, sampling)
    first = time.perf_counter()
    interrupted = False
    try:
        if transcript.add(new):
            for new in session.decode(transcript.left):
                if not transcript.add(new):
                    break
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - first
    transcript.finish()
    read = sum(engine.bytes_per_token(len(ids) + i) for i in range(1, len(transcript.tokens)))
    if report is not None:
        for line in profile(session).lines():
            report(line)
    result = transcript.generation(len(ids), prefilled - begin, seconds, read, interrupted)
    if interrupted:
        raise Interrupted(result)
    return result
