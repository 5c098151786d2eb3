"""Tiny Gemma 4 checkpoints in Hugging Face format, one for each released variant, made with transformers itself."""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.utils import logging as hf_logging

from gemma4_impl.config import FULL, SLIDING, TextConfig
from gemma4_impl.names import from_hf
from reference.tiny_vision import processor_config, vision_config

_COMMON = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 512,
    "final_logit_softcapping": 30.0,
    "head_dim": 16,
    "global_head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
}

# A sqrt(hidden_size) that bfloat16 rounds badly (by 1.3e-3 or more) shows an embedding scale that was not rounded.
# Two unshared layers of each type come before the shared ones, so that reading the wrong producer shows.
TINY: dict[str, dict[str, Any]] = {
    "E2B": _COMMON
    | {
        "hidden_size": 40,
        "intermediate_size": 64,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "layer_types": [*[SLIDING] * 4, FULL, SLIDING, FULL, SLIDING, FULL],
        "sliding_window": 7,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
    },
    "E4B": _COMMON
    | {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": [SLIDING, SLIDING, FULL] * 3,
        "sliding_window": 8,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 12,
    },
    "26B-A4B": _COMMON
    | {
        "hidden_size": 56,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "sliding_window": 6,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 16,
        "use_bidirectional_attention": "vision",
    },
    "31B": _COMMON
    | {
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
        "sliding_window": 9,
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
    },
}
"""Keyword arguments of `Gemma4TextConfig`, by variant."""

SHORT: dict[str, dict[str, Any]] = {
    "E2B": {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL], "num_kv_shared_layers": 2},
    "E4B": {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL], "num_kv_shared_layers": 1},
    "26B-A4B": {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
    "31B": {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
}
"""The same of as few layers as have every feature, over `TINY`'s: for what takes its time for each layer."""

ALIGNED: dict[int, dict[str, Any]] = {
    32: {"hidden_size": 96, "intermediate_size": 64, "moe_intermediate_size": 32, "hidden_size_per_layer_input": 32},
    256: {
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "hidden_size_per_layer_input": 32,
        "head_dim": 64,
        "global_head_dim": 128,
    },
}
"""Sizes for quantization, by the multiple that rows then have: 32, or 256 but for the per-layer input's projections."""


def aligned(variant: str, multiple: int) -> dict[str, Any]:
    """`overrides` for `make_tiny` that give `variant` rows of a multiple of 32 or 256."""
    return {key: value for key, value in ALIGNED[multiple].items() if TINY[variant].get(key)}


_MARKER_NAMES = {
    "boi": "<|image>",
    "image": "<|image|>",
    "eoi": "<image|>",
    "video": "<|video|>",
    "boa": "<|audio>",
    "audio": "<|audio|>",
    "eoa": "<audio|>",
}
_MARKERS = {text: 98 + i for i, text in enumerate(_MARKER_NAMES.values())}
_SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, **_MARKERS, "<|turn>": 105, "<turn|>": 106}

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def make_tiny(
    variant: str,
    out: str | Path,
    *,
    dtype: str = "float32",
    multimodal: bool = False,
    hub_form: bool = False,
    shards: int = 1,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a checkpoint (weights, config, tokenizer) to the folder `out` and returns its path.

    A tensor's values depend on its name, its shape, `variant` and `seed` only: the same bytes on every machine, the
    same text weights with and without `multimodal`; other dtypes hold the float32 values, rounded. `multimodal` adds a
    vision tower, puts the text tensors under `model.language_model.` and gives ids 98 to 104 to images, video and
    audio; `hub_form` writes the released files' flat config keys; `shards` > 1 splits the weights into that many files;
    `overrides` replaces entries of `TINY[variant]`.
    Raises ValueError for an unknown name, a bad value, and if `out` exists and is not an empty folder.
    """
    kwargs = _text_kwargs(variant, overrides or {})
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: already exists and is not an empty folder")
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with _quiet():
            model = _build(variant, kwargs, multimodal).to(getattr(torch, dtype))
            _fill(model, f"{variant}/{seed}")
            model.save_pretrained(tmp)
        if shards != 1:
            _split(tmp, shards)
        if hub_form:
            _to_hub_form(tmp / "config.json")
        if multimodal:
            _write_json(tmp / "processor_config.json", processor_config(variant))
        _write_tokenizer(tmp)
        tmp.replace(target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def _text_kwargs(variant: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    if variant not in TINY:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(TINY)}")
    known = {f.name for f in dataclasses.fields(transformers.Gemma4TextConfig)}
    if unknown := set(overrides) - known - {"global_head_dim", "num_global_key_value_heads"}:
        raise ValueError(f"unknown override {min(unknown)!r}; expected a field of Gemma4TextConfig")
    # Copied: Gemma4TextConfig may change the layer_types it is given.
    kwargs = copy.deepcopy({**TINY[variant], **overrides})
    # It also accepts sizes that contradict each other; these are refused before anything is built.
    TextConfig.from_dict({**kwargs, "model_type": "gemma4_text"}, f"{variant} with overrides")
    return kwargs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or warnings from transformers, and torch's random state as it was."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _build(variant: str, kwargs: Mapping[str, Any], multimodal: bool) -> transformers.PreTrainedModel:
    config = transformers.Gemma4TextConfig(**kwargs)
    if multimodal:
        ids = {f"{name}_token_id": _MARKERS[text] for name, text in _MARKER_NAMES.items() if name != "eoa"}
        config = transformers.Gemma4Config(
            text_config=config,
            vision_config=vision_config(variant),
            eoa_token_index=_MARKERS[_MARKER_NAMES["eoa"]],
            tie_word_embeddings=config.tie_word_embeddings,
            **ids,
        )
        model = transformers.Gemma4ForConditionalGeneration(config)
    else:
        model = transformers.Gemma4ForCausalLM(config)
    special = {key: kwargs[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**special)
    return model


def _fill(model: transformers.PreTrainedModel, key: str) -> None:
    """Overwrites every parameter and saved buffer."""
    text = model.config.get_text_config()
    # Sorted, so that a tied lm_head comes before the embedding whose values it must have.
    for name, tensor in sorted(model.state_dict().items()):
        name = from_hf(name) or name
        z = _noise(f"{key}/{name}", tuple(tensor.shape))
        tensor.copy_(_weight(name, z, text))


def _noise(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values of mean 0, variance 1 and size below 3.5, in float32."""
    # torch.randn's bits depend on the CPU's vector instructions; a sum of uniforms takes exact steps everywhere.
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    u = torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return (u[0] + u[1] + u[2] + u[3] - 2) * math.sqrt(3)


def _weight(name: str, z: torch.Tensor, text: transformers.Gemma4TextConfig) -> torch.Tensor:
    """The tensor `name` made from the noise `z`, scaled so that activations stay near 1 and every branch counts."""
    leaf = name.split(".")[-1]
    off_one = (1 + 0.3 * z).clamp(min=0.3)
    if leaf == "layer_scalar":
        index = int(re.search(r"layers\.(\d+)\.", name)[1])
        value = 0.6 + 0.5 * ((index + 1) * 0.618034 % 1)  # golden ratio: all different
        return torch.full_like(z, value if value < 0.85 else value + 0.2)  # and none within 5 % of 1
    if re.search(r"[qk]_norm\.weight$", name):
        # The attention scale is 1, so these two norms alone set the spread of the attention logits.
        return off_one * math.sqrt(1.6 / math.sqrt(z.shape[-1]))
    if name == "norm.weight":
        return 3.5 * off_one  # the tied head's gain: sets the spread of the logits
    if leaf in ("scale", "per_expert_scale", "std_scale") or name.endswith("norm.weight") or "layernorm" in name:
        return off_one
    if leaf in ("input_min", "output_min", "input_max", "output_max"):
        # An average of values, which o_proj is given, is smaller than one of them.
        bound = (1.2 + 0.5 * z.abs()) * (0.25 if "o_proj" in name else 1)
        return -bound if leaf.endswith("min") else bound
    if name.endswith("router.proj.weight"):
        return 2 * z
    if name == "embed_tokens_per_layer.weight":
        return z * (1 / math.sqrt(text.hidden_size_per_layer_input))
    if leaf in ("std_bias", "position_embedding_table"):
        return 0.5 * z
    return z * (1 / math.sqrt(z.shape[-1]))


def _split(folder: Path, shards: int) -> None:
    """Replaces model.safetensors by `shards` files and their index."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    if not 1 <= shards <= len(names):
        raise ValueError(f"shards = {shards}: must lie between 1 and the number of tensors, {len(names)}")
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    whole.unlink()


def _to_hub_form(path: Path) -> None:
    """Folds `per_layer_config` into the released files' `global_head_dim` and `num_global_key_value_heads`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    per_layer = text.pop("per_layer_config")
    full = per_layer[str(text["layer_types"].index(FULL))]
    text["global_head_dim"] = full["head_dim"]
    text["num_global_key_value_heads"] = full.get("num_key_value_heads")
    _write_json(path, config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


_TEXT = """
The river starts as a thin line of water under the stones of the high meadow, and nobody who steps over it there
would think that it could carry a ship. It runs down through the pines, takes in the snow of three mountains, and by
the time it reaches the first village it is wide enough to need a bridge. The bridge was built by a mason who had
never built one before. He asked the old people how high the water had been in the worst year, and when they showed
him the mark on the wall of the mill he added the height of a man and began to work. The other masons laughed, but
the bridge is still standing and theirs are not.

Below the village the valley opens and the river slows. Here are the orchards, the fields of barley and the long
rows of beans, and here in the summer the children learn to swim. They are told every year not to go near the weir,
and every year one of them goes, and comes home wet and silent. In the evening the herons stand in the shallows. They
do not move for an hour, and then they move once, and there is one fish less in the river.

What does the river know about all of this? Nothing, of course; it is only water that goes from a higher place to a
lower one. But the people who live with it have learned to read it: the colour that says there was rain in the
mountains, the sound that says the ice will break in the morning, the smell that comes before a storm. They write
these things down in a book that is kept in the school, and anyone who can read may add a line to it. The first
entry is two hundred years old. It says that the water was high, that the bridge was holding, and that there would
be bread again when the road was open.
"""

_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- elif part['type'] == 'image' -%}
                {{- '\\n\\n<|image|>\\n\\n' -}}
            {%- else -%}
                {{- raise_exception('only text and images are supported, got ' + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def _write_tokenizer(folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja: 512 tokens, BPE with byte fallback.

    No space is put before the text and none is dropped, so decoding gives back any text but one: a literal U+2581,
    which stands for the space in the vocabulary, as in Gemma's own tokenizer, comes back as a space.
    """
    folder = Path(folder)
    vocab, merges = _bpe()
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        "extra_special_tokens": {f"{name}_token": text for name, text in _MARKER_NAMES.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "padding_side": "left",
    }
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")


def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges: special tokens and ASCII up to 106, then 256 bytes, space, newline, merges of `_TEXT`."""
    vocab = dict(_SPECIAL) | {chr(c): c - ord("!") + 4 for c in range(ord("!"), ord("~") + 1)}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "\n"]:
        vocab[token] = len(vocab)
    words = {tuple("▁" + word): count for word, count in Counter(_TEXT.split()).items()}
    merges = []
    while len(vocab) < 512:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        vocab.setdefault("".join(best), len(vocab))
        words = {_merge(word, best): count for word, count in words.items()}
    return vocab, merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        out.append("".join(word[i : i + step]))
        i += step
    return tuple(out)
