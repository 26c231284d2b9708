"""Comparison of finished or running trainings, from what they keep in their run directories."""
