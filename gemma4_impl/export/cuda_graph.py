"""Prefill and decode as graphs for NVIDIA GPUs, and a kernel chosen for each attention and each linear in them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from gemma4_impl.config import SLIDING, TextConfig
from gemma4_impl.export import Step
from gemma4_impl.export.cuda_weights import QuantizedLinear, place_weights
from gemma4_impl.export.source import quantized_weights
from gemma4_impl.kernels.int4_linear import operators as linears
from gemma4_impl.kernels.sdpa import operators as _registers_them  # noqa: F401
from gemma4_impl.kernels.steps import naive, sampling_state
from gemma4_impl.model.cache import KVCache
from gemma4_impl.model.decoder import Gemma4

aten, ours = torch.ops.aten, torch.ops.gemma4
# One node each, until a compiler takes in their Triton kernels.
SDPA_PREFILL, SDPA_DECODE = ours.sdpa_prefill.default, ours.sdpa_decode.default
LINEAR, EXPERTS, DEQUANTIZE = (
    ours.quantized_linear.default, ours.quantized_experts.default, ours.dequantize.default,
)  # fmt: skip


@dataclass(frozen=True)
class KernelChoice:
    """Who computes a node, and why."""

    node: str
    module: str
    """Its path in the model."""
    shape: str
    """Its sizes by their letters; one that differs from call to call is `2..C`."""
    kernel: str
    reason: str


class Decode(nn.Module):
    """One token in, the next one out, drawn on the device.

    Buffers beside the model's and the cache's: `state` of the random numbers, and the last `logits`, float32 [1, V]."""

    def __init__(self, model: Gemma4, cache: KVCache, top_k: int | None = None):
        super().__init__()
        self.model, self.cache, self.top_k = model, cache, top_k
        self.register_buffer("state", sampling_state(0, model.device))
        shape = (1, model.config.vocab_size)
        self.register_buffer("logits", torch.zeros(shape, dtype=torch.float32, device=model.device))

    def forward(self, tokens: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
        """tokens and positions int64 [1, 1], temperature float32 [1] -> int64 [1]; see `draw`."""
        logits = self.model(tokens, positions, self.cache, "last")[:, 0].float()
        self.logits.copy_(logits)
        return draw(logits, temperature, self.top_k, self.state)


def draw(logits: Tensor, temperature: Tensor, top_k: int | None, state: Tensor) -> Tensor:
    """Draws an id from float32 logits [1, V] by Gumbel-max -> [1], the one that `steps.sample` draws; moves `state` on.

    At temperature [1] = 0, which leaves `state` alone, it is the largest logit; -1 where there is no distribution."""
    noise = naive.gumbel(*logits.shape, state)
    if top_k is None:
        token = (logits + temperature * noise).argmax(dim=-1)
    else:
        # A stable sort, of which the first k are the k largest, lower ids first among equals.
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        values, ids = values[:, :top_k], ids[:, :top_k]
        best = (values + temperature * noise.gather(1, ids)).argmax(dim=-1, keepdim=True)
        token = ids.gather(1, best)[:, 0]
    state[1] += (temperature[0] > 0).long()
    return torch.where(logits.amax(dim=-1) > -torch.inf, token, -1)


@torch.no_grad()
def export_programs(model: Gemma4, cache: KVCache, top_k: int | None = None) -> dict[str, ExportedProgram]:
    """`prefill` (tokens, positions int64 [1, T], T from 2 to `cache.max_chunk`; absent if that is 1) -> logits
    [1, 1, V] of the last token, and `decode`, which is `Decode`; on one cache, with our operators in place.

    Quantized weights are those that `source.hold` put into the model: their modules are replaced in it. Raises
    ValueError as `refusals` says, and for a cache of several rows."""
    if reasons := refusals(model, top_k):
        raise ValueError(f"backend cuda: {'; '.join(reasons)}")
    if cache.batch_size != 1:
        raise ValueError(f"a program decodes one row, but the cache has {cache.batch_size}")
    place_weights(model)
    with torch.device(model.device):
        inputs = {"decode": (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1))}
        if cache.max_chunk > 1:
            length = min(3, cache.max_chunk)
            inputs["prefill"] = (torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None])
    modules = {"prefill": Step(model, cache), "decode": Decode(model, cache, top_k)}
    dynamic = {1: Dim("length", min=2, max=cache.max_chunk)} if cache.max_chunk > 2 else None
    shapes = {"prefill": {"tokens": dynamic, "positions": dynamic}, "decode": None}
    programs = {
        name: torch.export.export(modules[name], inputs[name], dynamic_shapes=shapes[name])
        for name in ("prefill", "decode")
        if name in inputs
    }
    for name, program in programs.items():
        place_attention(program, model.config, cache)
        check_whole(program, model, name)
    return programs


def refusals(model: Gemma4, top_k: int | None = None) -> list[str]:
    """Why a model cannot be exported for CUDA; empty if it can."""
    out = []
    if model.dtype not in linears.FLOATS:
        out.append(f"computes in bfloat16, float16 or float32, not {str(model.dtype).removeprefix('torch.')}")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        out.append(f"top_k = {top_k}: must be from 1 to the vocabulary's {model.config.vocab_size}")
    out += [f"{name}: {why}" for name, q in quantized_weights(model).items() if (why := linears.refusal(q))]
    return out


# 1. Attention


def place_attention(program: ExportedProgram, config: TextConfig, cache: KVCache) -> None:
    """Puts our operators in the place of `scaled_dot_product_attention`; the masks, which nothing reads then, go.

    One query is `sdpa_decode`, split over the keys, which it finds by the length alone; several are `sdpa_prefill`.
    Both read no further than the queries see. A flat cache holds position p in slot p; in a ring prefill reads the
    slots' positions."""
    graph, positions, length = program.graph, _input(program, "positions"), None
    for node in list(graph.nodes):
        if node.target != aten.scaled_dot_product_attention.default:
            continue
        layer = config.layers[_layer(node)]
        window = config.sliding_window if layer.layer_type == SLIDING else None
        q, k, v = node.args[:3]
        with graph.inserting_before(node):
            if q.meta["val"].shape[2] == 1:
                if length is None:
                    length = _length(graph, positions)
                new = _call(graph, SDPA_DECODE, (q, k, v, length, None, window, 1.0))
            else:
                stored = _stored(program, layer.layer_type, cache) if window is not None else None
                new = _call(graph, SDPA_PREFILL, (q, k, v, positions, stored, None, window, 1.0))
        new.meta |= {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    _remove_masks(graph)
    graph.lint()
    program.graph_module.recompile()


def _remove_masks(graph: torch.fx.Graph) -> None:
    """Of what nothing reads, checks of dtypes and products in place would stay."""
    for node in list(graph.nodes):
        if node.target == aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target == aten.__iand__.Tensor and node.args[0].op != "placeholder" and len(node.args[0].users) == 1:
            node.target = aten.__and__.Tensor
    graph.eliminate_dead_code()


def _length(graph: torch.fx.Graph, positions: Node) -> Node:
    """int32 [1]: tokens so far, those of this call among them."""
    last = _call(graph, aten.amax.default, (positions, [1]))
    return _call(graph, aten._to_copy.default, (_call(graph, aten.add.Tensor, (last, 1)),), dtype=torch.int32)


def _stored(program: ExportedProgram, kind: str, cache: KVCache) -> Node:
    """int64 [1, C]: the position in each slot of a ring, those of this call's tokens among them."""
    name = f"cache.{kind}_positions"
    inputs = program.graph_signature.inputs_to_buffers
    buffer = next(n for n in program.graph.nodes if n.op == "placeholder" and inputs.get(n.name) == name)
    written = next(user for user in buffer.users if user.target == aten.scatter_.src)
    found = [user for user in written.users if user.args[1:] == (1, 0, cache.capacity[kind])]
    return found[0] if found else _call(program.graph, aten.slice.Tensor, (written, 1, 0, cache.capacity[kind]))


def _call(graph: torch.fx.Graph, target: torch._ops.OpOverload, args: tuple, **kwargs: object) -> Node:
    node = graph.call_function(target, args, kwargs)
    values = torch.fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values, **kwargs)
    return node


def _input(program: ExportedProgram, name: str) -> Node:
    return next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == name)


# 2. What was chosen


def check_whole(program: ExportedProgram, model: Gemma4, name: str) -> None:
    """Raises ValueError unless each attention, and each quantized linear, of the program is one operator of ours."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    parts = list(model.modules())
    quantized = sum(isinstance(m, QuantizedLinear) for m in parts)
    wanted = {"attention": model.config.num_hidden_layers, "quantized linear": quantized}
    found = {
        "attention": sum(n.target in (SDPA_PREFILL, SDPA_DECODE) for n in nodes),
        "quantized linear": sum(n.target == LINEAR for n in nodes),
    }
    if wanted != found or any(n.target == aten.scaled_dot_product_attention.default for n in nodes):
        raise ValueError(f"{name}: the graph has {found} operators of ours, but the model {wanted}")


def kernel_choices(program: ExportedProgram) -> list[KernelChoice]:
    """Who computes each attention and each linear of a program from `export_programs`, in its order."""
    return list(_choices(program))


def _choices(program: ExportedProgram) -> Iterator[KernelChoice]:
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _KERNELS:
            continue
        shape, kernel, reason = _KERNELS[node.target](node)
        yield KernelChoice(node.name, _module(node), shape, kernel, reason)


def _attention(node: Node) -> tuple[str, str, str]:
    (_, N, T, H), (_, K, S, _) = (a.meta["val"].shape for a in node.args[:2])
    window = node.args[5] if node.target == SDPA_DECODE else node.args[6]
    shape = f"N={N} K={K} H={H} T={_size(T)} S={S}" + (f" window={window}" if window else "")
    if node.target == SDPA_DECODE:
        return shape, "sdpa_decode", "one query: split over the keys, of which the length on the device says how many"
    if window is None:
        return shape, "sdpa_prefill", "several queries: tiles of the keys that they see, position p in slot p"
    return shape, "sdpa_prefill, positions read", "several queries of a ring: its slots' positions say what is seen"


def _quantized(node: Node) -> tuple[str, str, str]:
    x, codes, scale = (a.meta["val"] for a in node.args[:3])
    K = x.shape[-1]
    M = x.numel() // K
    shape = f"M={_size(M)} N={codes.shape[0]} K={K} int{node.args[4]} group={K // scale.shape[-1]}"
    if isinstance(M, int) and M == 1:
        return shape, "matvec", "one row: codes are multiplied as they are read, bound by memory"
    return shape, "dequantize + GEMM", "several rows: bound by arithmetic, which the dense product is best at"


def _experts(node: Node) -> tuple[str, str, str]:
    codes, slots = node.args[1].meta["val"], node.args[6].meta["val"].shape[0]
    E, N = codes.shape[:2]
    shape = f"k={slots} of E={E} N={N} K={node.args[0].meta['val'].shape[-1]} int{node.args[4]}"
    return shape, "matvec of chosen experts", "one token: only its experts' codes are read"


def _dequantized(node: Node) -> tuple[str, str, str]:
    E, N, K = node.meta["val"].shape
    return f"E={E} N={N} K={K} int{node.args[3]}", "dequantize", "several tokens go to any of the experts"


def _linear(node: Node) -> tuple[str, str, str]:
    x, w = (a.meta["val"] for a in node.args[:2])
    M = x.numel() // x.shape[-1]
    shape = f"M={_size(M)} N={w.shape[0]} K={w.shape[1]}"
    return shape, "GEMV" if isinstance(M, int) and M == 1 else "GEMM", "dense: the compiler's own choice"


def _stacked(node: Node) -> tuple[str, str, str]:
    x, w = (a.meta["val"] for a in node.args[1])
    E, N, K = w.shape[-3:]
    if x.dim() == 2:
        return f"k={E} N={N} K={K}", "GEMV of chosen experts", "one token: only its experts are read"
    return f"M={_size(x.shape[1])} E={E} N={N} K={K}", "GEMM of all experts", "programs have no grouped product"


_KERNELS = {
    SDPA_PREFILL: _attention,
    SDPA_DECODE: _attention,
    LINEAR: _quantized,
    EXPERTS: _experts,
    DEQUANTIZE: _dequantized,
    aten.linear.default: _linear,
    aten.einsum.default: _stacked,
}


def _size(n: int | torch.SymInt) -> str:
    return str(n) if isinstance(n, int) else "2..C"


def _module(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def _layer(node: Node) -> int:
    """Number of the decoder layer that a node came from."""
    parts = _module(node).split(".")
    return int(parts[parts.index("layers") + 1])
