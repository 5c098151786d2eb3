"""Export for NVIDIA GPUs: graphs lowered through ExecuTorch's CUDA backend, and compiled as AOTInductor packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from gemma4_impl.config import TextConfig
from gemma4_impl.export import cuda_aoti
from gemma4_impl.export.cuda_aoti import open_session as open_session
from gemma4_impl.export.cuda_graph import export_programs, kernel_choices, refusals
from gemma4_impl.export.folder import PROGRAM
from gemma4_impl.export.program import Lowered, Method, Settings, Value, constants
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4

if TYPE_CHECKING:
    from gemma4_impl.vision.images import ImageEncoder


def check(config: TextConfig, settings: Settings, vision: bool) -> None:
    """Refuses what no weight has to be read for. Raises ValueError as `lower` does, also without a GPU."""
    if reasons := _not_there(settings, vision):
        raise ValueError(f"backend cuda: {'; '.join(reasons)}")
    if not torch.cuda.is_available():
        raise ValueError("backend cuda: compiling the kernels needs an NVIDIA GPU, and there is none here")


def lower(
    model: Gemma4,
    settings: Settings,
    tower: ImageEncoder | None = None,
    report: Callable[[str], None] | None = None,
    top_k: int | None = None,
) -> Lowered:
    """Makes `prefill` and `decode` of a model from `open_source`, whose quantized modules are replaced on the way.

    Its `write` gives model.pte and its .ptd for ExecuTorch's CUDA runtime, and `cuda_aoti`'s packages for Python.
    `decode` draws from the `top_k` largest. Raises ValueError for what CUDA programs do not have (a vision tower, taps,
    a dtype, a group size), before anything is exported; ImportError without executorch; and ValueError without a GPU,
    on which kernels are compiled, after all that needs none: the graphs, the choice of kernels, the partition."""
    report = report or (lambda stage: None)
    _refuse(model, settings, tower, top_k)
    cache = KVCache(model.config, 1, settings.max_seq_len, settings.max_prefill_chunk, model.dtype)
    report("exporting the graphs")
    programs = export_programs(model, cache, top_k)
    choices = {name: kernel_choices(program) for name, program in programs.items()}
    report("partitioning")
    check_partition(programs)
    if not torch.cuda.is_available():
        raise ValueError(
            f"backend cuda: {' and '.join(programs)} were exported, {sum(map(len, choices.values()))} attentions and "
            "linears have their kernels, and ExecuTorch takes each method as one delegate; compiling them needs an "
            "NVIDIA GPU, and there is none here"
        )
    # 0: of all.
    metadata = constants(model.config, settings) | {"get_top_k": top_k or 0}
    sizes = cuda_aoti.state_sizes(cache, model.config.vocab_size)
    report("compiling for ExecuTorch")
    program = lower_executorch(programs, metadata)

    def write(folder: Path) -> None:
        with (folder / PROGRAM).open("wb") as file:
            program.write_to_file(file)
        program.write_tensor_data_to_file(str(folder))
        report("compiling packages")
        cuda_aoti.write_packages(programs, folder, "cuda", sizes)

    return Lowered(
        write=write,
        methods={name: _method(name, model, settings) for name in programs},
        constants=metadata,
        caches=sizes,
        extra={"kernels": {name: [dataclasses.asdict(choice) for choice in rows] for name, rows in choices.items()}},
    )


def check_partition(programs: dict[str, ExportedProgram]) -> dict[str, ExportedProgram]:
    """What ExecuTorch would hand its CUDA backend of each program, edge operators in one delegate; nothing is compiled.

    Raises ValueError if a method is not one delegate, or has nodes outside, or our operators did not stay whole."""
    from executorch.backends.aoti.aoti_partitioner import AotiPartitioner
    from executorch.backends.cuda.cuda_backend import CudaBackend

    from gemma4_impl.export.cuda_dry import Dry

    parts = {
        name: [AotiPartitioner(Dry.__name__, [CudaBackend.generate_method_name_compile_spec(name)])]
        for name in programs
    }
    with Dry.collecting() as delegated:
        manager = _edge(programs, parts, None)
    for name, program in programs.items():
        nodes = [n for n in manager.exported_program(name).graph.nodes if n.op == "call_function"]
        outside = [n for n in nodes if n.target is not torch.ops.higher_order.executorch_call_delegate]
        outside = [str(n.target) for n in outside if n.target.__name__ != "getitem"]
        delegates = sum(n.target is torch.ops.higher_order.executorch_call_delegate for n in nodes)
        if delegates != 1 or outside:
            raise ValueError(
                f"{name}: {delegates} delegates and {len(outside)} nodes outside: {', '.join(outside[:3])}"
            )
        if _ours(delegated[name]) != _ours(program):
            raise ValueError(
                f"{name}: operators of ours were taken apart: {_ours(program)} became {_ours(delegated[name])}"
            )
    return delegated


def lower_executorch(programs: dict[str, ExportedProgram], metadata: dict[str, int | list[int]]) -> Any:
    """The ExecuTorch program of both methods. Needs a GPU: Inductor tunes and compiles Triton kernels on it."""
    from executorch.backends.cuda.cuda_backend import CudaBackend
    from executorch.backends.cuda.cuda_partitioner import CudaPartitioner
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    parts = {name: [CudaPartitioner([CudaBackend.generate_method_name_compile_spec(name)])] for name in programs}
    with torch._inductor.config.patch(cuda_aoti.OPTIONS):
        manager = _edge(programs, parts, metadata)
    # Inputs are the caller's memory, so that they can stay on the device; the caches are the delegates' own.
    config = ExecutorchBackendConfig(
        extract_delegate_segments=True,
        emit_mutable_buffer_names=True,
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
    )
    return manager.to_executorch(config)


def _edge(programs: dict[str, ExportedProgram], parts: dict[str, list], metadata: dict | None) -> Any:
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    # What a delegate takes in is removed from the constants of the program it came from, which is still needed.
    own = {
        name: p._update(p.graph_module, p.graph_signature, constants=dict(p.constants)) for name, p in programs.items()
    }
    return to_edge_transform_and_lower(own, partitioner=parts, constant_methods=metadata, compile_config=config)


def _refuse(model: Gemma4, settings: Settings, tower: ImageEncoder | None, top_k: int | None) -> None:
    reasons = refusals(model, top_k) + _not_there(settings, tower is not None)
    if model.dtype != settings.dtype:
        reasons.append(f"the model computes in {model.dtype}, the program in {settings.dtype}")
    if reasons:
        raise ValueError(f"backend cuda: {'; '.join(reasons)}")


def _not_there(settings: Settings, vision: bool) -> list[str]:
    reasons = {
        "has no vision tower: export it for xnnpack or mlx": vision,
        "returns no taps: fused kernels have none": settings.taps,
    }
    return [reason for reason, asked in reasons.items() if asked]


def _method(name: str, model: Gemma4, settings: Settings) -> Method:
    chunk = settings.max_prefill_chunk
    length = 1 if name == "decode" else 2 if chunk == 2 else {"min": 2, "max": chunk}
    inputs = [Value(value, torch.int64, (1, length)) for value in ("tokens", "positions")]
    if name == "prefill":
        return Method(inputs, [Value("logits", model.dtype, (1, 1, model.config.vocab_size))])
    return Method([*inputs, Value("temperature", torch.float32, (1,))], [Value("token", torch.int64, (1,))])


def _ours(program: ExportedProgram) -> dict[str, int]:
    out: dict[str, int] = {}
    for node in program.graph.nodes:
        name = getattr(node.target, "name", None)
        name = name() if callable(name) else str(name)
        if node.op == "call_function" and name.startswith("gemma4::"):
            out[name] = out.get(name, 0) + 1
    return out
