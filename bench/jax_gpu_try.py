"""Decode speed of an E2B-sized JAX model with random weights on a GPU, as a share of its copy speed.

`python -m bench.jax_gpu` runs every variant in a process of its own, prints one line for each, and writes
`jax_gpu.json` into $OUT if that is set. `--variants a,b` picks some, `--layers 10` makes the model shallower.
"""

import argparse
import dataclasses
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gemma4_impl.config import VARIANTS as SIZES
from gemma4_impl.config import TextConfig
from gemma4_impl.generation import Sampling
from gemma4_impl.nnx import decoder, layers
from gemma4_impl.nnx.cache import KVCache, make_cache
from gemma4_impl.nnx.decoder import Gemma4, ScaledEmbedding
from gemma4_impl.nnx.engine import Decoding, Generator

SEGMENT, ROUNDS = 64, 4
WHILE = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the same decode."""

    changes: Sequence[Callable[[Gemma4], None]] = ()
    """What is done to the model before the engine is made of it."""
    flags: str = ""
    contexts: Sequence[int] = (512,)
    profile: bool = False
    layers: int = 0
    """0 is all of them."""


# Changes of a model. Each keeps its result within rounding.


def row_sums(model: Gemma4) -> None:
    """Products as multiplied and summed along rows, which fuses with what is around it."""
    _products(_row_sums)


def pallas(model: Gemma4) -> None:
    """Products by a Pallas kernel."""
    _products(_pallas_rows)


def head_sums(model: Gemma4) -> None:
    """The tied head as row sums."""
    ScaledEmbedding.attend = lambda self, x: _row_sums(x, self.weight[...], jnp.float32)


def head_pallas(model: Gemma4) -> None:
    """The tied head as a Pallas kernel."""
    ScaledEmbedding.attend = lambda self, x: _pallas_rows(x, self.weight[...], jnp.float32)


def slices(model: Gemma4) -> None:
    """The cache is written by a slice instead of a scatter."""

    def write(held: tuple[Array, Array], slots: Array, k: Array, v: Array) -> tuple[Array, Array]:
        new = zip(held, (k, v), strict=True)
        return tuple(jax.lax.dynamic_update_slice(old, x.astype(old.dtype), (0, slots[0, 0], 0, 0)) for old, x in new)

    def reserve(self: KVCache, positions: Array) -> tuple[KVCache, dict[str, Array]]:
        slots = {kind: positions % held.shape[1] for kind, held in self.positions.items()}
        stored = {
            kind: jax.lax.dynamic_update_slice(held, positions, (0, slots[kind][0, 0]))
            for kind, held in self.positions.items()
        }
        return dataclasses.replace(self, lengths=positions.max(axis=1) + 1, positions=stored), slots

    decoder.write, KVCache.reserve = write, reserve


def fused(model: Gemma4) -> None:
    """One product for gate and up, and one for queries, keys and values. Comes before what changes the products."""
    for layer in model.layers:
        layer.mlp.gate_up = _joined([layer.mlp.gate_proj, layer.mlp.up_proj])
        attention = layer.self_attn
        if not attention.config.kv_shared:
            attention.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
            del attention.q_proj, attention.k_proj, attention.v_proj
        del layer.mlp.gate_proj, layer.mlp.up_proj

    def mlp(self: decoder.MLP, x: Array) -> Array:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down_proj(layers.gated(gate, up))

    def attend(self: decoder.Attention, x: Array, rotary: tuple, mask: Array, held: Any, slots: Any) -> tuple:
        if self.config.kv_shared:
            q, kv = self._heads(self.q_proj(x)), held
        else:
            heads, K = self._heads(self.qkv(x)), self.config.num_key_value_heads
            q, k, v = jnp.split(heads, [heads.shape[2] - 2 * K, heads.shape[2] - K], axis=2)
            k = decoder.apply_rotary(self.k_norm(k), *rotary)
            kv = decoder.write(held, slots, k, self.v_norm(v))
        q = decoder.apply_rotary(self.q_norm(q), *rotary)
        return self.o_proj(decoder.attend(q, *kv, mask).reshape(*x.shape[:2], -1)), kv

    decoder.MLP.__call__, decoder.Attention.__call__ = mlp, attend


def attention_sums(model: Gemma4) -> None:
    """Scores and their product with the values as sums, for one query a row."""
    decoder.attend = lambda q, k, v, mask: _attend(q, k, v, mask, True, True)


def attention_scores(model: Gemma4) -> None:
    decoder.attend = lambda q, k, v, mask: _attend(q, k, v, mask, True, False)


def attention_barrier(model: Gemma4) -> None:
    decoder.attend = lambda q, k, v, mask: _attend(q, k, v, mask, False, False)


def _attend(q: Array, k: Array, v: Array, mask: Array, sum_scores: bool, sum_values: bool) -> Array:
    B, T, N, H = q.shape
    K, wide = k.shape[2], jnp.float32
    q = q.reshape(B, K, N // K, H)
    if sum_scores:
        keys = jnp.swapaxes(k, 1, 2)[:, :, None].astype(wide)
        scores = (q[:, :, :, None].astype(wide) * keys).sum(-1)
    else:
        scores = jnp.einsum("bkgh,bskh->bkgs", q, k, preferred_element_type=wide)
    probs = jax.nn.softmax(jnp.where(mask[:, :, 0][:, :, None], scores, -jnp.inf), axis=-1)
    probs = probs.astype(v.dtype)
    if not sum_scores and not sum_values:
        probs = jax.lax.optimization_barrier(probs)
    if sum_values:
        out = (probs[..., None].astype(wide) * jnp.swapaxes(v, 1, 2)[:, :, None].astype(wide)).sum(-2)
    else:
        out = jnp.einsum("bkgs,bskh->bkgh", probs, v, preferred_element_type=wide)
    return out.astype(v.dtype).reshape(B, T, N, H)


VARIANTS: dict[str, Variant] = {
    "try_sums": Variant((attention_sums,), profile=True),
    "try_scores": Variant((attention_scores,), profile=True),
    "try_sums_rows": Variant((attention_sums, row_sums), profile=True),
    "try_no_split_k": Variant(flags="--xla_gpu_enable_split_k_autotuning=false", profile=True),
    "try_sums_no_split_k": Variant((attention_sums,), flags="--xla_gpu_enable_split_k_autotuning=false", profile=True),
    "try_block_level": Variant(
        (attention_sums,), flags="--xla_gpu_experimental_enable_fusion_block_level_rewriter=true", profile=True
    ),
    "try_barrier": Variant((attention_barrier,)),
    "try_sums_rows_while": Variant((attention_sums, row_sums), flags=WHILE),
    "products": Variant(),
    "base": Variant(profile=True, contexts=(512, 4096)),
    "no_command_buffer": Variant(flags="--xla_gpu_enable_command_buffer="),
    "while_command_buffer": Variant(flags=WHILE),
    "no_triton": Variant(flags="--xla_gpu_enable_triton_gemm=false"),
    "no_merger": Variant(flags="--xla_gpu_dot_merger_threshold_mb=0"),
    "autotune_0": Variant(flags="--xla_gpu_autotune_level=0"),
    "slices": Variant((slices,), profile=True),
    "fused": Variant((fused, slices), profile=True),
    "fused_while": Variant((fused, slices), flags=WHILE),
    "fused_no_triton": Variant((fused, slices), flags="--xla_gpu_enable_triton_gemm=false"),
    "row_sums": Variant((row_sums, head_sums, slices), profile=True),
    "fused_row_sums": Variant((fused, row_sums, head_sums, slices), profile=True),
    "fused_row_sums_while": Variant((fused, row_sums, head_sums, slices), flags=WHILE),
    "pallas": Variant((fused, pallas, head_pallas, slices), profile=True),
}
DEFAULT = ("try_sums", "try_sums_rows", "try_scores", "try_no_split_k", "try_sums_no_split_k", "try_block_level")


def _row_sums(x: Array, w: Array, dtype: Any = None) -> Array:
    """x [..., D], w [F, D] -> [..., F], summed in float32."""
    wide = jnp.float32
    return (x[..., None, :].astype(wide) * w.astype(wide)).sum(axis=-1).astype(dtype or x.dtype)


def _pallas_rows(x: Array, w: Array, dtype: Any = None, interpret: bool = False) -> Array:
    """x [..., D] of one row, w [F, D] -> [..., F], summed in float32."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    F, D = w.shape
    cols = next(c for c in (1024, 512, 256, 128, 64, 32, 16, 8) if D % c == 0)
    rows = next(r for r in (8, 4, 2, 1) if F % r == 0)
    if F * D > 1 << 27:
        rows = 16

    def kernel(x_ref: Any, w_ref: Any, o_ref: Any) -> None:
        def add(i: Array, total: Array) -> Array:
            at = pl.ds(i * cols, cols)
            return total + w_ref[:, at].astype(jnp.float32) * x_ref[at].astype(jnp.float32)[None]

        total = jax.lax.fori_loop(0, D // cols, add, jnp.zeros((rows, cols), jnp.float32))
        o_ref[...] = total.sum(axis=1).astype(o_ref.dtype)

    out = pl.pallas_call(
        kernel,
        grid=(F // rows,),
        in_specs=[pl.BlockSpec((D,), lambda i: (0,)), pl.BlockSpec((rows, D), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((rows,), lambda i: (i,)),
        out_shape=jax.ShapeDtypeStruct((F,), dtype or x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(x.reshape(-1), w)
    return out.reshape(*x.shape[:-1], F)


def _products(product: Callable[[Array, Array], Array]) -> None:
    layers.Linear.__call__ = lambda self, x: product(x, self.weight[...])


def _joined(linears: Sequence[layers.Linear]) -> layers.Linear:
    out = linears[0]
    out.weight.set_value(jnp.concatenate([linear.weight[...] for linear in linears]))
    return out


def random_model(config: TextConfig) -> Gemma4:
    """A bfloat16 model made on the device, tensor by tensor."""
    model = nnx.eval_shape(lambda: Gemma4(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    make = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[-1] ** -0.5),
        static_argnums=1,
    )
    filled = []
    for i, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        key = jax.random.key(i, impl="rbg")
        value = jnp.ones(leaf.shape, jnp.bfloat16) if leaf.ndim < 2 else make(key, leaf.shape)
        filled.append((path, leaf.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def filled_cache(config: TextConfig, context: int, room: int) -> KVCache:
    """A cache of one row as `context` tokens would leave it, its keys and values random."""
    cache = make_cache(config, 1, room, dtype=jnp.bfloat16)
    positions = {}
    for kind, held in cache.positions.items():
        stored = np.full(held.shape, -1, np.int32)
        past = np.arange(max(0, context - held.shape[1]), context)
        stored[0, past % held.shape[1]] = past
        positions[kind] = jnp.asarray(stored)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    kv = {
        i: (draw(jax.random.key(i), k.shape), draw(jax.random.key(-i), v.shape)) for i, (k, v) in cache.layers.items()
    }
    return KVCache(jnp.full(1, context, jnp.int32), positions, kv)


def copy_speed() -> float:
    """Bytes read and written a second, the best of several ways to copy 4 GiB."""
    n = 1 << 30
    x = jnp.zeros(n, jnp.uint32)
    ways = {
        "x + 1": jax.jit(lambda x: x + 1),
        "copy": jax.jit(jnp.copy),
        "loop": jax.jit(lambda x: jax.lax.fori_loop(0, 4, lambda i, x: x + 1, x)),
        "wide": jax.jit(lambda x: x.reshape(-1, 4096) ^ 1),
        "reverse": jax.jit(lambda x: x.reshape(1 << 15, -1)[::-1]),
    }
    found = {}
    for name, way in ways.items():
        times = []
        for _ in range(8):
            start = time.perf_counter()
            way(x).block_until_ready()
            times.append(time.perf_counter() - start)
        found[name] = 2 * x.nbytes * (4 if name == "loop" else 1) / min(times)
    y = x
    f = jax.jit(lambda x: x + 1, donate_argnums=0)
    y = f(jnp.zeros(n, jnp.uint32)).block_until_ready()
    start = time.perf_counter()
    for _ in range(20):
        y = f(y)
    y.block_until_ready()
    found["donated, 20 at once"] = 20 * 2 * x.nbytes / (time.perf_counter() - start)
    del y
    start = time.perf_counter()
    read = jax.jit(lambda x: x.reshape(1 << 15, -1).max(axis=1))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        read(x).block_until_ready()
        times.append(time.perf_counter() - start)
    print("  copies GB/s:", {k: round(v / 1e9) for k, v in found.items()}, "read", round(x.nbytes / min(times) / 1e9), flush=True)
    return max(found.values())


def decode_speed(engine: Generator, context: int, name: str, profile: bool) -> dict[str, Any]:
    """Times `ROUNDS` segments after a first one that compiles."""
    room = context + SEGMENT * (ROUNDS + 3)
    decoding = Decoding(
        filled_cache(engine.config, context, room),
        jnp.full(1, 1000, jnp.int32),
        jnp.zeros(1, bool),
        np.int32(1),
        jax.random.key(0),
        jnp.zeros(1, jnp.int32) - 7,
        Sampling(temperature=0),
    )
    start = time.perf_counter()
    out, decoding = engine.decode(decoding)
    out.block_until_ready()
    compiled = time.perf_counter() - start
    out, decoding = engine.decode(decoding)
    first = int(decoding.cache.lengths[0])
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        out, decoding = engine.decode(decoding)
        out.block_until_ready()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times) / SEGMENT
    tokens = np.asarray(out)[0].tolist()
    read = engine.bytes_per_token(first + SEGMENT * ROUNDS // 2)
    result = {
        "context": context,
        "compile_s": compiled,
        "tokens_per_second": 1 / seconds,
        "us_per_token": seconds * 1e6,
        "bytes_per_token": read,
        "gb_per_second": read / seconds / 1e9,
        "tokens": tokens[:8],
        "weight_bytes": engine.bytes_per_token(0),
    }
    if profile:
        if out := os.environ.get("OUT"):
            try:
                with gzip.open(Path(out) / f"{name}.hlo.gz", "wt") as file:
                    file.write(hlo(engine, decoding))
            except Exception as error:
                print(f"  no HLO: {error}", flush=True)
        try:
            result["kernels"] = kernels(lambda: engine.decode(decoding)[0].block_until_ready())
            for row in result["kernels"]["longest"][:25]:
                print(
                    f"    {row['us_per_token']:8.1f} us {row['calls_per_token']:6.1f} calls {row['name']}", flush=True
                )
            print({k: round(v, 1) for k, v in result["kernels"].items() if k != "longest"}, flush=True)
        except Exception as error:
            print(f"  no profile: {error!r}", flush=True)
    return result


def hlo(engine: Generator, d: Decoding) -> str:
    """The compiled decode."""
    count = np.int32(SEGMENT)
    args = d.cache, d.token, d.done, d.key, d.stop, d.drawn, count, np.float32(0), np.float32(1)
    return engine._decode.lower(engine._weights, *args, filters=(True, None, False)).compile().as_text()


def kernels(run: Callable[[], Any]) -> dict[str, Any]:
    """What the GPU did in `run`, a token: kernels, their time, and the longest of them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    total, count, names = 0.0, 0, Counter()
    calls: Counter[str] = Counter()
    for plane in data.planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if "Stream" not in line.name:
                continue
            for event in line.events:
                total += event.duration_ns
                count += 1
                names[event.name] += event.duration_ns
                calls[event.name] += 1
    top = [
        {"name": n[:60], "us_per_token": t / 1e3 / SEGMENT, "calls_per_token": calls[n] / SEGMENT}
        for n, t in names.most_common(60)
    ]
    return {"per_token": count / SEGMENT, "busy_us_per_token": total / 1e3 / SEGMENT, "longest": top}


def products() -> list[dict[str, Any]]:
    """Speed of one row times a matrix, each matrix read from memory, in the ways a decode could do it."""
    ways = {
        "dot in_out": (lambda x, w: x @ w, False),
        "dot out_in": (lambda x, w: jnp.einsum("bd,fd->bf", x, w), True),
        "row_sums": (_row_sums, True),
        "pallas": (_pallas_rows, True),
    }
    out = []
    for D, F in ((1536, 2048), (2048, 1536), (1536, 12_288), (12_288, 1536), (1536, 24_576), (1536, 262_144)):
        n = max(2, min(32, (600 << 20) // (D * F * 2)))
        make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
        for name, (product, transposed) in ways.items():
            try:
                ws = [make(jax.random.key(i, impl="rbg"), (F, D) if transposed else (D, F)) for i in range(n)]

                @jax.jit
                def chain(x: Array, ws: list[Array], product: Callable = product) -> Array:
                    def once(_: Array, x: Array) -> Array:
                        for w in ws:
                            x = x + product(x, w)[:, :1] * 1e-9
                        return x

                    return jax.lax.fori_loop(0, 10, once, x)

                x = jnp.ones((1, D), jnp.bfloat16)
                chain(x, ws).block_until_ready()
                times = []
                for _ in range(5):
                    start = time.perf_counter()
                    chain(x, ws).block_until_ready()
                    times.append(time.perf_counter() - start)
                us = min(times) / 10 / n * 1e6
                row = {"D": D, "F": F, "way": name, "us": us, "gb_per_second": D * F * 2 / us / 1e3}
            except Exception as error:
                row = {"D": D, "F": F, "way": name, "error": " ".join(str(error).split())[:300]}
            print("   ", json.dumps(row), flush=True)
            out.append(row)
    return out


def child(name: str, depth: int, contexts: Sequence[int]) -> dict[str, Any]:
    variant = VARIANTS[name]
    device = jax.devices()[0]
    print(f"  {name}: {device.device_kind}, jax {jax.__version__}", flush=True)
    if name == "products":
        return {"variant": name, "copy_gb_per_second": copy_speed() / 1e9, "products": products()}
    config = SIZES["E2B"]
    if depth:
        kinds, shared = config.layer_types[-depth:], depth * config.num_kv_shared_layers // config.num_hidden_layers
        config = dataclasses.replace(
            config, layer_types=kinds, num_hidden_layers=depth, num_kv_shared_layers=shared // 5 * 5
        )
    start = time.perf_counter()
    model = random_model(config)
    for change in variant.changes:
        change(model)
    engine = Generator(model, segment=SEGMENT)
    del model
    jax.block_until_ready(engine._weights)
    print(f"  model made in {time.perf_counter() - start:.1f} s", flush=True)
    result = {"variant": name, "layers": config.num_hidden_layers, "copy_gb_per_second": copy_speed() / 1e9}
    result["runs"] = []
    for context in contexts or variant.contexts:
        run = decode_speed(engine, context, name, variant.profile and context == 512)
        run["share"] = run["gb_per_second"] / result["copy_gb_per_second"]
        line = {k: round(v, 3) for k, v in run.items() if isinstance(v, int | float)}
        print(f"  {json.dumps(line)}", flush=True)
        result["runs"].append(run)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", default=",".join(DEFAULT))
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--contexts", default="", help="such as 512,4096")
    parser.add_argument("--seconds", type=float, default=285, help="no variant starts after this many")
    parser.add_argument("--child")
    args = parser.parse_args()
    contexts = [int(c) for c in args.contexts.split(",") if c]
    if args.child:
        print("RESULT " + json.dumps(child(args.child, args.layers, contexts)), flush=True)
        return
    begin, results = time.perf_counter(), []
    for name in args.variants.split(","):
        left = args.seconds - (time.perf_counter() - begin)
        if left < 15:
            print(f"{name}: no time left", flush=True)
            continue
        print(f"{name} ({time.perf_counter() - begin:.0f} s)", flush=True)
        flags = f"{os.environ.get('XLA_FLAGS', '')} {VARIANTS[name].flags}".strip()
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
            "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "jax_gpu_try_cache"),
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        command = [sys.executable, "-m", "bench.jax_gpu_try", "--child", name, "--layers", str(args.layers)]
        command += ["--contexts", args.contexts]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            print("\n".join(line for line in done.stdout.splitlines() if line not in found), flush=True)
            if found:
                results.append(json.loads(found[0].removeprefix("RESULT ")))
            else:
                print(f"  failed: {done.stderr[-800:]}", flush=True)
        except subprocess.TimeoutExpired as error:
            print(f"  stopped after {error.timeout:.0f} s: {(error.stdout or b'')[-800:]!r}", flush=True)
        if out := os.environ.get("OUT"):
            (Path(out) / "jax_gpu_try.json").write_text(json.dumps(results, indent=1))
    for result in results:
        for run in result.get("runs", []):
            print(
                f"{result['variant']:>22} context {run['context']:5}: {run['tokens_per_second']:7.1f} tokens/s, "
                f"{run['gb_per_second']:6.0f} of {result['copy_gb_per_second']:.0f} GB/s = {run['share']:.1%}; "
                f"compiled in {run['compile_s']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
