"""What a parity run is to check: checkpoints with our models, and quantized candidates and programs made from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from gemma4_impl.checkpoint import check_fits, is_quantized, open_checkpoint
from gemma4_impl.config import VARIANTS
from gemma4_impl.errors import one_line
from gemma4_impl.export.folder import BACKENDS, open_folder
from gemma4_impl.model.decoder import Gemma4
from gemma4_impl.quant.recipe import RECIPES, load_recipe
from parity import PATHS
from parity import images as with_images
from parity.candidate import RAGGED
from parity.engine import CANDIDATES
from parity.exported import Program
from parity.quantized import KINDS, Quantized, Target, check_same_architecture
from reference.tiny import TINY, aligned, make_tiny

_DEMONSTRATED = (("E2B", "quantized:default", "torchao"), ("26B-A4B", "gguf:Q4_K_M", "gguf"))
"""What is checked beside our model on the tiny checkpoints if nothing is asked for, where the package is installed."""


_PROGRAM = "pte"


@dataclass(frozen=True)
class Targets:
    plain: dict[str, Path]
    """Label -> folder of the checkpoints that our models are checked on as they are."""
    quantized: list[Target]
    programs: list[Program] = field(default_factory=list)


def targets(candidates: Sequence[str], checkpoints: Mapping[str, Path], folder: Path) -> Targets:
    """`candidates` are `torch`, `jax`, `quantized:DIR`, `quantized:RECIPE`, `gguf:FILE`, `gguf:TYPE`, `pte:DIR` and
    `pte:BACKEND`; what is only named by a recipe, type or backend is made in `folder`, of `checkpoints` (label ->
    folder) or, if there are none, of tiny ones. A program's source is that checkpoint or quantized candidate whose
    fingerprint its manifest has.

    Raises ValueError for one that is unknown or fits no checkpoint, and what opening the files raises."""
    parsed = [_parse(value) for value in candidates if value not in CANDIDATES]
    ours = not candidates or len(parsed) < len(candidates)
    exported = [name for kind, name in parsed if kind == _PROGRAM]
    parsed = [(kind, name) for kind, name in parsed if kind != _PROGRAM]
    plain = dict(checkpoints) if ours else {}
    found = []
    if not checkpoints:
        if ours:
            plain = {f"tiny {v}": make_tiny(v, folder / v) for v in VARIANTS}
        shown = [] if candidates else [(v, value) for v, value, package in _DEMONSTRATED if find_spec(package)]
        wanted = [(v, *_parse(value)) for v, value in shown]
        wanted += [(v, kind, name) for v in VARIANTS for kind, name in parsed if not Path(name).exists()]
        found += [_tiny(variant, kind, name, folder) for variant, kind, name in wanted]
    for kind, name in parsed:
        if Path(name).exists():
            found.append(_on_disk(kind, Path(name), checkpoints))
        elif checkpoints:
            found += [_made(label, path, kind, name, folder) for label, path in checkpoints.items()]
    for target in found:
        check(target)
    return Targets(
        plain, found, [program for name in exported for program in _programs(name, checkpoints, found, folder)]
    )


def implementations(
    candidates: Sequence[str], reference: str, device: torch.device, everything: bool
) -> tuple[tuple[str, ...], str | None]:
    """Those of our models that `candidates` name, by default PyTorch's, or with `everything` all that can run; and why
    JAX's is left out.

    Raises ValueError if a model that is asked for, or the reference, cannot run on `device`, or they are the same."""
    wanted = tuple(name for name in CANDIDATES if name in candidates)
    if not wanted and not candidates:
        wanted = CANDIDATES if everything and reference == "hf" else CANDIDATES[:1]
    if reference in wanted:
        raise ValueError(f"--candidate {reference} --reference {reference}: a model proves nothing against itself")
    if "jax" not in (*wanted, reference):
        return wanted, None
    try:
        from gemma4_impl.nnx.command import find_devices

        find_devices(str(device))
    except (ImportError, ValueError) as error:
        if "jax" in (*candidates, reference):
            raise ValueError(one_line(error)) from None
        return tuple(name for name in wanted if name != "jax"), one_line(error)
    return wanted, None


def default_paths(
    implementations: Sequence[str], paths: Sequence[str]
) -> tuple[dict[str, Sequence[str]], dict[str, Sequence[str]]]:
    """The cache paths of each of our models if no candidate is asked for, without and with images; of `paths` if some
    are. JAX compiles for each of them, so that it goes through fewer."""
    text = {"torch": PATHS, "jax": ("full", "chunked", "generate")}
    shown = {"torch": with_images.PATHS, "jax": ("full", "generate")}
    if paths:
        text = dict.fromkeys(text, paths)
        shown = {name: [path for path in own if path in paths] for name, own in shown.items()}
    return tuple({name: own[name] for name in implementations if own[name]} for own in (text, shown))


def check(target: Target) -> None:
    """Raises what is wrong with the candidate and can be known before anything runs."""
    weights = target.candidate.weights()
    with torch.device("meta"):
        check_fits(Gemma4(weights.config), weights)
    target.candidate.source()
    if target.original is not None:
        check_same_architecture(target.original, target.candidate)


def _parse(value: str) -> tuple[str, str]:
    kind, _, name = value.partition(":")
    if kind not in (*KINDS, _PROGRAM) or not name:
        raise ValueError(f"--candidate {value!r}: expected torch, jax, quantized:DIR, gguf:FILE or pte:DIR")
    return kind, name


def _on_disk(kind: str, path: Path, checkpoints: Mapping[str, Path]) -> Target:
    if kind == "quantized" and not (path.is_dir() and is_quantized(path)):
        raise ValueError(
            f"--candidate quantized:{path}: config.json names no quantization; `gemma4 quantize` makes one"
        )
    if kind == "gguf" and not path.is_file():
        raise ValueError(f"--candidate gguf:{path}: is no file")
    if len(checkpoints) > 1:
        raise ValueError(f"--candidate {kind}:{path}: give one CHECKPOINT alone, the one that it was made from")
    name = path.resolve().stem if kind == "gguf" else path.resolve().name
    for label, original in checkpoints.items():
        return Target(label, Quantized(kind, path, f"{kind}:{name}"), original)
    return Target(name, Quantized(kind, path, kind), None)


def _made(label: str, original: Path, kind: str, name: str, folder: Path) -> Target:
    if kind == "gguf":
        raise FileNotFoundError(f"--candidate gguf:{name}: no such file; llama.cpp's convert_hf_to_gguf.py makes one")
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise FileNotFoundError(f"--candidate quantized:{name}: no such folder, nor a recipe; there are {known}")
    from gemma4_impl.quant.save import quantize_checkpoint

    out = folder / f"{len(list(folder.iterdir()))} {name}"
    quantize_checkpoint(original, out, load_recipe(name))
    return Target(label, Quantized(kind, out, f"{kind}:{name}"), original)


def _tiny(variant: str, kind: str, name: str, folder: Path) -> Target:
    """A tiny checkpoint, in bfloat16 as the released ones are, whose rows can be quantized, and what is made of it."""
    at = folder / f"{variant} {kind} {name}"
    if kind == "quantized":
        original = make_tiny(variant, at, dtype="bfloat16", overrides=aligned(variant, 32))
        return _made(f"tiny {variant}/32", original, kind, name, folder)
    from reference.tiny_gguf import DRAWN, TYPES, make_tiny_gguf

    if name not in (*TYPES, "Q4_K_M"):
        known = ", ".join(TYPES)
        raise FileNotFoundError(f"--candidate gguf:{name}: no such file, nor a type; there are Q4_K_M, {known}")
    overrides = aligned(variant, 256)
    if not TINY[variant].get("num_kv_shared_layers"):
        # Rows this long take their time; the second half of the layers repeats the first.
        types = TINY[variant]["layer_types"]
        overrides |= {"layer_types": types[len(types) // 2 :], "num_hidden_layers": len(types) // 2}
    original = make_tiny(variant, at, dtype="bfloat16", overrides=overrides)
    file = make_tiny_gguf(original, folder / f"{variant} {name}.gguf", name)
    # gguf-py cannot quantize to some types; a file of those holds weights of its own.
    own = name in (*DRAWN, "Q4_K_M")
    return Target(f"tiny {variant}/256", Quantized(kind, file, f"{kind}:{name}"), None if own else original)


def _programs(name: str, checkpoints: Mapping[str, Path], quantized: Sequence[Target], folder: Path) -> list[Program]:
    """The exported folder `name`, or those that a backend of this name makes of each checkpoint."""
    at = Path(name)
    if not at.exists():
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise FileNotFoundError(f"--candidate pte:{name}: no such folder, nor a backend; there are {known}")
        sources = checkpoints or {f"tiny {v}": make_tiny(v, folder / f"{v} {name}") for v in VARIANTS}
        return [_exported(label, path, name, folder) for label, path in sources.items()]
    manifest = open_folder(at).manifest
    sources = [Program(label, "", at, path) for label, path in checkpoints.items()]
    sources += [Program(t.label, "", at, t.candidate.path, t.original) for t in quantized]
    made_from, known = manifest.source["name"], manifest.source["fingerprint"]
    if not sources:
        raise ValueError(f"--candidate pte:{at}: give the CHECKPOINT that it was made from, {made_from}")
    prints = {source.source: open_checkpoint(source.source).fingerprint() for source in sources}
    for source in sources:
        if prints[source.source] == known:
            return [replace(source, candidate=f"pte:{at.resolve().name}")]
    others = ", ".join(f"{path} is {found[:12]}" for path, found in prints.items())
    raise ValueError(
        f"--candidate pte:{at}: was made from {made_from}, whose fingerprint is {known[:12]}, but {others}"
    )


def _exported(label: str, source: Path, backend: str, folder: Path) -> Program:
    from gemma4_impl.export.front import export

    out = folder / f"{len(list(folder.iterdir()))} {backend}"
    # So small a chunk that the rings of the sliding layers wrap.
    export(source, out, backend, max_prefill_chunk=max(RAGGED), taps=True)
    return Program(label, f"pte:{backend}", out, source)
