"""Shared fixtures; benchmarks are collected only when asked for; tests that need hardware skip with a reason."""

import gc
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# JAX reads these when it is imported: eight devices of a CPU, and of a GPU no more memory than is used.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Processes of one run, which inherit it, compile a program once between them; the next run starts from nothing.
    _compiled = tempfile.TemporaryDirectory(prefix="gemma4-jax-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import pytest
import torch

# On models this small, threads mostly wait for each other; benchmarks set their own number.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """On a CPU, where compiling takes most of the time of JAX tests, XLA spends as little on it as it can, unless there
    are benchmarks among what is run. JAX reads this when it is imported, which no conftest does."""
    bench = config.rootpath / "bench"
    named = [(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.args]
    named = named if config.args_source is pytest.Config.ArgsSource.ARGS else []
    timed = config.getoption("benchmark_only", False) or any(bench in (path, *path.parents) for path in named)
    if not timed and not torch.cuda.is_available():
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`-m parity` runs on all cores, up to eight, unless -n says otherwise: compiling takes most of its time."""
    chosen = getattr(config.option, "numprocesses", None)
    if config.option.markexpr == "parity" and chosen is None and not config.option.usepdb:
        config.option.numprocesses = min(os.cpu_count() or 1, 8)
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        # One process has a file whole: what its tests share (programs, truths, compiled functions) is made once.
        config.option.dist, config.option.loadscopereorder = "loadfile", False


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Unless files are named, --benchmark-only collects `bench/` and nothing else, and other runs all but it."""
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        return None
    bench = config.rootpath / "bench"
    inside = collection_path == bench or bench in collection_path.parents
    only = config.getoption("benchmark_only", False)
    return None if inside == only or collection_path == config.rootpath else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        # The longest files first, so that no process is left with one at the end.
        items.sort(
            key=lambda item: not item.nodeid.startswith(("parity", "tests/export", "tests/nnx", "tests/test_export"))
        )
    reasons = {
        "cuda": None if torch.cuda.is_available() else "needs an NVIDIA GPU",
        "mlx_device": None if torch.backends.mps.is_available() else "needs a Mac with Metal",
        "checkpoint": None if os.environ.get("GEMMA4_CHECKPOINT") else "set GEMMA4_CHECKPOINT to a checkpoint folder",
    }
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure() -> None:
    # What is never collected, bindings report as leaked when the process ends.
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """`-m cuda` and `-m mlx_device` without the hardware: what was not tried, by folder, as no test of it failed."""
    skipped = terminalreporter.stats.get("skipped", [])
    reason = {"cuda": "needs an NVIDIA GPU", "mlx_device": "needs a Mac with Metal"}.get(config.option.markexpr)
    untried = [r for r in skipped if reason and isinstance(r.longrepr, tuple) and reason in r.longrepr[2]]
    if untried:
        folders = Counter(r.nodeid.partition("::")[0].rpartition("/")[0] for r in untried)
        listed = ", ".join(f"{folder} ({count})" for folder, count in sorted(folders.items()))
        terminalreporter.write_line(f"not tried here, {len(untried)} tests, each {reason}: {listed}")


@pytest.fixture(scope="module", autouse=True)
def quiet_heap() -> None:
    """The collector walks nothing that was imported or that other files left: it would take a tenth of all time, and
    more of what is timed."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def optimized() -> Iterator[None]:
    """For what XLA's own roundings decide: JAX compiles as it does outside of tests."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    if before:
        # The setting is no part of what compiled functions are found by.
        jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)


Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """variant -> folder of its tiny checkpoint in float32, made once a session."""
    from reference.tiny import make_tiny

    return cache(lambda variant: make_tiny(variant, tmp_path_factory.mktemp("tiny") / variant))


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """variant -> folder of a checkpoint like `tiny`'s of as few layers as have every feature, made once a session."""
    from reference.tiny import SHORT, make_tiny

    return cache(
        lambda variant: make_tiny(variant, tmp_path_factory.mktemp("short") / variant, overrides=SHORT[variant])
    )


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """variant -> folder of its tiny multimodal checkpoint in float32, made once a session."""
    from reference.tiny import make_tiny

    return cache(lambda variant: make_tiny(variant, tmp_path_factory.mktemp("images") / variant, multimodal=True))


@pytest.fixture(scope="session")
def short_images(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """variant -> folder of a checkpoint like `tiny_images`' with `short`'s layers, made once a session."""
    from reference.tiny import SHORT, make_tiny

    def make(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("short-images") / variant
        return make_tiny(variant, folder, multimodal=True, overrides=SHORT[variant])

    return cache(make)
