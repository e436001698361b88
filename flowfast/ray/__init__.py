"""Many machines, by Ray (extra `flowfast[ray]`): docs/ray.md.

Only this package knows Ray, and it schedules nothing itself: Ray Data hands batches of prompts to `Searcher`s, and a
reward that many of them share is one of Ray's actors.
"""

from __future__ import annotations

from flowfast.errors import OptionError

try:
    import ray
    import ray.data  # noqa: F401
except ImportError as error:
    raise OptionError(f"flowfast.ray needs {error.name}: pip install 'flowfast[ray]'") from None

from flowfast.ray.searcher import Searcher

__all__ = ["Searcher"]
