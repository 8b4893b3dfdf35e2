"""The training loop, objectives, optimiser, checkpoints and logging."""
