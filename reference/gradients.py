"""Gradients of transformers' own loss, in float32, bfloat16 and true float64, for every parameter by canonical name."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gemma4_impl import names, taps
from gemma4_impl.taps import Recorder
from reference.float64 import PromoteFloat32
from reference.hf import HFReference

if TYPE_CHECKING:
    from gemma4_impl.vision.processing import ProcessedImages

_IGNORED = -100


@dataclass(frozen=True)
class Gradients:
    """What one sequence adds to the loss of a batch, and to its gradients."""

    loss: float
    parameters: dict[str, Tensor]
    """Canonical name -> float64, on the CPU, in the parameter's shape; zeros where nothing depends on it."""
    taps: dict[str, Tensor]
    """Those of the forward pass, [1, T, ...], of the vision tower [I, P, ...]."""


class StraightThrough(Recorder):
    """A recorder whose forced values replace a tap's value but not its gradient, which flows on to what came before. A
    forced NaN leaves the value.

    `roundoffs` moves each component of the gradient that enters the logits up or down by half an eps of its dtype."""

    roundoffs: torch.Generator | None = None

    def record(self, name: str, value: Tensor) -> Tensor:
        forced = super().record(name, value)
        if forced is not value:
            own = value.detach()
            # Exactly the forced value: the difference is 0.
            value = torch.where(forced.isnan(), own, forced) + (value - own)
        if name == "logits" and self.roundoffs is not None:
            sign = torch.randint(0, 2, value.shape, generator=self.roundoffs).to(value.device) * 2 - 1
            factor = 1 + torch.finfo(value.dtype).eps / 2 * sign.double()
            # The hook belongs to this tensor: a model that was not forced may go on with its own.
            value = value.view_as(value)
            value.register_hook(lambda gradient: (gradient * factor).to(gradient.dtype))
        return value


def gradients(
    reference: HFReference,
    row: Sequence[int],
    targets: Sequence[bool],
    total: int,
    *,
    glob: str = "",
    forced: Mapping[str, Tensor] | None = None,
    routing: Mapping[str, Tensor] | None = None,
    roundoffs: torch.Generator | None = None,
    images: "ProcessedImages | None" = None,
) -> Gradients:
    """Of transformers' causal loss over the tokens of `row` that are `targets`, divided by `total`.

    Every parameter is differentiated by, with images also the tower's and the projector's, and `layer_scalar`, which
    transformers keeps as a buffer that no optimiser sees. So is an embedding's row of the padding token, which PyTorch
    leaves out where there is a `padding_idx`. `images` stand at the row's image tokens, from the first one on; `forced`
    and `routing` are as in `HFReference.capture`, but that gradients flow through.

    Takes the model, as much again for the gradients, and all activations of the sequence."""
    leaves = parameters(reference, images is not None)
    recorder = StraightThrough(1, len(row), glob, forced, routing)
    recorder.roundoffs = roundoffs
    tokens = torch.tensor([list(row)], device=reference.device)
    labels = tokens.masked_fill(~torch.tensor([list(targets)], device=reference.device), _IGNORED)
    model = reference.model
    with taps.recording(recorder), PromoteFloat32() if reference.truth else nullcontext():
        logits = reference._forward(tokens, (), reference._encode(images))
        vocabulary = reference.config.vocab_size
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, num_items_in_batch=total)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    by_name = {
        name: (torch.zeros_like(leaf) if gradient is None else gradient).double().cpu()
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return Gradients(loss.item(), by_name, recorder.values)


def parameters(reference: HFReference, images: bool) -> dict[str, Tensor]:
    """Canonical name -> what is differentiated by."""
    for module in reference.model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    found = {}
    for name, value in reference.model.named_parameters():
        text = names.from_hf(name)
        if text is not None or images:
            found[text or names.tower_from_hf(name)] = value
    for i, layer in enumerate(reference.text.layers):
        found[f"layers.{i}.layer_scalar"] = layer.layer_scalar
    for value in found.values():
        value.requires_grad_(True)
    return found
