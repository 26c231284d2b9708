"""Benchmarks: ratios of things timed side by side in one run. `python -m pretrain.bench` lists them."""
