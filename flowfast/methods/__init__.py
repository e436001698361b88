"""Search methods, one a file; importing this package registers them all."""

from flowfast.methods import auto, bon, code, prune, rbf, smc, sop, svdd  # noqa: F401
from flowfast.methods.base import METHODS, described, make_method

__all__ = ["METHODS", "described", "make_method"]
