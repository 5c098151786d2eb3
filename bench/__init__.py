"""Benchmarks of ours against every peer that is installed: `pytest --benchmark-only` measures, `make bench` reports too."""
