"""An evaluation: checkpoints scored on the same data, and averages compared with the best single one.

`options` declares the options, and `report` the result. `job` has each checkpoint scored by an evaluator, ranks them by
the metric that decides, and compares them as a sweep does.
"""
