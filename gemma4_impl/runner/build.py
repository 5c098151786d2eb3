"""Builds the runner with CMake against the installed executorch."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
BUILD_DIR = SOURCE_DIR.parents[1] / "build" / "runner"
NAME = "gemma4-runner"
PRESETS = ("default", "cuda", "mlx", "sanitize")


class BuildError(RuntimeError):
    """What is missing or does not fit, in one line."""


def build(build_dir: Path = BUILD_DIR, preset: str = "default", package: Path | None = None) -> Path:
    """Configures and builds, or brings up to date, and returns the program, which was started once.

    Args:
        package: the `share/cmake` folder of an ExecuTorch package. Default: the one that is installed.
    Raises BuildError if something is missing, or does not fit together."""
    package = package or find_package()
    if shutil.which("cmake") is None:
        raise BuildError("cmake is not installed; on Debian: apt install cmake; anywhere: pip install cmake")
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
        raise BuildError("there is no C++ compiler; on Debian: apt install g++; on a Mac: xcode-select --install")
    build_dir.mkdir(parents=True, exist_ok=True)
    with _lock(build_dir):
        new = not (build_dir / "CMakeCache.txt").exists()
        generator = ["-G", "Ninja"] if new and shutil.which("ninja") else []
        configure = ["cmake", "--preset", preset, "-B", build_dir, *generator, f"-Dexecutorch_DIR={package}"]
        _run(configure, "cmake cannot configure the runner")
        _run(["cmake", "--build", build_dir, "--parallel", str(os.cpu_count() or 1)], "the runner does not build")
    program = build_dir / NAME
    _run([program, "--version"], "the runner was built, but does not start")
    return program


def find_package() -> Path:
    """The `share/cmake` folder of the installed executorch. Raises BuildError if there is none."""
    spec = importlib.util.find_spec("executorch")
    for place in spec.submodule_search_locations if spec else ():
        folder = Path(place) / "share" / "cmake"
        if (folder / "executorch-config.cmake").is_file():
            return folder.resolve()
    if spec:
        raise BuildError("the installed executorch has no C++ package (share/cmake); executorch >= 1.5 has one")
    raise BuildError("executorch is not installed; run: pip install 'gemma4-parity[export]'")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held while building, so that two processes do not write the same files."""
    import fcntl

    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str | Path], failure: str) -> None:
    result = subprocess.run(list(map(str, command)), cwd=SOURCE_DIR, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{failure}: {explain(result.stdout + result.stderr)}")


def explain(output: str) -> str:
    """The line that matters of what cmake, a compiler, a linker or the loader printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if "undefined reference to" in line or "Undefined symbols" in line or "GLIBCXX_" in line or "CXXABI_" in line:
            return f"its C++ library and the one executorch was built with do not fit together (ABI): {line}"
    for i, line in enumerate(lines):
        if line.startswith("CMake Error") and i + 1 < len(lines):
            # The message follows in lines of its own, up to the call stack.
            message = [text for text in lines[i + 1 :] if not text.startswith("--")]
            end = next((n for n, text in enumerate(message) if text.startswith(("Call Stack", "CMake "))), len(message))
            return " ".join(message[:end]) or line
        if "error:" in line or "error while loading" in line:
            return line
    return lines[-1] if lines else "it says nothing"
