"""What `gemma4 generate --backend jax` opens: devices, a mesh, the model on them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gemma4_impl.errors import short
from gemma4_impl.generation import Generation, Prompt
from gemma4_impl.nnx.distributed import initialize_distributed
from gemma4_impl.nnx.engine import Generator
from gemma4_impl.nnx.generate import generate
from gemma4_impl.nnx.images import ImageEncoder
from gemma4_impl.nnx.load import from_pretrained
from gemma4_impl.nnx.sharding import make_mesh
from gemma4_impl.tokenizer import Tokenizer

MAX_CHUNK = 512


def open_jax(
    checkpoint: Path,
    tower: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    mesh: str | None = None,
    progress: bool = False,
) -> Callable[..., Generation]:
    """Loads the model at `checkpoint`, with the vision tower at `tower` if there is one. Returns `generate` for it,
    which takes a prompt and options.

    Joins the other processes first if the environment names them (`initialize_distributed`); only the first one
    streams. `device` is a platform of JAX's, or one device of it ("cuda:1"); `mesh` ("fsdp=1,tp=4") takes them all.
    Raises ValueError for devices that are not there, and as loading does."""
    initialize_distributed()
    devices = find_devices(device)
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    grid = None if mesh is None else make_mesh(mesh, devices)

    def place() -> contextlib.AbstractContextManager:
        return jax.default_device(devices[0]) if grid is None else jax.set_mesh(grid)

    with place():
        encoder = None if tower is None else ImageEncoder.from_pretrained(tower, dtype, text=checkpoint)
        model = from_pretrained(checkpoint, dtype, progress=progress)
    longest = 0 if encoder is None else encoder.processor.max_soft_tokens
    engine = Generator(model, max_chunk=max(MAX_CHUNK, longest))

    def run(prompt: Prompt, *, stream: Callable[[str], None] | None = None, **options: Any) -> Generation:
        if jax.process_index():
            stream = None
        with place():
            return generate(engine, tokenizer, prompt, stream=stream, encoder=encoder, **options)

    return run


def find_devices(name: str | None) -> list[jax.Device]:
    """All devices of the platform `name`, or the one that it numbers; by default those of JAX's own choice. Raises
    ValueError."""
    if name is None:
        return jax.devices()
    platform, _, index = name.partition(":")
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        raise ValueError(f"--device {short(name)}: jax cannot use it on this machine; try --device cpu") from None
    if not index:
        return devices
    if not (index.isascii() and index.isdigit() and int(index[:6]) < len(devices)):
        raise ValueError(f"--device {short(name)}: the devices of {platform} are 0 to {len(devices) - 1}")
    return [devices[int(index[:6])]]
