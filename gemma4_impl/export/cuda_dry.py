"""A backend of ExecuTorch that compiles nothing: it shows what a partitioner hands over."""

from collections.abc import Iterator
from contextlib import contextmanager

from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram


class Dry(BackendDetails):
    """Found by its name; the first compile spec is the method's name."""

    _delegated: dict[str, ExportedProgram] | None = None

    @classmethod
    @contextmanager
    def collecting(cls) -> Iterator[dict[str, ExportedProgram]]:
        """Gives method -> the last program delegated for it."""
        cls._delegated = {}
        try:
            yield cls._delegated
        finally:
            cls._delegated = None

    @classmethod
    def preprocess(cls, edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        cls._delegated[compile_specs[0].value.decode()] = edge_program
        return PreprocessResult(b"")
