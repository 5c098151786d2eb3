"""Exported programs on an NVIDIA GPU: packages against eager, decode as a CUDA graph, ExecuTorch's lowering."""

import json

import pytest
import torch
from cuda_programs import (
    CONTEXT,
    LIMITS,
    VOCAB,
    chunked,
    dense,
    eager,
    exported,
    prompt,
    settings,
    weights,
    whole,
)
from exported import write_lowered

from gemma4_impl.export import cuda, source
from gemma4_impl.export.cuda_aoti import Session, load_packages, new_state, state_sizes, write_packages
from gemma4_impl.generation import Sampling
from gemma4_impl.kernels.steps import naive, sampling_state
from parity.budget import check_total
from reference.tiny import TINY

pytestmark = pytest.mark.cuda

EXPERTS = TINY["26B-A4B"]["num_experts"]
CASES = {
    "dense, float32": ("31B", False, torch.float32, {}),
    "PLE, KV sharing, quantized": ("E2B", True, torch.bfloat16, {}),
    "MoE, float32": ("26B-A4B", False, torch.float32, {}),
    # A router that rounds chooses another expert here and there, in any implementation: here it has no choice.
    "MoE, quantized": ("26B-A4B", True, torch.bfloat16, {"top_k_experts": EXPERTS}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(checkpoint, dtype, how to make a session of its packages)."""
    variant, quantized, dtype, changes = CASES[request.param]
    found = exported(weights(variant, tmp_path_factory.mktemp("tiny") / "m", quantized, **changes), dtype, top_k=5)
    folder, sizes = tmp_path_factory.mktemp("packages"), state_sizes(found.cache, VOCAB)
    write_packages(found.programs, folder, "cuda", sizes)

    def session() -> Session:
        state = new_state(sizes, "cuda")
        return Session(load_packages(folder, state, "cuda"), state, LIMITS, 5)

    return found.checkpoint, dtype, session


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double().cpu() - truth).norm() / truth.norm())


def test_chunks_and_decode_are_in_parity_with_eager(case):
    """Within twice what the eager model in the same dtype on the same GPU is wrong by."""
    checkpoint, dtype, make = case
    tokens, session = prompt(), make()
    truth = whole(dense(checkpoint, torch.float64), tokens)
    model = dense(checkpoint, dtype).cuda()
    references = [error(run(model, tokens.cuda()), truth) for run in (eager, whole)]
    first = chunked(session.forward, tokens)
    assert not check_total(error(first, truth), references, dtype)["total"].red
    session.reset()
    chunked(session.forward, prompt(seed=2))
    session.reset()
    again = chunked(session.forward, tokens)
    assert not check_total(error(again, truth), references, dtype)["total"].red
    assert torch.equal(again, first)


def test_a_graph_draws_what_single_steps_draw(case):
    """Greedily and with a temperature; the graph is captured once, and goes on from where `forward` left."""
    make = case[2]
    replayed, stepped = make(), make()
    for sampling in (Sampling(temperature=0), Sampling(20.0, top_k=5, seed=3)):
        for session in (replayed, stepped):
            session.reset()
            for part in prompt(20).split(1, dim=1):
                logits = session.forward(part, session.length)
        token = int(logits.argmax())
        replayed.start(token, sampling)
        assert replayed._graph is not None
        got = [*replayed.decode(7), *replayed.decode(18)]
        state = sampling_state(3, "cuda")
        expected = []
        for _ in range(25):
            logits = stepped.forward(torch.tensor([[token]]), stepped.length)
            token = int(naive.sample(logits, sampling.temperature, sampling.top_k, None, state))
            expected.append(token)
        assert got == expected
        assert len(set(got)) > (3 if sampling.temperature else 0)


def test_a_graph_replays_past_the_ring(case):
    """To the end of the context, and no further."""
    session = case[2]()
    session.forward(prompt(5), 0)
    session.start(7)
    assert len(list(session.decode(CONTEXT - 5))) == CONTEXT - 5
    with pytest.raises(ValueError, match="1 more tokens do not fit"):
        list(session.decode(1))


@pytest.mark.parametrize("variant", ["31B", "E2B"])
def test_lowered_for_executorch_and_opened_again(variant, tmp_path):
    """One delegate a method in model.pte, weights in a .ptd, packages that run; all that the manifest says."""
    pytest.importorskip("executorch", reason="needs the package executorch")
    checkpoint = weights(variant, tmp_path / "m", True)
    lowered = cuda.lower(source.open_source(checkpoint, torch.bfloat16).model, settings(torch.bfloat16))
    folder = tmp_path / "out"
    folder.mkdir()
    manifest = write_lowered(lowered, folder, "cuda", torch.bfloat16)
    assert (folder / "model.pte").stat().st_size > 0
    assert list(folder.glob("*.ptd"))
    kernels = json.loads(json.dumps(lowered.extra))["kernels"]
    assert {row["kernel"] for row in kernels["decode"] if "sdpa" in row["kernel"]} == {"sdpa_decode"}
    tokens = prompt()
    truth = whole(dense(checkpoint, torch.float64), tokens)
    reference = error(eager(dense(checkpoint, torch.bfloat16).cuda(), tokens.cuda()), truth)
    session = cuda.open_session(folder, manifest)
    assert not check_total(error(chunked(session.forward, tokens), truth), [reference], torch.bfloat16)["total"].red
