"""One method a file; importing this package registers them all."""

from flowfast.searcher.methods import bon, code, rbf, smc, sop, svdd  # noqa: F401
from flowfast.searcher.plan import METHODS, make_method

__all__ = ["METHODS", "make_method"]
