"""The catalogue of faults of exported programs, by name."""

from parity.faults.export_graph import GRAPH
from parity.faults.export_session import SESSION

EXPORT = {fault.name: fault for fault in (*GRAPH, *SESSION)}
"""None is here that nothing can show: an MLX program computes which of its slots are filled from the position alone, so
that what a sequence before left in them is never read."""
