"""`flowfast compare`: every method on the same prompts and seeds, at equal budgets, with intervals.

Fair: one micro-batch for all arms, many prompts a call, and the arms take turns chunk by chunk, each time in another
order, so that a machine that slows down slows all of them.

design.py says what is compared, run.py runs it, statistics.py makes rows of results of it, results.py writes them.
"""
