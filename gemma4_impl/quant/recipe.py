"""Quantization recipes: which tensor becomes what, by rules on canonical names; the first that matches decides."""

import dataclasses
import fnmatch
import functools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from gemma4_impl.config import TextConfig

METHODS = ("min_max", "mse", "hqq")
_QUANTIZABLE = re.compile(
    r"embed_tokens(_per_layer)?\.weight"
    r"|(lm_head|per_layer_model_projection)\.weight"
    r"|layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|per_layer_input_gate|per_layer_projection)\.weight"
    r"|layers\.\d+\.experts\.(gate_up|down)_proj"
)
_LAYER = re.compile(r"layers\.(\d+)\.")
_LAYERS_TERM = re.compile(r"edge|-?\d{1,6}|(-?\d{1,6})?:(-?\d{1,6})?(:([1-9]\d{0,5})?)?")
_MAX_FILE_BYTES = 1 << 20
_MAX_PATTERN = 200


class RecipeError(ValueError):
    """A recipe that is malformed or does not fit a model; the message names the file and the rule, or the tensor."""


@dataclass(frozen=True)
class QuantConfig:
    """How a tensor is quantized. Raises ValueError for a value out of its range."""

    bits: int
    """4 or 8."""
    group_size: int | None
    """How many weights along a row share a scale; None: all of them (per axis)."""
    symmetric: bool = True
    """A scale alone; False: a scale and a zero, a float that is added."""
    method: str = "min_max"
    """"min_max": the codes span the group's weights; "mse": least squared error; "hqq": least l_p norm of the error,
    p < 1, for which a zero is needed (`hqq.py`)."""

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or self.bits not in (4, 8):
            raise ValueError(f"bits = {short(self.bits)}: must be 4 or 8")
        size = self.group_size
        if size is not None and not (_is_int(size) and size >= 2 and size % 2 == 0):
            raise ValueError(f"group_size = {short(size)}: must be an even number, or None for a scale a row")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric = {short(self.symmetric)}: must be true or false")
        if self.method not in METHODS:
            raise ValueError(f"method = {short(self.method)}: must be one of {', '.join(METHODS)}")
        if self.method == "hqq" and self.symmetric:
            raise ValueError("method = 'hqq' optimises a scale and a zero: it needs symmetric = false")

    def nbytes(self, shape: Sequence[int], scale_bytes: int = 2) -> int:
        """Bytes of the codes, scales and zeros of a tensor [..., N, K]."""
        weights = math.prod(shape)
        groups = weights // (self.group_size or shape[-1])
        return weights * self.bits // 8 + groups * scale_bytes * (1 if self.symmetric else 2)

    def __str__(self) -> str:
        group = "axis" if self.group_size is None else f"group {self.group_size}"
        return f"int{self.bits} {'' if self.symmetric else 'a'}symmetric {self.method} {group}"


@dataclass(frozen=True)
class QuantRule:
    """What becomes of the tensors whose canonical name matches. Raises ValueError for a malformed pattern or range."""

    pattern: str
    """A glob (`*`, `?`, `[kv]`) for the whole name, as for taps; `*` spans dots: "*.v_proj.weight"."""
    config: QuantConfig | None
    """None keeps the tensor in the checkpoint's dtype."""
    layers: str | None = None
    """Only in these decoder layers: indices and Python slices, negative ones counted from the end, and "edge" for the
    first and the last eighth (rounded up), with commas between: "0, 4:8, -1"."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not 0 < len(self.pattern) <= _MAX_PATTERN:
            raise ValueError(f"pattern = {short(self.pattern)}: must be a glob of at most {_MAX_PATTERN} characters")
        if self.config is not None and not isinstance(self.config, QuantConfig):
            raise ValueError(f"config = {short(self.config)}: must be a QuantConfig, or None to keep the tensor")
        if self.config is not None and self.config.bits == 8 and not self.config.symmetric:
            raise ValueError("8 bits are symmetric in a checkpoint: torchao's int8 tensors add no zero")
        if self.layers is not None:
            terms = (
                self.layers.split(",") if isinstance(self.layers, str) and len(self.layers) <= _MAX_PATTERN else [""]
            )
            if not all(_LAYERS_TERM.fullmatch(term.strip()) for term in terms):
                raise ValueError(
                    f"layers = {short(self.layers)}: expected indices, slices or edge: '0, 4:8, -1', 'edge'"
                )

    def matches(self, name: str, depth: int) -> bool:
        """Whether the rule is for `name` in a model of `depth` layers. Raises ValueError if it has no such layers."""
        if not fnmatch.fnmatchcase(name, self.pattern):
            return False
        if self.layers is None:
            return True
        layer = _LAYER.match(name)
        return layer is not None and int(layer[1]) in _layers(self.layers, depth)


@functools.lru_cache(maxsize=256)
def _layers(spec: str, depth: int) -> frozenset[int]:
    chosen: set[int] = set()
    for term in map(str.strip, spec.split(",")):
        if term == "edge":
            eighth = math.ceil(depth / 8)
            chosen |= {*range(eighth), *range(depth - eighth, depth)}
        elif ":" in term:
            chosen |= set(range(depth)[slice(*(int(part) if part else None for part in term.split(":")))])
        elif -depth <= int(term) < depth:
            chosen.add(int(term) % depth)
        else:
            raise ValueError(f"layers = {spec!r}: the model has {depth} layers, and no layer {term}")
    if not chosen:
        raise ValueError(f"layers = {spec!r}: selects none of the model's {depth} layers")
    return frozenset(chosen)


@dataclass(frozen=True)
class QuantRecipe:
    """A named list of rules. Every linear, embedding and expert stack needs one that matches; norms, scalars and
    routers stay as they are, and no rule may quantize them."""

    name: str
    rules: tuple[QuantRule, ...]

    def config_for(self, name: str, shape: Sequence[int], model_config: TextConfig) -> QuantConfig | None:
        """How to quantize the tensor `name`; None: not at all.

        Raises RecipeError if no rule matches, if one matches a tensor that must stay, or if the group size does not
        divide the rows."""
        quantizable = _QUANTIZABLE.fullmatch(name) is not None
        for number, rule in enumerate(self.rules, 1):
            try:
                matches = rule.matches(name, model_config.num_hidden_layers)
            except ValueError as error:
                raise RecipeError(f"recipe {self.name!r}: rule {number}: {error}") from None
            if not matches:
                continue
            where = f"recipe {self.name!r}: rule {number} ({rule.pattern!r})"
            if rule.config is None:
                return None
            if not quantizable:
                raise RecipeError(f"{where} would quantize {name}: norms, scalars and routers stay; narrow the pattern")
            _check_rows(where, name, rule.config, shape[-1])
            return rule.config
        if quantizable:
            example = re.sub(r"^layers\.\d+\.", "*.", name)
            raise RecipeError(
                f"recipe {self.name!r}: no rule matches {name}; add one with pattern = {example!r}, "
                "and config = 'keep' if it shall stay as it is"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        return {"name": self.name, "rules": [_rule_to_dict(rule) for rule in self.rules]}

    @classmethod
    def from_dict(cls, raw: Any, source: str = "recipe") -> "QuantRecipe":
        """Reads `{"name": ..., "rules": [{"pattern": ..., "layers": ..., "config": {"bits": 4, "group_size": 32}}]}`.
        config may be "keep", group_size "axis". Raises RecipeError naming `source` and the rule."""
        raw = _table(raw, {"name", "rules"}, {"name", "rules"}, source)
        if not isinstance(raw["name"], str) or not raw["name"]:
            raise RecipeError(f"{source}: name = {short(raw['name'])}: must be a text")
        if not isinstance(raw["rules"], list) or not raw["rules"]:
            raise RecipeError(f"{source}: rules must be a list with at least one rule")
        rules = (_rule_from_dict(rule, f"{source}: rule {i}") for i, rule in enumerate(raw["rules"], 1))
        return cls(raw["name"], tuple(rules))


def plan(recipe: QuantRecipe, model_config: TextConfig) -> dict[str, QuantConfig | None]:
    """How to quantize each tensor of the model, in its order; None: not at all. The head counts as untied from the
    embedding. Raises RecipeError as `config_for` does."""
    return {name: recipe.config_for(name, shape, model_config) for name, shape in untied_shapes(model_config).items()}


def untied_shapes(model_config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, with a head of its own; nothing is allocated."""
    import torch

    from gemma4_impl.model.decoder import Gemma4

    with torch.device("meta"):
        model = Gemma4(dataclasses.replace(model_config, tie_word_embeddings=False))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load_recipe(name_or_path: str | Path) -> QuantRecipe:
    """A built-in recipe by name, or one from a TOML or JSON file (`.toml`, `.json`).

    Raises FileNotFoundError for neither, RecipeError naming the file and the rule for anything wrong in it."""
    if str(name_or_path) in RECIPES:
        return RECIPES[str(name_or_path)]
    path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file, and none of the built-in ones: {', '.join(RECIPES)}")
    if path.suffix not in (".toml", ".json"):
        raise RecipeError(f"{path}: a recipe file ends in .toml or .json")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise RecipeError(f"{path}: more than {_MAX_FILE_BYTES} bytes; not a recipe")
    try:
        raw = (tomllib if path.suffix == ".toml" else json).loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid {path.suffix[1:].upper()} ({error})") from None
    return QuantRecipe.from_dict(raw, str(path))


def _check_rows(where: str, name: str, config: QuantConfig, row: int) -> None:
    if row % (config.group_size or 2) == 0:
        return
    fitting = [str(size) for size in (16, 32, 64, 128, 256) if row % size == 0]
    if row % 2 == 0:
        fitting.append("'axis'")
    if not fitting:
        raise RecipeError(f"{where}: {name} has rows of {row} weights, an odd number; keep it")
    raise RecipeError(
        f"{where}: {name} has rows of {row} weights, which groups of {config.group_size} do not divide; "
        f"group_size may be {', '.join(fitting)}"
    )


def _rule_to_dict(rule: QuantRule) -> dict[str, Any]:
    out: dict[str, Any] = {"pattern": rule.pattern}
    if rule.layers is not None:
        out["layers"] = rule.layers
    if rule.config is None:
        return out | {"config": "keep"}
    config = dataclasses.asdict(rule.config)
    return out | {"config": config | {"group_size": rule.config.group_size or "axis"}}


def _rule_from_dict(raw: Any, source: str) -> QuantRule:
    raw = _table(raw, {"pattern", "config"}, {"pattern", "config", "layers"}, source)
    config = raw["config"]
    try:
        if config != "keep":
            keys = {field.name for field in dataclasses.fields(QuantConfig)}
            config = dict(_table(config, {"bits", "group_size"}, keys, f"{source}: config"))
            if config["group_size"] is None:
                raise ValueError("group_size = None: write 'axis' for one scale a row")
            config["group_size"] = None if config["group_size"] == "axis" else config["group_size"]
        return QuantRule(raw["pattern"], None if config == "keep" else QuantConfig(**config), raw.get("layers"))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None


def _table(raw: Any, required: set[str], known: set[str], source: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{source}: expected a table with {', '.join(sorted(known))}, got {short(raw)}")
    if unknown := [key for key in raw if key not in known]:
        raise RecipeError(f"{source}: unknown key {short(unknown[0])}; known: {', '.join(sorted(known))}")
    if missing := sorted(required - set(raw)):
        raise RecipeError(f"{source}: {missing[0]} is missing")
    return raw


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _everywhere(config: QuantConfig) -> tuple[QuantRule, ...]:
    """Every linear, the head among them, and the experts."""
    patterns = ("*_proj.weight", "*.experts.*_proj", "*_projection.weight", "*_input_gate.weight", "lm_head.weight")
    return tuple(QuantRule(pattern, config) for pattern in patterns)


_INT8 = QuantConfig(8, None)
_EMBEDDINGS = QuantRule("embed_tokens*.weight", _INT8)

RECIPES: dict[str, QuantRecipe] = {
    recipe.name: recipe
    for recipe in (
        QuantRecipe("default", (_EMBEDDINGS, *_everywhere(QuantConfig(4, 32)))),
        QuantRecipe(
            "sensitive",
            (
                _EMBEDDINGS,
                # With attention_k_eq_v a full layer has no v_proj: its values come from k_proj.
                QuantRule("*.self_attn.[kv]_proj.weight", _INT8, "edge"),
                QuantRule("*.mlp.down_proj.weight", _INT8, "edge"),
                QuantRule("*.experts.down_proj", _INT8, "edge"),
                *_everywhere(QuantConfig(4, 32, symmetric=False, method="hqq")),
            ),
        ),
        # Half as many scales pay for a zero beside each: the size of `default`, and a smaller error.
        QuantRecipe("compact", (_EMBEDDINGS, *_everywhere(QuantConfig(4, 64, symmetric=False, method="mse")))),
    )
}
"""The built-in recipes, by name."""
