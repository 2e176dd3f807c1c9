"""Evaluation: the user's model and data."""
