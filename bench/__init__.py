"""Measurements: `python -m bench.run` (timings) and `python -m bench.gpu_check` (everything a GPU
is needed for, in one file of results)."""
