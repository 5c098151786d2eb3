"""Runs a transformers text model whose weights stay on disk: each module gets them just before its forward."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gemma4 import modeling_gemma4 as hf


class WeightFiles:
    """The tensors of a checkpoint folder by the names that transformers' text model gives them."""

    def __init__(self, path: Path):
        index = path / "model.safetensors.index.json"
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else None
        self.slices: dict[str, Any] = {}
        for name in names or ["model.safetensors"]:
            file = safe_open(path / name, framework="pt")
            self.slices |= {key: (file, key) for key in file.keys()}  # noqa: SIM118

    def get(self, name: str) -> Any:
        """The safetensors slice of `name`, in a text-only or a multimodal checkpoint."""
        for key in (name, name.replace("model.", "model.language_model.", 1)):
            if key in self.slices:
                file, key = self.slices[key]
                return file.get_slice(key)
        raise KeyError(name)


def streamed(path: Path, dtype: torch.dtype, compute: torch.dtype, device: torch.device) -> nn.Module:
    """A `Gemma4ForCausalLM` on meta that loads each layer, norm and head as `dtype`, converted to `compute`, when it
    runs, and drops it afterwards. Of an embedding table only the rows looked up are read, so peak memory is the
    largest layer or the output head."""
    config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    with torch.device("meta"):
        model = hf.Gemma4ForCausalLM(config).eval()
    files = WeightFiles(path)
    text = model.model
    for module in text.modules():
        if isinstance(module, hf.Gemma4TextScaledWordEmbedding):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
    set_frequencies(text.rotary_emb, device)

    def load(name: str) -> Tensor:
        return files.get(name)[:].to(device, dtype).to(compute)

    for prefix, module in _units(model):
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(_rows(f"{prefix}.weight", files, dtype, compute, device))
        elif prefix == "lm_head":
            tied = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
            module.register_forward_pre_hook(lambda m, a, name=tied: _set(m, "weight", load(name)))
        else:
            module.register_forward_pre_hook(_fill(prefix, load), prepend=True)
        module.register_forward_hook(_empty)
    return model


def set_frequencies(rotary: nn.Module, device: torch.device) -> None:
    """Computes transformers' RoPE frequencies again, as its own functions do: no checkpoint holds them."""
    for kind, init in rotary.rope_init_fns.items():
        inv_freq, _ = init(rotary.config.per_layer_config[kind], device, layer_type=kind)
        setattr(rotary, f"{kind}_inv_freq", inv_freq)


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "lm_head", model.lm_head
    for name, module in model.model.named_children():
        if isinstance(module, nn.ModuleList):
            yield from ((f"model.{name}.{i}", layer) for i, layer in enumerate(module))
        elif any(True for _ in module.parameters()):
            yield f"model.{name}", module


def _fill(prefix: str, load: Any) -> Any:
    def hook(module: nn.Module, args: tuple) -> None:
        for name in module.state_dict():
            parent, _, leaf = name.rpartition(".")
            _set(module.get_submodule(parent), leaf, load(f"{prefix}.{name}"))

    return hook


def _rows(name: str, files: WeightFiles, dtype: torch.dtype, compute: torch.dtype, device: torch.device) -> Any:
    def hook(module: nn.Module, args: tuple) -> tuple:
        ids, where = args[0].unique(return_inverse=True)
        part = files.get(name)
        rows = torch.cat([part[i : i + 1] for i in ids.tolist()])
        _set(module, "weight", rows.to(device, dtype).to(compute))
        return (where, *args[1:])

    return hook


def _empty(module: nn.Module, args: tuple, output: Any) -> None:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is not None and name != "embed_scale":
                    _set(part, name, torch.empty_like(value, device="meta"))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value
