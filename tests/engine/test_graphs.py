"""Bucket, warm-up, capture, replay and fallback of CUDA graphs, against a recorder that replays on the CPU.

The recorder keeps the ops of a capture with the very tensors they read and wrote, and a replay runs these again: a
result that went to a new address, or an input that moved, comes out wrong just as it would on a GPU. Static outputs are
filled with NaN before a replay, so that a dead replay shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten

import flowfast
from flowfast.engine import graphs, loaded
from flowfast.engine.graphs import Graphs
from flowfast.errors import FlowfastError
from flowfast.rounds.batch import SlotBatch
from tests.toys import METHODS, GaussianFlow, NearTarget


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.made: set[int] = set()  # what the ops themselves allocated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_flatten((args, kwargs))[0]:
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.before:
                storage = leaf.untyped_storage()
                self.before[storage.data_ptr()] = (storage, storage.clone())
        result = func(*args, **(kwargs or {}))
        places = [leaf.untyped_storage().data_ptr() for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        self.made |= set(places) - self.before.keys()
        self.ops.append((func, args, kwargs or {}, result))
        return result

    def undo(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)


class CpuRecorder:
    """A capture runs the work to see its ops and then undoes what it wrote, for on a GPU a capture runs nothing."""

    def __init__(self, alive: bool = True):
        self.alive, self.captures, self.replays = alive, 0, 0

    def capture(self, work: Any) -> Any:
        self.captures += 1
        tape = Tape()
        with tape:
            result = work()
        tape.undo()

        def replay() -> None:
            self.replays += 1
            for tensor in tree_flatten(result)[0]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in tape.made:
                    tensor.fill_(torch.nan)
            for func, args, kwargs, kept in tape.ops if self.alive else []:
                fresh = func(*args, **kwargs)
                for to, new in zip(tree_flatten(kept)[0], tree_flatten(fresh)[0], strict=True):
                    if isinstance(to, Tensor) and to.data_ptr() != new.data_ptr():
                        to.copy_(new)

        return result, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CpuRecorder:
    found = CpuRecorder()
    monkeypatch.setattr(loaded, "recorder_for", lambda device, wanted: found if wanted else None)
    return found


def search(method: str, **options: Any) -> flowfast.SearchResult:
    options = {"budget": 60, "steps": 6, "micro_batch": 4, "guidance": 3.0, **options}
    return flowfast.search(GaussianFlow(), ["a", "bb", "ccc"], reward=NearTarget(), method=method, slots=2, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_captured_search_gives_the_same_bits(recorder: CpuRecorder, method: str) -> None:
    plain = search(method, cuda_graphs=False)
    assert recorder.captures == 0
    captured = search(method)
    assert 0 < recorder.captures < recorder.replays
    for one, other in zip(plain.samples, captured.samples, strict=True):
        assert (one.winner, one.nfe, one.reward) == (other.winner, other.nfe, other.reward)
        assert torch.equal(one.latent, other.latent)


@pytest.mark.parametrize("method", METHODS)
def test_a_captured_steered_search_gives_the_same_bits(recorder: CpuRecorder, method: str) -> None:
    """Forward and backward pass are in one graph."""
    plain, captured = (search(method, gradient="dps:0.5", cuda_graphs=wanted) for wanted in (False, True))
    assert 0 < recorder.captures < recorder.replays
    for one, other in zip(plain.samples, captured.samples, strict=True):
        assert (one.winner, one.nfe, one.reward) == (other.winner, other.nfe, other.reward)
        assert torch.equal(one.latent, other.latent)


def test_host_rewards_are_not_captured(recorder: CpuRecorder) -> None:
    calls = []

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(prompts))
        return -images.flatten(1).square().sum(1)

    result = flowfast.search(GaussianFlow(), ["a"], reward=score, method="rbf", budget=60, steps=6, guidance=1.0)
    assert recorder.replays > 0
    assert len(calls) == result.rounds and sum(calls) == result.samples[0].reward_calls


@pytest.mark.parametrize(("method", "regroups"), [("rbf", False), ("smc", True), ("bon", False)])
def test_after_their_warm_up_the_parts_of_a_round_are_replays(
    recorder: CpuRecorder, method: str, regroups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's part in every round, decoder and reward where a score is read, and what regroups chains: each is
    captured once for each number of its rows, so that numbers add up and do not multiply."""
    sizes: list[tuple[int, int]] = []
    lay = SlotBatch.lay
    monkeypatch.setattr(SlotBatch, "lay", lambda self: (lay(self), sizes.append(self.size())))
    search(method, micro_batch=16)
    parts = [[rows for rows, _ in sizes], [scored for _, scored in sizes if scored]]
    parts += [[scored for _, scored in sizes]] * regroups
    assert recorder.captures == sum(len(set(rows)) for rows in parts)
    assert recorder.replays == sum(len(rows) - len(set(rows)) for rows in parts)


def test_a_reward_that_cannot_be_captured_leaves_model_and_decoder_in_the_graph(
    recorder: CpuRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    class Waits(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            if any(isinstance(mode, Tape) for mode in _get_current_dispatch_mode_stack()):
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().forward(images, t, cond)

    options = {"budget": 60, "steps": 6, "micro_batch": 16, "method": "rbf"}
    found = [
        flowfast.search(GaussianFlow(), ["a", "bb"], reward=Waits(), cuda_graphs=wanted, **options)
        for wanted in (True, False)
    ]
    assert recorder.replays > 0 and len(caplog.records) == 1
    for one, other in zip(found[0].samples, found[1].samples, strict=True):
        assert (one.winner, one.nfe, one.reward) == (other.winner, other.nfe, other.reward)


def test_a_flow_that_waits_is_not_captured_and_says_why(
    recorder: CpuRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    class Waits(GaussianFlow):
        defaults = flowfast.FlowDefaults(waits_because="it reads the weather")

    options = {"reward": NearTarget(), "budget": 60, "steps": 6, "micro_batch": 16, "method": "rbf"}
    found = [flowfast.search(flow, ["a", "bb"], **options) for flow in (Waits(), GaussianFlow())]
    assert [record.getMessage() for record in caplog.records] == [
        "runs without CUDA graphs, more slowly, because it reads the weather"
    ]
    assert recorder.captures == 2  # the other flow's
    assert [sample.winner for sample in found[0].samples] == [sample.winner for sample in found[1].samples]


def test_a_dead_replay_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "recorder_for", lambda device, wanted: CpuRecorder(alive=False))
    try:
        broken = search("rbf")
    except FlowfastError:
        return
    monkeypatch.undo()
    assert broken.nan_rewards > 0


def test_one_capture_a_key_after_one_eager_run() -> None:
    recorder, x = CpuRecorder(), torch.zeros(4)
    graphs, seen = Graphs(recorder), []

    def work() -> Tensor:
        seen.append("eager")
        return x * 2

    for step in range(5):
        x.fill_(step)
        for key in ("one", "other"):
            assert graphs.run(key, work, [x]).tolist() == [2.0 * step] * 4
    assert len(seen) == 4  # a warm-up and a capture for each key
    assert (recorder.captures, recorder.replays) == (2, 8)


@pytest.mark.parametrize(
    "other", [torch.zeros(4), torch.zeros(2, 2), torch.zeros(8)[::2]], ids=["moved", "shape", "stride"]
)
def test_an_input_that_changed_its_place_is_refused(other: Tensor) -> None:
    x = torch.zeros(4)
    graphs = Graphs(CpuRecorder())
    for _ in range(2):
        graphs.run("key", lambda: x + 1, [x])
    with pytest.raises(FlowfastError, match=r"inputs \[0\]"):
        graphs.run("key", lambda: x + 1, [other])


def test_what_cannot_be_captured_runs_eagerly_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class Refuses:
        def capture(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphs, x = Graphs(Refuses()), torch.ones(2)
    for _ in range(4):
        assert graphs.run("key", lambda: x + 1, [x]).tolist() == [2.0, 2.0]
    assert "not permitted when stream is capturing" in graphs.eager_because["key"]
    assert len(caplog.records) == 1


def test_sizes_that_were_not_used_for_longest_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    recorder = CpuRecorder()
    kept = graphs.Graphs(recorder)

    def run(size: int) -> None:
        kept.run(size, lambda: torch.zeros(size).add(1), [])

    for size in (1, 1, 2, 2, 1, 3, 3):  # each warmed up, then captured; 1 is used again before 3 comes
        run(size)
    assert recorder.captures == 3
    run(1)
    assert recorder.captures == 3
    run(2)  # had to leave for 3
    assert recorder.captures == 4
