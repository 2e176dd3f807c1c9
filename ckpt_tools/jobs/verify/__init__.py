"""Verify: whether a checkpoint is whole, and whether an output is what its record says.

`file` checks a checkpoint by itself. `origin` looks for the inputs in its record, and makes it again from them. Both
give a `check` each time, and compare tensors that `names` has paired. `job` is the whole, and changes no file.
"""
