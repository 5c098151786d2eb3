"""Tensor names: canonical ones (the checkpoint's, without its prefix) and what Hugging Face files call them."""

# Longest first: a multimodal checkpoint's text tensors also start with "model.".
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_TOWERS = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")


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


def to_hf(name: str, multimodal: bool = False) -> str:
    """Inverse of `from_hf` for the files that transformers saves."""
    if name.startswith("lm_head."):
        return name
    return ("model.language_model." if multimodal else "model.") + name
