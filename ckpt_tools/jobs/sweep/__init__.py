"""A sweep: many averages of one series from one read of it, each scored, and the best one chosen honestly.

`options` declares the options, and `grid` makes the candidates of them. `bench` has them written (`making`, or
`running_sum` for a soup) and scored (`evaluation`), and keeps the scores (`results`). `judging` ranks them and compares
the best with the last checkpoint (`verdict`), for the `report`; `files` writes the picture, the page and the table of
it. `job` is the whole.
"""
