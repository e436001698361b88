"""The ops of flowfast, `torch.ops.flowfast.<op>(...)`: one module an op, with its equation and a PyTorch reference.

All ops write into tensors that the caller owns and return nothing; they may be called from eager and scripted code, and
give the same bits whatever the backend, the batch and the number of threads.
"""

from flowfast.ops import (  # each module registers its ops when it is imported
    assign_lanes,
    branch_step,
    decide,
    gather_ancestors,
    noise,
    normalize_log_weights,
    posterior_mean,
    resample,
)
from flowfast.ops.backend import instruction_set, libraries, live, use_backend, use_instruction_set
from flowfast.ops.backend import load as _load
from flowfast.ops.noise import STREAM_VERSION
from flowfast.ops.resample import RESAMPLING

_load()

__all__ = [
    "RESAMPLING",
    "STREAM_VERSION",
    "assign_lanes",
    "branch_step",
    "decide",
    "gather_ancestors",
    "instruction_set",
    "libraries",
    "live",
    "noise",
    "normalize_log_weights",
    "posterior_mean",
    "resample",
    "use_backend",
    "use_instruction_set",
]
