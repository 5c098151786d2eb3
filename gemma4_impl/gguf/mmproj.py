"""A llama.cpp `mmproj` file: Gemma 4's vision tower, its config from the metadata, its tensors as in a checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma4_impl import names
from gemma4_impl.checkpoint import CheckpointError
from gemma4_impl.config import ConfigError
from gemma4_impl.errors import short
from gemma4_impl.gguf.blocks import dense, dequantize
from gemma4_impl.gguf.config import config_from_metadata, towers_in
from gemma4_impl.gguf.reader import GGUFArray, GGUFError, GGUFFile, TensorInfo
from gemma4_impl.vision.config import VisionConfig

PROJECTOR = "gemma4v"
_PREFIX = "clip.vision."

# Where each field of VisionConfig is said, without "clip.vision." unless it is a tensor.
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "v.blk.0.attn_q_norm.weight",
    "text_hidden_size": "projection_dim",
    "patch_size": "patch_size",
    "pooling_kernel_size": "projector.scale_factor",
    "position_embedding_size": "v.position_embd.weight",
    "rms_norm_eps": "attention.layer_norm_epsilon",
}
_PATCHES, _POSITIONS = "v.patch_embd.weight", "v.position_embd.weight"
# Keys that change nothing: images are resized to what fits, not to a square.
_NO_EFFECT = {"projector_type", "image_size"}
_FIXED = {"image_mean": 0.0, "image_std": 1.0}
_LEAST_PER_LAYER = 13

IMAGE_TOKENS = {"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"}
"""The fields of VisionConfig that are token ids, and what these tokens are called in the vocabulary."""


class Mmproj:
    """The vision tensors of an `mmproj` file as `gemma4_impl.vision.tower.TowerWeights`: canonical names, in the shapes
    of a checkpoint. An audio tower in the file is left alone.

    Nothing is read until asked for, and then one tensor: the file stays mapped, and a tensor that is not quantized may
    be a view of it.

    Raises as `GGUFFile` does, GGUFError for a file without Gemma 4's vision tower, and CheckpointError for a tensor
    that such a tower does not have."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.gguf = GGUFFile(self.path)
        _check_kind(self.gguf)
        self._infos: dict[str, TensorInfo] = {}
        for info in self.gguf.tensors.values():
            name = names.tower_from_gguf(info.name)
            if name is not None:
                self._infos[name] = info
            elif not names.is_gguf_audio(info.name):
                raise CheckpointError(
                    f"{info.path}: tensor {short(info.name)} is unknown in Gemma 4's vision tower; it would be ignored"
                )
        self.towers: dict[str, Path] = {name: info.path for name, info in self._infos.items()}
        """Each tensor's canonical name, and the file that holds it."""

    @property
    def dtype(self) -> torch.dtype:
        """float32 if all tensors are, else bfloat16."""
        stored = {info.type.dtype for info in self._infos.values()}
        return torch.float32 if stored == {torch.float32} else torch.bfloat16

    def config(self, text: dict[str, Any]) -> VisionConfig:
        """The tower's config. `text` holds the fields that the text model decides (see `text_fields`).

        What the file does not say is as in every released tower: the RoPE base is 100. Clipped linears and the
        standardisation are there if their tensors are. Raises ConfigError naming the key or the tensor, also for the
        tower of another text model."""
        keys = _Keys(self)
        layers = keys.integer("block_count")
        if layers * _LEAST_PER_LAYER > len(self._infos):
            keys.fail(_PREFIX + "block_count", f"= {layers} needs more than the {len(self._infos)} tensors there are")
        head_dim = keys.shape(_KEYS["head_dim"], 1)[0]
        if (said := keys.integer("attention.head_dim", head_dim)) != head_dim:
            keys.fail(_PREFIX + "attention.head_dim", f"= {said}, but {_KEYS['head_dim']} has {head_dim} values")
        heads_kv = keys.shape("v.blk.0.attn_k.weight", 2)[0] // head_dim
        fields = {
            "hidden_size": keys.integer("embedding_length"),
            "intermediate_size": keys.integer("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": keys.integer("attention.head_count"),
            "num_key_value_heads": keys.integer("attention.head_count_kv", heads_kv),
            "head_dim": head_dim,
            "text_hidden_size": keys.integer("projection_dim"),
            "patch_size": keys.integer("patch_size"),
            "pooling_kernel_size": keys.integer("projector.scale_factor", 3),
            "position_embedding_size": keys.shape(_POSITIONS, 3)[1],
            "rms_norm_eps": keys.real("attention.layer_norm_epsilon"),
            "use_clipped_linears": any(name.endswith(names.CLIP_BOUNDS) for name in self._infos),
            "standardize": any(name.startswith("vision_tower.std_") for name in self._infos),
        }
        keys.check_rest()
        if (wanted := text["text_hidden_size"]) != fields["text_hidden_size"]:
            what = f"= {fields['text_hidden_size']}, but the text model's hidden_size is {wanted}"
            keys.fail(_PREFIX + "projection_dim", f"{what}; it is another model's vision tower")
        try:
            return VisionConfig(**{**fields, **text})
        except ConfigError as error:
            key = _KEYS.get(str(error).partition(" ")[0])
            keys.fail("the text model" if key is None else _full(key), f"gives {error}")

    def tower(self, name: str) -> Tensor:
        """The tensor as a checkpoint has it: in its own dtype, or dequantized in float32.

        Raises CheckpointError for a patch embedding that is no convolution over RGB."""
        info = self._infos[name]
        data = self.gguf.bytes(info.name)
        values = dequantize(data, info.type) if info.type.quantized else dense(data, info.type)
        if info.name == _PATCHES:
            if values.dim() != 4 or values.shape[1] != 3 or values.shape[2] != values.shape[3]:
                found = list(values.shape)
                raise CheckpointError(f"{info.path}: {info.name} is {found}, expected [D, 3, patch, patch]")
            # From channel, row, column of a patch to row, column, channel.
            return values.permute(0, 2, 3, 1).flatten(1)
        if name.endswith(names.CLIP_BOUNDS) and values.numel() == 1:
            return values.reshape(())
        return values


def text_fields(file: GGUFFile) -> dict[str, Any]:
    """What a text model's GGUF file decides of `VisionConfig`: `text_hidden_size`, the ids of the tokens around and in
    place of an image, and whether an image's tokens see each other both ways.

    No key says the last. The released models with per-layer inputs (E2B, E4B) are causal throughout, the others
    (26B-A4B, 31B) are not; `embedding_length_per_layer_input`, which has to be right for the text, tells which it is.
    (llama.cpp goes by E2B's and E4B's hidden sizes.)
    Raises as `config_from_metadata` does, and ConfigError for a vocabulary without these tokens."""
    config = config_from_metadata(file)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    stored = tokens.raw() if isinstance(tokens, GGUFArray) else []
    ids = {}
    for field, token in IMAGE_TOKENS.items():
        if token.encode() not in stored:
            raise ConfigError(f"{file.path}: tokenizer.ggml.tokens has no {token}; this model takes text only")
        ids[field] = stored.index(token.encode())
    both_ways = None if config.hidden_size_per_layer_input else "vision"
    return {"text_hidden_size": config.hidden_size, "use_bidirectional_attention": both_ways, **ids}


def is_vision_tower(file: GGUFFile) -> bool:
    """Whether the file holds a vision tower of Gemma 4's kind, complete or not."""
    try:
        _check_kind(file)
    except GGUFError:
        return False
    return True


def _check_kind(file: GGUFFile) -> None:
    towers = towers_in(file)
    if towers is None:
        raise GGUFError(f"{file.path}: holds no vision tower; to use images, give the model's mmproj file (--mmproj)")
    if file.metadata.get("clip.has_vision_encoder") is not True:
        raise GGUFError(f"{file.path}: holds the {towers}, but no vision tower (clip.has_vision_encoder)")
    # llama.cpp looks at the first; the second is for files with an audio tower too.
    keys = ("clip.projector_type", "clip.vision.projector_type")
    key = next((key for key in keys if file.metadata.get(key, "") != ""), keys[1])
    if (found := file.metadata.get(key)) != PROJECTOR:
        raise GGUFError(f"{file.path}: {key} = {short(found)}; expected {PROJECTOR!r}, Gemma 4's vision tower")
    if file.metadata.get("clip.use_silu", False) is not False:
        raise GGUFError(f"{file.path}: clip.use_silu is true; Gemma 4's vision tower uses GELU")


class _Keys:
    """Reads `clip.vision.*` by type; raises ConfigError naming the file and the key."""

    def __init__(self, source: Mmproj):
        self.path, self.file, self.metadata = source.path, source.gguf, source.gguf.metadata

    def fail(self, key: str, why: str) -> Any:
        raise ConfigError(f"{self.path}: {key} {why}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(_PREFIX + key, default)
        return self.fail(_PREFIX + key, "is missing") if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value < 1 << 31:
            self.fail(_PREFIX + key, f"= {short(value)}: must be an integer >= 1")
        return value

    def real(self, key: str) -> float:
        """The shortest decimal that float32 rounds to the stored value, which is what was meant by it: 1e-06."""
        value = self._get(key, None)
        if type(value) not in (float, int) or not 0 < value < 1e38:
            self.fail(_PREFIX + key, f"= {short(value)}: must be a positive number")
        return float(str(np.float32(value)))

    def shape(self, tensor: str, dims: int) -> tuple[int, ...]:
        info = self.file.tensors.get(tensor)
        if info is None or len(info.shape) != dims:
            self.fail(f"tensor {tensor}", "is missing" if info is None else f"has the shape {list(info.shape)}")
        return info.shape

    def check_rest(self) -> None:
        """An unknown key may change what the tower computes: better refused than ignored."""
        known = {*_KEYS.values(), *_NO_EFFECT, "attention.head_dim"}
        for full, value in self.metadata.items():
            key = full.removeprefix(_PREFIX)
            if not full.startswith(_PREFIX) or key in known:
                continue
            if key in _FIXED:
                if not isinstance(value, GGUFArray) or value.is_text or set(value.tolist()) != {_FIXED[key]}:
                    self.fail(full, f"= {short(value)}: Gemma 4 does not normalise images; expected {_FIXED[key]}")
            elif value not in (False, 0, ""):
                self.fail(short(full), f"= {short(value)} is unknown; it would be ignored")


def _full(key: str) -> str:
    return f"tensor {key}" if key.startswith("v.") else _PREFIX + key
