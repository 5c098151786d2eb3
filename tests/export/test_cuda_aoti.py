"""AOTInductor packages of prefill and decode on the CPU: one state for both, weights stored and held once."""

import json

import pytest
import torch
from cuda_programs import CHUNK, CONTEXT, LIMITS, VOCAB, chunked, prompt, session, weights
from cuda_programs import exported as export
from safetensors import safe_open

from gemma4_impl.config import FULL
from gemma4_impl.export import cuda_aoti
from gemma4_impl.export.cuda_aoti import (
    Session,
    load_packages,
    new_state,
    shared_constants,
    state_sizes,
    write_packages,
)

QUICK = {"cpp.simdlen": 1, "aot_inductor.precompile_headers": False}
"""Kernels that are compiled in seconds, rather than fast."""


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """One layer, quantized: (its case, its folder)."""
    case = export(weights("31B", tmp_path_factory.mktemp("tiny") / "m", True, [FULL]), top_k=None)
    expected = session(case)
    folder = tmp_path_factory.mktemp("packages")
    write_packages(case.programs, folder, "cpu", state_sizes(case.cache, VOCAB), QUICK)
    return case, expected, folder


def test_chunks_and_decode_across_two_packages(packaged):
    """Ragged prefill by one package and decode by the other, on the same caches, is what the graphs compute eagerly."""
    case, expected, folder = packaged
    state = new_state(state_sizes(case.cache, VOCAB), "cpu")
    program = Session(load_packages(folder, state, "cpu"), state, LIMITS)
    assert set(program.functions) == {"prefill", "decode"}
    for tokens in (prompt(), prompt(seed=2)):
        got, want = chunked(program.forward, tokens), chunked(expected.forward, tokens)
        # Other sums in other orders, in float32.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
        first = int(got[-1].argmax())
        for one in (program, expected):
            one.start(first)
        assert list(program.decode(8)) == list(expected.decode(8))
        assert int(state["state"][1]) == 0
        for one in (program, expected):
            one.reset()


def test_two_sessions_do_not_share_a_state(packaged):
    case, _, folder = packaged
    tokens = prompt(CHUNK)
    sessions = []
    for _ in range(2):
        state = new_state(state_sizes(case.cache, VOCAB), "cpu")
        sessions.append(Session(load_packages(folder, state, "cpu"), state, LIMITS))
    one, other = sessions
    assert torch.equal(one.forward(tokens, 0), other.forward(tokens, 0))
    other.forward(tokens.flip(1), CHUNK)
    then = one.forward(tokens[:, :1], CHUNK)
    other.reset()
    other.forward(tokens, 0)
    assert torch.equal(other.forward(tokens[:, :1], CHUNK), then)


def test_weights_are_stored_once(packaged):
    case, _, folder = packaged
    sizes = state_sizes(case.cache, VOCAB)
    with safe_open(folder / cuda_aoti.CONSTANTS, framework="pt") as file:
        names = set(file.keys())
        aliases = json.loads(file.metadata()["aliases"])
    assert aliases["model.lm_head.qdata"] == "model.embed_tokens.qdata"
    assert not names & set(sizes)


def test_a_missing_constant_is_named(packaged, tmp_path):
    case, _, folder = packaged
    state = new_state(state_sizes(case.cache, VOCAB), "cpu")
    del state["cache.layers_0_k"]
    with pytest.raises(ValueError, match=r"decode.pt2: no tensor is given for cache.layers_0_k"):
        load_packages(folder, state, "cpu")


def test_other_tensors_by_the_same_name_are_refused(packaged):
    programs = packaged[0].programs
    kept = programs["decode"]._state_dict["model.norm.weight"]
    programs["decode"]._state_dict["model.norm.weight"] = kept + 1
    try:
        with pytest.raises(ValueError, match="different tensors by the name of model"):
            shared_constants(programs, "cpu")
    finally:
        programs["decode"]._state_dict["model.norm.weight"] = kept


def test_a_new_state_is_empty(packaged):
    case = packaged[0]
    state = new_state(state_sizes(case.cache, VOCAB), "cpu")
    assert bool((state["cache.full_attention_positions"] == -1).all())
    assert state["cache.layers_0_k"].shape == (1, 1, CONTEXT + 1, 32)
    assert state["logits"].shape == (1, VOCAB)
    assert sum(size["bytes"] for size in state_sizes(case.cache, VOCAB).values()) == sum(
        t.nbytes for t in state.values()
    )
