"""Tiny GGUF files, written with gguf-py from a tiny checkpoint the way llama.cpp's converter and quantizer do."""

import fnmatch
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors import safe_open

from gemma4_impl.config import TextConfig
from gemma4_impl.gguf.config import metadata_from_config, rope_freqs
from gemma4_impl.names import GGUF_ROPE_FREQS, from_hf

Types = str | Mapping[str, str] | Callable[[str, tuple[int, ...]], str]

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
"""Types that gguf-py can quantize to: the file holds the checkpoint's weights, rounded."""
DRAWN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types that it can only read: their blocks are drawn at random, and the file holds new weights of the same size."""
TYPES = ("F32", "F16", "BF16", *QUANTIZED, *DRAWN)

# Byte offsets of the float16 scale and, where there is one, of the minimums' scale in a block of a drawn type, and the
# ratio of the two that centres the weights on 0: a minimum of 1 takes away as much as the mean code is.
_SCALES: dict[str, tuple[int, int | None, float]] = {
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0),
    "IQ4_NL": (0, None, 0),
    "IQ4_XS": (0, None, 0),
}
# What takes the place of a type whose block does not divide the rows.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def make_tiny_gguf(
    checkpoint: str | Path,
    out: str | Path,
    types: Types = "F32",
    seed: int = 0,
    *,
    separate_experts: bool = False,
    join_qkv: bool = False,
    max_tensors: int = 0,
) -> Path:
    """Writes the text model and the tokenizer of the checkpoint folder to the GGUF file `out` and returns its path.

    `types` is one of `TYPES` for every weight that llama.cpp would quantize; "Q4_K_M" for its mixture of that name; a
    mapping from patterns of GGUF names (`blk.*.attn_v.weight`) to types, the first that matches, else F32; or a
    function (GGUF name, shape) -> type. Where a type's block does not divide the rows, llama.cpp's replacement is
    taken. Blocks of the `DRAWN` types depend on `seed`, the name and the shape, not on the checkpoint's values but for
    their spread. F32 holds the checkpoint's weights exactly.
    `separate_experts` stores the experts' gates and ups as two tensors, `join_qkv` the three projections of a layer as
    one, `max_tensors` splits the file: the path returned is the first part's (`NAME-00001-of-0000N.gguf`).
    Raises ValueError for an unknown type or a folder that is no such checkpoint."""
    checkpoint, out = Path(checkpoint), Path(out)
    config = TextConfig.from_file(checkpoint)
    tensors = {GGUF_ROPE_FREQS: rope_freqs(config).numpy(), **_tensors(checkpoint, config)}
    if separate_experts:
        tensors = dict(_separated(tensors))
    if join_qkv:
        tensors = _joined(tensors)
    choose = _chooser(types, config, tensors)
    # It warns about what all Gemma tokenizers have, and about every split.
    logging.getLogger("gguf").setLevel(logging.ERROR)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "gemma4", split_max_tensors=max_tensors)
    _add_metadata(writer, config, checkpoint.name, types)
    _add_tokenizer(writer, checkpoint)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType[choose(name, values.shape)]
        writer.add_tensor(name, _blocks(name, values, kind, seed), raw_dtype=kind)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    parts = len(writer.tensors)
    writer.close()
    return out if parts == 1 else out.with_name(f"{out.stem}-00001-of-{parts:05d}.gguf")


def draw_blocks(kind: str, shape: tuple[int, ...], std: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 [..., rows, bytes a row]: random blocks of one of the `DRAWN` types whose weights have about this spread.

    Every bit of a block but its float16 scales is drawn, so that all codes, sub-scales and signs occur."""
    quant = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[quant]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, nbytes), dtype=np.uint8)
    at, minimum_at, ratio = _SCALES[kind]

    def set_scales(scale: np.ndarray) -> None:
        for where, value in ((at, scale), (minimum_at, scale * ratio)):
            if where is not None:
                data[..., where : where + 2] = value.astype("<f2")[..., None].view(np.uint8)

    set_scales(np.ones(data.shape[:-1]))
    unit = float(dequantize(data.reshape(-1, nbytes), quant).std())
    set_scales(std / unit * rng.uniform(0.5, 1.5, data.shape[:-1]))
    return data.reshape(*shape[:-1], -1)


def _tensors(checkpoint: Path, config: TextConfig) -> dict[str, np.ndarray]:
    """The checkpoint's text tensors in float32 under gguf-py's names for them."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, config.num_hidden_layers)
    out = {}
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{checkpoint}: holds no *.safetensors")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for hf_name in handle.keys():  # noqa: SIM118
                ours = from_hf(hf_name)
                if ours is not None:
                    out[_gguf_name(known, ours)] = handle.get_tensor(hf_name).to(torch.float32).numpy()
    return dict(sorted(out.items()))


def _gguf_name(known: gguf.TensorNameMap, ours: str) -> str:
    # The converter names these two itself.
    for suffix, theirs in (
        (".router.scale", "ffn_gate_inp.scale"),
        (".router.per_expert_scale", "ffn_down_exps.scale"),
    ):
        if ours.endswith(suffix):
            return f"blk.{ours.split('.')[1]}.{theirs}"
    name = ours if ours.startswith("lm_head") else f"model.{ours}"
    if not name.endswith(".weight"):
        name += ".weight"
    theirs = known.get_name(name, try_suffixes=(".weight",))
    if theirs is None:
        raise ValueError(f"gguf-py has no name for {ours}")
    return theirs


def _separated(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for name, values in tensors.items():
        if name.endswith("ffn_gate_up_exps.weight"):
            gate, up = np.split(values, 2, axis=1)
            yield name.replace("gate_up", "gate"), np.ascontiguousarray(gate)
            yield name.replace("gate_up", "up"), np.ascontiguousarray(up)
        else:
            yield name, values


def _joined(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One attn_qkv for the layers that have all three projections, as the converter's --fuse-qkv does."""
    out = dict(tensors)
    for name in tensors:
        parts = [name.replace("attn_v", f"attn_{part}") for part in "qkv"]
        if re.fullmatch(r"blk\.\d+\.attn_v\.weight", name):
            out[name.replace("attn_v", "attn_qkv")] = np.concatenate([out.pop(part) for part in parts])
    return out


def _chooser(types: Types, config: TextConfig, tensors: Mapping[str, np.ndarray]) -> Callable[[str, tuple], str]:
    if types == "Q4_K_M":
        wanted = _q4_k_m(config, [name for name in tensors if name.endswith("attn_v.weight")])
    elif isinstance(types, str):
        wanted = _default(types)
    elif isinstance(types, Mapping):
        patterns = dict(types)

        def wanted(name: str, _shape: tuple[int, ...]) -> str:
            return next((kind for pattern, kind in patterns.items() if fnmatch.fnmatchcase(name, pattern)), "F32")
    else:
        wanted = types

    def choose(name: str, shape: tuple[int, ...]) -> str:
        kind = wanted(name, shape)
        if kind not in TYPES:
            raise ValueError(f"{name}: unknown type {kind!r}; known: {', '.join(TYPES)}, and Q4_K_M for a whole file")
        if shape[-1] % _block(kind):
            kind = _FALLBACK.get(kind, "F16")
        return kind if shape[-1] % _block(kind) == 0 else "F16"

    return choose


def _default(kind: str) -> Callable[[str, tuple], str]:
    """`kind` for what llama.cpp quantizes, F32 for what it does not."""

    def wanted(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight") or "ffn_gate_inp" in name:
            return "F32"
        if "per_layer_model_proj" in name and kind not in ("F32", "F16"):
            return "BF16"
        return kind

    return wanted


def _q4_k_m(config: TextConfig, values: list[str]) -> Callable[[str, tuple], str]:
    """llama.cpp's Q4_K_M (but for its exception for 8 experts, which no released Gemma 4 has)."""
    base = _default("Q4_K")

    def more_bits(i: int, of: int) -> bool:
        return i < of // 8 or i >= 7 * of // 8 or (i - of // 8) % 3 == 2

    def wanted(name: str, shape: tuple[int, ...]) -> str:
        kind = base(name, shape)
        if kind != "Q4_K":
            return kind
        if name == "output.weight" or (config.tie_word_embeddings and name.endswith("token_embd.weight")):
            return "Q6_K"
        if name in values:
            return "Q6_K" if more_bits(values.index(name), len(values)) else kind
        if "ffn_down" in name:
            return "Q6_K" if more_bits(int(name.split(".")[1]), config.num_hidden_layers) else kind
        return "Q5_K" if name.endswith("attn_qkv.weight") else kind

    return wanted


def _block(kind: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


def _blocks(name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    if kind.name not in DRAWN:
        return quantize(np.ascontiguousarray(values), kind)
    key = hashlib.sha256(f"{seed}/{kind.name}/{name}/{values.shape}".encode()).digest()
    return draw_blocks(kind.name, values.shape, float(values.std()), np.random.default_rng(list(key)))


def _add_metadata(writer: gguf.GGUFWriter, config: TextConfig, name: str, types: Types) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    prefix = "ALL" if types == "F32" else "MOSTLY"
    file_type = getattr(gguf.LlamaFileType, f"{prefix}_{types}", gguf.LlamaFileType.GUESSED)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata_from_config(config).items():
        if key.startswith("tokenizer.") or key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path) -> None:
    """The vocabulary by id. Every special token is a control token, as in the released files."""
    raw: dict[str, Any] = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {**raw["model"]["vocab"], **{token["content"]: token["id"] for token in raw["added_tokens"]}}
    special = {token["content"]: token["special"] for token in raw["added_tokens"]}
    tokens, kinds = [], []
    for i, token in enumerate(sorted(ids, key=ids.__getitem__)):
        if ids[token] != i:
            raise ValueError(f"{checkpoint / 'tokenizer.json'}: no token has the id {i}")
        tokens.append(token)
        kinds.append(_token_type(token, special.get(token)))
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types(kinds)
    gguf.SpecialVocab(checkpoint, load_merges=True).add_to_gguf(writer, quiet=True)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


def _token_type(token: str, special: bool | None) -> gguf.TokenType:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return gguf.TokenType.BYTE
    if special is None:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
