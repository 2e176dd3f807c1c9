"""Checkpoints: what one checkpoint holds, whatever its file format."""
