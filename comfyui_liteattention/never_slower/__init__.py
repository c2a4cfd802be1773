"""Never slower than dense: from which step on a run skips, and how much time it may lose by that.

A call of ours that computes all tiles may take longer than the user's own attention; it pays once
enough tiles are skipped. How long ours takes is measured once per process for each model, size and
settings: the first calls of every run are left to the user's own attention and timed (dense.py),
and at the next one the first run also makes some calls of ours whose results it throws away, one in
full and one with the skipping that the settings allow at the end of a run (rehearsal.py). From
these times follows the step at which to begin, or that skipping never pays (costs.py).

After that the clock plays no part. What a run loses or gains is calculated from its tiles
(account.py), so that the same seed gives the same bits: a layer begins when the allowance covers
what it may lose, and a run that has used up the allowance goes on densely (pace.py).
"""
