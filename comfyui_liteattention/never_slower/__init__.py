"""Never slower than dense: from which step on a run skips, and how much may be lost by that.

A full call of ours may take longer than the attention that the user has; it pays as far as tiles
are skipped. How long it takes is measured once in a process for a model, a size and the settings:
the first calls of every run are left to the user's own attention, and at the last of these the
first run also asks ours, aside, in full and at the skipping that the settings allow later
(rehearsal.py). From that follows the step at which to begin, or that it never pays (costs.py).

The clock is not asked again. What a run loses or gains from there on is reckoned from its tiles
(account.py), so that the same seed gives the same bits: a layer begins when what it may lose is
covered, and a run that has nothing left to lose goes on densely (pace.py).
"""
