"""A `Gemma4` into one MLX program, with the proof that all of it was lowered."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim, ExportedProgram

from gemma4_impl.export import vision as images
from gemma4_impl.export.folder import PROGRAM
from gemma4_impl.export.mlx import marks, weights
from gemma4_impl.export.mlx.bindings import import_mlx_backend
from gemma4_impl.export.mlx.model import HEADS_FIRST, MlxGemma4
from gemma4_impl.export.program import Lowered, Method, Settings, Value, constants, dtype_name
from gemma4_impl.export.source import quantized_weights
from gemma4_impl.model.decoder import Gemma4

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager

    from gemma4_impl.vision.images import ImageEncoder

METHOD = "forward"


def lower(
    model: Gemma4,
    settings: Settings,
    tower: "ImageEncoder | None" = None,
    report: Callable[[str], None] | None = None,
) -> Lowered:
    """One method `forward(tokens [1, T], input_pos [1]) -> logits [1, 1, V]` of the last token, T from 1 on.

    With a tower also the method `vision`; `forward` then takes `embeds` [1, T, D] and `ends` [1, T] too, in every call,
    because methods of the MLX backend share no caches (`export.vision.ImageStep` says what they are).
    `Lowered.extra["taps"]` says where the program has each tap: after an instruction of a chain, in a tensor, whose
    dims `axes` bring into the usual order; `last` if only the chunk's last position is computed. `extra["nodes"]`
    counts the instructions of each kind. Raises ValueError for what MLX cannot hold, and if a single node was not
    lowered."""
    report = report or (lambda line: None)
    import_mlx_backend()
    if tower is not None:
        images.check_images(model.config, tower, settings)
    program = MlxGemma4(model, settings.max_seq_len, settings.max_prefill_chunk)
    kept = weights.install(program, quantized_weights(model), settings.dtype, report)
    report("tracing")
    exported = {METHOD: trace(program, tower is not None)}
    names = marks.unmark(exported[METHOD])
    metadata, methods = constants(model.config, settings), {}
    if tower is not None:
        exported[images.VISION], methods[images.VISION] = images.vision_method(tower, settings)
        metadata |= images.vision_constants(tower)
    report("lowering to MLX")
    with _quiet(), marks.finding() as found:
        edge = _to_edge(exported, metadata)
    for name in exported:
        _check_delegated(edge, name)
    _check_quantized(found.nodes, kept)
    _check_taps(names, found.taps)
    buffer = edge.to_executorch()

    def write(folder: Path) -> None:
        with open(folder / PROGRAM, "wb") as file:
            buffer.write_to_file(file)

    length = {"min": 1, "max": program.max_chunk} if program.max_chunk > 1 else 1
    inputs = [Value("tokens", torch.int64, (1, length)), Value("input_pos", torch.int64, (1,))]
    if tower is not None:
        inputs.append(Value("embeds", settings.dtype, (1, length, model.config.hidden_size)))
        inputs.append(Value("ends", torch.int64, (1, length)))
    forward = Method(inputs, [Value("logits", settings.dtype, (1, 1, model.config.vocab_size))])
    shared = model.config.first_kv_shared_layer
    return Lowered(
        write,
        {METHOD: forward, **methods},
        metadata,
        {
            name: {"dtype": dtype_name(b.dtype), "shape": list(b.shape), "bytes": b.nbytes}
            for name, b in program.caches()
        },
        {
            "nodes": dict(sorted(found.nodes.items())),
            "taps": {name: {**found.taps[name], **_layout(name, shared)} for name in names},
        },
    )


@torch.no_grad()
def trace(program: MlxGemma4, takes_images: bool = False) -> ExportedProgram:
    """The program's graph for any chunk that it takes, its taps marked."""
    chunk, model = program.max_chunk, program.model
    T = min(chunk, 3)
    tokens, ends = (torch.zeros(1, T, dtype=torch.long) for _ in range(2))
    example = [tokens, torch.zeros(1, dtype=torch.long)]
    length = {1: Dim("length", min=1, max=chunk)} if chunk > 1 else None
    dynamic = {"tokens": length, "input_pos": None}
    if takes_images:
        example += [torch.zeros(1, T, model.config.hidden_size, dtype=model.dtype), ends]
        dynamic |= {"embeds": length, "ends": length}
    with marks.marking():
        return torch.export.export(program, tuple(example), dynamic_shapes=dynamic)


def _to_edge(exported: dict[str, ExportedProgram], metadata: dict[str, Any]) -> "EdgeProgramManager":
    from executorch.backends.mlx import MLXPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    return to_edge_transform_and_lower(
        exported,
        transform_passes=marks.passes(),
        partitioner={name: [MLXPartitioner()] for name in exported},
        constant_methods=metadata,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )


def _check_delegated(edge: "EdgeProgramManager", method: str) -> None:
    """Raises ValueError naming what is left outside of the method's one delegate."""
    from executorch.exir.lowered_backend_module import executorch_call_delegate

    calls = [node for node in edge.exported_program(method).graph.nodes if node.op == "call_function"]
    delegates = [node for node in calls if node.target is executorch_call_delegate]
    outside = [node for node in calls if node not in delegates and getattr(node.target, "__name__", "") != "getitem"]
    if outside:
        kinds = Counter(str(node.target) for node in outside)
        named = ", ".join(f"{name} ({count})" for name, count in kinds.items())
        raise ValueError(f"the MLX backend did not take, of {method}: {named}")
    if len(delegates) != 1:
        raise ValueError(f"{method} was cut into {len(delegates)} MLX delegates instead of one")


def _check_quantized(nodes: Counter[str], kept: set[str]) -> None:
    """Raises ValueError unless the program multiplies with every quantized weight by a quantized product."""
    experts = sum(name.endswith("_proj") for name in kept)
    linears = sum(name.endswith(".weight") and not name.startswith("embed_tokens") for name in kept)
    embeddings = len(kept) - experts - linears
    for kind, count in (("QuantizedMatmulNode", linears), ("GatherQmmNode", experts), ("DequantizeNode", embeddings)):
        if nodes[kind] != count:
            raise ValueError(f"{count} quantized weights need a {kind}, but the MLX program has {nodes[kind]}")


def _check_taps(names: list[str], found: dict[str, dict[str, int]]) -> None:
    if lost := [name for name in names if name not in found]:
        raise ValueError(f"the MLX program has no place for the taps {', '.join(lost[:8])}")


def _layout(name: str, first_shared: int) -> dict[str, Any]:
    part = name.split(".")
    last = int(part[1]) >= first_shared if part[0] == "layers" else name in ("norm", "logits")
    return {"axes": [0, 2, 1, 3] if name.endswith(HEADS_FIRST) else None, "last": last}


@contextmanager
def _quiet() -> Iterator[None]:
    """The backend's partitioner logs what it found to stderr."""
    logger = logging.getLogger("executorch.backends.mlx")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
