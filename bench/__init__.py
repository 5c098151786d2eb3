"""Benchmarks of ours against every peer that is installed: `pytest --benchmark-only`, or `make bench` for a report."""
