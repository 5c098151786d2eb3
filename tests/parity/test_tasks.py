"""A run in pieces: the same report whatever the number of processes, and what happens if one of them fails."""

import os
from functools import partial

import pytest
import torch

from parity.compare import Comparison
from parity.engine import Case, Report
from parity.tasks import Task, processes_for, run_tasks


def made(label: str, advance=lambda what: None) -> Report:
    """A report with a tensor in it, and the process that made it."""
    advance(label)
    comparison = Comparison([], [], [], [], None, by_position={"embed": torch.full((1, 3), float(len(label)))})
    return Report([Case(label, "float32", "full", comparison)], {label: {"process": os.getpid()}})


def broken(advance=lambda what: None) -> Report:
    raise ValueError("config.json: is not there")


def killed(advance=lambda what: None) -> Report:
    os._exit(9)


TASKS = [Task(f"{'x' * n}", n, partial(made, "x" * n)) for n in (2, 4, 1, 3)]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_report_is_in_the_order_of_the_tasks(processes):
    told = []
    report = run_tasks(TASKS, processes, told.append)
    assert [len(case.checkpoint) for case in report.cases] == [2, 4, 1, 3]
    for case in report.cases:
        assert torch.equal(case.comparison.by_position["embed"], torch.full((1, 3), float(len(case.checkpoint))))
    others = {entry["process"] for entry in report.inputs.values()} - {os.getpid()}
    if processes == 1:
        assert not others
        assert told == ["xx", "xxxx", "x", "xxx"]
    else:
        assert len(others) <= 2
        assert all(told.count("x" * n) == n for n in (1, 2, 3, 4))


def test_a_killed_process_is_one_line():
    with pytest.raises(MemoryError, match="memory ran out"):
        run_tasks([*TASKS, Task("killed", 9, killed)], 2, lambda what: None)


@pytest.mark.parametrize("processes", [1, 8])
def test_what_a_task_raises_is_raised(processes):
    """And a few tasks start no process."""
    with pytest.raises(ValueError, match=r"config\.json"):
        run_tasks([TASKS[0], Task("broken", 1, broken)], processes, lambda what: None)
    assert run_tasks([], processes, print) == Report()


def test_a_gpu_takes_one_process():
    assert processes_for(torch.device("cuda")) == processes_for(torch.device("mps")) == 1
    assert 1 <= processes_for(torch.device("cpu")) <= (os.cpu_count() or 1)
