"""Tiny `mmproj` files, written with gguf-py from a tiny multimodal checkpoint the way llama.cpp's converter does."""

import json
import logging
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors import safe_open

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")

_BOUNDS = (".input_min", ".input_max", ".output_min", ".output_max")
_TOWERS = ("model.vision_tower.", "model.embed_vision.")


def make_tiny_mmproj(multimodal: str | Path, out: str | Path, types: str = "F32") -> Path:
    """Writes the vision tower and the projector of the checkpoint folder `multimodal` to the GGUF file `out` and
    returns its path.

    `types` is one of `TYPES` for every matrix; where its block does not divide the rows, F16 is taken. The patch
    embedding is F16 if `types` is, else F32; norms, positions, bounds and the standardisation are F32 always.
    Raises ValueError for an unknown type or a folder without a vision tower."""
    multimodal, out = Path(multimodal), Path(out)
    if types not in TYPES:
        raise ValueError(f"unknown type {types!r}; known: {', '.join(TYPES)}")
    config = json.loads((multimodal / "config.json").read_text(encoding="utf-8"))
    vision = config.get("vision_config")
    if vision is None:
        raise ValueError(f"{multimodal}: has no vision tower")
    logging.getLogger("gguf").setLevel(logging.ERROR)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(multimodal.name)
    prefix = "ALL" if types == "F32" else "MOSTLY"
    writer.add_file_type(getattr(gguf.LlamaFileType, f"{prefix}_{types}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_vision_projector_type("gemma4v")
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(224)
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_image_mean([0.0, 0.0, 0.0])
    writer.add_vision_image_std([1.0, 1.0, 1.0])
    writer.add_vision_attention_layernorm_eps(vision["rms_norm_eps"])
    if vision["pooling_kernel_size"] != 3:
        writer.add_vision_projector_scale_factor(vision["pooling_kernel_size"])
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["num_hidden_layers"])
    for name, values in sorted(tower_tensors(multimodal).items()):
        theirs = _gguf_name(known, name)
        if theirs == "v.patch_embd.weight":
            values = values.reshape(len(values), vision["patch_size"], vision["patch_size"], 3).transpose(0, 3, 1, 2)
        values = np.ascontiguousarray(values if values.ndim else values[None])
        kind = gguf.GGMLQuantizationType[type_of(theirs, values.shape, types)]
        writer.add_tensor(theirs, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def tower_tensors(multimodal: str | Path) -> dict[str, np.ndarray]:
    """The tower's and the projector's tensors in float32, under the checkpoint's names."""
    out = {}
    for file in sorted(Path(multimodal).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                if name.startswith(_TOWERS):
                    out[name] = handle.get_tensor(name).to(torch.float32).numpy()
    return out


def type_of(name: str, shape: tuple[int, ...], types: str) -> str:
    """The type that a tensor of this GGUF name has in a file of `types`."""
    if name == "v.patch_embd.weight":
        return "F16" if types == "F16" else "F32"
    if len(shape) != 2 or not name.endswith(".weight"):
        return "F32"
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[types]][0]
    return "F16" if shape[-1] % block else types


def _gguf_name(known: gguf.TensorNameMap, name: str) -> str:
    name = name.replace("model.vision_tower.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
    if name.endswith("position_embedding_table"):
        name += ".weight"
    theirs = known.get_name(name, try_suffixes=(".weight", *_BOUNDS))
    if theirs is None:
        raise ValueError(f"gguf-py has no name for {name}")
    return theirs
