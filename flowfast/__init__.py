"""flowfast makes a pretrained flow model give better samples at inference time: SDE, interpolant conversion, reward
search within a fixed budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowfast.version import __version__

if TYPE_CHECKING:
    from flowfast import rewards
    from flowfast.api import flow_from, load, replay, search
    from flowfast.archive.export import export
    from flowfast.archive.load import load_archive
    from flowfast.config import SearchConfig
    from flowfast.engine.async_engine import AsyncEngine
    from flowfast.engine.engine import Engine
    from flowfast.engine.request import Event, Failed, Finished, Found, Partial, Progress
    from flowfast.models.diffusers import from_diffusers
    from flowfast.types import Candidate, FlowDefaults, Sample, SearchResult, Winner

_HOMES = {
    "AsyncEngine": "flowfast.engine.async_engine",
    "Engine": "flowfast.engine.engine",
    "Event": "flowfast.engine.request",
    "Failed": "flowfast.engine.request",
    "Finished": "flowfast.engine.request",
    "Found": "flowfast.engine.request",
    "Partial": "flowfast.engine.request",
    "Progress": "flowfast.engine.request",
    "SearchConfig": "flowfast.config",
    "export": "flowfast.archive.export",
    "flow_from": "flowfast.api",
    "from_diffusers": "flowfast.models.diffusers",
    "load": "flowfast.api",
    "load_archive": "flowfast.archive.load",
    "replay": "flowfast.api",
    "search": "flowfast.api",
    "Candidate": "flowfast.types",
    "FlowDefaults": "flowfast.types",
    "Sample": "flowfast.types",
    "SearchResult": "flowfast.types",
    "Winner": "flowfast.types",
}


def __getattr__(name: str) -> Any:
    """Loads the engine when it is first asked for, so that `import flowfast` costs little."""
    import importlib

    if name == "rewards":
        return importlib.import_module("flowfast.rewards")
    if name not in _HOMES:
        raise AttributeError(f"module 'flowfast' has no attribute {name!r}: choose of {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = [
    "AsyncEngine",
    "Candidate",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "FlowDefaults",
    "Found",
    "Partial",
    "Progress",
    "Sample",
    "SearchConfig",
    "SearchResult",
    "Winner",
    "__version__",
    "export",
    "flow_from",
    "from_diffusers",
    "load",
    "load_archive",
    "replay",
    "rewards",
    "search",
]
