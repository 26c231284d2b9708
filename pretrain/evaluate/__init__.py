"""Evaluation: whether a run is good. One metric a file, in `metrics/`."""
