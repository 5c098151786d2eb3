"""Faults in what a program's manifest says, and in the loop that feeds it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from parity.candidate_pte import ProgramCandidate
from parity.faults.export_fault import QUANTIZED, XNNPACK, ExportFault, wrap
from parity.faults.export_graph import nodes


def position_off_after_a_chunk(candidate: ProgramCandidate) -> None:
    """The position of every call but the first is one too many."""

    def run(original: Any, inputs: Any, *rest: Any) -> Any:
        tokens, position = inputs
        return original([tokens, position + (position > 0).astype(position.dtype)], *rest)

    machine = candidate.session._machine
    original = machine.run
    machine.run = lambda inputs, *rest: run(original, inputs, *rest)


def last_token_alone(candidate: ProgramCandidate) -> None:
    """Of a chunk, `decode` is called with the last token: the method for one token where prefill belongs."""

    def forward(original: Any, tokens: Tensor, position: int, **options: Any) -> Any:
        candidate.session.length = position + tokens.shape[1] - 1
        return original(tokens[:, -1:], candidate.session.length, **options)

    wrap(candidate, "forward", forward)


def never_reset(candidate: ProgramCandidate) -> None:
    """A sequence was run before, and the next one goes on from it."""
    candidate.capture(list(range(110, 130)), "chunked")
    begun = candidate.session.length

    def forward(original: Any, tokens: Tensor, position: int, **options: Any) -> Any:
        return original(tokens, begun + position, **options)

    wrap(candidate, "reset", lambda original: None)
    wrap(candidate, "forward", forward)


def two_programs_on_one_state(candidate: ProgramCandidate) -> None:
    """Another sequence runs through the same caches in between."""

    def forward(original: Any, tokens: Tensor, position: int, **options: Any) -> Any:
        found = original(tokens, position, **options)
        candidate.session.length = position
        original(tokens.flip(1), position)
        return found

    wrap(candidate, "forward", forward)


def taps_of_the_call_before(candidate: ProgramCandidate) -> None:
    before: dict[str, Tensor] = {}

    def forward(original: Any, tokens: Tensor, position: int, taps: bool = False) -> Any:
        logits, found = original(tokens, position, taps=True)
        stale = {name: value for name, value in before.items() if value.shape == found[name].shape}
        before.update(found)
        return logits, found | stale

    wrap(candidate, "forward", forward)


def sampled(candidate: ProgramCandidate) -> None:
    def forward(original: Any, tokens: Tensor, position: int, **options: Any) -> Any:
        logits, found = original(tokens, position, **options)
        return logits.argmax(-1, keepdim=True), found

    wrap(candidate, "forward", forward)


def first_tokens_logits(candidate: ProgramCandidate) -> None:
    """The logits of a chunk's first token instead of its last."""

    def forward(original: Any, tokens: Tensor, position: int, **options: Any) -> Any:
        logits, _ = original(tokens[:, :1], position, **options)
        candidate.session.length = position
        return logits, original(tokens, position, **options)[1]

    wrap(candidate, "forward", forward)


def scale_dropped(candidate: ProgramCandidate) -> None:
    """Codes and zeros as they are, scales of 1."""
    product = nodes(candidate.session._machine.graph, "QuantizedMatmulNode")[0]
    _change(candidate, product.fields["scales"], lambda scale: scale * 0 + 1)


def groups_shifted(candidate: ProgramCandidate) -> None:
    """A row's one scale is made one for each of its groups, in the wrong order: the table of rows over and over."""
    import mlx.core as mx

    graph = candidate.session._machine.graph
    scales = nodes(graph, "DequantizeNode")[0].fields["scales"]
    # Those of the rows that are looked up.
    table = next(node.fields["x"] for node in nodes(graph, "TakeNode") if node.fields["out"] == scales)
    _change(candidate, table, lambda scale: mx.concatenate([scale[:, 0]] * scale.shape[1]).reshape(scale.shape))


def _change(candidate: ProgramCandidate, slot: Any, change: Callable[[Any], Any]) -> None:
    constants = candidate.session._machine._constants
    constants[slot.index] = change(constants[slot.index])


def unshared_caches(candidate: ProgramCandidate) -> None:
    """Each method is loaded from a program of its own: what prefill writes decode does not see."""
    from executorch.runtime import Runtime

    session, kept = candidate.session, []

    def reset(original: Any) -> None:
        original()
        kept[:] = [Runtime.get().load_program(session.path)]
        session._methods["decode"] = kept[0].load_method("decode")

    wrap(candidate, "reset", reset)


def _set(section: str, name: str, value: Any):
    def inject(manifest: dict[str, Any]) -> None:
        manifest[section][name] = value

    return inject


def ring_said_shorter(manifest: dict[str, Any]) -> None:
    manifest["caches"]["model.layers.0.self_attn.k_cache"]["shape"][2] -= 1


def larger_chunk(manifest: dict[str, Any]) -> None:
    """In the constants and in the method's input."""
    manifest["constants"]["get_max_prefill_chunk"] = 24
    for value in manifest["methods"]["forward"]["inputs"]:
        if value["name"] == "tokens":
            value["shape"][1]["max"] = 24


def methods_exchanged(manifest: dict[str, Any]) -> None:
    methods = manifest["methods"]
    methods["prefill"], methods["decode"] = methods["decode"], methods["prefill"]


SESSION = (
    ExportFault(
        "position_off_after_a_chunk",
        "positions are one too many from the second call on",
        "session",
        position_off_after_a_chunk,
        "layers.0.self_attn.q",
    ),
    ExportFault(
        "two_programs_on_one_state",
        "another sequence runs through the same caches",
        "session",
        two_programs_on_one_state,
        "layers.0.self_attn.out",
    ),
    ExportFault(
        "stale_taps",
        "taps are those of the call before",
        "session",
        taps_of_the_call_before,
        "embed",
        path="decode",
    ),
    ExportFault(
        "sampler_left_in",
        "the program returns a token, not logits",
        "session",
        sampled,
        "not the logits of 512 tokens: is a sampler left in it?",
    ),
    ExportFault(
        "first_tokens_logits",
        "a chunk's logits are its first token's",
        "session",
        first_tokens_logits,
        "logits",
    ),
    ExportFault(
        "scale_dropped",
        "a quantized product leaves the scale out",
        "session",
        scale_dropped,
        "layers.0.self_attn.q",
        QUANTIZED,
    ),
    ExportFault(
        "embedding_regrouped_wrongly",
        "a row's groups take the scales of other rows",
        "session",
        groups_shifted,
        "embed",
        QUANTIZED,
    ),
    ExportFault(
        "stale_state_after_reset",
        "the state of the sequence before is still there",
        "session",
        never_reset,
        "layers.0.self_attn.q",
    ),
    ExportFault(
        "wrong_method",
        "decode is called with the last token of a chunk",
        "session",
        last_token_alone,
        "layers.0.self_attn.out",
        XNNPACK,
    ),
    ExportFault(
        "unshared_caches",
        "prefill and decode have caches of their own",
        "session",
        unshared_caches,
        "layers.0.self_attn.out",
        XNNPACK,
        "generate",
    ),
    ExportFault(
        "chunk_too_long",
        "the manifest allows longer chunks than the program takes",
        "manifest",
        larger_chunk,
        "forward's tokens is int64 [1, 12], but the manifest says int64 [1, 24]",
    ),
    ExportFault(
        "ring_said_shorter",
        "a sliding layer's cache has no room for a window and a chunk",
        "manifest",
        ring_said_shorter,
        "layer 0 (sliding_attention) needs 1 heads, 18 slots and heads of 16",
    ),
    ExportFault(
        "context_too_long",
        "the manifest says that the caches hold more than they do",
        "manifest",
        _set("constants", "get_max_seq_len", 128),
        "get_max_seq_len is 64, but the manifest says 128",
    ),
    ExportFault(
        "other_stop_tokens",
        "the manifest's ids that end a reply are not the program's",
        "manifest",
        _set("constants", "get_eos_ids", [1]),
        "get_eos_ids is [1, 106], but the manifest says [1]",
    ),
    ExportFault(
        "methods_exchanged",
        "prefill and decode have each other's names",
        "manifest",
        methods_exchanged,
        "methods.prefill takes up to 1 tokens, but constants.get_max_prefill_chunk is 12",
        XNNPACK,
    ),
)
