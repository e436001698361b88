"""Named spans of a round, for NVTX (Nsight Systems) and for the Chrome trace of `flowfast generate --profile`.

Without a listener a span costs two calls into the nvtx package, or nothing where that is missing; NVTX_DISABLE=1 turns
these off, too.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import nvtx

    _domain: Any = nvtx.get_domain("flowfast") if nvtx.enabled() else None
except ImportError:
    _domain = None


class Span:
    """A reusable context; spans of one name do not nest."""

    def __init__(self, name: str):
        self.name = f"flowfast: {name}"
        self._attributes = _domain and _domain.get_event_attributes(message=name)
        self._record: Any = None

    def __enter__(self) -> None:
        if self._attributes is not None:
            _domain.push_range(self._attributes)
        if torch.autograd.profiler._is_profiler_enabled:
            self._record = torch.profiler.record_function(self.name)
            self._record.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._record is not None:
            self._record.__exit__(*error)
            self._record = None
        if self._attributes is not None:
            _domain.pop_range()


BRANCH, VELOCITY, DECODE, REWARD, DECIDE = (Span(name) for name in ("branch", "velocity", "decode", "reward", "decide"))
