"""Series: which checkpoints, in what order, and how much each counts."""
