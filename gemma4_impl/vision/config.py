"""The vision tower's configuration, read from `config.json`, and the image processor's, from its own file."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_impl.config import ConfigError, _is_positive
from gemma4_impl.errors import one_line, plain, short

# No weight then has more bytes than 64 bits can count.
_TOO_LARGE = 1 << 20

# Keys of vision_config that other tools write and that do not change what the tower computes.
_NO_EFFECT = {
    "_name_or_path", "_attn_implementation", "architectures", "attention_dropout", "attn_implementation",
    "cache_implementation", "chunk_size_feed_forward", "default_output_length", "dtype", "id2label",
    "initializer_range", "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id", "max_position_embeddings",
    "model_type", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "tie_encoder_decoder",
    "tie_word_embeddings", "torch_dtype", "torchscript", "transformers_version", "use_cache",
}  # fmt: skip

# What the image processor's file must say where it says anything: transformers could do otherwise, the model could not.
_PROCESSOR_FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_PROCESSOR_SIZES = ("patch_size", "pooling_kernel_size", "max_soft_tokens")
_PROCESSOR_NO_EFFECT = {
    "_processor_class", "auto_map", "crop_size", "data_format", "default_to_square", "device", "disable_grouping",
    "do_center_crop", "do_pad", "feature_extractor_type", "image_mean", "image_processor_type", "image_seq_length",
    "image_std", "input_data_format", "model_input_names", "pad_size", "processor_class", "return_tensors", "size",
    "transformers_version",
}  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """A Gemma 4 vision tower and what ties it to the text model. Field names and meanings are those of transformers'
    `Gemma4VisionConfig`, then those of the outer `Gemma4Config` and its text model that images need."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    text_hidden_size: int
    """The text model's `hidden_size`, to which soft tokens are projected."""
    patch_size: int = 16
    pooling_kernel_size: int = 3
    position_embedding_size: int = 10_240
    rope_theta: float = 100.0
    rms_norm_eps: float = 1e-6
    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    use_clipped_linears: bool = False
    standardize: bool = False
    image_token_id: int = 258_880
    boi_token_id: int = 255_999
    eoi_token_id: int = 258_882
    use_bidirectional_attention: str | None = None
    """"vision": the tokens of an image see each other both ways, in sliding layers only. None: all is causal."""

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config") -> "VisionConfig":
        """Reads a multimodal (`gemma4`) config. Raises ConfigError naming `source` and the key, also for a checkpoint
        without a vision tower."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source}: expected a JSON object, got {type(raw).__name__}")
        if raw.get("vision_config") is None:
            raise ConfigError(f"{source}: vision_config is missing; this checkpoint takes text only, no images")
        if raw.get("model_type") != "gemma4":
            raise ConfigError(f"{source}: model_type is {short(raw.get('model_type'))}; expected 'gemma4' with images")
        fields = _vision_fields(raw["vision_config"], f"{source}: vision_config")
        text = raw.get("text_config")
        if not isinstance(text, Mapping) or text.get("hidden_size") is None:
            raise ConfigError(f"{source}: text_config.hidden_size is missing; soft tokens are projected to it")
        fields["text_hidden_size"] = text["hidden_size"]
        fields["use_bidirectional_attention"] = text.get("use_bidirectional_attention") or None
        for key in ("image_token_id", "boi_token_id", "eoi_token_id"):
            if raw.get(key) is not None:
                fields[key] = raw[key]
        try:
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> "VisionConfig":
        """Reads `config.json` (or the one in the folder `path`). Raises ConfigError, FileNotFoundError."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        return cls.from_dict(_read_json(path), str(path))


def processor_sizes(folder: str | Path) -> dict[str, int]:
    """`patch_size`, `pooling_kernel_size` and `max_soft_tokens` as far as the checkpoint's `processor_config.json` (its
    `image_processor` part) or `preprocessor_config.json` states them; transformers prefers the first.

    Raises ConfigError naming the file and the key for a setting that Gemma 4's image processing does not have."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path, source = Path(folder) / name, str(Path(folder) / name)
        if not path.is_file():
            continue
        raw = _read_json(path)
        if name == "processor_config.json":
            raw = raw.get("image_processor") if isinstance(raw, Mapping) else raw
            if raw is None:
                continue
            source += ": image_processor"
        return _sizes_of(raw, source)
    return {}


def _sizes_of(raw: Any, source: str) -> dict[str, int]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, got {type(raw).__name__}")
    sizes = {}
    for key, value in raw.items():
        if value is None or key in _PROCESSOR_NO_EFFECT:
            continue
        if key in _PROCESSOR_FIXED:
            want = _PROCESSOR_FIXED[key]
            if value != want or isinstance(value, bool) != isinstance(want, bool):
                raise ConfigError(f"{source}: {key} = {short(value)}: only {want} is supported")
        elif key in _PROCESSOR_SIZES:
            if not _is_count(value, 1):
                raise ConfigError(f"{source}: {key} = {short(value)}: must be an integer >= 1")
            sizes[key] = value
        elif value is not False:
            raise ConfigError(f"{source}: unknown key {short(key)} = {short(value)}; it would be ignored")
    return sizes


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint holds config.json and *.safetensors")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({one_line(error)})") from None


def _vision_fields(raw: Any, source: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, got {type(raw).__name__}")
    if raw.get("model_type", "gemma4_vision") != "gemma4_vision":
        raise ConfigError(f"{source}: model_type is {short(raw['model_type'])}; expected 'gemma4_vision'")
    outer = {"text_hidden_size", "image_token_id", "boi_token_id", "eoi_token_id", "use_bidirectional_attention"}
    known = {f.name for f in dataclasses.fields(VisionConfig)} - outer - {"rope_theta"}
    out: dict[str, Any] = {}
    for key, value in raw.items():
        if value is None or key in _NO_EFFECT:
            continue
        if key in known:
            out[key] = value
        elif key == "rope_parameters":
            out |= _rope_of(value, source)
        elif key == "global_head_dim":
            if value != raw.get("head_dim"):
                raise ConfigError(f"{source}: {key} = {short(value)}: all layers have head_dim; not supported")
        elif value is not False:
            # An unknown switch that is on may change the maths: better refused than ignored.
            raise ConfigError(f"{source}: unknown key {short(key)} = {short(value)}; it would be ignored")
    fields = [f for f in dataclasses.fields(VisionConfig) if f.name in known and f.default is dataclasses.MISSING]
    if missing := [f.name for f in fields if f.name not in out]:
        raise ConfigError(f"{source}: missing key(s) {', '.join(missing)}")
    return out


def _rope_of(raw: Any, source: str) -> dict[str, Any]:
    """`rope_theta`; the released files call the axial RoPE "default", as transformers did before it had a name."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: rope_parameters must be an object")
    if extra := {str(k) for k, v in raw.items() if k not in ("rope_type", "rope_theta") and v is not None}:
        raise ConfigError(f"{source}: rope_parameters.{plain(min(extra))} is not supported")
    if raw.get("rope_type", "axial") not in ("axial", "default"):
        raise ConfigError(f"{source}: rope_parameters.rope_type {short(raw['rope_type'])} is not 'axial' or 'default'")
    return {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(c: VisionConfig) -> None:
    """Raises ConfigError for a value that is malformed, or that contradicts another one."""

    def refuse(key: str, why: str) -> None:
        raise ConfigError(f"{key} = {short(getattr(c, key))}: {why}")

    counts = ("image_token_id", "boi_token_id", "eoi_token_id")
    for field in dataclasses.fields(c):
        value, least = getattr(c, field.name), 0 if field.name in counts else 1
        if field.type is int and not _is_count(value, least):
            refuse(field.name, f"must be an integer >= {least}")
        if field.type is int and value >= _TOO_LARGE:
            refuse(field.name, "is larger than that of any model")
        if field.type is bool and not isinstance(value, bool):
            refuse(field.name, "must be true or false")
        if field.type is float and not _is_positive(value):
            refuse(field.name, "must be a positive number")
    if c.attention_bias:
        refuse("attention_bias", "no Gemma 4 checkpoint has biases; not supported")
    if c.hidden_activation != "gelu_pytorch_tanh":
        refuse("hidden_activation", "only 'gelu_pytorch_tanh' is supported")
    if c.head_dim % 4:
        refuse("head_dim", "RoPE over x and y needs a multiple of 4")
    if c.num_attention_heads % c.num_key_value_heads:
        refuse("num_key_value_heads", f"must divide num_attention_heads = {c.num_attention_heads}")
    if c.pooling_kernel_size < 2:
        refuse("pooling_kernel_size", "transformers returns the padding without pooling; not supported")
    if c.use_bidirectional_attention not in (None, "vision"):
        refuse("use_bidirectional_attention", "only images may be seen both ways ('vision')")
