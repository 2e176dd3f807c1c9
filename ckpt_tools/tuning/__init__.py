"""Tuning: the training of a classifier, or of more, after averaging; no checkpoints."""
