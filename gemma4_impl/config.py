"""The text model's configuration: frozen dataclasses with Hugging Face field names, read from `config.json`."""

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from gemma4_impl.errors import plain

SLIDING, FULL = "sliding_attention", "full_attention"

# No weight, the experts' stack of three such sizes included, then has more bytes than 64 bits can count.
_WIDE, _LONG = 1 << 20, 1 << 31

# Keys that other tools write and that do not change what the text model computes. (quantization_config says how the
# weights are stored: no checkpoint class reads a folder that has it as if it had not.)
_NO_EFFECT = {
    "_name_or_path", "architectures", "attn_implementation", "cache_implementation", "dtype", "torch_dtype",
    "transformers_version", "initializer_range", "use_cache", "attention_dropout", "is_causal", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "problem_type", "id2label", "label2id",
    "chunk_size_feed_forward", "is_encoder_decoder", "model_type", "tie_encoder_decoder", "torchscript",
    "use_bidirectional_attention", "keys_to_ignore_at_inference", "_attn_implementation", "quantization_config",
}  # fmt: skip


class ConfigError(ValueError):
    """A `config.json` that cannot be read as a Gemma 4 text model; the message names the file and the key."""


@dataclass(frozen=True)
class RopeParameters:
    """RoPE of one layer type: `default` rotates every dim, `proportional` only `partial_rotary_factor` of them."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True)
class LayerConfig:
    """What sets one decoder layer apart; derived by `TextConfig.layers`."""

    index: int
    layer_type: str
    head_dim: int
    num_key_value_heads: int
    intermediate_size: int
    k_eq_v: bool
    kv_source: int
    """Index of the layer whose keys and values are attended to: the layer itself unless it is KV-shared."""

    @property
    def is_sliding(self) -> bool:
        return self.layer_type == SLIDING

    @property
    def kv_shared(self) -> bool:
        return self.kv_source != self.index


@dataclass(frozen=True)
class TextConfig:
    """A Gemma 4 text decoder. Field names and meanings are those of `transformers`' `Gemma4TextConfig`,
    in the hub's flat form (`global_head_dim`, `num_global_key_value_heads`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    layer_types: tuple[str, ...]
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    sliding_window: int = 512
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 262_144
    enable_moe_block: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None
    rope_parameters: Mapping[str, RopeParameters] = dataclasses.field(
        default_factory=lambda: {
            SLIDING: RopeParameters("default", 10_000.0),
            FULL: RopeParameters("proportional", 1_000_000.0, 0.25),
        }
    )
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = 30.0
    max_position_embeddings: int = 131_072
    tie_word_embeddings: bool = True
    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _check(self)

    def __hash__(self) -> int:
        # The generated one would hash rope_parameters, a dict.
        return hash((self.vocab_size, self.hidden_size, self.intermediate_size, self.layer_types))

    @functools.cached_property
    def first_kv_shared_layer(self) -> int:
        """Index of the first layer that reads another layer's keys and values (`num_hidden_layers` if none)."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    @functools.cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        """One `LayerConfig` a layer. A KV-shared layer reads the last unshared layer of its own type."""
        producers = {kind: i for i, kind in enumerate(self.layer_types[: self.first_kv_shared_layer])}
        layers = []
        for i, kind in enumerate(self.layer_types):
            shared = i >= self.first_kv_shared_layer
            k_eq_v = self.attention_k_eq_v and kind == FULL
            global_heads = self.num_global_key_value_heads if k_eq_v else None
            layers.append(
                LayerConfig(
                    index=i,
                    layer_type=kind,
                    head_dim=self.head_dim if kind == SLIDING else self.global_head_dim,
                    num_key_value_heads=global_heads or self.num_key_value_heads,
                    intermediate_size=self.intermediate_size * (2 if shared and self.use_double_wide_mlp else 1),
                    k_eq_v=k_eq_v,
                    kv_source=producers[kind] if shared else i,
                )
            )
        return tuple(layers)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config") -> "TextConfig":
        """Reads the hub's flat form and the `per_layer_config` form that transformers 5.23 saves, of a text-only
        (`gemma4_text`) or multimodal (`gemma4`) checkpoint. Raises ConfigError naming `source` and the key."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source}: expected a JSON object, got {type(raw).__name__}")
        model_type = raw.get("model_type")
        if model_type == "gemma4":
            text = raw.get("text_config")
            if not isinstance(text, Mapping):
                raise ConfigError(f"{source}: text_config is missing; a gemma4 config holds the text model there")
            # The outer object decides these for the whole checkpoint when it states them.
            outer = {k: raw[k] for k in ("tie_word_embeddings", "eos_token_id") if raw.get(k) is not None}
            return cls.from_dict({"model_type": "gemma4_text", **text, **outer}, f"{source}: text_config")
        if model_type != "gemma4_text":
            raise ConfigError(f"{source}: model_type is {short(model_type)}; expected 'gemma4_text' or 'gemma4'")
        fields = _fields_of(raw, source)
        try:
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> "TextConfig":
        """Reads `config.json` (or the one in the folder `path`), or the metadata of a GGUF file.
        Raises ConfigError, FileNotFoundError, GGUFError."""
        path = Path(path)
        if path.suffix == ".gguf" or (path.is_file() and path.suffix != ".json"):
            from gemma4_impl.gguf.config import config_from_file

            return config_from_file(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such folder; a checkpoint holds config.json and *.safetensors")
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a checkpoint holds config.json and *.safetensors")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error})") from None
        return cls.from_dict(raw, str(path))


def _fields_of(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    types = {f.name: f.type for f in dataclasses.fields(TextConfig)}
    out: dict[str, Any] = {}
    for key, value in raw.items():
        if key in types:
            if value is not None:
                out[key] = value
        elif key == "use_bidirectional_attention" and value not in (None, False, "vision"):
            raise ConfigError(f"{source}: {key} = {short(value)}: only images may be seen both ways ('vision')")
        elif key != "per_layer_config" and key not in _NO_EFFECT and value not in (None, False):
            # An unknown switch that is on may change the maths: better refused than ignored.
            raise ConfigError(f"{source}: unknown key {short(key)} = {short(value)}; it would be ignored")
    for key in ("layer_types", "eos_token_id"):
        if key in out:
            out[key] = tuple(out[key]) if isinstance(out[key], list | tuple) else (out[key],)
    if "rope_parameters" in out:
        out["rope_parameters"] = _rope_of(out["rope_parameters"], source)
    if "per_layer_config" in raw:
        out.update(_flatten_per_layer(raw["per_layer_config"], out, source))
    # What transformers takes an absent key to mean.
    out = {"global_head_dim": 512, "hidden_size_per_layer_input": 256, "final_logit_softcapping": None} | out
    required = [f.name for f in dataclasses.fields(TextConfig) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in out]:
        raise ConfigError(f"{source}: missing key(s) {', '.join(missing)}")
    return out


def _rope_of(raw: Any, source: str) -> dict[str, RopeParameters]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: rope_parameters must be an object with one entry a layer type")
    known = {f.name for f in dataclasses.fields(RopeParameters)}
    out = {}
    for kind, values in raw.items():
        if not isinstance(values, Mapping) or any(values.get(k) is None for k in ("rope_type", "rope_theta")):
            raise ConfigError(f"{source}: rope_parameters.{plain(kind)} needs rope_type and rope_theta")
        if extra := {k for k, v in values.items() if k not in known and v is not None}:
            raise ConfigError(f"{source}: rope_parameters.{plain(kind)}.{plain(min(extra))} is not supported")
        out[kind] = RopeParameters(**{k: v for k, v in values.items() if v is not None})
    return out


def _flatten_per_layer(per_layer: Any, flat: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Folds `{"5": {"head_dim": 512, ...}}` into `global_head_dim` and `num_global_key_value_heads`, which count for
    nothing beside it."""
    layer_types = flat.get("layer_types", ())
    overrides: dict[int, dict[str, Any]] = {}
    per_layer = {} if per_layer is None else per_layer
    if not isinstance(per_layer, Mapping):
        raise ConfigError(f"{source}: per_layer_config must be an object with one entry a layer")
    # transformers writes the indices with leading zeros, as many as the last one needs.
    width = len(str(len(layer_types) - 1))
    indices = {spelt: i for i in range(len(layer_types)) for spelt in (str(i), str(i).zfill(width))}
    for key, values in per_layer.items():
        index = indices.get(str(key))
        if index is None or (index in overrides and overrides[index] != values):
            raise ConfigError(f"{source}: per_layer_config.{str(key)[:20]}: no such layer")
        if not isinstance(values, Mapping) or (extra := set(values) - {"head_dim", "num_key_value_heads"}):
            what = f".{plain(min(extra))}" if isinstance(values, Mapping) else ""
            raise ConfigError(f"{source}: per_layer_config.{key}{what} is not supported")
        if layer_types[index] == FULL:
            overrides[index] = dict(values)
        elif any(values[k] != flat.get(k) for k in values):
            raise ConfigError(f"{source}: per_layer_config.{key} changes a sliding layer, which is not supported")
    full = [i for i, kind in enumerate(layer_types) if kind == FULL]
    first = overrides.get(full[0], {}) if full else {}
    for i in full:
        if overrides.get(i, {}) != first:
            raise ConfigError(f"{source}: per_layer_config.{i} differs from layer {full[0]}'s; full layers must agree")
    out = {"global_head_dim": first.get("head_dim", flat.get("head_dim")), "num_global_key_value_heads": None}
    if "num_key_value_heads" in first and first["num_key_value_heads"] != flat.get("num_key_value_heads"):
        if not flat.get("attention_k_eq_v"):
            raise ConfigError(f"{source}: per_layer_config.{full[0]}.num_key_value_heads needs attention_k_eq_v")
        out["num_global_key_value_heads"] = first["num_key_value_heads"]
    return out


def _check(c: TextConfig) -> None:
    """Raises ConfigError for a value that is malformed, or that contradicts another one."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{key} = {short(getattr(c, key))}: {why}")

    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    sizes += ["num_key_value_heads", "head_dim", "global_head_dim", "sliding_window", "max_position_embeddings"]
    sizes += ["vocab_size_per_layer_input"]
    switches = ["attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block", "tie_word_embeddings", "attention_bias"]
    counts = ["num_kv_shared_layers", "hidden_size_per_layer_input", "pad_token_id", "bos_token_id"]
    optional = ["num_global_key_value_heads", "num_experts", "top_k_experts", "moe_intermediate_size"]
    for key in sizes + counts + [k for k in optional if getattr(c, k) is not None]:
        value, least = getattr(c, key), 0 if key in counts else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            refuse(key, f"must be an integer >= {least}")
        if value >= (_LONG if key in ("max_position_embeddings", "sliding_window") else _WIDE):
            refuse(key, "is larger than that of any model")
    for key in switches:
        if not isinstance(getattr(c, key), bool):
            refuse(key, "must be true or false")
    for key in ("rms_norm_eps", "final_logit_softcapping"):
        value = getattr(c, key)
        if value is not None and not _is_positive(value):
            refuse(key, "must be a positive number")
    if c.attention_bias:
        refuse("attention_bias", "no Gemma 4 checkpoint has biases; not supported")
    if c.hidden_activation != "gelu_pytorch_tanh":
        refuse("hidden_activation", "only 'gelu_pytorch_tanh' is supported")
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in c.eos_token_id):
        refuse("eos_token_id", "must be a token id or a list of them")

    if unknown := [k for k in c.layer_types if k not in (SLIDING, FULL)]:
        refuse("layer_types", f"unknown layer type {short(unknown[0])}")
    if len(c.layer_types) != c.num_hidden_layers:
        refuse("num_hidden_layers", f"but layer_types has {len(c.layer_types)} entries")
    if c.layer_types[-1] != FULL:
        refuse("layer_types", "the last layer must be full_attention")
    for key in ("num_key_value_heads", "num_global_key_value_heads"):
        if (heads := getattr(c, key)) is not None and c.num_attention_heads % heads:
            refuse(key, f"must divide num_attention_heads = {c.num_attention_heads}")
    for key in ("head_dim", "global_head_dim"):
        if getattr(c, key) % 2:
            refuse(key, "RoPE needs an even head_dim")
    if c.num_kv_shared_layers >= c.num_hidden_layers:
        refuse("num_kv_shared_layers", f"must be less than num_hidden_layers = {c.num_hidden_layers}")
    unshared = c.layer_types[: c.num_hidden_layers - c.num_kv_shared_layers]
    if orphans := set(c.layer_types) - set(unshared):
        refuse("num_kv_shared_layers", f"no unshared {min(orphans)} layer is left to share from")
    if c.enable_moe_block:
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            if getattr(c, key) is None:
                refuse(key, "is needed with enable_moe_block")
        if c.top_k_experts > c.num_experts:
            refuse("top_k_experts", f"exceeds num_experts = {c.num_experts}")
    for kind in sorted(set(c.layer_types)):
        rope = c.rope_parameters.get(kind)
        if rope is None:
            refuse("rope_parameters", f"has no entry for {kind}")
        if rope.rope_type not in ("default", "proportional"):
            refuse("rope_parameters", f"{kind}: rope_type {short(rope.rope_type)} is not 'default' or 'proportional'")
        if not _is_positive(rope.rope_theta):
            refuse("rope_parameters", f"{kind}: rope_theta must be a positive number")
        if not _is_positive(rope.partial_rotary_factor) or rope.partial_rotary_factor > 1:
            refuse("rope_parameters", f"{kind}: partial_rotary_factor must lie in (0, 1]")
        if rope.rope_type == "default" and rope.partial_rotary_factor != 1:
            refuse("rope_parameters", f"{kind}: partial_rotary_factor needs rope_type 'proportional'")
    for key in ("pad_token_id", "bos_token_id"):
        if getattr(c, key) >= c.vocab_size:
            refuse(key, f"is outside the vocabulary of {c.vocab_size}")
    if c.hidden_size_per_layer_input and c.vocab_size_per_layer_input < c.vocab_size:
        refuse("vocab_size_per_layer_input", f"must hold every token of vocab_size = {c.vocab_size}")


def _is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _pattern(sliding: int, repeats: int) -> tuple[str, ...]:
    return (*[SLIDING] * sliding, FULL) * repeats


VARIANTS: dict[str, TextConfig] = {
    "E2B": TextConfig(
        vocab_size=262_144,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        global_head_dim=512,
        layer_types=_pattern(4, 7),
        sliding_window=512,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=256,
        eos_token_id=(1, 106),
    ),
    "E4B": TextConfig(
        vocab_size=262_144,
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=42,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        layer_types=_pattern(5, 7),
        sliding_window=512,
        num_kv_shared_layers=18,
        hidden_size_per_layer_input=256,
        eos_token_id=(1, 106),
    ),
    "26B-A4B": TextConfig(
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        layer_types=_pattern(5, 5),
        attention_k_eq_v=True,
        sliding_window=1024,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        max_position_embeddings=262_144,
        eos_token_id=(1, 106),
    ),
    "31B": TextConfig(
        vocab_size=262_144,
        hidden_size=5376,
        intermediate_size=21_504,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
        head_dim=256,
        global_head_dim=512,
        layer_types=_pattern(5, 10),
        attention_k_eq_v=True,
        sliding_window=1024,
        max_position_embeddings=262_144,
        eos_token_id=(1, 106),
    ),
}
"""The released sizes, text part."""
