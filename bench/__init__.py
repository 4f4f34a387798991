"""Benchmarks: each figure beside its floor, measured in one interleaved run. `python -m bench`."""
