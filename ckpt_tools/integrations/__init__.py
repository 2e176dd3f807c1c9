"""Callbacks that average the checkpoints of a training when it ends; each module imports its library."""
