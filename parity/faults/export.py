"""The catalogue of faults of exported programs, by name."""

from parity.faults.export_graph import GRAPH
from parity.faults.export_session import SESSION

EXPORT = {fault.name: fault for fault in (*GRAPH, *SESSION)}
"""None is here that nothing can show: which slots of a cache are filled a program computes from the position alone, so
that what an earlier sequence left in them is never read."""
