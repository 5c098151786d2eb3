"""A transformers text model with weights from any source: all at once, or each module's just before its forward."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma4 import modeling_gemma4 as hf
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

from gemma4_impl.names import from_hf
from reference.float64 import unpromoted
from reference.weights import Source


def filled(
    config: Gemma4TextConfig, source: Source, dtype: torch.dtype, compute: torch.dtype, device: torch.device
) -> nn.Module:
    """A `Gemma4ForCausalLM` with every tensor taken from `source`, rounded as `_rounded` says."""
    model = _on_meta(config, device)
    tied = config.tie_word_embeddings
    for name in model.state_dict():
        if not (tied and name == "lm_head.weight"):
            parent, _, leaf = name.rpartition(".")
            value = _rounded(source, name, source.tensor(from_hf(name)).to(device), dtype, compute)
            _set(model.get_submodule(parent), leaf, value)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def streamed(
    config: Gemma4TextConfig, source: Source, dtype: torch.dtype, compute: torch.dtype, device: torch.device
) -> nn.Module:
    """A `Gemma4ForCausalLM` on meta that loads each layer, norm and head as `_rounded` says when it runs, and drops
    it afterwards. Of an embedding table only the rows looked up are read, so peak memory is the largest layer or the
    output head."""
    model = _on_meta(config, device)

    @unpromoted()
    def load(name: str) -> Tensor:
        return _rounded(source, name, source.tensor(from_hf(name)).to(device), dtype, compute)

    @unpromoted()
    def rows(name: str, ids: list[int]) -> Tensor:
        found = torch.cat([source.rows(from_hf(name), i, i + 1) for i in ids])
        return _rounded(source, name, found.to(device), dtype, compute)

    for prefix, module in _units(model):
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(_rows(f"{prefix}.weight", rows))
        elif prefix == "lm_head":
            tied = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
            module.register_forward_pre_hook(lambda m, a, name=tied: _set(m, "weight", load(name)))
        else:
            module.register_forward_pre_hook(_fill(prefix, load), prepend=True)
        module.register_forward_hook(_empty)
    return model


def _on_meta(config: Gemma4TextConfig, device: torch.device) -> nn.Module:
    """The model without weights; what no checkpoint holds is computed."""
    with torch.device("meta"):
        model = hf.Gemma4ForCausalLM(config).eval()
    for module in model.model.modules():
        if isinstance(module, hf.Gemma4TextScaledWordEmbedding):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
    set_frequencies(model.model.rotary_emb, device)
    return model


def _rounded(source: Source, name: str, value: Tensor, dtype: torch.dtype, compute: torch.dtype) -> Tensor:
    """`value` as a model in `dtype` holds it, in `compute`. The truth keeps dequantized values as they are: that a
    dense model in bfloat16 has to round them is its own error."""
    if compute == torch.float64 and source.is_quantized(from_hf(name)):
        return value.to(compute)
    return value.to(dtype).to(compute)


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


def _fill(prefix: str, load: Callable[[str], Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple) -> None:
        for name in module.state_dict():
            parent, _, leaf = name.rpartition(".")
            _set(module.get_submodule(parent), leaf, load(f"{prefix}.{name}"))

    return hook


def _rows(name: str, rows: Callable[[str, list[int]], Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple) -> tuple:
        ids, where = args[0].unique(return_inverse=True)
        _set(module, "weight", rows(name, ids.tolist()))
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
