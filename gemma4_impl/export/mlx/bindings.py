"""Makes `executorch.backends.mlx` importable where its wheel lacks the generated serialization files.

Those files are made once, in a cache folder, by the generator and the schema compiler that the wheel carries, and
served from there by an import hook: site-packages stays as it is."""

import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

BACKEND = "executorch.backends.mlx"
GENERATED = (
    "_generated_inspector.py",
    "serialization/mlx_graph_schema.py",
    "serialization/_generated_serializers.py",
    "serialization/_generated/__init__.py",
    "serialization/_generated/mlx_delegate/MLXGraph.py",
)
"""What the backend cannot be imported without, below its folder."""
_DIGESTS = "digests.json"


def import_mlx_backend() -> ModuleType:
    """`executorch.backends.mlx`, after which its `serialization` and `pte_inspector` can be imported as well.

    Raises ModuleNotFoundError without executorch, RuntimeError if the files cannot be generated."""
    spec = find_spec(BACKEND)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{BACKEND}: not part of the installed executorch", name=BACKEND)
    backend = Path(spec.origin).parent
    if not _complete(backend) and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(generated_files(backend, cache_folder())))
    return importlib.import_module(BACKEND)


def cache_folder() -> Path:
    """`$GEMMA4_CACHE`, or `~/.cache/gemma4`."""
    return Path(os.environ.get("GEMMA4_CACHE") or Path.home() / ".cache" / "gemma4")


def generated_files(backend: Path, cache: Path) -> Path:
    """The folder in `cache` with the files generated for `backend`, which is made unless it is there and intact.

    Its name is a hash of what the files are made from. Any number of processes may ask at once."""
    sources = [*sorted((backend / "serialization").glob("*.py")), backend / "serialization" / "schema.fbs"]
    flatc = backend.parent.parent / "data" / "bin" / "flatc"
    key = hashlib.sha256()
    for file in (*sources, flatc):
        if not file.is_file():
            raise RuntimeError(f"{BACKEND} cannot be completed: the wheel lacks {file}")
        key.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    entry = cache / "executorch-mlx" / key.hexdigest()[:32]
    if not _intact(entry):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with open(entry.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another process may have made it meanwhile.
            if not _intact(entry):
                with tempfile.TemporaryDirectory(prefix=".part-", dir=entry.parent) as part:
                    made = _generate(sources, flatc, Path(part) / "mlx")
                    if entry.exists():
                        shutil.rmtree(entry)
                    os.rename(made, entry)
    return entry


def _generate(sources: Sequence[Path], flatc: Path, folder: Path) -> Path:
    serialization = folder / "serialization"
    serialization.mkdir(parents=True)
    for file in sources:
        shutil.copyfile(file, serialization / file.name)
    # The generator also writes the C++ loader, from templates that no wheel has.
    (folder / "runtime").mkdir()
    for name in ("MLXLoader.h.tmpl", "MLXLoader.cpp.tmpl"):
        (serialization / name).touch()
    generator = serialization / "generate.py"
    run = subprocess.run([sys.executable, generator, "--flatc", flatc], capture_output=True, text=True, check=False)
    # It goes on after a failure of flatc, with status 0 and a line in its output.
    if run.returncode or not _complete(folder):
        failures = [line for line in run.stdout.splitlines() if "fail" in line.lower()]
        reason = run.stderr.strip()[-500:] or "; ".join(failures) or f"{generator.name} did not write all of its files"
        raise RuntimeError(f"{BACKEND} cannot be completed: {reason}")
    shutil.rmtree(folder / "runtime")
    digests = {str(file.relative_to(folder)): _digest(file) for file in _files(folder)}
    (folder / _DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    return folder


def _intact(entry: Path) -> bool:
    try:
        digests = json.loads((entry / _DIGESTS).read_text(encoding="utf-8"))
        return _complete(entry) and all(_digest(entry / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in GENERATED)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class _Finder:
    """Finds the two modules of the backend that have to come from the cache; what is below them is found from there."""

    def __init__(self, folder: Path):
        self.files = {
            f"{BACKEND}.serialization": folder / "serialization" / "__init__.py",
            f"{BACKEND}._generated_inspector": folder / "_generated_inspector.py",
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self.files.get(name)
        if file is None:
            return None
        package = [str(file.parent)] if file.name == "__init__.py" else None
        return spec_from_file_location(name, file, submodule_search_locations=package)
