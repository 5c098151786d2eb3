"""Several processes, one or more a host, as one JAX program."""

import os
from collections.abc import Mapping

import jax

from gemma4_impl.errors import one_line, short

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


class DistributedError(ValueError):
    """Processes that cannot be joined as was asked; the message names the setting."""


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins this process with the others, after which `jax.devices()` are those of all. To be called before anything
    else of JAX; does nothing for a single process, or a second time.

    What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. On CPU the processes
    talk through Gloo. Every process must then run the same calls in the same order.

    Args:
        coordinator: host:port of process 0, where it listens and the others find it.
        timeout: seconds to wait for the others, after which JAX ends the process.

    Raises DistributedError for settings that are incomplete or wrong, and when JAX is in use already."""
    if jax.distributed.is_initialized():
        return
    settings = _settings(coordinator, num_processes, process_id, os.environ)
    if settings is None:
        return
    address, count, index = settings
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=timeout)
    except RuntimeError as error:
        raise DistributedError(f"process {index} of {count} could not join {address}: {one_line(error)}") from None


def _settings(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> tuple[str, int, int] | None:
    """Address, number of processes and this one's; None for a single process."""
    address = coordinator or environment.get(COORDINATOR)
    count = _number(num_processes, PROCESSES, environment)
    index = _number(process_id, PROCESS, environment)
    if count is None and address is None and index is None:
        return None
    if count == 1 and not index:
        return None
    if missing := [
        name for name, value in ((COORDINATOR, address), (PROCESSES, count), (PROCESS, index)) if value is None
    ]:
        raise DistributedError(
            f"{missing[0]} is not set; several processes need all of {COORDINATOR}, {PROCESSES}, {PROCESS}"
        )
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise DistributedError(f"{COORDINATOR} = {short(address)}: not of the form host:port")
    if count < 1:
        raise DistributedError(f"{PROCESSES} = {count}: must be at least 1")
    if not 0 <= index < count:
        raise DistributedError(f"{PROCESS} = {index}: must be from 0 to {PROCESSES} - 1 = {count - 1}")
    return address, count, index


def _number(given: int | None, name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name) if given is None else str(given)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise DistributedError(f"{name} = {short(text)}: not a number")
    return int(text)
