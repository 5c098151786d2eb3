"""Exported programs with a vision tower, run here: soft tokens and prompts with images are the model's."""

from dataclasses import replace

import pytest
import torch
from image_programs import CHUNK, CONTEXT, Multimodal, assert_within_budget, causal, error, make_small, noise

from gemma4_impl.export import front, run
from gemma4_impl.generate import generate

BACKENDS = ("xnnpack", "mlx")


class Program:
    """An exported folder, opened; and the checkpoint's model in float32 and in float64, the truth."""

    def __init__(self, source, folder, backend):
        front.export(source, folder, backend, max_seq_len=CONTEXT, max_prefill_chunk=CHUNK, vision=True)
        self.exported, self.session, self.tokenizer = run.open_program(folder)
        self.encoder = run.open_encoder(self.exported, self.session)
        self.own, self.truth = Multimodal.load(source), Multimodal.load(source, torch.float64)

    def soft(self, tokens, images):
        return self.encoder.merge(tokens, self.encoder.encode(images), torch.float32)


@pytest.fixture(scope="module", params=BACKENDS)
def program(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Program(make_small(folder / "source"), folder / "out", request.param)


def test_the_manifest_says_what_images_need(program):
    constants, config = program.exported.manifest.constants, program.own.encoder.config
    assert constants["get_image_token_id"] == config.image_token_id
    assert (constants["get_boi_token_id"], constants["get_eoi_token_id"]) == (config.boi_token_id, config.eoi_token_id)
    assert constants["get_max_soft_tokens"] == program.own.encoder.processor.max_soft_tokens
    assert constants["get_bidirectional_images"] == 1
    assert (program.encoder.config, program.encoder.processor) == (config, program.own.encoder.processor)


def test_soft_tokens_are_the_towers(program):
    images = program.own.images()
    assert min(images.num_soft_tokens) < max(images.num_soft_tokens) == program.own.encoder.processor.max_soft_tokens
    for batch in (images, program.own.one_square()):
        parts = (encoder.encode(batch) for encoder in (program.encoder, program.own.encoder, program.truth.encoder))
        for got, own, truth in zip(*parts, strict=True):
            assert_within_budget(got, own, truth)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [([(30, 30), (300, 2)], [20, 3, 30]), ([(20, 300)], [0, 1]), ([(41, 40)] * 3, [1, 1, 1, 1]), ([], [90])],
    ids=str,
)
def test_prompts_with_images(program, sizes, text):
    """In chunks, then decoding: every logit that comes out is that of one forward. Text alone too."""
    tokens, images = program.own.prompt(sizes, text)
    own, truth = (model.logits(tokens, images) for model in (program.own, program.truth))
    soft, T = program.soft(tokens, images) if images else None, tokens.shape[1]
    after = T if soft is None else int(soft.mask[0].nonzero()[-1]) + 2
    after = min(after, T - 1)
    program.session.reset()
    part = None if soft is None else soft[:after]
    got = [run.prefill(program.session, tokens[:, :after], CHUNK, part)]
    got += [program.session.forward(tokens[:, i : i + 1], i).reshape(1, -1) for i in range(after, T)]
    assert_within_budget(torch.cat(got), own[after - 1 :], truth[after - 1 :])
    if soft is not None:
        program.session.reset()
        seen = run.prefill(program.session, tokens[:, :after], CHUNK, causal(part))
        assert error(seen[0], truth[after - 1]) > 1e-3


def test_generation_is_the_models(program):
    options = {"max_new_tokens": 6, "temperature": 0, "images": [noise(20, 30), noise(40, 12)]}
    want = generate(program.own.model, program.tokenizer, "What is this?", encoder=program.own.encoder, **options)
    got = run.generate(
        program.exported, program.session, program.tokenizer, "What is this?", encoder=program.encoder, **options
    )
    assert got.tokens == want.tokens
    assert got.prompt_tokens == want.prompt_tokens > 2 * min(program.own.images().num_soft_tokens)


def test_what_does_not_fit_is_refused(program):
    session, images = program.session, program.own.images()
    with pytest.raises(ValueError, match="padded with position -1"):
        program.encoder.encode(
            replace(images, pixel_values=images.pixel_values[:, 9:], positions=images.positions[:, 9:])
        )
    P = images.positions.shape[1]
    for patches, positions in (
        (images.pixel_values[:1, : P - 9], images.positions[:1, : P - 9]),
        (images.pixel_values[:2], images.positions[:2]),
        (images.pixel_values[:1, :, 1:], images.positions[:1]),
    ):
        with pytest.raises(ValueError, match=r"patches|input"):
            session.vision(patches, positions)
    tokens, shown = program.own.prompt([(30, 30)], [3, 3])
    soft = program.soft(tokens, shown)
    session.reset()
    with pytest.raises(ValueError, match="soft tokens"):
        session.forward(tokens[:, :8], 0, images=soft[:9])
