"""Faults in the graph of an MLX program: what its nodes say, after they were read and before they are run."""

from dataclasses import replace
from typing import Any

from parity.faults.export_fault import ExportFault


def nodes(graph: Any, kind: str) -> list[Any]:
    """The nodes of this kind, in the order in which they run."""
    return [node for node in graph.chains[graph.main] if node.kind == kind]


def rope_dims_halved(graph: Any) -> None:
    for node in nodes(graph, "RopeNode"):
        if node.fields["freqs"] is None:
            node.fields["dims"] //= 2


def rope_bases_swapped(graph: Any) -> None:
    ropes = nodes(graph, "RopeNode")
    one, other = dict.fromkeys(node.fields["base"] for node in ropes)
    for node in ropes:
        node.fields["base"] = other if node.fields["base"] == one else one


def rope_interleaved(graph: Any) -> None:
    for node in nodes(graph, "RopeNode"):
        node.fields["traditional"] = True


def rope_periods_lost(graph: Any) -> None:
    for node in nodes(graph, "RopeNode"):
        node.fields["freqs"] = None


def keys_rotated_from_zero(graph: Any) -> None:
    nodes(graph, "RopeNode")[1].fields["offset"] = 0


def ring_one_short(graph: Any) -> None:
    """Both the slot where a chunk begins and the room that is left before the ring's end."""
    starts = nodes(graph, "ModIntNode")
    begun, slots = {node.fields["out"] for node in starts}, starts[0].fields["b"]
    for node in starts:
        node.fields["b"] = slots - 1
    for node in nodes(graph, "SubtractIntNode"):
        if node.fields["a"] == slots and node.fields["b"] in begun:
            node.fields["a"] = slots - 1


def window_forgotten(graph: Any) -> None:
    """The last of the mask's three conditions, which the first two are anded with."""
    last = nodes(graph, "BitwiseAndNode")[1]
    last.fields["b"] = last.fields["a"]


def future_visible(graph: Any) -> None:
    nodes(graph, "SdpaNode")[1].fields["causal"] = False


def keys_and_values_swapped(graph: Any) -> None:
    """In the cache of the first layer: each is written where the other belongs."""
    sdpa = nodes(graph, "SdpaNode")[0].fields
    sdpa["k"], sdpa["v"] = sdpa["v"], sdpa["k"]


def caches_overlap(graph: Any) -> None:
    """The first two full layers write into one buffer, as if its memory had been planned twice."""
    first = graph.slots("mutable buffer").start
    for node in graph.chains[graph.main]:
        for name, slot in node.fields.items():
            if getattr(slot, "index", None) == first + 4 and type(slot).__name__ == "Tid":
                node.fields[name] = replace(slot, index=first + 2)


def wrong_producer(graph: Any) -> None:
    """The shared layer's keys and values are sliced from another layer's caches of the same type."""
    first = graph.slots("mutable buffer").start
    for sliced, buffer in zip(nodes(graph, "SliceNode")[-2:], (first + 2, first + 3), strict=True):
        sliced.fields["x"] = replace(sliced.fields["x"], index=buffer)


def softcap_missing(graph: Any) -> None:
    """The last tanh is left out: x / cap * cap remains."""
    chain = graph.chains[graph.main]
    at = max(i for i, node in enumerate(chain) if node.kind == "TanhNode")
    chain[at] = replace(chain[at], kind="IdCopyNode")


def gelu_exact(graph: Any) -> None:
    for node in nodes(graph, "GeluNode"):
        node.fields["approximate"] = "none"


GRAPH = (
    ExportFault(
        "rope_dims",
        "half of each head is rotated",
        "graph",
        rope_dims_halved,
        "layers.0.self_attn.q",
    ),
    ExportFault(
        "rope_bases_swapped",
        "sliding and full layers rotate with each other's base",
        "graph",
        rope_bases_swapped,
        "layers.0.self_attn.q",
    ),
    ExportFault(
        "rope_interleaved",
        "neighbours are rotated as pairs, not the halves of a head",
        "graph",
        rope_interleaved,
        "layers.0.self_attn.q",
    ),
    ExportFault(
        "rope_periods_lost",
        "the full layers' own frequencies are dropped, and every pair rotates",
        "graph",
        rope_periods_lost,
        "layers.1.self_attn.q",
    ),
    ExportFault(
        "keys_rotated_from_zero",
        "a chunk's keys are rotated as if it were the first",
        "graph",
        keys_rotated_from_zero,
        "layers.0.self_attn.k",
    ),
    ExportFault(
        "ring_one_short",
        "the ring wraps one slot too early",
        "graph",
        ring_one_short,
        "layers.0.self_attn.out",
    ),
    ExportFault(
        "mask_left_causal",
        "the sliding layers' mask hides the future and nothing else",
        "graph",
        window_forgotten,
        "layers.0.self_attn.out",
    ),
    ExportFault(
        "future_visible",
        "a full layer's attention is not causal inside of a chunk",
        "graph",
        future_visible,
        "layers.1.self_attn.out",
    ),
    ExportFault(
        "keys_and_values_swapped",
        "keys are kept where values belong",
        "graph",
        keys_and_values_swapped,
        "layers.0.self_attn.out",
    ),
    ExportFault(
        "caches_overlap",
        "two layers write their keys into one buffer",
        "graph",
        caches_overlap,
        "layers.1.self_attn.out",
    ),
    ExportFault(
        "wrong_producer",
        "the KV-shared layer reads the caches of the full layer before its own",
        "graph",
        wrong_producer,
        "layers.3.self_attn.out",
    ),
    ExportFault(
        "softcap_missing",
        "the logits are not capped",
        "graph",
        softcap_missing,
        "logits",
    ),
    ExportFault(
        "gelu_exact",
        "GELU is computed with erf",
        "graph",
        gelu_exact,
        "layers.0.mlp",
    ),
)
