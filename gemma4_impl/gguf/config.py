"""GGUF metadata to `TextConfig` and back, in the terms of llama.cpp's `gemma4` architecture."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from gemma4_impl import names
from gemma4_impl.config import FULL, SLIDING, ConfigError, RopeParameters, TextConfig
from gemma4_impl.errors import short
from gemma4_impl.gguf.blocks import dense
from gemma4_impl.gguf.reader import GGUFArray, GGUFError, GGUFFile

ARCHITECTURE = "gemma4"

# Where each field of TextConfig is said, without "gemma4." unless it is a tensor or a key of the tokenizer.
_KEYS = {
    "vocab_size": "token_embd.weight",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_global_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length_swa",
    "global_head_dim": "attention.key_length",
    "layer_types": "attention.sliding_window_pattern",
    "sliding_window": "attention.sliding_window",
    "num_kv_shared_layers": "attention.shared_kv_layers",
    "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    "vocab_size_per_layer_input": "per_layer_token_embd.weight",
    "num_experts": "expert_count",
    "top_k_experts": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "rope_parameters": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "final_logit_softcapping": "final_logit_softcapping",
    "max_position_embeddings": "context_length",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
_CHECKED = {
    "vocab_size", "attention.value_length", "attention.value_length_swa", "rope.freq_base_swa", "rope.dimension_count",
    "rope.dimension_count_swa",
}  # fmt: skip
# Keys that may only say what every Gemma 4 does anyway.
_FIXED = {
    "attention.causal": True,
    "attention.scale": 1.0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "expert_gating_func": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
}
_STOPS = (b"<eos>", b"<turn|>", b"<end_of_turn>")
_UNROTATED = 1e30
_MAX_LAYERS = 4096
_MISSING = object()


def config_from_file(path: str | Path) -> TextConfig:
    """The config of a GGUF file. Raises as `GGUFFile` and `config_from_metadata` do."""
    with GGUFFile(path) as file:
        return config_from_metadata(file)


def config_from_metadata(file: GGUFFile) -> TextConfig:
    """Reads the metadata, the tensors' names and shapes (a file without `output.weight` has a tied head; one whose
    full layers have no `attn_v` takes V from K), and `rope_freqs`.

    Raises GGUFError if it is no Gemma 4 text model, ConfigError naming the key that is missing or contradictory."""
    check_architecture(file)
    keys = _Keys(file)
    layers = keys.integer("block_count")
    if not 1 <= layers <= _MAX_LAYERS:
        keys.fail(_full("block_count"), f"= {layers}: must lie between 1 and {_MAX_LAYERS}")
    kinds = keys.layer_types(layers)
    shared = keys.integer("attention.shared_kv_layers", 0)
    if set(kinds[: max(0, layers - shared)]) != set(kinds):
        keys.fail(_full("attention.shared_kv_layers"), f"= {shared} of {layers} leaves no layers to share from")
    k_eq_v = _k_eq_v(file, kinds[: layers - shared])
    heads_kv, global_heads_kv = _heads_kv(keys, kinds, k_eq_v)
    width, double_wide = _widths(keys, layers, shared)
    head_dim, global_head_dim = _head_dims(keys)
    experts = keys.integer("expert_count", 0)
    ple = keys.integer("embedding_length_per_layer_input")
    vocab = _vocab(keys)
    fields = {
        "vocab_size": vocab,
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": keys.uniform("attention.head_count", layers),
        "num_key_value_heads": heads_kv,
        "num_global_key_value_heads": global_heads_kv,
        "head_dim": head_dim,
        "global_head_dim": global_head_dim,
        "layer_types": tuple(kinds),
        "attention_k_eq_v": k_eq_v,
        "sliding_window": keys.integer("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": double_wide,
        "hidden_size_per_layer_input": ple,
        "vocab_size_per_layer_input": keys.rows("per_layer_token_embd.weight") if ple else vocab,
        "enable_moe_block": experts > 0,
        "num_experts": experts or None,
        "top_k_experts": keys.uniform("expert_used_count", layers) if experts else None,
        "moe_intermediate_size": keys.uniform("expert_feed_forward_length", layers) if experts else None,
        "rope_parameters": {
            SLIDING: RopeParameters("default", keys.real("rope.freq_base_swa", 10_000.0)),
            FULL: RopeParameters("proportional", keys.real("rope.freq_base"), _rotated(keys, global_head_dim)),
        },
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "final_logit_softcapping": keys.real("final_logit_softcapping", 0.0) or None,
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": names.to_gguf("lm_head.weight") not in file.tensors,
        "pad_token_id": keys.integer("tokenizer.ggml.padding_token_id", 0),
        "bos_token_id": keys.integer("tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": _stops(keys, vocab),
    }
    keys.check_rest()
    try:
        return TextConfig(**fields)
    except ConfigError as error:
        key = _KEYS.get(str(error).partition(" ")[0])
        keys.fail(_full(key) if key else "metadata", f"gives {error}")


def metadata_from_config(config: TextConfig) -> dict[str, Any]:
    """What llama.cpp's converter writes for such a model: the architecture, its sizes, and of the tokenizer's keys the
    ids that the config knows (a second stop token as the end of a turn, which the converter leaves to the vocabulary).
    Values are bool, int, float, str, and lists of them.

    Raises ConfigError for sliding layers that rotate only some dims: GGUF cannot say that."""
    sliding = config.rope_parameters.get(SLIDING, RopeParameters("default", 10_000.0))
    if sliding.partial_rotary_factor != 1:
        raise ConfigError("rope_parameters: GGUF cannot say that sliding layers rotate only some dims")
    kinds = [layer.is_sliding for layer in config.layers]
    heads_kv: int | list[int] = config.num_key_value_heads
    if config.attention_k_eq_v and config.num_global_key_value_heads is not None:
        heads_kv = [layer.num_key_value_heads for layer in config.layers]
    width: int | list[int] = config.intermediate_size
    if config.use_double_wide_mlp:
        width = [layer.intermediate_size for layer in config.layers]
    out: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": width,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": heads_kv,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.global_head_dim,
        "attention.value_length": config.global_head_dim,
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": kinds,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "rope.freq_base": float(config.rope_parameters[FULL].rope_theta),
        "rope.freq_base_swa": float(sliding.rope_theta),
        "rope.dimension_count": config.global_head_dim,
        "rope.dimension_count_swa": config.head_dim,
    }
    if config.final_logit_softcapping is not None:
        out["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if config.enable_moe_block:
        out["expert_count"] = config.num_experts
        out["expert_used_count"] = config.top_k_experts
        out["expert_feed_forward_length"] = config.moe_intermediate_size
    out = {_full(key): value for key, value in out.items()}
    out["tokenizer.ggml.bos_token_id"] = config.bos_token_id
    out["tokenizer.ggml.padding_token_id"] = config.pad_token_id
    out |= dict(zip(("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"), config.eos_token_id, strict=False))
    return {"general.architecture": ARCHITECTURE, **out}


def rope_freqs(config: TextConfig) -> Tensor:
    """The tensor `rope_freqs.weight`, float32 [global_head_dim / 2]: 1 for the pairs of dims of a full layer that
    rotate, and 1e30, which stops them, for the others."""
    pairs = config.global_head_dim // 2
    rotated = int(config.rope_parameters[FULL].partial_rotary_factor * config.global_head_dim // 2)
    return torch.tensor([1.0] * rotated + [_UNROTATED] * (pairs - rotated))


def check_architecture(file: GGUFFile) -> None:
    """Raises GGUFError, saying what the file holds instead, unless it is a Gemma 4 text model."""
    if tower := towers_in(file):
        raise GGUFError(
            f"{file.path}: holds the {tower}, no text model; give the text model's .gguf file, this one goes beside it"
        )
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise GGUFError(f"{file.path}: general.architecture = {short(found)}; expected {ARCHITECTURE!r}")
    if (kind := file.metadata.get("general.type", "model")) != "model":
        raise GGUFError(f"{file.path}: general.type = {short(kind)}; expected 'model'")


def towers_in(file: GGUFFile) -> str | None:
    """ "vision tower of X", if that is what the file holds instead of a text model (an `mmproj` file)."""
    meta = file.metadata
    if meta.get("general.architecture") != "clip" and meta.get("general.type") != "mmproj":
        return None
    kinds = [kind for kind in ("vision", "audio") if meta.get(f"clip.has_{kind}_encoder") is True] or ["vision"]
    name = meta.get("general.name") or meta.get("general.basename")
    of = f" of {short(name)}" if isinstance(name, str) else ""
    return f"{' and '.join(kinds)} tower{'s' if len(kinds) > 1 else ''}{of}"


class _Keys:
    """Reads `gemma4.*` and other keys by type; raises ConfigError naming the file and the key."""

    def __init__(self, file: GGUFFile):
        self.file, self.metadata = file, file.metadata

    def fail(self, key: str, why: str) -> NoReturn:
        raise ConfigError(f"{self.file.path}: {key} {why}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(_full(key), default)
        if value is _MISSING:
            self.fail(_full(key), "is missing")
        return value

    def integer(self, key: str, default: Any = _MISSING) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 0 <= value < 1 << 31:
            self.fail(_full(key), f"= {short(value)}: must be an integer >= 0")
        return value

    def real(self, key: str, default: Any = _MISSING) -> float:
        """The shortest decimal that float32 rounds to the stored value, which is what was meant by it: 1e-06."""
        value = self._get(key, default)
        if type(value) not in (float, int) or not abs(value) < 1e38:
            self.fail(_full(key), f"= {short(value)}: must be a number")
        return float(str(np.float32(value)))

    def per_layer(self, key: str, layers: int) -> list[int]:
        """One integer for each layer, or one for all."""
        value = self._get(key, _MISSING)
        if not isinstance(value, GGUFArray):
            return [self.integer(key)] * layers
        if len(value) != layers:
            self.fail(_full(key), f"has {len(value)} entries for {layers} layers")
        found = value.tolist()
        if not all(type(v) in (int, bool) and v >= 0 for v in found):
            self.fail(_full(key), "must hold integers >= 0")
        return [int(v) for v in found]

    def uniform(self, key: str, layers: int) -> int:
        return self.same(key, self.per_layer(key, layers), "layers")

    def same(self, key: str, values: Iterable[int], what: str) -> int:
        found = sorted(set(values))
        if len(found) != 1:
            self.fail(_full(key), f"differs among the {what} ({short(found)}), which is not supported")
        return found[0]

    def layer_types(self, layers: int) -> list[str]:
        key = "attention.sliding_window_pattern"
        if not isinstance(self._get(key, _MISSING), GGUFArray):
            self.fail(_full(key), "must be an array with one entry a layer")
        pattern = self.per_layer(key, layers)
        if not pattern or not set(pattern) <= {0, 1}:
            self.fail(_full(key), "must say true or false for every layer")
        return [SLIDING if sliding else FULL for sliding in pattern]

    def rows(self, tensor: str) -> int:
        info = self.file.tensors.get(tensor)
        if info is None or len(info.shape) != 2:
            self.fail(f"tensor {tensor}", "is missing" if info is None else f"has the shape {list(info.shape)}")
        return info.shape[0]

    def check_rest(self) -> None:
        """An unknown key may change what the model computes: better refused than ignored."""
        known = {_full(key) for key in (*_KEYS.values(), *_CHECKED)}
        fixed = {_full(key): value for key, value in _FIXED.items()}
        for key, value in self.metadata.items():
            if not key.startswith(f"{ARCHITECTURE}.") or key in known:
                continue
            if key in fixed and value != fixed[key]:
                self.fail(key, f"= {short(value)} is not supported; expected {fixed[key]!r}")
            if key not in fixed and value not in (False, 0, ""):
                self.fail(short(key), f"= {short(value)} is unknown; it would be ignored")


def _full(key: str) -> str:
    return key if key.startswith("tokenizer.") or key.endswith(".weight") else f"{ARCHITECTURE}.{key}"


def _k_eq_v(file: GGUFFile, unshared: list[str]) -> bool:
    """Whether the full layers that have their own keys have no values of their own."""
    with_v = {
        i: any(f"blk.{i}.{part}.weight" in file.tensors for part in ("attn_v", "attn_qkv"))
        for i, kind in enumerate(unshared)
        if kind == FULL
    }
    if len(set(with_v.values())) > 1:
        absent = next(i for i, has in with_v.items() if not has)
        raise ConfigError(f"{file.path}: tensor blk.{absent}.attn_v.weight is missing; other full layers have theirs")
    return not all(with_v.values())


def _heads_kv(keys: _Keys, kinds: list[str], k_eq_v: bool) -> tuple[int, int | None]:
    """num_key_value_heads and num_global_key_value_heads."""
    key = "attention.head_count_kv"
    heads = keys.per_layer(key, len(kinds))
    by_kind = {kind: [n for n, k in zip(heads, kinds, strict=True) if k == kind] for kind in (SLIDING, FULL)}
    full = keys.same(key, by_kind[FULL] or by_kind[SLIDING], "full layers")
    sliding = keys.same(key, by_kind[SLIDING] or by_kind[FULL], "sliding layers")
    if not k_eq_v:
        if full != sliding:
            keys.fail(_full(key), f"= {full} on full layers and {sliding} on others needs full layers without attn_v")
        return sliding, None
    return sliding, full if isinstance(keys.metadata[_full(key)], GGUFArray) else None


def _widths(keys: _Keys, layers: int, shared: int) -> tuple[int, bool]:
    """intermediate_size and use_double_wide_mlp."""
    key = "feed_forward_length"
    widths = keys.per_layer(key, layers)
    own = keys.same(key, widths[: layers - shared], "layers with keys of their own")
    wide = keys.same(key, widths[layers - shared :] or [own], "KV-shared layers")
    if wide not in (own, 2 * own):
        keys.fail(_full(key), f"= {wide} on KV-shared layers: must be {own} or twice that")
    return own, wide == 2 * own


def _head_dims(keys: _Keys) -> tuple[int, int]:
    """head_dim and global_head_dim."""
    dims = []
    for suffix in ("_swa", ""):
        dims.append(keys.integer(f"attention.key_length{suffix}"))
        for other in ("attention.value_length", "rope.dimension_count"):
            if (found := keys.integer(f"{other}{suffix}", dims[-1])) != dims[-1]:
                wanted = f"gemma4.attention.key_length{suffix} = {dims[-1]}"
                keys.fail(_full(f"{other}{suffix}"), f"= {found} differs from {wanted}")
    return dims[0], dims[1]


def _vocab(keys: _Keys) -> int:
    rows = keys.rows("token_embd.weight")
    if (said := keys.integer("vocab_size", rows)) != rows:
        keys.fail("gemma4.vocab_size", f"= {said}, but token_embd.weight has {rows} rows")
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and (not isinstance(tokens, GGUFArray) or not tokens.is_text or len(tokens) != rows):
        keys.fail("tokenizer.ggml.tokens", f"is {short(tokens)}; token_embd.weight has {rows} rows")
    return rows


def _rotated(keys: _Keys, head_dim: int) -> float:
    """The full layers' partial_rotary_factor."""
    name = names.GGUF_ROPE_FREQS
    info = keys.file.tensors.get(name)
    if info is None:
        keys.fail(f"tensor {name}", "is missing; it says which dims of the full layers rotate")
    if info.shape != (head_dim // 2,) or info.type.name != "F32":
        keys.fail(f"tensor {name}", f"is {info.type.name} {list(info.shape)}; expected F32 [{head_dim // 2}]")
    factors = dense(keys.file.bytes(name), info.type)
    rotated = int((factors == 1).sum())
    if not rotated or not torch.equal(
        factors, factors.new_tensor([1.0] * rotated + [_UNROTATED] * (len(factors) - rotated))
    ):
        keys.fail(f"tensor {name}", "must be 1 for the first dims, which rotate, and 1e30 for all others")
    return rotated / len(factors)


def _stops(keys: _Keys, vocab: int) -> tuple[int, ...]:
    """The ids that end a reply: those that the metadata name, and the vocabulary's tokens for it."""
    found = {
        keys.integer(f"tokenizer.ggml.{kind}_token_id")
        for kind in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{kind}_token_id" in keys.metadata
    }
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        found |= {i for i, token in enumerate(tokens.raw()) if token in _STOPS}
    if wrong := [i for i in found if i >= vocab]:
        keys.fail("tokenizer.ggml.eos_token_id", f"= {max(wrong)} is outside the vocabulary of {vocab}")
    default = next(f.default for f in dataclasses.fields(TextConfig) if f.name == "eos_token_id")
    return tuple(sorted(found)) or default
