"""Writes where the numbers of a search lie (flowfast/ops/layout.py) for C++ and CUDA, and for Triton.

    python csrc/write_layout.py

Run it after a change of that table; tests/ops/test_layout.py fails until then.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flowfast.ops import layout  # noqa: E402
from flowfast.ops.layout import ALIGNMENT, BUFFERS, Field  # noqa: E402

GENERATED = "Written by csrc/write_layout.py; flowfast/ops/layout.py says what each field is. Do not edit."
ENUMS = {
    "chain": "ChainRow",
    "score": "ScoreRow",
    "slot": "SlotRow",
    "slot_real": "SlotRealRow",
    "lane": "LaneRow",
    "lane_real": "LaneRealRow",
}
CPP = {"ints": "int64_t", "floats": "float", "flags": "bool"}


def cpp() -> str:
    """csrc/core/layout.h."""
    lines = [f"// {GENERATED}", "#pragma once", "", "#include <cstdint>", "", "namespace flowfast {", ""]
    for field in layout.FIELDS:
        if field.rows:
            names = [f"k{_camel(row)}" for row in (*field.rows, f"{field.name}_rows")]
            lines.append(f"enum {ENUMS[field.name]} {{ {', '.join(names)} }};")
    lines += ["", "struct Sizes {", "  int64_t slots, chains, lanes, transitions, widest, top;", "};", ""]
    lines += ["// Elements of the buffers.", "struct Extents {", "  int64_t ints, floats, flags;", "};", ""]
    lines += ["struct Fields {"]
    for field in layout.FIELDS:
        shape = ", ".join(((f"k{_camel(field.name)}Rows",) if field.rows else ()) + field.shape)
        member = f"  {'' if field.written else 'const '}{CPP[field.buffer]}* {field.name};"
        lines.append(f"{member:<36}// ({shape})")
    lines += ["};", "", "// Points at the fields of packed buffers, which may be null where only the extents matter."]
    lines += ["inline Extents lay_out(const Sizes& sizes, int64_t* ints, float* floats, bool* flags, Fields& fields) {"]
    lines += ["  const int64_t S = sizes.slots, B = S * sizes.chains, K = sizes.lanes, T = sizes.transitions;"]
    lines += ["  const int64_t N = sizes.widest, top = sizes.top;", "  Extents end{0, 0, 0};"]
    lines += ["  const auto from = [](auto* buffer, int64_t at) { return buffer ? buffer + at : nullptr; };"]
    for field in layout.FIELDS:
        step = ALIGNMENT // BUFFERS[field.buffer].itemsize
        count = _product(field, "B", "k{}Rows")
        lines.append(f"  fields.{field.name} = from({field.buffer}, end.{field.buffer});")
        lines.append(f"  end.{field.buffer} += ({count} + {step - 1}) / {step} * {step};")
    lines += ["  return end;", "}", "", "}  // namespace flowfast", ""]
    return "\n".join(lines)


def triton() -> str:
    """kernels/_layout.py."""
    lines = [f'"""{GENERATED}"""', "", "from typing import Any, NamedTuple", "", "import triton"]
    lines += ["import triton.language as tl", ""]
    for field in layout.FIELDS:
        rows = (*field.rows, f"{field.name}_rows") if field.rows else ()
        lines += [f"{row.upper()}: tl.constexpr = tl.constexpr({i})" for i, row in enumerate(rows)]
    lines += _tuple("Sizes", "Of one batch, as flowfast/ops/layout.py names them.", ["S", "B", "K", "N", "T", "top"])
    lines += _tuple("Fields", "Pointers to the fields.", [field.name for field in layout.FIELDS])
    lines += ["", "", "@triton.jit", "def fields_of(ints, floats, flags, sizes):"]
    lines += ['    """Of the packed buffers."""']
    lines += [f"    {name} = sizes.{name}.to(tl.int64)" for name in ("S", "B", "K", "N", "T", "top")]
    for field in layout.FIELDS:
        step = ALIGNMENT // BUFFERS[field.buffer].itemsize
        count = _product(field, "B", str(len(field.rows)))
        end = f"{field.buffer} + (({count} + {step - 1}) & -{step})"
        lines.append(f"    {field.name}, {field.buffer} = {field.buffer}, {end}")
    names = "".join(f"{field.name}, " for field in layout.FIELDS)
    wrapped = textwrap.wrap(names.rstrip(", "), 112)
    return "\n".join([*lines, "    return Fields(", *(f"        {line}" for line in wrapped), "    )  # fmt: skip", ""])


def _tuple(name: str, words: str, members: list[str]) -> list[str]:
    return ["", "", f"class {name}(NamedTuple):", f'    """{words}"""', "", *(f"    {each}: Any" for each in members)]


def _product(field: Field, batch: str, rows: str) -> str:
    names = {"2B": f"2 * {batch}", "T+1": "T + 1"}
    first = [rows.format(_camel(field.name))] if field.rows else []
    return " * ".join(first + [names.get(name, name) for name in field.shape])


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


WRITTEN = {"csrc/core/layout.h": cpp, "kernels/_layout.py": triton}


def main() -> None:
    for name, text in WRITTEN.items():
        (ROOT / name).write_text(text())


if __name__ == "__main__":
    main()
