"""Requests into slots: rounds, host rewards, deadlines, checkpoints, CUDA graphs, replay."""
