"""Decode speed of an E2B-sized JAX model with random weights on a GPU, as a share of its copy speed.

`python -m bench.jax_gpu` prints what it measures, and writes it to `jax_gpu.json` in the folder $OUT, if that is set,
together with the compiled program.
"""

import argparse
import gzip
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from gemma4_impl.config import VARIANTS, TextConfig
from gemma4_impl.generation import Sampling
from gemma4_impl.nnx.cache import KVCache, make_cache
from gemma4_impl.nnx.decoder import Gemma4
from gemma4_impl.nnx.engine import Decoding, Generator

SEGMENT, ROUNDS = 64, 6


def random_model(config: TextConfig) -> Gemma4:
    """A bfloat16 model made on the device, tensor by tensor: one program for all of them takes minutes to compile."""
    model = nnx.eval_shape(lambda: Gemma4(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    filled = []
    for i, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        key = jax.random.key(i, impl="rbg")
        value = jnp.ones(leaf.shape, jnp.bfloat16)
        if leaf.ndim > 1:
            value = _normal(key, leaf.shape) * jnp.bfloat16(leaf.shape[-1] ** -0.5)
        filled.append((path, leaf.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@jax.jit(static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def filled_cache(config: TextConfig, context: int, room: int) -> KVCache:
    """A cache of one row as `context` tokens would leave it, its keys and values random."""
    cache = make_cache(config, 1, room, dtype=jnp.bfloat16)
    positions = {}
    for kind, held in cache.positions.items():
        stored = np.full(held.shape, -1, np.int32)
        past = np.arange(max(0, context - held.shape[1]), context)
        stored[0, past % held.shape[1]] = past
        positions[kind] = jnp.asarray(stored)
    kv = {
        i: (_normal(jax.random.key(2 * i), k.shape), _normal(jax.random.key(2 * i + 1), v.shape))
        for i, (k, v) in cache.layers.items()
    }
    return KVCache(jnp.full(1, context, jnp.int32), positions, kv)


def copy_speed() -> float:
    """Bytes read and written a second: the best of several ways to copy 4 GiB. JAX's own depend on how they come to be
    compiled; PyTorch's is the memory's, where PyTorch has the GPU too."""
    x = jnp.zeros(1 << 30, jnp.uint32)
    ways = {
        "add": lambda x: x + 1,
        "add rows": lambda x: x.reshape(-1, 4096) + 1,
        "reverse rows": lambda x: x.reshape(1 << 15, -1)[::-1],
    }
    found = {}
    for name, way in ways.items():
        copy = jax.jit(way)
        found[name] = 2 * x.nbytes / min(_seconds(lambda copy=copy: copy(x)) for _ in range(8))
    if torch.cuda.is_available():
        found["torch"] = _torch_copy_speed()
    print("copied, GB/s:", {name: round(speed / 1e9) for name, speed in found.items()}, flush=True)
    return max(found.values())


def _torch_copy_speed() -> float:
    source = torch.zeros(1 << 30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    speed = 2 * source.nbytes / min(times)
    del source, target
    torch.cuda.empty_cache()
    return speed


def decode_speed(engine: Generator, context: int) -> dict[str, Any]:
    """The median of `ROUNDS` segments after two that compile and warm up; what was decoded, and what it had to read."""
    d = Decoding(
        cache=filled_cache(engine.config, context, context + SEGMENT * (ROUNDS + 4)),
        token=jnp.full(1, 1000, jnp.int32),
        done=jnp.zeros(1, bool),
        drawn=jnp.int32(1),
        key=jax.random.key(0),
        stop=np.array([-7], np.int32),
        sampling=Sampling(temperature=0),
    )
    times, tokens = [], []

    def segment() -> jax.Array:
        nonlocal d
        out, d = engine.decode(d)
        tokens.append(out)
        return out

    compiled = _seconds(segment)
    segment()
    first = int(d.cache.lengths[0])
    times = [_seconds(segment) for _ in range(ROUNDS)]
    seconds = statistics.median(times) / SEGMENT
    read = engine.bytes_per_token(first + SEGMENT * ROUNDS // 2)
    return {
        "context": context,
        "first_segment_s": compiled,
        "tokens_per_second": 1 / seconds,
        "bytes_per_token": read,
        "weight_bytes": engine.bytes_per_token(0),
        "gb_per_second": read / seconds / 1e9,
        "distinct_tokens": len(np.unique(np.concatenate(tokens, axis=1))),
        "kernels": kernels(segment),
        "hlo": hlo(engine, d),
    }


def kernels(run: Callable[[], jax.Array]) -> dict[str, Any]:
    """What the GPU did in `run`, a token: kernels, their time, and the longest of them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run().block_until_ready()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    times, calls = Counter(), Counter()
    for plane in data.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                times[event.name] += event.duration_ns / 1e3 / SEGMENT
                calls[event.name] += 1 / SEGMENT
    longest = [{"name": n, "us": round(t, 1), "calls": calls[n]} for n, t in times.most_common(40)]
    return {"calls": sum(calls.values()), "us": sum(times.values()), "longest": longest}


def hlo(engine: Generator, d: Decoding) -> str:
    """The compiled decode."""
    args = d.cache, d.token, d.done, d.key, d.stop, d.drawn, np.int32(SEGMENT), np.float32(0), np.float32(1)
    return engine._decode.lower(engine._weights, *args, filters=(True, None, False)).compile().as_text()


def _seconds(run: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    run().block_until_ready()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="E2B", choices=VARIANTS)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096])
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    copied = copy_speed()
    engine = Generator(random_model(VARIANTS[args.variant]), segment=SEGMENT)
    results = []
    for context in args.contexts:
        result = decode_speed(engine, context)
        program, profile = result.pop("hlo"), result["kernels"]
        share = result["gb_per_second"] * 1e9 / copied
        results.append(result | {"copy_gb_per_second": copied / 1e9, "share": share})
        print(
            f"{args.variant}, context {context}: {result['tokens_per_second']:.1f} tokens/s, "
            f"{result['bytes_per_token'] / 1e9:.2f} GB a token, {result['gb_per_second']:.0f} GB/s, "
            f"{share:.1%} of {copied / 1e9:.0f}; {profile['calls']:.0f} kernels, {profile['us']:.0f} us a token",
            flush=True,
        )
        for row in profile["longest"][:15]:
            print(f"  {row['us']:8.1f} us {row['calls']:6.1f} {row['name'][:60]}", flush=True)
        if out := os.environ.get("OUT"):
            (Path(out) / "jax_gpu.json").write_text(json.dumps(results, indent=1))
            with gzip.open(Path(out) / f"decode_{context}.hlo.gz", "wt") as file:
                file.write(program)


if __name__ == "__main__":
    main()
