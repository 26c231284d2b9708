"""Ablations: rows that differ from one baseline by a few settings, trained and judged alike, in one table."""
