"""Rules: one module a way of averaging, each a pure function to coefficients with an item `RULE`."""
