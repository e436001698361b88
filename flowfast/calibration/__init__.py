"""What a reward knows of a model's samples on their way, measured once (`flowfast calibrate`), and the plans that
follow from it.

A bank (bank.py) holds rewards of many whole trajectories at every transition. A plan whose chains only go on or end is
replayed on it (replay.py), so that plans are compared without a model (choose.py).
"""
