"""`gemma4 gguf inspect`: what a GGUF file holds, and what each tensor of it is to Gemma 4."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma4_impl.cli import cli

if TYPE_CHECKING:
    from gemma4_impl.config import TextConfig
    from gemma4_impl.gguf.reader import GGUFFile


@cli.group("gguf")
def gguf_group() -> None:
    """GGUF files, as llama.cpp has them."""


@gguf_group.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead.")
def inspect_command(file: Path, as_json: bool) -> None:
    """Show the tensors in FILE with their types, shapes and sizes, and what each is called in a Gemma 4 checkpoint.

    Also the sums by type, the bits a weight takes, and the model that the metadata describe. Exit code 2 if it is no
    Gemma 4 that could be used, and no file of its vision tower (mmproj) either.
    """
    from gemma4_impl.gguf.reader import GGUFFile

    with GGUFFile(file) as gguf:
        found = inspect(gguf)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    if found["problem"]:
        raise ValueError(found["problem"])


def inspect(file: "GGUFFile") -> dict[str, Any]:
    """What the command prints, JSON-ready. `problem` says why the file cannot be used as a model, None if it can."""
    import torch

    from gemma4_impl.checkpoint import check_fits
    from gemma4_impl.gguf.checkpoint import GGUFCheckpoint
    from gemma4_impl.gguf.config import towers_in
    from gemma4_impl.gguf.mmproj import is_vision_tower
    from gemma4_impl.model.decoder import Gemma4

    metadata = file.metadata
    config, problem = None, None
    tower = towers_in(file)
    if not tower:
        try:
            checkpoint = GGUFCheckpoint(file.path)
            config = checkpoint.config
            with torch.device("meta"):
                check_fits(Gemma4(config), checkpoint)
        except ValueError as error:
            problem = str(error)
    is_vision = tower is not None and is_vision_tower(file)
    tensors = [_tensor(info, not tower, is_vision) for info in file.tensors.values()]
    weights, nbytes = sum(t["weights"] for t in tensors), sum(t["bytes"] for t in tensors)
    return {
        "files": [str(path) for path in file.paths],
        "architecture": metadata.get("general.architecture"),
        "name": metadata.get("general.name"),
        "holds": tower or "text model",
        "problem": problem,
        "config": None if config is None else _summary(config),
        "tokens": _length(metadata.get("tokenizer.ggml.tokens")),
        "chat_template": "tokenizer.chat_template" in metadata,
        "tensors": tensors,
        "types": _by_type(tensors),
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": round(8 * nbytes / weights, 3) if weights else None,
    }


def _tensor(info: Any, is_text: bool, is_vision: bool) -> dict[str, Any]:
    from gemma4_impl import names

    held = list(names.held_by_gguf(info.name)) if is_text else []
    if is_vision and (ours := names.tower_from_gguf(info.name)):
        held = [ours]
    note = "" if held else "not used"
    if is_text and not held:
        note = "(which dims rotate)" if info.name == names.GGUF_ROPE_FREQS else "unknown"
    sizes = {"weights": math.prod(info.shape), "bytes": info.nbytes}
    return {"name": info.name, "type": info.type.name, "shape": list(info.shape), **sizes, "is": held, "note": note}


def _by_type(tensors: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for tensor in sorted(tensors, key=lambda t: t["type"]):
        total = out.setdefault(tensor["type"], {"tensors": 0, "weights": 0, "bytes": 0})
        total["tensors"] += 1
        for key in ("weights", "bytes"):
            total[key] += tensor[key]
    for total in out.values():
        total["bits_per_weight"] = round(8 * total["bytes"] / total["weights"], 3)
    return dict(sorted(out.items(), key=lambda item: -item[1]["bytes"]))


def _summary(config: "TextConfig") -> dict[str, Any]:
    from gemma4_impl.config import FULL, VARIANTS

    same = ("num_hidden_layers", "hidden_size", "num_attention_heads", "enable_moe_block", "num_kv_shared_layers")
    like = [name for name, v in VARIANTS.items() if all(getattr(v, key) == getattr(config, key) for key in same)]
    keys = [
        *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("num_global_key_value_heads", "head_dim", "global_head_dim", "sliding_window", "num_kv_shared_layers"),
        *("attention_k_eq_v", "use_double_wide_mlp", "hidden_size_per_layer_input", "num_experts", "top_k_experts"),
        *("moe_intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "eos_token_id"),
    ]
    full = [i for i, kind in enumerate(config.layer_types) if kind == FULL]
    return {"variant": like[0] if like else None, **{key: getattr(config, key) for key in keys}, "full_layers": full}


def _length(value: Any) -> int | None:
    return len(value) if value is not None and hasattr(value, "__len__") else None


def _print(found: dict[str, Any]) -> None:
    rows = [("tensor", "type", "shape", "size", "is")]
    for t in found["tensors"]:
        shape = " x ".join(map(str, t["shape"]))
        rows.append((_shown(t["name"]), t["type"], shape, _size(t["bytes"]), ", ".join(t["is"]) or t["note"]))
    click.echo(_columns(rows, right={3}))
    click.echo()
    rows = [("type", "tensors", "weights", "size", "bits a weight")]
    total = {"tensors": len(found["tensors"]), **{k: found[k] for k in ("weights", "bytes", "bits_per_weight")}}
    for name, sums in {**found["types"], "all": total}.items():
        bits = f"{sums['bits_per_weight'] or 0:.2f}"
        rows.append((name, str(sums["tensors"]), f"{sums['weights']:,}", _size(sums["bytes"]), bits))
    click.echo(_columns(rows, right={1, 2, 3, 4}))
    click.echo()
    for file in found["files"]:
        click.echo(file)
    name = f" ({_shown(found['name'])})" if found["name"] else ""
    click.echo(f"{_shown(found['architecture'])}{name}: {found['holds']}")
    if found["config"] is not None:
        click.echo("\n".join(_describe(found["config"], found)))


def _shown(text: Any) -> str:
    """What a file says of itself, without anything that a terminal would obey."""
    return text if isinstance(text, str) and text.isprintable() else repr(text)


def _columns(rows: list[tuple[str, ...]], right: set[int]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = (
        [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _describe(c: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The model in a few lines."""
    heads = f"{c['num_attention_heads']} heads of {c['head_dim']}, on full layers of {c['global_head_dim']}"
    kv = f"{c['num_key_value_heads']} for keys and values"
    if c["num_global_key_value_heads"]:
        kv += f", on full layers {c['num_global_key_value_heads']}"
    if c["attention_k_eq_v"]:
        kv += ", whose values are their keys"
    layers = f"{c['num_hidden_layers']} layers, {len(c['full_layers'])} of them full"
    if c["num_kv_shared_layers"]:
        layers += f", the last {c['num_kv_shared_layers']} with others' keys and values"
    widths = f"hidden size {c['hidden_size']}, MLP {c['intermediate_size']}"
    if c["use_double_wide_mlp"]:
        widths += ", double where keys are shared"
    if c["num_experts"]:
        widths += f", {c['num_experts']} experts of {c['moe_intermediate_size']}, {c['top_k_experts']} a token"
    if c["hidden_size_per_layer_input"]:
        widths += f", per-layer inputs of {c['hidden_size_per_layer_input']}"
    tokens = "no tokenizer" if found["tokens"] is None else f"tokenizer of {found['tokens']}"
    template = "chat template" if found["chat_template"] else "no chat template"
    head = "tied head" if c["tie_word_embeddings"] else "untied head"
    stops = ", ".join(map(str, c["eos_token_id"]))
    return [
        f"  the size of {c['variant']}" if c["variant"] else "  no released size",
        f"  {layers}; window {c['sliding_window']}, context {c['max_position_embeddings']}",
        f"  {heads}; {kv}",
        f"  {widths}",
        f"  vocabulary of {c['vocab_size']}, {head}; {tokens}, {template}, stops at {stops}",
    ]


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
