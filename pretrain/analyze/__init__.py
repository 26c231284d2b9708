"""Looking into a trained run: one question a file."""
