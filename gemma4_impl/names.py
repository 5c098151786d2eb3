"""Tensor names: canonical ones (the checkpoint's, without its prefix), those in Hugging Face and GGUF files, and the
paths of Flax NNX parameters."""

from collections.abc import Sequence

# Longest first: a multimodal checkpoint's text tensors also start with "model.".
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_TOWERS = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")

_GGUF_MODEL = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}
_MODEL_OF_GGUF = {theirs: ours for ours, theirs in _GGUF_MODEL.items()}
_LAYER_OF_GGUF = {theirs: ours for ours, theirs in _GGUF_LAYER.items()}

# The vision tower, in the file that llama.cpp calls `mmproj`.
_GGUF_TOWER = {
    "vision_tower.patch_embedder.input_proj.weight": "v.patch_embd.weight",
    "vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
    "vision_tower.std_bias": "v.std_bias",
    "vision_tower.std_scale": "v.std_scale",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
}
_GGUF_TOWER_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CLIP_BOUNDS = ("input_min", "input_max", "output_min", "output_max")
"""What a clipped linear of the vision tower has beside its weight."""
_GGUF_TOWER_LAYER = {
    "input_layernorm.weight": "ln1.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "attn_post_norm.weight",
    "pre_feedforward_layernorm.weight": "ln2.weight",
    "post_feedforward_layernorm.weight": "ffn_post_norm.weight",
    **{f"{ours}.linear.weight": f"{theirs}.weight" for ours, theirs in _GGUF_TOWER_LINEARS.items()},
    **{f"{ours}.{b}": f"{theirs}.{b}" for ours, theirs in _GGUF_TOWER_LINEARS.items() for b in CLIP_BOUNDS},
}
_TOWER_OF_GGUF = {theirs: ours for ours, theirs in _GGUF_TOWER.items()}
_TOWER_LAYER_OF_GGUF = {theirs: ours for ours, theirs in _GGUF_TOWER_LAYER.items()}
_TOWER_LAYERS = "vision_tower.encoder.layers."

GGUF_ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the full layers' RoPE frequencies: metadata in the form of a tensor."""

# What a converter may have cut or joined along the rows: our tensors, in the order of those rows.
_GGUF_HALVES = {"ffn_gate_exps.weight": "experts.gate_up_proj", "ffn_up_exps.weight": "experts.gate_up_proj"}
_GGUF_JOINED = {"attn_qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv")}


def from_hf(name: str) -> str | None:
    """Canonical name (`layers.0.self_attn.q_proj.weight`, `lm_head.weight`) of a text tensor in a Hugging Face
    checkpoint; None for a tensor of the vision or audio tower."""
    stripped = name.removeprefix("model.")
    if stripped.startswith(_TOWERS):
        return None
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name.removeprefix("language_model.")


def tower_from_hf(name: str) -> str:
    """Canonical name (`vision_tower.patch_embedder.input_proj.weight`) of a tower's tensor in a Hugging Face
    checkpoint."""
    return name.removeprefix("model.")


def to_hf(name: str, multimodal: bool = False) -> str:
    """Inverse of `from_hf` for the files that transformers saves."""
    if name.startswith("lm_head."):
        return name
    return ("model.language_model." if multimodal else "model.") + name


def from_gguf(name: str) -> str | None:
    """Canonical name of a GGUF tensor; None for one that is no single parameter: `rope_freqs`, experts stored as
    separate gates and ups, a joined q/k/v, or a name that Gemma 4 does not have. `held_by_gguf` knows more."""
    index, leaf = _block(name)
    if index is None:
        return _MODEL_OF_GGUF.get(name)
    ours = _LAYER_OF_GGUF.get(leaf)
    return None if ours is None else f"layers.{index}.{ours}"


def to_gguf(name: str) -> str:
    """Inverse of `from_gguf`. Raises ValueError for what is no canonical name."""
    if name in _GGUF_MODEL:
        return _GGUF_MODEL[name]
    prefix, _, rest = name.partition(".")
    index, _, leaf = rest.partition(".")
    if prefix != "layers" or not _is_index(index) or leaf not in _GGUF_LAYER:
        raise ValueError(f"{name!r} is no tensor of Gemma 4's text model")
    return f"blk.{index}.{_GGUF_LAYER[leaf]}"


def held_by_gguf(name: str) -> tuple[str, ...]:
    """Canonical names of everything that a GGUF tensor holds, whole or in part; () if it holds no parameter."""
    if (whole := from_gguf(name)) is not None:
        return (whole,)
    index, leaf = _block(name)
    if index is None:
        return ()
    ours = (_GGUF_HALVES[leaf],) if leaf in _GGUF_HALVES else _GGUF_JOINED.get(leaf, ())
    return tuple(f"layers.{index}.{part}" for part in ours)


def tower_from_gguf(name: str) -> str | None:
    """Canonical name of a vision tensor in an `mmproj` file; None for any other, an audio tower's too."""
    index, leaf = _block(name.removeprefix("v.")) if name.startswith("v.") else (None, name)
    if index is None:
        return _TOWER_OF_GGUF.get(name)
    ours = _TOWER_LAYER_OF_GGUF.get(leaf)
    return None if ours is None else f"{_TOWER_LAYERS}{index}.{ours}"


def tower_to_gguf(name: str) -> str:
    """Inverse of `tower_from_gguf`. Raises ValueError for what is no canonical name of a vision tensor."""
    if name in _GGUF_TOWER:
        return _GGUF_TOWER[name]
    index, _, leaf = name.removeprefix(_TOWER_LAYERS).partition(".")
    if not name.startswith(_TOWER_LAYERS) or not _is_index(index) or leaf not in _GGUF_TOWER_LAYER:
        raise ValueError(f"{name!r} is no tensor of Gemma 4's vision tower")
    return f"v.blk.{index}.{_GGUF_TOWER_LAYER[leaf]}"


def to_nnx(name: str) -> tuple[str | int, ...]:
    """Path of the parameter in `gemma4_impl.nnx`, whose modules are called as in the checkpoint."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def from_nnx(path: Sequence[str | int]) -> str:
    """Inverse of `to_nnx`."""
    return ".".join(map(str, path))


def is_gguf_audio(name: str) -> bool:
    """Whether a tensor in an `mmproj` file belongs to the audio tower or its projector."""
    return name.startswith(("a.", "mm.a."))


def _block(name: str) -> tuple[str | None, str]:
    """("3", "attn_q.weight") of "blk.3.attn_q.weight"; (None, name) for any other."""
    prefix, _, rest = name.partition(".")
    index, _, leaf = rest.partition(".")
    return (index, leaf) if prefix == "blk" and _is_index(index) else (None, name)


def _is_index(text: str) -> bool:
    """Whether `text` is a layer number, spelt as it is everywhere: a second spelling would be a second tensor."""
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")
