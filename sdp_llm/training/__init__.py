"""The training loop around an engine or a simulation."""
