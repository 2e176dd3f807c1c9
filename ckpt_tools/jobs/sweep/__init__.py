"""A sweep: many averages of one series from one read of it, each scored, and the best one chosen honestly.

`options` declares the options, and `grid` makes the candidates of them. `scoring` has them written (`making`, or
`running_sum` for a soup) and scored (`evaluation`), keeps the scores (`results`), and deletes the files that nobody
wants (`scratch`). `judging` ranks them by the metric that decides (`aim`) and compares the best with the last
checkpoint (`verdict`), for the `report`; `files` writes the picture, the page (with the `geometry` of the series) and
the table of it. `job` is the whole.
"""
