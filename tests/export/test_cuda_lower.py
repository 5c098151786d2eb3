"""Lowering for ExecuTorch's CUDA backend, as far as it goes without a GPU: one delegate a method, and what is in it."""

import dataclasses

import pytest
import torch
from cuda_programs import CHUNK, CONTEXT, VOCAB, settings, weights

from gemma4_impl.config import FULL
from gemma4_impl.export import cuda, source
from gemma4_impl.export.cuda_aoti import state_sizes
from gemma4_impl.export.cuda_graph import export_programs
from gemma4_impl.model.cache import KVCache

pytest.importorskip("executorch", reason="needs the package executorch")


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """Quantized experts, one layer: (model, what ExecuTorch would be handed of each method, stages, the error)."""
    model = source.open_source(weights("26B-A4B", tmp_path_factory.mktemp("tiny") / "m", True, [FULL])).model
    stages, delegated = [], {}
    with pytest.MonkeyPatch.context() as patch:
        check = cuda.check_partition
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(cuda, "check_partition", lambda programs: delegated.update(check(programs)))
        with pytest.raises(ValueError) as error:
            cuda.lower(model, settings(), report=stages.append, top_k=5)
    return model, delegated, stages, str(error.value)


def names(program) -> list[str]:
    found = (n.target for n in program.graph.nodes if n.op == "call_function")
    return [t.name() if hasattr(t, "name") and callable(t.name) else str(t) for t in found]


def test_without_a_gpu_it_says_how_far_it_came(lowered):
    _, delegated, stages, message = lowered
    assert stages == ["exporting the graphs", "partitioning"]
    assert set(delegated) == {"prefill", "decode"}
    assert "prefill and decode were exported" in message or "decode and prefill were exported" in message
    assert "one delegate" in message
    assert "needs an NVIDIA GPU" in message


def test_operators_stay_whole_in_the_delegates(lowered):
    """What runs a CUDA program has no Python: with a definition for the CPU, or a custom operator, it could not run."""
    _, delegated, _, _ = lowered
    ours = {name: {op for op in names(program) if op.startswith("gemma4::")} for name, program in delegated.items()}
    assert ours["prefill"] == {"gemma4::sdpa_prefill", "gemma4::quantized_linear", "gemma4::dequantize"}
    assert ours["decode"] == {"gemma4::sdpa_decode", "gemma4::quantized_linear", "gemma4::quantized_experts"}
    assert names(delegated["decode"]).count("gemma4::sdpa_decode") == 1


def test_the_caches_are_the_delegates_own(lowered):
    """By the same names in both: that is by what ExecuTorch's CUDA backend stores a tensor once."""
    model, delegated, _, _ = lowered
    cache = KVCache(model.config, 1, CONTEXT, CHUNK, torch.float32)
    written = {name: set(program.graph_signature.buffers_to_mutate.values()) for name, program in delegated.items()}
    caches = {name for name in state_sizes(cache, VOCAB) if name.startswith("cache.")}
    assert written == {"prefill": caches, "decode": caches | {"state", "logits"}}


def test_programs_can_be_handed_over_more_than_once(tmp_path):
    """They are packed for Python after ExecuTorch has taken what it wants of them."""
    model = source.open_source(weights("31B", tmp_path / "m", True, [FULL])).model
    programs = export_programs(model, KVCache(model.config, 1, CONTEXT, CHUNK, torch.float32))
    kept = {name: set(program.constants) for name, program in programs.items()}
    first, second = cuda.check_partition(programs), cuda.check_partition(programs)
    assert [names(p) for p in first.values()] == [names(p) for p in second.values()]
    assert {name: set(program.constants) for name, program in programs.items()} == kept


def test_its_runtime_has_every_kernel(lowered):
    """After ExecuTorch's own passes, each operator is one that Inductor makes a kernel of, or that the runtime has."""
    from executorch.backends.cuda.cuda_backend import CudaBackend
    from torch._inductor import lowering
    from torch._inductor.decomposition import select_decomp_table

    table, supported = select_decomp_table(), CudaBackend.get_supported_fallback_kernels()
    for name, program in lowered[1].items():
        for each in CudaBackend.get_custom_passes([]):
            each(program if getattr(each, "requires_exported_program", False) else program.graph_module)
        for node in program.graph.nodes:
            op = getattr(node.target, "_op", node.target)
            if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
                continue
            kernel = f"aoti_torch_cuda_{op.name().removeprefix('aten::').replace('.', '_')}"
            missing = op in lowering.fallbacks and op not in table and kernel not in supported
            assert not missing, f"{name}: {op} has no kernel"
        assert "aten::topk" not in names(program)


def test_methods_are_what_the_programs_take(lowered):
    model = lowered[0]
    prefill, decode = (cuda._method(name, model, settings()) for name in ("prefill", "decode"))
    assert [(v.name, v.shape) for v in prefill.inputs] == [
        ("tokens", (1, {"min": 2, "max": CHUNK})),
        ("positions", (1, {"min": 2, "max": CHUNK})),
    ]
    assert [(v.name, v.dtype, v.shape) for v in prefill.outputs] == [("logits", torch.float32, (1, 1, VOCAB))]
    assert [v.shape for v in decode.inputs] == [(1, 1), (1, 1), (1,)]
    assert [(v.name, v.dtype, v.shape) for v in decode.outputs] == [("token", torch.int64, (1,))]
    two = dataclasses.replace(settings(), max_prefill_chunk=2)
    assert cuda._method("prefill", model, two).inputs[0].shape == (1, 2)


def test_what_is_taken_apart_is_an_error(lowered, monkeypatch):
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    monkeypatch.setattr(cuda, "_ours", lambda found: {"gemma4::sdpa_decode": int(found is program)})
    with pytest.raises(ValueError, match="decode: operators of ours were taken apart"):
        cuda.check_partition({"decode": program})
