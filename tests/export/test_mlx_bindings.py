"""The generated files of the MLX backend: made once, whoever asks, remade when broken, site-packages untouched."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gemma4_impl.export.mlx import bindings

pytest.importorskip("executorch")

ASK = """
import pathlib, runpy, sys
file, backend, cache = sys.argv[1:]
print(runpy.run_path(file)["generated_files"](pathlib.Path(backend), pathlib.Path(cache)))
"""


@pytest.fixture(scope="module")
def backend() -> Path:
    return Path(find_spec(bindings.BACKEND).origin).parent


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if "__pycache__" not in file.parts}


def test_two_processes_then_a_broken_entry(backend, tmp_path):
    before = names(backend)
    command = [sys.executable, "-c", ASK, bindings.__file__, str(backend), str(tmp_path)]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate()[0].strip() for process in asking}
    assert [process.returncode for process in asking] == [0, 0]
    (entry,) = (Path(answer) for answer in answers)
    assert bindings._intact(entry)
    made = names(entry)
    # The entry and its lock: no temporary folder is left.
    assert len(list(entry.parent.iterdir())) == 2

    stamp = entry.stat().st_ino
    assert bindings.generated_files(backend, tmp_path) == entry
    assert entry.stat().st_ino == stamp

    schema = entry / "serialization" / "mlx_graph_schema.py"
    intact = schema.read_text()
    for text in ("raise SystemExit('broken')", intact[: len(intact) // 2]):
        schema.write_text(text)
        assert bindings.generated_files(backend, tmp_path) == entry
        assert schema.read_text() == intact
    (entry / "_generated_inspector.py").unlink()
    assert bindings.generated_files(backend, tmp_path) == entry
    assert names(entry) == made
    assert names(backend) == before


def test_the_backend_is_imported(backend):
    module = bindings.import_mlx_backend()
    assert bindings.import_mlx_backend() is module
    assert module.__file__ == str(backend / "__init__.py")
    assert sum(isinstance(finder, bindings._Finder) for finder in sys.meta_path) <= 1
    from executorch.backends.mlx.pte_inspector import OP_NODE_FIELDS
    from executorch.backends.mlx.serialization import mlx_graph_schema

    assert {"SdpaNode", "RopeNode"} <= set(OP_NODE_FIELDS)
    assert Path(mlx_graph_schema.__file__).is_relative_to(bindings.cache_folder()) or bindings._complete(backend)


def test_a_complete_wheel_needs_no_hook(monkeypatch):
    monkeypatch.setattr(bindings, "_complete", lambda folder: True)
    monkeypatch.setattr(bindings.importlib, "import_module", lambda name: name)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, bindings._Finder)])
    before = list(sys.meta_path)
    assert bindings.import_mlx_backend() == bindings.BACKEND
    assert sys.meta_path == before


def test_a_generator_that_fails_is_named(backend, tmp_path):
    copy = tmp_path / "executorch" / "backends" / "mlx"
    (copy / "serialization").mkdir(parents=True)
    for file in (backend / "serialization").iterdir():
        if file.is_file():
            (copy / "serialization" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RuntimeError, match=r"the wheel lacks .*flatc"):
        bindings.generated_files(copy, tmp_path / "cache")
    flatc = tmp_path / "executorch" / "data" / "bin" / "flatc"
    flatc.parent.mkdir(parents=True)
    flatc.write_text("#!/bin/sh\necho no such schema >&2; exit 1\n")
    flatc.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"cannot be completed: .*no such schema"):
        bindings.generated_files(copy, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock" and path.is_file()]
