"""The `quantization_config` of config.json, which transformers' TorchAoConfig reads: torchao's own config objects."""

import json
import re
from collections.abc import Mapping
from typing import Any

from gemma4_impl.quant.recipe import QuantConfig


def torchao_config(tensors: Mapping[str, QuantConfig | None]) -> dict[str, Any]:
    """For tensors under the names that the files give them. A FqnToConfig: one regular expression for each kind of
    module, and the layers where these are not all treated alike."""
    kinds: dict[tuple[str, str], dict[str, list[str]]] = {}
    embedded = False
    for name, config in tensors.items():
        # A module's weight goes by the module's name, a bare parameter (the experts') by its own.
        before, layer, after = re.fullmatch(r"(?:(.*layers\.)(\d+))?(.*?)(?:\.weight)?", name).groups()
        kind = kinds.setdefault((before or "", after), {})
        kind.setdefault(json.dumps(_config(config)), []).append(layer or "")
        embedded = embedded or (config is not None and after.endswith(("embed_tokens", "lm_head")))
    modules = {}
    for (before, after), configs in kinds.items():
        for config, layers in configs.items():
            some = r"\d+" if len(configs) == 1 else f"({'|'.join(layers)})"
            if config != "null":
                modules[f"re:{re.escape(before)}{some}{re.escape(after)}" if before else after] = json.loads(config)
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": modules}}},
        "modules_to_not_convert": None,
        "include_input_output_embeddings": embedded,
        "untie_embedding_weights": False,
    }


def _config(config: QuantConfig | None) -> dict[str, Any] | None:
    """What torchao writes for the config object that describes the stored tensor; its defaults are left out."""
    if config is None:
        return None
    axis = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": config.group_size}}
    if config.bits == 4 and config.group_size is not None:
        return {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": config.group_size}}
    data = {"weight_dtype": {"_type": "torch.dtype", "_data": f"int{config.bits}"}}
    data["granularity"] = axis if config.group_size is None else group
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}
