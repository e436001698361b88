"""The one table of where the numbers of a search lie, against what C++, CUDA and Triton were given of it."""

import importlib.util
from pathlib import Path

import pytest
import torch

from flowfast.ops import layout
from flowfast.ops.layout import FIELDS, Sizes, make_buffers, places, views

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("write_layout", ROOT / "csrc/write_layout.py")
write_layout = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_layout)

SIZES = [Sizes(1, 1, 1, 1, 0, 1), Sizes(3, 5, 2, 7, 33, 4), Sizes(2, 3, 4, 10, 24, 2)]


@pytest.mark.parametrize("name", write_layout.WRITTEN)
def test_the_generated_files_are_those_of_the_table(name):
    assert (ROOT / name).read_text() == write_layout.WRITTEN[name](), "run python csrc/write_layout.py"


@pytest.mark.parametrize("name", write_layout.WRITTEN)
def test_a_permuted_table_makes_other_files(name, monkeypatch):
    before = write_layout.WRITTEN[name]()
    monkeypatch.setattr(layout, "FIELDS", (FIELDS[1], FIELDS[0], *FIELDS[2:]))
    assert write_layout.WRITTEN[name]() != before


@pytest.mark.parametrize("sizes", SIZES)
def test_fields_are_aligned_apart_and_together_all_there_is(sizes):
    buffers = make_buffers(sizes)
    for name, field in views(buffers, sizes).items():
        assert field.is_contiguous()
        assert field.data_ptr() % layout.ALIGNMENT == buffers["ints"].data_ptr() % layout.ALIGNMENT == 0, name
        assert not bool((field != 0).any()), f"{name} overlaps an earlier field"
        field.fill_(1)
    for name, buffer in buffers.items():
        padding = int((buffer == 0).sum())
        assert padding < sum(layout.ALIGNMENT for field in FIELDS if field.buffer == name)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_permuted_layout_is_another_search(sizes, monkeypatch):
    """What a backend would do that was built from another table: the ops see other numbers."""
    before = places(sizes)[0]
    swapped = tuple(reversed(FIELDS))
    monkeypatch.setattr(layout, "FIELDS", swapped)
    after = places(sizes)[0]
    assert {name for name in before if before[name].offset != after[name].offset}


def test_names_of_rows_are_their_numbers():
    for field in FIELDS:
        for number, row in enumerate(field.rows):
            assert getattr(layout, row.upper()) == number
    assert torch.int64 == layout.BUFFERS["ints"]
