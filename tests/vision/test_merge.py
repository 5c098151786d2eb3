"""Images inside prompts: transformers' model gives the same logits, and so does every way of feeding them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from gemma4_impl import Gemma4, Tokenizer
from gemma4_impl.config import ConfigError
from gemma4_impl.generate import generate, prefill
from gemma4_impl.model.soft_tokens import SoftTokens
from gemma4_impl.vision.images import ImageEncoder
from reference.tiny import make_tiny

VARIANTS = ("E2B", "E4B", "26B-A4B", "31B")


@dataclass
class Multimodal:
    path: Path
    model: Gemma4
    exact: Gemma4
    """The same in float64, where no rounding decides between two experts."""
    encoder: ImageEncoder

    def prompt(self, seed: int, sizes: list[tuple[int, int]], text: list[int]) -> tuple[Tensor, list[Image.Image]]:
        """Ids [1, T]: text[0] tokens, an image, text[1] tokens, another one, ..."""
        rng = np.random.default_rng(seed)
        images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        ids = [2]
        for i, n in enumerate(text):
            ids += rng.integers(107, 512, n).tolist() + [self.encoder.config.image_token_id] * (i < len(images))
        counts = self.encoder.processor(images).num_soft_tokens
        return torch.tensor([self.encoder.expand(ids, counts)]), images

    def soft(self, tokens: Tensor, images: list[Image.Image], model: Gemma4 | None = None) -> SoftTokens:
        return self.encoder.merge(tokens, self.encoder.encode(images), (model or self.model).dtype)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Multimodal]:
    made: dict[str, Multimodal] = {}

    def make(variant: str) -> Multimodal:
        if variant not in made:
            # The tower's own sizes, but few soft tokens an image, so that a context of 512 holds several.
            path = make_tiny(variant, tmp_path_factory.mktemp("mm") / variant, multimodal=True)
            encoder = ImageEncoder.from_pretrained(path)
            small = ImageEncoder(encoder.model, type(encoder.processor).from_config(encoder.config, 20))
            made[variant] = Multimodal(
                path, Gemma4.from_pretrained(path), Gemma4.from_pretrained(path, torch.float64), small
            )
        return made[variant]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, multimodal: Callable[[str], Multimodal]) -> None:
    from transformers.models.gemma4 import modeling_gemma4 as hf

    from reference.float64 import PromoteFloat32

    mm = multimodal(variant)
    tokens, images = mm.prompt(1, [(20, 30), (40, 12)], [5, 4, 12])
    processed = mm.encoder.processor(images)
    reference = hf.Gemma4ForConditionalGeneration.from_pretrained(mm.path, dtype=torch.float32, local_files_only=True)
    reference.eval().set_attn_implementation("eager")
    if mm.model.config.enable_moe_block:
        reference.set_experts_implementation("eager")
    inputs = {
        "input_ids": tokens,
        "pixel_values": processed.pixel_values,
        "image_position_ids": processed.positions,
        "mm_token_type_ids": (tokens == mm.encoder.config.image_token_id).long(),
    }
    with torch.no_grad():
        own = reference(**inputs).logits
        reference.double()
        with PromoteFloat32():
            truth = reference(**{**inputs, "pixel_values": processed.pixel_values.double()}).logits
        ours = mm.model(tokens, images=mm.soft(tokens, images))

    def error(x: Tensor) -> float:
        return float((x.double() - truth).norm() / truth.norm())

    assert error(ours) <= 2 * error(own) + torch.finfo(torch.float32).eps / 4
    if mm.encoder.bidirectional:
        assert mm.soft(tokens, images).longest > mm.model.config.sliding_window
        causal = SoftTokens(*(getattr(mm.soft(tokens, images), name) for name in ("mask", "embeds")), False)
        assert error(mm.model(tokens, images=causal)) > 1e-3


LAYOUTS = st.tuples(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=3),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.integers(0, 20),
)


@pytest.mark.parametrize("variant", ["E2B", "26B-A4B", "31B"])
@given(layout=LAYOUTS)
@example(layout=(750, [(35, 39), (25, 49), (27, 49)], [3, 5, 0, 0], 0))  # a near tie of two experts in float32
@settings(max_examples=12, deadline=None)
def test_chunks_and_decoding_give_the_full_forward(variant: str, layout: tuple, multimodal) -> None:
    seed, sizes, text, extra = layout
    mm = multimodal(variant)
    model = mm.exact
    tokens, images = mm.prompt(seed, sizes, [*text[: len(sizes)], text[3] + 2])
    soft = mm.soft(tokens, images, model)
    T = tokens.shape[1]
    after = int(soft.mask[0].nonzero()[-1]) + 1
    with torch.no_grad():
        full = model(tokens, images=soft)
    cache = model.make_cache(1, T, max_chunk=soft.longest + extra)
    logits = [prefill(model, tokens[:, :after], cache, images=soft[:after])]
    with torch.no_grad():
        logits += [model(tokens[:, i : i + 1], cache=cache)[:, 0] for i in range(after, T)]
    want = full[:, after - 1 :]
    # float64 through a dozen layers, in other orders of summation: an error in the mask shows at 1e-2.
    assert float((torch.stack(logits, dim=1) - want).norm() / want.norm()) < 1e-12


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("variant", ["E2B", "31B"])
def test_a_padded_batch_of_different_images(variant: str, left: bool, multimodal: Callable[[str], Multimodal]) -> None:
    mm = multimodal(variant)
    rows = [mm.prompt(3, [(20, 30), (40, 12)], [5, 4, 6]), mm.prompt(4, [(9, 50)], [2, 3])]
    length = max(tokens.shape[1] for tokens, _ in rows)
    batch, positions = torch.zeros(2, length, dtype=torch.long), torch.full((2, length), -1)
    for b, (tokens, _) in enumerate(rows):
        T = tokens.shape[1]
        where = slice(length - T, length) if left else slice(0, T)
        batch[b, where], positions[b, where] = tokens[0], torch.arange(T)
    soft = mm.soft(batch, [image for _, images in rows for image in images])
    cache = mm.model.make_cache(2, length, max_chunk=soft.longest + 7)
    logits = prefill(mm.model, batch, cache, positions, soft)
    for b, (tokens, images) in enumerate(rows):
        with torch.no_grad():
            want = mm.model(tokens, images=mm.soft(tokens, images))[0, -1]
        assert float((logits[b] - want).norm() / want.norm()) < 3e-5


def test_generate_with_images(multimodal: Callable[[str], Multimodal]) -> None:
    mm = multimodal("31B")
    tokenizer = Tokenizer.from_pretrained(mm.path)
    _, images = mm.prompt(5, [(20, 30), (40, 12)], [1, 1, 1])
    run = {"max_new_tokens": 5, "temperature": 0, "encoder": mm.encoder}
    shown = generate(mm.model, tokenizer, "What is this?", images=images, **run)
    counts = mm.encoder.processor(images).num_soft_tokens
    assert shown.prompt_tokens > sum(counts)
    swapped = generate(mm.model, tokenizer, "What is this?", images=images[::-1], **run)
    assert swapped.tokens != shown.tokens or swapped.prompt_tokens == shown.prompt_tokens
    raw = generate(mm.model, tokenizer, "See <|image|> here", images=images[:1], chat=False, **run)
    assert raw.prompt_tokens > counts[0]


def test_wrong_numbers_of_images(multimodal: Callable[[str], Multimodal]) -> None:
    mm = multimodal("31B")
    tokenizer = Tokenizer.from_pretrained(mm.path)
    _, images = mm.prompt(5, [(20, 30)], [1, 1])
    with pytest.raises(ValueError, match=r"0 image tokens .* for 1 images"):
        generate(mm.model, tokenizer, "no place", chat=False, images=images, encoder=mm.encoder)
    with pytest.raises(ValueError, match="but no image comes with it"):
        generate(mm.model, tokenizer, "a place <|image|>", chat=False)
    with pytest.raises(ValueError, match="need the vision tower"):
        generate(mm.model, tokenizer, "hello", images=images)
    with pytest.raises(ValueError, match="the context holds"):
        generate(mm.model, tokenizer, "hello", images=images * 30, encoder=mm.encoder)


def test_a_text_only_checkpoint_takes_no_images(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="takes text only"):
        ImageEncoder.from_pretrained(tiny("E2B"))
