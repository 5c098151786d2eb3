"""Hugging Face's Gemma 4 behind the tap vocabulary, in float32, bfloat16, and true float64."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma4 import modeling_gemma4 as hf
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.utils import logging

from gemma4_impl import taps
from gemma4_impl.config import TextConfig
from gemma4_impl.taps import Recorder
from gemma4_impl.vision.config import VisionConfig
from reference import chunks as cut
from reference.activations import quantize_inputs
from reference.float64 import PromoteFloat32
from reference.stream import filled, set_frequencies, streamed
from reference.vision import reset_frequencies, tap_vision, tapped_qkv
from reference.weights import Source, WeightFiles

if TYPE_CHECKING:
    from gemma4_impl.vision.processing import ProcessedImages

Attention = Literal["eager", "sdpa"]
Taps = dict[str, Tensor]


class HFReference:
    """A checkpoint in transformers, run on one unpadded sequence at a time.

    Args:
        dtype: the dtype that weights are loaded in and, unless `truth`, computed in.
        truth: compute in float64 on the weights as `dtype` rounds them. Constants that the model rounds to its
            dtype (the embedding scale) are rounded to `dtype` too; nothing else is.
        attention: transformers' eager or sdpa attention. The experts run eagerly with the former, and as
            transformers chooses with the latter.
        activations: names of the weights (`layers.0.mlp.up_proj.weight`) of linears whose inputs are rounded to 8-bit
            integers (`reference.activations.rounded`).
        stream: leave the weights on disk and load each layer as it runs: slower, and the memory of one layer.
        weights: take the tensors from here, and only the config from `path`. Dequantized ones are not rounded for
            the truth. The head is the embedding unless they hold another.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        truth: bool = False,
        attention: Attention = "eager",
        device: torch.device | str = "cpu",
        stream: bool = False,
        weights: Source | None = None,
        activations: Collection[str] = (),
    ):
        self.config = TextConfig.from_file(path)
        self.dtype, self.truth, self.device = dtype, truth, torch.device(device)
        if stream or weights is not None:
            config = text_config(Path(path))
            if weights is not None:
                config.tie_word_embeddings = "lm_head.weight" not in weights
            build, compute = streamed if stream else filled, torch.float64 if truth else dtype
            self.model = build(config, weights or WeightFiles(Path(path)), dtype, compute, self.device)
        else:
            self.model = _load(Path(path), dtype, self.device)
        self.text = getattr(self.model.model, "language_model", self.model.model)
        self.tower = getattr(self.model.model, "vision_tower", None)
        self.vision = None if self.tower is None else VisionConfig.from_file(path)
        if truth:
            self._to_float64()
        self.use(attention)
        self._tap_modules()
        quantize_inputs(self.model, activations)

    def use(self, attention: Attention) -> None:
        """Switches between transformers' attention implementations without reloading."""
        self.attention = attention
        self.model.set_attn_implementation(f"tapped_{attention}")
        # grouped_mm takes no float64; eager experts are the definition.
        if self.config.enable_moe_block:
            eager = attention == "eager" or self.truth
            self.model.set_experts_implementation("eager" if eager else "grouped_mm")

    def capture(
        self,
        rows: Sequence[Sequence[int]],
        *,
        glob: str = "*",
        forced: Mapping[str, Tensor] | None = None,
        routing: Mapping[str, Tensor] | None = None,
        chunks: Sequence[int] = (),
        images: "ProcessedImages | None" = None,
    ) -> Taps:
        """Taps [B, L, ...] of every row, NaN past the row's end, in execution order.

        `forced` [B, L, ...] and `routing` [B, L, k] as in `taps.Recorder`. Each row is one forward, or goes through
        transformers' own cache in chunks of these sizes, over and over, extended where they would cut an image.
        `images` stand at the image tokens of a single row, and add the vision tower's taps [I, P, ...], NaN in padding.
        Raises ValueError for images where there is no tower, or more than one row."""
        out: Taps = {}
        if images is not None and (self.tower is None or len(rows) != 1):
            raise ValueError("images need the vision tower of a multimodal checkpoint, loaded whole, and one sequence")
        length = max(len(row) for row in rows)
        for b, row in enumerate(rows):
            T = len(row)
            recorder = Recorder(
                1,
                T,
                glob,
                {n: v if n.startswith(taps.VISION) else v[b : b + 1, :T] for n, v in (forced or {}).items()},
                {name: value[b : b + 1, :T] for name, value in (routing or {}).items()},
            )
            tokens = torch.tensor([list(row)], device=self.device)
            mode = PromoteFloat32() if self.truth else nullcontext()
            with torch.no_grad(), taps.recording(recorder), mode:
                self._forward(tokens, chunks, self._encode(images))
            for name, value in recorder.values.items():
                if name.startswith(taps.VISION):
                    out[name] = value
                    continue
                if name not in out:
                    out[name] = value.new_full((len(rows), length, *value.shape[2:]), torch.nan)
                out[name][b, :T] = value[0]
        return taps.in_order(out, self.config, self.vision)

    def _encode(self, images: "ProcessedImages | None") -> Tensor | None:
        """The soft tokens of all images [n, D], by the model's own method."""
        if images is None:
            return None
        images = images.trimmed()
        pixels = images.pixel_values.to(self.device, torch.float64 if self.truth else torch.float32)
        found = self._get_image_features(pixels, images.positions.to(self.device), return_dict=True)
        return torch.cat(list(found.pooler_output))

    def _forward(self, tokens: Tensor, chunks: Sequence[int], soft: Tensor | None = None) -> Tensor:
        """The logits of the last chunk."""
        cache = DynamicCache(config=self.model.config) if chunks else None
        places = None if soft is None else tokens == self.vision.image_token_id
        for part in cut.chunks(tokens.shape[1], chunks or [tokens.shape[1]], places):
            positions = torch.arange(part.start, part.stop, device=self.device)[None]
            taps.at(positions)
            output = self.model(
                input_ids=tokens[:, part],
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=0,
                **({} if places is None else self._image_arguments(places, part, soft)),
            )
            logits = taps.tap("", "logits", output.logits)
        return logits

    def _image_arguments(self, places: Tensor, part: slice, soft: Tensor) -> dict[str, Any]:
        """What the model is to be told of the images in this part of a sequence, which were encoded before."""
        # With a cache transformers looks the types up by absolute position.
        told: dict[str, Any] = {"mm_token_type_ids": places[:, : part.stop].long()}
        before, here = int(places[:, : part.start].sum()), int(places[:, part].sum())
        if here:
            self._ready = BaseModelOutputWithPooling(pooler_output=(soft[before : before + here],))
            # That there are any is all that counts: `_tap_modules` has what is made of them.
            told["pixel_values"] = soft
        return told

    def forceable(self, name: str) -> bool:
        """Whether `forced` reaches this tap: sums that transformers never hands to a module are read, not replaced, and
        what routers chose is replaced by `routing`."""
        last_sum = "resid_ple" if self.config.hidden_size_per_layer_input else "resid_mlp"
        return not name.endswith(("." + last_sum, taps.CHOICE))

    def _to_float64(self) -> None:
        self.model.double()
        for module in self.model.modules():
            if isinstance(module, hf.Gemma4TextScaledWordEmbedding):
                scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64).to(self.dtype)
                module.embed_scale = scale.double().to(self.device)
        with PromoteFloat32():
            set_frequencies(self.text.rotary_emb, self.device)
            if self.tower is not None:
                reset_frequencies(self.tower)

    def _tap_modules(self) -> None:
        """Hooks that read each tap off transformers' own modules, and write a forced value back.

        A module's output is replaced by returning another. A residual is replaced in place on its way into a norm or
        gate: the layer goes on adding to that same tensor."""
        text = self.text
        if self.tower is None:
            text.embed_tokens.register_forward_hook(_output_tap("", "embed"))
        else:
            # The multimodal model looks tokens up and merges the images in before it calls the text model.
            text.register_forward_pre_hook(_embed_tap, with_kwargs=True)
            tap_vision(self.tower, self.model.model.embed_vision)
            self._get_image_features = self.model.model.get_image_features
            self.model.model.get_image_features = lambda *args, **kwargs: self._ready
        if self.config.hidden_size_per_layer_input:
            combine = text.project_per_layer_inputs
            text.project_per_layer_inputs = lambda *a, **k: taps.tap("", "per_layer_inputs", combine(*a, **k))
        for i, layer in enumerate(text.layers):
            prefix = f"layers.{i}."
            layer.self_attn.register_forward_hook(_output_tap(prefix, "self_attn.out"))
            layer.pre_feedforward_layernorm.register_forward_pre_hook(_residual_tap(prefix, "resid_mid", layer))
            layer.mlp.register_forward_hook(_output_tap(prefix, "mlp"))
            if self.config.enable_moe_block:
                layer.router.register_forward_hook(_router_tap(prefix))
                layer.experts.register_forward_hook(_flat_tap(prefix, "experts"))
            if self.config.hidden_size_per_layer_input:
                layer.per_layer_input_gate.register_forward_pre_hook(_residual_tap(prefix, "resid_mlp", layer))
                layer.post_per_layer_input_norm.register_forward_hook(_sum_tap(prefix, "resid_ple", layer))
            else:
                layer.post_feedforward_layernorm.register_forward_hook(_sum_tap(prefix, "resid_mlp", layer))
            layer.register_forward_hook(_output_tap(prefix, "out"))
        text.norm.register_forward_hook(_output_tap("", "norm"))


def text_config(path: Path) -> Gemma4TextConfig:
    """transformers' config of the text model: of a checkpoint folder by its own reading, of a GGUF file by ours."""
    if path.is_dir():
        return AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    fields = dataclasses.asdict(TextConfig.from_file(path))
    return Gemma4TextConfig(**{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    multimodal = '"gemma4"' in (path / "config.json").read_text(encoding="utf-8")
    cls = hf.Gemma4ForConditionalGeneration if multimodal else hf.Gemma4ForCausalLM
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = cls.from_pretrained(path, dtype=dtype, local_files_only=True)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return model.to(device).eval()


def _embed_tap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "inputs_embeds": taps.tap("", "embed", kwargs["inputs_embeds"])}


def _output_tap(prefix: str, name: str) -> Any:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (taps.tap(prefix, name, output[0]), *output[1:])
        return taps.tap(prefix, name, output)

    return hook


def _residual_tap(prefix: str, name: str, layer: nn.Module) -> Any:
    def hook(module: nn.Module, args: tuple) -> None:
        value = taps.tap(prefix, name, args[0])
        if value is not args[0]:
            args[0].copy_(value)
        layer.tapped_residual = args[0]

    return hook


def _sum_tap(prefix: str, name: str, layer: nn.Module) -> Any:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        taps.tap(prefix, name, layer.tapped_residual + output)

    return hook


def _flat_tap(prefix: str, name: str) -> Any:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return taps.tap(prefix, name, output[None]).flatten(0, 1)

    return hook


def _router_tap(prefix: str) -> Any:
    """transformers' router returns (probabilities, weights, experts): the last two follow from forced values."""

    def hook(module: nn.Module, args: tuple, output: tuple) -> tuple:
        probs, weights, index = output
        forced_probs = taps.tap(prefix, "router", probs[None])[0]
        forced_index = taps.route(prefix, index[None])[0]
        if forced_probs is not probs or forced_index is not index:
            weights = forced_probs.gather(-1, forced_index)
            weights = weights / weights.sum(dim=-1, keepdim=True) * module.per_expert_scale[forced_index]
        return forced_probs, weights, forced_index

    return hook


def _tapped(attend: Any) -> Any:
    """transformers' attention function with q, k, v [B, heads, T, H] tapped, as they arrive, in BTNH."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if isinstance(module, hf.Gemma4VisionAttention):
            query, key, value = tapped_qkv(module, query, key, value)
        elif isinstance(module, hf.Gemma4TextAttention):
            prefix = f"layers.{module.layer_idx}.self_attn."
            query = taps.tap(prefix, "q", query.transpose(1, 2)).transpose(1, 2)
            if not module.is_kv_shared_layer:
                # The new ones come after those of the cache. In place, because the cache holds these same tensors, and
                # so do the layers that share them.
                T = query.shape[2]
                for name, states in (("k", key[:, :, -T:]), ("v", value[:, :, -T:])):
                    states.copy_(taps.tap(prefix, name, states.transpose(1, 2)).transpose(1, 2))
        return attend(module, query, key, value, mask, **kwargs)

    return forward


for _name, _attend in (("eager", hf.eager_attention_forward), ("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])):
    AttentionInterface.register(f"tapped_{_name}", _tapped(_attend))
    AttentionMaskInterface.register(f"tapped_{_name}", ALL_MASK_ATTENTION_FUNCTIONS[_name])
