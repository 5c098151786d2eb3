"""A session of generation with an exported MLX program, run by the replay."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from gemma4_impl.errors import short
from gemma4_impl.export.folder import PROGRAM, Manifest
from gemma4_impl.export.replay.machine import Machine, Tap
from gemma4_impl.export.replay.pte import Pte, open_pte
from gemma4_impl.export.vision import ends_of
from gemma4_impl.model.soft_tokens import SoftTokens

METHOD = "forward"


class Session:
    """`forward` of an exported program, and its caches; `gemma4_impl.export.run.Session` says what it offers."""

    def __init__(self, pte: Pte, manifest: Manifest):
        """Raises ValueError for a program that is malformed, holds what the replay does not know, or contradicts its
        manifest."""
        for name, value in manifest.constants.items():
            if name in pte.constants and _listed(pte.constants[name]) != _listed(value):
                raise ValueError(
                    f"{name} is {short(pte.constants[name])} in the program, {short(value)} in its manifest"
                )
        self.manifest, self.length = manifest, 0
        self._pte, self._others = pte, {}
        self._machine = Machine(pte, METHOD)
        ranks = [len(shape) for _, shape in self._machine.signature]
        if ranks not in ([2, 1], [2, 1, 3, 2]):
            raise ValueError(f"{METHOD} takes inputs of {ranks} dimensions, not tokens and a position")
        self._taps = _taps(manifest.extra.get("taps", {}), self._machine)

    @property
    def taps(self) -> bool:
        """Whether `forward(..., taps=True)` works."""
        return bool(self._taps)

    def forward(
        self, tokens: Tensor, position: int, images: SoftTokens | None = None, taps: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """tokens int64 [1, T], the first at `position`, which is `length` -> float32 logits [1, V] of the last one.

        Args:
            images: the soft tokens in this chunk, for a program with a vision tower.
            taps: also return the taps of the vocabulary, [1, T, ...] in the program's dtype, or [1, 1, ...] of the last
                token where nothing else was computed.
        Raises ValueError for input that does not fit, and as `Machine.run`."""
        self.manifest.limits.check_chunk(tokens, position, self.length)
        if taps and not self._taps:
            raise ValueError("the program was exported without taps")
        wanted = {name: tap for name, (tap, _) in self._taps.items()} if taps else {}
        inputs = [to_mlx(tokens), mx.array([position], mx.int64), *self._images(images, position, tokens.shape[1])]
        (logits, *_), seen = self._machine.run(inputs, wanted)
        self.length += tokens.shape[1]
        out = to_torch(logits).float().reshape(1, -1)
        if not taps:
            return out
        return out, {name: _permuted(to_torch(value), self._taps[name][1]) for name, value in seen.items()}

    def _images(self, images: SoftTokens | None, position: int, length: int) -> list[mx.array]:
        """The further inputs of a program with a vision tower: embeds [1, T, D], and ends [1, T], -1 at text."""
        if len(self._machine.signature) == 2:
            if images is not None:
                raise ValueError("the program was exported without a vision tower")
            return []
        dtype, (_, _, D) = self._machine.signature[2]
        if images is None:
            return [mx.zeros((1, length, D), dtype), mx.full((1, length), -1, mx.int64)]
        if images.mask.shape != (1, length):
            raise ValueError(f"soft tokens of shape {list(images.mask.shape)} for a chunk of {length} tokens")
        positions = torch.arange(position, position + length)[None]
        return [to_mlx(images.embeds).astype(dtype), to_mlx(ends_of(images, positions))]

    def reset(self) -> None:
        """Forgets everything: the next token is at position 0."""
        self._machine.reset()
        self.length = 0

    def run(self, method: str, *inputs: Tensor) -> list[Tensor]:
        """Another method of the program, which has no part in the context. Raises as `Machine` and its `run`."""
        if method not in self._others:
            self._others[method] = Machine(self._pte, method)
        outputs, _ = self._others[method].run([to_mlx(value) for value in inputs])
        return [to_torch(value) for value in outputs]

    def vision(self, patches: Tensor, positions: Tensor) -> Tensor:
        """patches [1, P, C], positions int64 [1, P, 2] -> soft tokens [1, L, D]."""
        return self.run("vision", patches, positions)[0]


def open_session(folder: Path, manifest: Manifest) -> Session:
    """The program in `folder`, with empty caches. Raises OSError, ValueError (see `Session`), or ImportError if mlx or
    executorch is not installed."""
    return Session(open_pte(Path(folder) / PROGRAM), manifest)


def to_mlx(value: Tensor) -> mx.array:
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        # numpy, which stands between the two, has none.
        return mx.array(value.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(value.numpy())


def to_torch(value: mx.array) -> Tensor:
    if value.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(value.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


def _permuted(value: Tensor, axes: list[int] | None) -> Tensor:
    return value if axes is None else value.permute(axes)


def _listed(value: object) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _taps(raw: object, machine: Machine) -> dict[str, tuple[Tap, list[int] | None]]:
    """The manifest's taps: name -> slot, and the axes to transpose it by."""
    taps = {}
    chains = machine.graph.chains
    for name, item in raw.items() if isinstance(raw, Mapping) else [("", raw)]:
        where = f"manifest, tap {short(name)}"
        try:
            tap, axes = Tap(item["chain"], item["instruction"], item["tensor"]), item["axes"]
        except (KeyError, TypeError):
            raise ValueError(f"{where}: {short(item)} names no place in the program") from None
        numbers = (tap.chain, tap.instruction, tap.tensor)
        if any(type(n) is not int or n < 0 for n in numbers) or not (
            tap.chain < len(chains) and tap.instruction < len(chains[tap.chain]) and tap.tensor < machine.graph.tensors
        ):
            raise ValueError(f"{where}: {numbers} is no place in the program")
        if axes is not None and (not isinstance(axes, list) or sorted(axes, key=repr) != list(range(len(axes)))):
            raise ValueError(f"{where}: axes {short(axes)}")
        taps[name] = tap, axes
    return taps
