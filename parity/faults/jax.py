"""The fault catalogue of the JAX model: PyTorch's mistakes under their names, and those that only JAX invites."""

from parity.faults.fault import Fault
from parity.faults.jax_attention import ATTENTION, MASKS
from parity.faults.jax_blocks import BLOCKS, BRANCHES
from parity.faults.jax_cache import CACHES
from parity.faults.jax_images import IMAGES

__all__ = ["JAX_FAULTS", "JAX_IMAGE_FAULTS"]

JAX_FAULTS: dict[str, Fault] = {fault.name: fault for fault in (*BLOCKS, *ATTENTION, *MASKS, *CACHES, *BRANCHES)}
"""By name. Their `inject` takes a `parity.candidate_jax.JaxCandidate`."""

JAX_IMAGE_FAULTS: dict[str, Fault] = {fault.name: fault for fault in IMAGES}
"""By name; these take multimodal checkpoints."""
