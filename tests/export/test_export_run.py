"""Generation with a program equals generation with the model, whatever the chunk; the folder holds what it says."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4_impl.checkpoint import open_checkpoint
from gemma4_impl.config import ConfigError, TextConfig
from gemma4_impl.export import front, run
from gemma4_impl.export.folder import MANIFEST, hash_files, open_folder
from gemma4_impl.generate import generate
from gemma4_impl.generation import Interrupted
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.recipe import load_recipe
from gemma4_impl.quant.save import quantize_checkpoint
from gemma4_impl.tokenizer import Tokenizer
from reference.tiny import ALIGNED, make_tiny
from reference.tiny_gguf import make_tiny_gguf

CHUNK = 5


@pytest.fixture(scope="module", autouse=True)
def fake():
    """The fake backend in the place of XNNPACK's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(front.MODULES, "xnnpack", "fake_backend")
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny("31B", tmp_path_factory.mktemp("run") / "31B", overrides=ALIGNED[32])


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "sub" / "x"
    stages = []
    front.export(source, out, "xnnpack", max_seq_len=96, max_prefill_chunk=CHUNK, report=stages.append)
    assert stages == ["lowering", "lowering decode", "writing", "hashing"]
    return out


@pytest.fixture(scope="module")
def opened(folder):
    return run.open_program(folder)


@pytest.fixture(scope="module")
def model(source):
    return Gemma4.from_pretrained(source)


def test_the_folder(folder, source):
    exported = open_folder(folder)
    manifest, config = exported.manifest, TextConfig.from_file(source)
    assert (manifest.backend, manifest.dtype, manifest.taps) == ("xnnpack", torch.float32, False)
    assert (manifest.max_seq_len, manifest.max_prefill_chunk) == (96, CHUNK)
    assert manifest.methods["prefill"].inputs[0].shape == (1, {"min": 2, "max": CHUNK})
    assert manifest.source == {"name": "31B", "fingerprint": open_checkpoint(source).fingerprint()}
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.eos_ids == tuple(sorted({*config.eos_token_id, *Tokenizer.from_pretrained(source).stop_ids}))
    assert manifest.caches["layers_0_k"]["shape"] == [1, 2, 9 - 1 + CHUNK + 1, 16]
    assert exported.config == config
    assert set(manifest.files) == {p.name for p in folder.iterdir()} - {MANIFEST}
    assert {"config.json", "model.pte", "tokenizer.json", "generation_config.json"} <= set(manifest.files)
    assert manifest.files == hash_files(folder)
    assert list(folder.parent.iterdir()) == [folder]


@given(st.data())
@settings(max_examples=10, deadline=None)
def test_greedy_and_sampled_as_with_the_model(opened, model, data):
    exported, session, tokenizer = opened
    # The image token is refused without an image.
    token = st.integers(0, 511).filter(lambda token: token != tokenizer.image_id)
    ids = data.draw(st.lists(token, min_size=1, max_size=40))
    options = data.draw(
        st.sampled_from([{"temperature": 0}, {"top_k": 20, "top_p": 0.9, "seed": 7}, {"seed": 8, "temperature": 0.3}])
    )
    options |= {"max_new_tokens": data.draw(st.integers(1, 25)), "chat": False}
    pieces = []
    got = run.generate(exported, session, tokenizer, ids, stream=pieces.append, **options)
    want = generate(model, tokenizer, ids, max_seq_len=96, **options)
    assert (got.tokens, got.text, got.stop_reason) == (want.tokens, want.text, want.stop_reason)
    assert "".join(pieces) == got.text
    assert got.prompt_tokens == len(ids)


def test_chunks(opened):
    exported, session, tokenizer = opened
    for length, parts in ((1, [1]), (5, [5]), (6, [5, 1]), (13, [5, 5, 3])):
        session.calls.clear()
        run.generate(exported, session, tokenizer, list(range(3, 3 + length)), temperature=0, max_new_tokens=3)
        assert session.calls[: len(parts)] == parts
        assert set(session.calls[len(parts) :]) <= {1}
    session.reset()
    tokens = torch.arange(3, 15)[None]
    whole = run.prefill(session, tokens, CHUNK)
    session.reset()
    run.prefill(session, tokens[:, :7], CHUNK)
    assert torch.allclose(run.prefill(session, tokens[:, 7:], CHUNK), whole, atol=1e-4)
    assert session.length == 12


def test_the_context_ends(opened):
    exported, session, tokenizer = opened
    result = run.generate(exported, session, tokenizer, [5] * 90, temperature=0, max_new_tokens=500)
    assert result.stop_reason == "eos" or len(result.tokens) == 96 - 90 + 1
    with pytest.raises(ValueError, match="the prompt has 97 tokens but the program holds 96; shorten it or export"):
        run.generate(exported, session, tokenizer, [5] * 97)
    with pytest.raises(ValueError, match="token id 512 is outside the model's vocabulary of 512"):
        run.generate(exported, session, tokenizer, [5, 512])
    with pytest.raises(ValueError, match="exported without a vision tower; export it with --vision"):
        run.open_encoder(exported, session)
    with pytest.raises(ValueError, match="the prompt is empty"):
        run.prefill(session, torch.zeros(1, 0, dtype=torch.long), CHUNK)


def test_interrupted(opened, monkeypatch):
    exported, session, tokenizer = opened
    forward = session.forward

    def stop_late(tokens, position):
        if position > 8:
            raise KeyboardInterrupt
        return forward(tokens, position)

    monkeypatch.setattr(session, "forward", stop_late)
    with pytest.raises(Interrupted) as error:
        run.generate(exported, session, tokenizer, [5, 9, 11], temperature=0, max_new_tokens=50)
    assert error.value.generation.stop_reason == "interrupted"
    assert len(error.value.generation.tokens) == 7


@pytest.mark.parametrize("kind", ["quantized", "gguf"])
def test_other_sources(kind, source, tmp_path):
    if kind == "gguf":
        path = make_tiny_gguf(source, tmp_path / "m.gguf", "Q8_0")
    else:
        path = tmp_path / "q"
        quantize_checkpoint(source, path, load_recipe("default"))
    front.export(path, tmp_path / "x", "xnnpack", max_seq_len=40, max_prefill_chunk=8, dtype=torch.float32)
    exported, session, tokenizer = run.open_program(tmp_path / "x")
    assert exported.config == open_checkpoint(path).config
    model, own = Gemma4.from_pretrained(path, torch.float32), Tokenizer.from_pretrained(path)
    assert exported.manifest.eos_ids == tuple(sorted({*model.config.eos_token_id, *own.stop_ids}))
    text = "An old house, 3 stories"
    assert tokenizer.encode(text) == own.encode(text)
    assert tokenizer.chat_template == own.chat_template
    got = run.generate(exported, session, tokenizer, text, temperature=0, max_new_tokens=9, chat=False)
    want = generate(model, own, text, temperature=0, max_new_tokens=9, chat=False)
    assert (got.tokens, got.text) == (want.tokens, want.text)


class TestRefusals:
    """Nothing is loaded, and nothing is left behind."""

    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch, tmp_path):
        def loaded(*_):
            raise AssertionError("a weight was read")

        monkeypatch.setattr(front, "open_source", loaded)
        yield
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"backend": "vulkan"}, "unknown backend 'vulkan'; known: xnnpack, mlx, cuda"),
            ({"max_seq_len": 513}, "max_seq_len = 513 exceeds the model's max_position_embeddings = 512"),
            ({"max_seq_len": 8, "max_prefill_chunk": 9}, "max_prefill_chunk = 9 exceeds max_seq_len = 8"),
            ({"dtype": torch.float64}, "dtype = torch.float64: must be float32, bfloat16 or float16"),
            ({"dtype": torch.float16}, "fake programs do not compute in float16"),
            ({"backend": "cuda", "taps": True}, "backend cuda: returns no taps: fused kernels have none"),
        ],
    )
    def test_arguments(self, source, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            front.export(source, tmp_path / "x", **{"backend": "xnnpack"} | options)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
    def test_no_gpu(self, source, tmp_path):
        with pytest.raises(ValueError, match="compiling the kernels needs an NVIDIA GPU, and there is none here"):
            front.export(source, tmp_path / "x", "cuda")

    def test_no_tower(self, source, tmp_path):
        with pytest.raises(ConfigError, match="takes text only"):
            front.export(source, tmp_path / "x", "xnnpack", vision=True)
        gguf = make_tiny_gguf(source, tmp_path / "m.gguf")
        with pytest.raises(ValueError, match="--vision needs a multimodal checkpoint folder"):
            front.export(gguf, tmp_path / "x", "xnnpack", vision=True)

    def test_places(self, source, tmp_path):
        with pytest.raises(FileExistsError, match="already exists"):
            front.export(source, source, "xnnpack")
        with pytest.raises(ValueError, match="lies inside the checkpoint"):
            front.export(source, source / "x", "xnnpack")
        with pytest.raises(FileNotFoundError):
            front.export(tmp_path / "nothing", tmp_path / "x", "xnnpack")

    def test_a_package_that_is_missing(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(front, "_PACKAGES", ("executorch_that_is_not_there",))
        with pytest.raises(ImportError, match=r"executorch_that_is_not_there .* pip install 'gemma4-parity\[export\]'"):
            front.export(source, tmp_path / "x", "xnnpack")

    def test_a_tokenizer_of_another_model(self, source):
        tokenizer, config = Tokenizer.from_pretrained(source), TextConfig.from_file(source)
        tokenizer.bos_id = 3
        with pytest.raises(ValueError, match=r"the tokenizer's BOS is 3, but config.json says 2"):
            front.check_tokenizer(tokenizer, config)
        tokenizer.bos_id, tokenizer.stop_ids = 2, frozenset([1, 600])
        with pytest.raises(ValueError, match="stop token 600 is outside the model's vocabulary of 512"):
            front.check_tokenizer(tokenizer, config)


def test_an_error_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(front, "hash_files", full)
    with pytest.raises(OSError, match="No space left on device; nothing was written"):
        front.export(source, tmp_path / "a" / "x", "xnnpack", max_seq_len=16)
    assert list(tmp_path.iterdir()) == []


def test_defaults(source):
    config, tokenizer = TextConfig.from_file(source), Tokenizer.from_pretrained(source)
    filled = front.make_settings(config, tokenizer, None, None, torch.float32, False)
    assert (filled.max_seq_len, filled.max_prefill_chunk, filled.taps) == (512, 512, False)
    filled = front.make_settings(config, tokenizer, 100, None, torch.bfloat16, True)
    assert (filled.max_seq_len, filled.max_prefill_chunk, filled.taps) == (100, 100, True)
    long = front.make_settings(
        replace(config, max_position_embeddings=10**6), tokenizer, None, None, torch.float32, False
    )
    assert (long.max_seq_len, long.max_prefill_chunk) == (4096, 512)


def test_a_program_that_draws_itself(opened, monkeypatch):
    """It is asked for what it can draw; the host draws the rest."""
    exported, session, tokenizer = opened
    started = []

    def decode(steps):
        token = started[-1][0]
        for _ in range(steps):
            token = int(session.forward(torch.tensor([[token]]), session.length).argmax())
            yield token

    want = run.generate(exported, session, tokenizer, [5, 9, 11], temperature=0, max_new_tokens=12)
    monkeypatch.setattr(session, "top_k", None, raising=False)
    monkeypatch.setattr(session, "start", lambda *args: started.append(args), raising=False)
    monkeypatch.setattr(session, "decode", decode, raising=False)
    got = run.generate(exported, session, tokenizer, [5, 9, 11], temperature=0, max_new_tokens=12)
    assert got.tokens == want.tokens
    assert [token for token, _ in started] == [want.tokens[0]]
    run.generate(exported, session, tokenizer, [5, 9, 11], max_new_tokens=3)
    run.generate(exported, session, tokenizer, [5, 9, 11], top_p=1.0, max_new_tokens=3)
    assert len(started) == 3
    run.generate(exported, session, tokenizer, [5, 9, 11], top_p=0.9, max_new_tokens=3)
    run.generate(exported, session, tokenizer, [5, 9, 11], top_k=7, max_new_tokens=3)
    assert len(started) == 3


def test_a_manifest_is_text_that_people_can_read(folder):
    raw = json.loads((folder / MANIFEST).read_text())
    assert (raw["format_version"], raw["constants"]["get_n_layers"]) == (1, 8)
