"""`first_chain`: a search whose chains bear other numbers, hence another noise; with those before them one larger."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flowfast
from flowfast.errors import OptionError
from flowfast.types import Candidate
from tests.toys import METHODS, GaussianFlow, NearTarget

STEPS = 6


def search(method: str, **options: Any) -> tuple[flowfast.SearchResult, dict[tuple[int, int, int], float | None]]:
    seen: dict[tuple[int, int, int], float | None] = {}

    def note(candidates: list[Candidate]) -> None:
        seen.update({(c.chain, c.transition, c.candidate): c.reward for c in candidates})

    options = {"budget": 48, "steps": STEPS, "micro_batch": 4, "score_all": True, **options}
    return flowfast.search(
        GaussianFlow(), ["a"], reward=NearTarget(), method=method, on_round=note, **options
    ), seen  # fmt: skip


def test_chains_that_go_on_from_a_number_are_those_of_the_larger_search() -> None:
    """Best-of-n, eight samples of seven evaluations: chains 0 to 2 and 3 to 7 apart find what all eight find."""
    whole, all_of_them = search("bon", budget=56)
    parts = [search("bon", budget=21), search("bon", budget=35, first_chain=3)]
    assert parts[0][1] | parts[1][1] == all_of_them and len(all_of_them) == 56
    best = max((part for part, _ in parts), key=lambda part: part.samples[0].reward).samples[0]
    assert best.winner == whole.samples[0].winner and torch.equal(best.image, whole.samples[0].image)


@pytest.mark.parametrize("method", METHODS)
def test_the_winner_is_drawn_again_from_its_address(method: str) -> None:
    found, seen = search(method, first_chain=5)
    sample = found.samples[0]
    assert {chain for chain, *_ in sample.winner.path} <= set(range(5, 5 + 64)) and min(seen)[0] >= 5
    assert torch.equal(flowfast.replay(GaussianFlow(), sample, found.config)[-1][1], sample.image)


@pytest.mark.parametrize("method", METHODS)
def test_other_chains_have_another_noise(method: str) -> None:
    first, other = search(method)[0], search(method, first_chain=64)[0]
    assert not torch.equal(first.samples[0].image, other.samples[0].image)
    again = search(method, first_chain=64)[0]
    assert torch.equal(again.samples[0].image, other.samples[0].image)


def test_requests_of_different_first_chains_share_a_batch_and_keep_their_bits() -> None:
    engine = flowfast.Engine(GaussianFlow(), reward=NearTarget(), slots=3, micro_batch=4)
    for first in (0, 3, 64):
        engine.add_request("a", id=str(first), method="bon", budget=21, steps=STEPS, first_chain=first)
    found = {event.id: event.sample for event in engine.stream() if isinstance(event, flowfast.Finished)}
    engine.close()
    for first in (0, 3, 64):
        alone = search("bon", budget=21, first_chain=first)[0].samples[0]
        assert torch.equal(found[str(first)].image, alone.image) and found[str(first)].winner == alone.winner


@pytest.mark.parametrize("wrong", [-1, 2**31 + 1, "one", 1.5])
def test_a_number_that_no_chain_has_is_refused(wrong: Any) -> None:
    with pytest.raises(OptionError, match="first_chain"):
        search("bon", first_chain=wrong)
