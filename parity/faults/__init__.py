"""The fault catalogue: mistakes that porters make, each with the tap where the engine must find it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma4_impl.config import TextConfig
from parity import PATHS
from parity.candidate import TorchCandidate
from parity.compare import Comparison
from parity.engine import DTYPES, Baseline, baseline, judge
from parity.faults.attention import ATTENTION
from parity.faults.blocks import BLOCKS
from parity.faults.branches import BRANCHES
from parity.faults.fault import Fault
from parity.faults.images import IMAGES
from parity.faults.masks import MASKS
from parity.images import drawn, place
from parity.inputs import default_tokens

__all__ = ["FAULTS", "IMAGE_FAULTS", "Fault", "baseline_of", "find"]

FAULTS = {fault.name: fault for fault in (*BLOCKS, *ATTENTION, *MASKS, *BRANCHES)}
"""By name. None is here that the engine cannot see: a softmax computed in bfloat16, say, stays within twice the
rounding that transformers makes itself."""

IMAGE_FAULTS = {fault.name: fault for fault in IMAGES}
"""By name; these take multimodal checkpoints."""


def baseline_of(fault: Fault, checkpoint: str | Path, paths: Sequence[str] = PATHS) -> Baseline:
    """What `find` holds the fault against: in its dtype, on as many tokens as it takes to show; the reference also runs
    in the chunks of `paths`, which only widens what is allowed."""
    path = Path(checkpoint)
    tokens = default_tokens(TextConfig.from_file(path), path, fault.length)
    tokens, images = place(path, tokens, drawn() if fault.images else ())
    return baseline(path, tokens, DTYPES[fault.dtype], paths=paths, images=images)


def find(
    fault: Fault, checkpoint: str | Path, base: Baseline | None = None, load: Callable[..., Any] = TorchCandidate
) -> Comparison:
    """Loads the candidate, puts the fault in, and judges it through the fault's path.

    `base` is what `baseline_of` gives, and is made here if absent. `load(checkpoint, dtype)` makes the candidate."""
    base = base or baseline_of(fault, checkpoint)
    candidate = load(checkpoint, base.dtype)
    fault.inject(candidate)
    return judge(candidate, base, fault.path)
