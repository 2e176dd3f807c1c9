"""A sweep: many averages of one series from one read of it, each scored, and the best one chosen honestly.

`options` declares the options, `bench` makes candidates and scores them, `results` keeps the scores, `verdict` compares
the best with the last checkpoint, and `job` is the whole.
"""
