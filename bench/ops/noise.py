"""Times the addressed normals on one thread: nanoseconds a normal for each instruction set and the PyTorch reference.

    python -m bench.ops.noise

A row of 2^18 float32 numbers (1 MiB) into the same buffer, so what counts is the generator and not memory. Checked
before it is timed: all of them give the same bits. Medians; candidates take turns.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time

import torch

from flowfast import ops
from flowfast.errors import OptionError

ELEMENTS = 1 << 18
ROUNDS = 41


def main() -> None:
    torch.set_num_threads(1)
    out, lane = torch.empty(1, ELEMENTS), torch.zeros(1, dtype=torch.int64)
    expected = torch.empty_like(out)
    ops.noise.normal_reference(expected, lane, lane, lane, lane, 1)
    available = []
    for name in ("scalar", "avx2", "avx512"):
        with contextlib.suppress(OptionError), ops.use_instruction_set(name):
            torch.ops.flowfast.normal_(out, lane, lane, lane, lane, 1)
            assert torch.equal(out, expected), f"{name} differs from the reference"
            available.append(name)

    times: dict[str, list[float]] = {name: [] for name in ("reference", "torch.randn", *available)}
    for turn in range(ROUNDS):
        for name, values in times.items():
            if name in ("reference", "scalar") and turn % 8:
                continue  # slow ones: a few are enough
            with ops.use_instruction_set(name) if name in available else contextlib.nullcontext():
                start = time.perf_counter()
                if name == "reference":
                    ops.noise.normal_reference(out, lane, lane, lane, lane, 1)
                elif name == "torch.randn":
                    torch.randn(ELEMENTS, out=out[0])
                else:
                    torch.ops.flowfast.normal_(out, lane, lane, lane, lane, 1)
                values.append(1e9 * (time.perf_counter() - start) / ELEMENTS)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 1 thread; ns a normal, median")
    for name, values in times.items():
        print(f"{name:<12} {statistics.median(values):8.3f}")


if __name__ == "__main__":
    main()
