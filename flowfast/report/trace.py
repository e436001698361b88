"""`--profile`: what a search did when, as a Chrome trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flowfast.errors import OptionError
from flowfast.files import replacing


@contextmanager
def chrome_trace(path: Path | None) -> Iterator[None]:
    """Profiles what runs inside and writes it for chrome://tracing or ui.perfetto.dev; None: does nothing."""
    if path is None:
        yield
        return
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OptionError("--profile: expected the name of a file as UTF-8 text") from None
    with torch.profiler.profile() as profiler:
        yield
    with replacing(path) as part:
        profiler.export_chrome_trace(str(part))
