"""XNNPACK: prefill and decode lowered into one program that shares its caches, and the session that runs it."""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gemma4_impl import taps as tap_points
from gemma4_impl.config import TextConfig
from gemma4_impl.errors import one_line
from gemma4_impl.export import vision
from gemma4_impl.export.folder import PROGRAM, Manifest
from gemma4_impl.export.program import Lowered, Method, Settings, Value, cache_sizes, constants
from gemma4_impl.export.source import quantized_weights
from gemma4_impl.export.xnnpack_model import XnnCache, prepare
from gemma4_impl.export.xnnpack_weights import check_linears, install
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.model.soft_tokens import SoftTokens

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
    from executorch.runtime import Program

    from gemma4_impl.vision.images import ImageEncoder

PREFILL, DECODE = "prefill", "decode"
Report = Callable[[str], None]
_OUTSIDE = re.compile(r"quantize_affine|aten[:.]+(linear|addmm|mm)\b")
"""What no program may compute by itself: a weight made dense again, or a product that XNNPACK would have done."""


def check(config: TextConfig, settings: Settings, with_tower: bool) -> None:
    """Refuses, with a ValueError, what no weight has to be read for."""
    if settings.dtype != torch.float32:
        raise ValueError(f"xnnpack: {settings.dtype} is not supported; choose float32")


def lower(
    model: Gemma4, settings: Settings, tower: "ImageEncoder | None" = None, report: Report | None = None
) -> Lowered:
    """`prefill` (2 to max_prefill_chunk tokens) and `decode` (one), tokens and positions int64 [1, T] -> logits
    [1, 1, V] of the last token, in float32; with `settings.taps` followed by the taps. With a tower also its method
    `vision`, and `prefill_images` on the same caches (see export/vision.py).

    Raises ValueError, before anything is lowered, for what XNNPACK cannot compute."""
    report = report or (lambda line: None)
    if tower is not None:
        vision.check_images(model.config, tower, settings)
    check(model.config, settings, tower is not None)
    model = _copy(model)
    kept = install(model, report)
    check_linears(model)
    prepare(model)
    cache = XnnCache(model.config, settings.max_seq_len, settings.max_prefill_chunk, model.dtype)
    lengths = {DECODE: 1} | ({PREFILL: settings.max_prefill_chunk} if settings.max_prefill_chunk > 1 else {})
    programs, methods = {}, {}
    for name, longest in lengths.items():
        report(f"exporting {name}")
        programs[name], methods[name] = _export(model, cache, longest, settings.taps)
    metadata = constants(model.config, settings)
    if tower is not None:
        report(f"exporting {vision.PREFILL_IMAGES} and {vision.VISION}")
        programs[vision.VISION], methods[vision.VISION] = vision.vision_method(tower, settings, vision.for_xnnpack)
        taken = vision.images_method(model, cache, tower, settings)
        programs[vision.PREFILL_IMAGES], methods[vision.PREFILL_IMAGES] = taken
        metadata |= vision.vision_constants(tower)
    buffer = _to_executorch(programs, metadata, report)
    return Lowered(
        write=lambda folder: _write(buffer, folder / PROGRAM),
        methods=methods,
        constants=metadata,
        caches=cache_sizes(cache),
        extra={"quantized": sorted(kept)},
    )


def _copy(model: Gemma4) -> Gemma4:
    """The same weights in modules of their own."""
    shared = [*model.parameters(), *model.buffers(), *quantized_weights(model).values()]
    return copy.deepcopy(model, {id(value): value for value in shared})


class _Taps:
    """Stands for a `taps.Recorder` while the model is traced."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def at(self, positions: Tensor) -> None:
        pass

    def record(self, name: str, value: Tensor) -> Tensor:
        self.values[name] = value
        return value

    def route(self, prefix: str, index: Tensor) -> Tensor:
        self.record(prefix + "choice", index)
        return index


class _Step(nn.Module):
    """tokens and positions [1, T] -> logits [1, 1, V] of the last token, and the taps in order if asked for."""

    def __init__(self, model: Gemma4, cache: KVCache, taps: bool):
        super().__init__()
        self.model, self.cache = model, cache
        names = [*tap_points.tap_names(model.config), *tap_points.choice_names(model.config)] if taps else []
        self.names = [name for name in names if name != "logits"]

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        if not self.names:
            return (self.model(tokens, positions, self.cache, "last"),)
        with tap_points.recording(_Taps()) as recorder:
            logits = self.model(tokens, positions, self.cache, "last")
        return (logits, *(recorder.values[name] for name in self.names))


@torch.no_grad()
def _export(model: Gemma4, cache: KVCache, longest: int, taps: bool) -> tuple[ExportedProgram, Method]:
    """The graph for up to `longest` tokens (at least 2 then, or exactly 1), and what goes in and out."""
    dim = Dim("length", min=2, max=longest) if longest > 2 else None
    length = longest if dim is None else 3
    tokens, positions = torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]
    dynamic = {name: {1: dim} for name in ("tokens", "positions")} if dim else None
    step = _Step(model, cache, taps)
    program = torch.export.export(step, (tokens, positions), dynamic_shapes=dynamic, strict=False)
    size = {"min": 2, "max": longest} if dim else longest
    inputs = [Value(name, torch.long, (1, size)) for name in ("tokens", "positions")]
    values = [node.meta["val"] for node in program.graph.output_node().args[0]][-1 - len(step.names) :]
    outputs = [
        Value(name, value.dtype, tuple(s if isinstance(s, int) else size for s in value.shape))
        for name, value in zip(("logits", *step.names), values, strict=True)
    ]
    return program, Method(inputs, outputs)


def _to_executorch(programs: dict[str, ExportedProgram], metadata: dict, report: Report) -> "ExecutorchProgramManager":
    """All methods as one ExecuTorch program, whose mutable buffers are the same memory in each."""
    # Imported here: it takes seconds, and inspecting a model needs none of it.
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    from gemma4_impl.export.xnnpack_partition import Partitioner

    report("lowering to XNNPACK")
    edge = to_edge_transform_and_lower(
        programs,
        partitioner={name: [Partitioner()] for name in programs},
        constant_methods=metadata,
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    report("planning memory")
    program = edge.to_executorch(
        ExecutorchBackendConfig(
            # Without this every method has caches of its own.
            memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
            run_reinplace_pass=True,
            do_quant_fusion_and_const_prop=True,
        )
    )
    for name in programs:
        for node in program.exported_program(name).graph.nodes:
            if node.op == "call_function" and _OUTSIDE.search(str(node.target)):
                raise RuntimeError(f"{name}: {node.target} is left outside of XNNPACK")
    return program


def _write(program: "ExecutorchProgramManager", path: Path) -> None:
    with path.open("wb") as file:
        program.write_to_file(file)


def open_session(folder: Path, manifest: Manifest) -> "Session":
    """Loads the program in a folder that `open_folder` checked; see `Session`. Raises ValueError if it cannot be
    loaded, ImportError without executorch."""
    return Session(folder / PROGRAM, manifest)


class Session:
    """One sequence that runs through an XNNPACK program, whose caches live in this object's copy of it."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self.reset()

    def reset(self) -> None:
        """Loads the program anew: nothing of the sequence is left."""
        self._program = self._methods = None
        program = _load(self.path)
        known = (PREFILL, DECODE, vision.PREFILL_IMAGES, vision.VISION)
        names = [name for name in known if name in self.manifest.methods]
        if missing := [name for name in names if name not in program.method_names]:
            raise ValueError(f"{self.path}: has no method {missing[0]}, which the manifest describes")
        with _one_error(self.path):
            self._methods = {name: program.load_method(name) for name in names}
        self._program = program
        self.length = 0

    def forward(
        self, tokens: Tensor, position: int, images: SoftTokens | None = None, taps: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """tokens int64 [1, T], which begin at `position` -> logits [1, V] of the last one; with `taps` also name ->
        value [1, T, ...], or [1, 1, ...] where only the last token was computed.

        `images` are the soft tokens in this chunk. Raises ValueError for a position that does not continue the
        sequence, too many tokens, ids outside the vocabulary, and images or taps that the program does not have."""
        length = self.manifest.limits.check_chunk(tokens, position, self.length)
        if taps and not self.manifest.taps:
            raise ValueError("this program returns no taps; export it with taps")
        positions = torch.arange(position, position + length)[None]
        name, inputs = DECODE if length == 1 else PREFILL, (tokens.contiguous(), positions)
        if images is not None and bool(images.mask.any()):
            name, inputs = vision.PREFILL_IMAGES, (*inputs, *self._images(images, positions, taps))
        with _one_error(self.path):
            values = [value.clone() for value in self._methods[name].execute(inputs)]
        self.length += length
        logits = values[0][:, -1]
        if not taps:
            return logits
        names = [value.name for value in self.manifest.methods[name].outputs]
        return logits, dict(zip(names, values, strict=True))

    def vision(self, patches: Tensor, positions: Tensor) -> Tensor:
        """patches float32 [1, P, C], positions int64 [1, P, 2] -> soft tokens [1, L, D]. Raises ValueError for other
        shapes, and if the program was exported without a vision tower."""
        if vision.VISION not in self._methods:
            raise ValueError(f"{self.path}: exported without a vision tower")
        for value, given in zip(self.manifest.methods[vision.VISION].inputs, (patches, positions), strict=True):
            if (given.dtype, tuple(given.shape)) != (value.dtype, value.shape):
                raise ValueError(
                    f"{value.name} are {given.dtype} {list(given.shape)}; expected {value.dtype} {list(value.shape)}"
                )
        with _one_error(self.path):
            return self._methods[vision.VISION].execute((patches.contiguous(), positions.contiguous()))[0].clone()

    def _images(self, images: SoftTokens, positions: Tensor, taps: bool) -> tuple[Tensor, Tensor]:
        """The further inputs of `prefill_images`."""
        if vision.PREFILL_IMAGES not in self._methods:
            raise ValueError(f"{self.path}: exported without a vision tower")
        if images.mask.shape != positions.shape:
            raise ValueError(f"soft tokens of shape {list(images.mask.shape)} for {positions.shape[1]} tokens")
        if positions.shape[1] < 2:
            raise ValueError("one soft token alone; images are fed at least 2 tokens at a time")
        if taps:
            raise ValueError("no taps of a chunk with images; the method returns none")
        return images.embeds.float().contiguous(), vision.ends_of(images, positions)


def _load(path: Path) -> "Program":
    try:
        import executorch.kernels.quantized  # noqa: F401  (registers the kernels of quantized embeddings)
        from executorch.runtime import Runtime
    except ImportError as error:
        raise ImportError(
            f"executorch is needed for this: pip install 'gemma4-parity[export]' ({one_line(error)})"
        ) from None
    with _one_error(path):
        return Runtime.get().load_program(path)


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{path}: ExecuTorch refuses it ({one_line(error)})") from None
