"""In-place resampling of latents and velocities: only dead slots are written, only their ancestors are read.

    python -m bench resample_in_place

16 particles of 1 MiB, 6 of them dead. Peers: `index`, `x = x[ancestors]`, and `index_select`, into a second buffer that
is there already (index_select(out=); buffers would then change places). All sides move x and u. `bytes` is the
minimum, every dead slot written once and its ancestor read once; `bytes_touched` is what the kernel of the operating
system saw being read or written, by pages, and `bytes_ratio` that over the minimum (null: it does not tell here).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.timing import FLUX, Suite, paired

PARTICLES, DEAD = 16, 6


def ancestors() -> Tensor:
    """Slots 1, 4, 6, 9, 11, 14 are dead; each goes on from a survivor of its own."""
    parents = torch.arange(PARTICLES)
    parents[torch.tensor([1, 4, 6, 9, 11, 14])] = torch.tensor([0, 3, 5, 8, 10, 13])
    return parents


def touched(run: Callable[[], object], tensors: list[Tensor]) -> int | None:
    """Bytes of `tensors` (each a mapping of its own) in pages that `run` reads or writes; None where Linux's page flags
    are not to be had."""
    others = on_pages(torch.zeros(1 << 24))
    try:
        Path("/proc/self/clear_refs").write_text("1")
        others.add_(1)  # a page that the processor still knows is not marked again: make it forget
        run()
        areas = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    except OSError:
        return None
    total = 0
    for tensor in tensors:
        own = [area for area in areas if area.startswith(f"{tensor.data_ptr():x}-")]
        found = re.search(r"^Referenced: +(\d+) kB", own[0], re.MULTILINE) if own else None
        if found is None:
            return None
        total += 1024 * int(found.group(1))
    return total


def on_pages(values: Tensor) -> Tensor:
    """The same numbers in a private mapping of their own, in small pages, between two that nobody touches."""
    size = values.numel() * values.element_size()
    memory = mmap.mmap(-1, size + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE, 0, size)  # also keeps the mapping apart from its neighbours
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel()).view(values.shape)
    copy.copy_(values)
    return copy


def test_resample_in_place(benchmark: Any, suite: Suite) -> None:
    options = suite.options
    shape = (64, 64) if options.quick else FLUX
    torch.manual_seed(0)
    x, u = (on_pages(torch.randn(PARTICLES, shape[0] * shape[1])) for _ in range(2))
    parents = ancestors()
    expected = x[parents], u[parents]
    x_next, u_next = torch.empty_like(x), torch.empty_like(u)

    def ours() -> None:
        torch.ops.flowfast.gather_ancestors_(x, u, parents)

    def index() -> tuple[Tensor, Tensor]:
        return x[parents], u[parents]

    def index_select() -> tuple[Tensor, Tensor]:
        torch.index_select(x, 0, parents, out=x_next)
        torch.index_select(u, 0, parents, out=u_next)
        return x_next, u_next

    pages = touched(ours, [x, u])
    for result in ((x, u), index(), index_select()):
        assert all(torch.equal(left, right) for left, right in zip(result, expected, strict=True))
    least = 2 * 2 * DEAD * x[0].numel() * x.element_size()
    candidates: dict[str, Callable[[], object]] = {"ours": ours, "index": index, "index_select": index_select}
    times = paired(benchmark, candidates, options.turns(41), calls=4)
    for peer in ("index", "index_select"):
        suite.row(
            "resample_in_place", batch=PARTICLES, shape=shape, dtype=x.dtype, ours=times["ours"], peer=peer,
            theirs=times[peer], bytes=least, dead=DEAD, bytes_touched=pages,
            bytes_ratio=None if pages is None else pages / least,
        )  # fmt: skip
