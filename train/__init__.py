"""The training loop, objectives, optimizer, checkpoints and logging."""
