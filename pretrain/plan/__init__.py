"""Plans: what a run takes, before it is paid for."""
