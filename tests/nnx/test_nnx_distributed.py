"""Several processes as one program: what must be set, and two of them that compute, and save, one model."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma4_impl.config import FULL, SLIDING
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.nnx import distributed
from gemma4_impl.nnx.distributed import COORDINATOR, PROCESS, PROCESSES, DistributedError, initialize_distributed
from reference.tiny import make_tiny

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from gemma4_impl.nnx.distributed import initialize_distributed

initialize_distributed(timeout=60)
initialize_distributed()  # the second time nothing happens

import jax, numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from gemma4_impl.nnx.load import from_pretrained
from gemma4_impl.nnx.save import save_pretrained
from gemma4_impl.nnx.sharding import make_mesh

source, out, tokens = sys.argv[1:]
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
with jax.set_mesh(make_mesh("fsdp=2,tp=2")):
    model = from_pretrained(source)
    graphdef, state = nnx.split(model)
    held = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
    call = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0])
    logits = multihost_utils.process_allgather(call(state, np.load(tokens)), tiled=True)
    save_pretrained(model, out, source)
np.savez(f"{out}-{jax.process_index()}.npz", logits=logits, held=held)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes(tmp_path):
    """Two devices each, over which the weights are spread: both see the logits of one process, and one writes."""
    sizes = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    source = make_tiny("31B", tmp_path / "m", overrides=sizes)
    tokens = np.random.default_rng(0).integers(107, 512, (2, 8))
    np.save(tmp_path / "tokens.npy", tokens.astype(np.int32))
    shared = {COORDINATOR: f"localhost:{free_port()}", PROCESSES: "2", "JAX_NUM_CPU_DEVICES": "2"}
    shared |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "out"), str(tmp_path / "tokens.npy")]
    running = [
        subprocess.Popen(command, env=os.environ | shared | {PROCESS: str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors

    found = [np.load(tmp_path / f"out-{i}.npz") for i in range(2)]
    assert (found[0]["logits"] == found[1]["logits"]).all()
    with torch.no_grad():
        exact = Gemma4.from_pretrained(source, torch.float64)(torch.from_numpy(tokens)).numpy()
        single = Gemma4.from_pretrained(source)(torch.from_numpy(tokens)).numpy()
    # As on one process, the order of sums differs: twice the error of float32 is granted.
    assert np.linalg.norm(found[0]["logits"] - exact) <= 2 * np.linalg.norm(single - exact)
    saved, original = (Gemma4.from_pretrained(path).state_dict() for path in (tmp_path / "out", source))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    total = sum(t.nbytes for name, t in original.items() if name != "lm_head.weight")
    # Half of all, but for vectors, and key/value projections of one head, which every device has whole.
    assert all(total / 2 <= each["held"] < 0.6 * total for each in found)


@pytest.mark.parametrize("given", [{}, {"num_processes": 1}, {"num_processes": 1, "process_id": 0}])
def test_a_single_process_is_left_alone(given, monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: pytest.fail("it was started"))
    for name in (COORDINATOR, PROCESSES, PROCESS):
        monkeypatch.delenv(name, raising=False)
    initialize_distributed(**given)


def test_arguments_come_before_the_environment(monkeypatch):
    started = []
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args, **_: started.append(args))
    for name, value in {COORDINATOR: "a:1", PROCESSES: "4", PROCESS: "3"}.items():
        monkeypatch.setenv(name, value)
    initialize_distributed()
    initialize_distributed("[::1]:2", 8, 0)
    assert started == [("a:1", 4, 3), ("[::1]:2", 8, 0)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, f"{COORDINATOR} is not set; several processes need all of"),
        ({"coordinator": "a:1"}, f"{PROCESSES} is not set"),
        ({"coordinator": "a:1", "num_processes": 2}, f"{PROCESS} is not set"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, f"{COORDINATOR} = 'a': not of the form host:port"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, "not of the form host:port"),
        ({"coordinator": "a:99999", "num_processes": 2, "process_id": 0}, "not of the form host:port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, f"{PROCESS} = 2: must be from 0 to .* = 1"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, f"{PROCESSES} = 0: must be at least 1"),
        ({"coordinator": "a:1", "num_processes": -1, "process_id": 0}, f"{PROCESSES} = '-1': not a number"),
    ],
)
def test_settings_that_are_wrong(given, message, monkeypatch):
    for name in (COORDINATOR, PROCESSES, PROCESS):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DistributedError, match=message):
        initialize_distributed(**given)


def test_an_environment_that_is_wrong(monkeypatch):
    for name, value in {COORDINATOR: "a:1", PROCESSES: "two", PROCESS: "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=f"{PROCESSES} = 'two': not a number"):
        initialize_distributed()


def test_too_late(monkeypatch):
    """JAX is in use by now."""
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    distributed.jax.devices()
    with pytest.raises(DistributedError, match=r"process 0 of 2 could not join localhost:1: .*before any JAX"):
        initialize_distributed("localhost:1", 2, 0)
