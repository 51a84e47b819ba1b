"""Training: state, step, loop, checkpoints, sharding."""
