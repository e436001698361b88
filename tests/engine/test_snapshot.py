"""An engine that was killed goes on: whoever had not been told a result gets the one that an undisturbed engine gives,
and damaged files are refused by name."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flowfast
from flowfast.engine import engine as engines
from flowfast.engine import journal as journals
from flowfast.engine import snapshot as snapshots
from flowfast.engine.journal import Journal
from flowfast.engine.snapshot import journal_path, read
from flowfast.errors import OptionError, OutputError
from flowfast.prompts import Prompt
from tests.engine.test_checkpoint import Counted, Killed
from tests.engine.test_checkpoint_files import bytes_written, mutants
from tests.toys import METHODS, GaussianFlow, NearTarget

Samples = dict[str, flowfast.Sample]
COMMON: dict[str, Any] = {"budget": 30, "steps": 6}
ASKED: dict[str, dict[str, Any]] = {
    **{method: {"prompt": "a" * (1 + at), "method": method, **COMMON} for at, method in enumerate(METHODS)},
    "small": {"prompt": "bb", "method": "svdd", "budget": 16, "steps": 6},
    "seed": {"prompt": Prompt("ccc", seed=7), "method": "rbf", **COMMON},
    "latents": {"prompt": "d", "method": "svdd", "latents": torch.full((3,), 0.3), **COMMON},
    **{f"host {at}": {"prompt": "h" * at, "method": "svdd", "reward": "host", **COMMON} for at in (1, 2, 3, 4)},
}


def on_host(images: Any, prompts: list[str]) -> list[float]:
    return [-float((image - len(prompt)).square().sum()) for image, prompt in zip(images, prompts, strict=True)]


def rewards() -> dict[str, Any]:
    return {"near": NearTarget(), "host": on_host}


OPTIONS: dict[str, Any] = {"slots": 4, "micro_batch": 4, "max_budget": 40}


def engine(path: Path | None, flow: Any = None, **options: Any) -> flowfast.Engine:
    save = {} if path is None else {"save_to": str(path), "save_seconds": 0.0}
    return flowfast.Engine(flow or GaussianFlow(), reward=rewards(), **{**OPTIONS, **save, **options})


def restored(path: Path, flow: Any = None, **options: Any) -> flowfast.Engine:
    options = {**OPTIONS, "save_seconds": 0.0, **options}
    return flowfast.Engine.restore(path, flow or GaussianFlow(), rewards(), **options)


def ask(of: flowfast.Engine, asked: dict[str, dict[str, Any]]) -> None:
    for id, params in asked.items():
        of.add_request(id=id, **params)


def dies(of: flowfast.Engine) -> None:
    """As a process that is killed: only the system lets go of its lock."""
    if of.kept is not None:
        of.kept.close()


def finish(of: flowfast.Engine) -> Samples:
    found: Samples = {}
    for event in of.stream():
        assert not isinstance(event, flowfast.Failed), event
        if isinstance(event, flowfast.Finished):
            found[event.id] = event.sample
    return found


@pytest.fixture(scope="module")
def expected() -> Samples:
    """Of an engine that nothing disturbs."""
    undisturbed = engine(None)
    ask(undisturbed, ASKED)
    return finish(undisturbed)


def assert_same(found: Samples, expected: Samples) -> None:
    for id, sample in found.items():
        right = expected[id]
        assert (sample.reward, sample.nfe, sample.winner) == (right.reward, right.nfe, right.winner), id
        assert (sample.reward_calls, sample.unspent) == (right.reward_calls, right.unspent), id
        for name in ("image", "latent", "x_t"):
            assert torch.equal(getattr(sample.top[0], name), getattr(right.top[0], name)), (id, name)


def until_killed(of: flowfast.Engine, told: Samples, last: set[str]) -> bool:
    """Steps; the samples that were told, and whose telling the last step was. True: it was killed."""
    try:
        while of.busy:
            events = of.step()
            last.clear()
            for event in events:
                if isinstance(event, flowfast.Finished):
                    told[event.id] = event.sample
                    last.add(event.id)
    except Killed:
        return True
    return False


def check_goes_on(path: Path, told: Samples, last: set[str], expected: Samples, added: set[str]) -> None:
    """Who was not told gets the right sample; the last ones told may hear it again, where a kill came before that was
    noted."""
    again = restored(path)
    found = finish(again)
    again.close()
    assert added - told.keys() <= found.keys() <= added - told.keys() | last
    assert_same(found, expected)
    assert_same(told, expected)


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_killed_at_any_round(tmp_path: Path, expected: Samples, seconds: float) -> None:
    """All methods, several kinds at once, a reward on the host, with a state of every round and with that of finishes
    alone."""
    whole = Counted()
    undisturbed = engine(None, whole)
    ask(undisturbed, ASKED)
    finish(undisturbed)
    partly = 0
    for life in range(whole.calls - 1, 0, -1 - whole.calls // 6):
        path, told, last = tmp_path / f"{life}.state", dict[str, flowfast.Sample](), set[str]()
        first = engine(path, Counted(life), save_seconds=seconds)
        ask(first, ASKED)
        assert until_killed(first, told, last)
        dies(first)
        partly += 0 < len(told) < len(ASKED)
        check_goes_on(path, told, set(), expected, set(ASKED))
    assert partly > 1


def kill_at(monkeypatch: pytest.MonkeyPatch, operation: int) -> Callable[[], int]:
    """Dies before the operation of this number of those that make files last; how many there were."""
    count = itertools.count()
    seen = [0]

    def dying(plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            seen[0] = next(count)
            if seen[0] >= operation:
                raise Killed
            return plain(*arguments)

        return run

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    return lambda: seen[0]


def killed_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Samples, operations: range) -> int:
    """Kills an engine of few requests at these operations on files, each time anew; how often it was killed."""
    names = ("svdd", "bon", "host 1", "host 2", "ode")
    kills = 0
    for operation in operations:
        path, told, last, added = tmp_path / f"{operation}.state", dict[str, flowfast.Sample](), set[str](), set[str]()
        first = engine(path)  # its empty files are there
        with monkeypatch.context() as patched:
            kill_at(patched, operation)
            try:
                for name in names:
                    first.add_request(id=name, **ASKED[name])
                    added.add(name)
                killed = until_killed(first, told, last)
            except Killed:
                killed = True
        kills += killed
        dies(first)
        again = restored(path)
        found = finish(again)
        again.close()
        adding = set(names[len(added) : len(added) + 1])  # it was not told that this was taken on
        assert added - told.keys() <= found.keys() <= added - told.keys() | last | adding
        assert_same({**told, **found}, expected)
    return kills


def test_killed_in_the_middle_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Samples) -> None:
    """Before the state or the journal was synced or renamed, so also between the two."""
    assert killed_in_files(tmp_path, monkeypatch, expected, range(0, 76, 4)) > 15


def test_killed_again_and_again(tmp_path: Path, expected: Samples) -> None:
    path, told, last = tmp_path / "state", dict[str, flowfast.Sample](), set[str]()
    first = engine(path, Counted(7))
    ask(first, ASKED)
    alive = first
    for _ in range(200):
        killed = until_killed(alive, told, last)
        dies(alive)
        if not killed:
            break
        alive = restored(path, Counted(7))
    assert told.keys() == expected.keys()
    assert_same(told, expected)


PROGRAM = """
import sys, torch, flowfast
from pathlib import Path
torch.set_num_threads(int(sys.argv[2]))
from tests.engine.test_snapshot import ASKED, ask, engine
of = engine(Path(sys.argv[1]))
ask(of, ASKED)
print("asked", flush=True)
while of.busy:
    for event in of.step():
        if isinstance(event, flowfast.Finished):
            print(event.id, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 3, 9])
def test_a_process_that_is_killed(tmp_path: Path, expected: Samples, lines: int) -> None:
    path, threads = tmp_path / "state", str(torch.get_num_threads())
    command = [sys.executable, "-c", PROGRAM, str(path), threads]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        told = [process.stdout.readline().strip() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().split("\n")
    again = restored(path)
    found = finish(again)
    again.close()
    assert told[0] == "asked" and set(ASKED) - set(told) <= found.keys()
    assert len(found.keys() & set(told)) <= len(OPTIONS) + 4  # those of the last step that it told
    assert_same(found, expected)
    assert not list(tmp_path.glob("*part*"))


# ---- who comes back ----


def test_an_aborted_request_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = engine(path)
    ask(first, {name: ASKED[name] for name in ("svdd", "small", "rbf", "bon")})
    first.step()
    assert {"svdd", "small"} <= {job.request.id for *_, job in first.core.scheduler.running()}
    assert first.abort("svdd") and first.abort("rbf")  # one runs beside another, one may wait
    dies(first)  # before any step
    again = restored(path)
    assert finish(again).keys() == {"small", "bon"}
    again.close()


def test_told_results_do_not_come_back_and_their_ids_are_free(tmp_path: Path, expected: Samples) -> None:
    """A new request by the name of one that ran when the state was saved starts from its own beginning."""
    path = tmp_path / "state"
    first = engine(path, save_seconds=1e6)
    ask(first, {"same": ASKED["bon"], "rbf": ASKED["rbf"]})
    told = set[str]()
    while "same" not in told:
        told |= {event.id for event in first.step() if isinstance(event, flowfast.Finished)}
    assert "rbf" not in told
    assert first.kept is not None
    first.step()
    first.add_request(id="same", **ASKED["seed"])
    assert str(first._jobs["same"].number) not in read(path).facts["running"]
    dies(first)
    again = restored(path)
    assert_same(finish(again), {"same": expected["seed"], "rbf": expected["rbf"]})
    again.close()


def test_a_restored_engine_takes_requests_and_names_them_anew(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = engine(path)
    ids = [first.add_request("a", method="bon", **COMMON) for _ in range(3)]
    first.abort(ids[0])
    dies(first)
    again = restored(path)
    ids += [again.add_request("b", method="bon", **COMMON) for _ in range(3)]
    assert len(set(ids)) == 6
    dies(again)
    last = restored(path)
    assert finish(last).keys() == set(ids[1:])
    last.close()


def test_a_state_alone_or_a_journal_alone(tmp_path: Path, expected: Samples) -> None:
    path = tmp_path / "state"
    first = engine(path)
    ask(first, ASKED)
    for _ in range(5):
        first.step()
    first.snapshot(tmp_path / "aside")
    first.snapshot(path)
    dies(first)
    aside = restored(tmp_path / "aside")
    found = finish(aside)
    aside.close()
    path.unlink()
    again = restored(path)  # all of them start anew
    assert finish(again).keys() == found.keys()
    again.close()
    assert_same(found, expected)
    journal_path(path).unlink()
    with pytest.raises(OptionError, match=r"cannot read the journal .*state.journal: No such file"):
        restored(path)


def test_priorities_deadlines_and_top_k_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = engine(path, slots=1)
    first.add_request("a", id="now", method="bon", **COMMON)
    first.add_request("a", id="late", method="bon", priority=3, deadline=1e5, **COMMON)
    first.add_request("a", id="early", method="bon", priority=-3, **COMMON)
    first.add_request("a", id="two", method="bon", top_k=2, **COMMON)
    dies(first)
    again = restored(path, slots=1)
    late = again._jobs["late"].request
    assert (late.priority, late.deadline) == (3, 1e5)
    found = finish(again)
    again.close()
    order = list(found)
    assert len(found["two"].top) == 2
    assert order.index("early") < order.index("late")


def test_cuts_and_splits_of_what_runs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = engine(path)
    ask(first, {"svdd": ASKED["svdd"]})
    first.step()
    job = first._jobs["svdd"]
    job.repeats = [(2, 8)]
    first.core._repeating = True
    job.splits = [(1, 8)]
    for _ in range(2):
        first.step()
    assert job.cuts == [(2, 8)]
    dies(first)
    again = restored(path)
    (rerun,) = [event.rerun for event in again.stream() if isinstance(event, flowfast.Finished)]
    again.close()
    assert rerun.cuts == ((0, 2, 8),) and rerun.splits == ((1, 8),)


def test_an_engine_that_memory_made_smaller_is_restored_by_the_same_options(tmp_path: Path) -> None:
    class Tight(GaussianFlow):
        def velocity(self, x_t: Any, t: Any, cond: Any) -> Any:
            if len(x_t) > 2:
                raise torch.OutOfMemoryError("4 rows do not fit")
            return super().velocity(x_t, t, cond)

    path, flow = tmp_path / "state", Tight()
    first = engine(path, flow)
    ask(first, {"svdd": ASKED["svdd"], "bon": ASKED["bon"]})
    for _ in range(4):
        first.step()
    assert first.core.micro_batch == 2
    dies(first)
    again = restored(path, Tight())
    assert again.core.micro_batch == 2 and finish(again).keys() == {"svdd", "bon"}
    again.close()


# ---- damage ----


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Of an engine in which some ran and others waited."""
    path = tmp_path / "state"
    first = engine(path, slots=2)
    ask(first, ASKED)
    for _ in range(40):
        first.step()
    first.snapshot(path)
    running = [job for *_, job in first.core.scheduler.running()]
    assert running and first.core.scheduler.count
    first.close()
    return path


@pytest.mark.parametrize(("which", "count"), [("snapshot", 250), ("journal", 250)])
def test_damage_is_refused_by_name_and_says_what_is_intact(stopped: Path, which: str, count: int) -> None:
    file = stopped if which == "snapshot" else journal_path(stopped)
    whole, requests, refused = file.read_bytes(), len(read(stopped).requests), 0
    for mutant in mutants(whole, count, random.Random(7)):
        file.write_bytes(mutant)
        try:
            found = read(stopped)
        except OptionError as error:
            refused += 1
            said = str(error)
            assert said.startswith(f"cannot restore from {file}: ") and "\n" not in said and len(said) < 500
            assert which == "journal" or f"the journal beside it is intact and knows {requests} requests" in said
        else:
            assert mutant.startswith(whole) and len(found.requests) == requests
    assert refused > 0.97 * count
    file.write_bytes(whole)
    assert len(read(stopped).requests) == requests


def test_a_damaged_journal_says_whose_entries_are_intact(stopped: Path) -> None:
    file = journal_path(stopped)
    lines = file.read_bytes().split(b"\n")
    at = len(lines) // 2
    lines[at] = lines[at].replace(b'"', b"'", 1)
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(
        OptionError, match=rf"line {at + 1} of \d+ is damaged; before that, \d+ requests had not ended: "
    ):
        restored(stopped)


@pytest.mark.parametrize("change", ["swapped", "twice", "gone"])
def test_lines_of_a_journal_that_were_moved_are_noticed(stopped: Path, change: str) -> None:
    """Each is whole in itself."""
    file = journal_path(stopped)
    head, first, second, *rest = file.read_bytes().split(b"\n")
    moved = {"swapped": [second, first], "twice": [first, first, second], "gone": [second]}[change]
    file.write_bytes(b"\n".join([head, *moved, *rest]))
    with pytest.raises(OptionError, match="is damaged"):
        restored(stopped)


def test_files_of_other_engines_or_times_are_refused(stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "state"
    second = engine(other)
    ask(second, ASKED)
    second.step()
    before = journal_path(other).read_bytes()
    mine, journal = stopped.read_bytes(), journal_path(stopped).read_bytes()
    stopped.write_bytes(other.read_bytes())
    with pytest.raises(OptionError, match=r"other engine than the journal beside it; .* knows \d+ requests"):
        restored(stopped)
    stopped.write_bytes(mine)
    journal_path(stopped).write_bytes(before)
    with pytest.raises(OptionError, match=rf"other engine than the journal beside it; .* knows {len(ASKED)} requests"):
        restored(stopped)
    lines = journal.split(b"\n")
    journal_path(stopped).write_bytes(b"\n".join([*lines[:-2], b""]))  # whole lines, one fewer
    with pytest.raises(OptionError, match=r"state.journal: it is cut off or of an earlier time, .* knows \d+ requests"):
        restored(stopped)
    journal_path(stopped).write_bytes(b"\n".join([*lines[:2], b""]))
    with pytest.raises(OptionError, match=r"state.journal: it is cut off"):
        restored(stopped)
    dies(second)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"micro_batch": 8}, r"of an engine with \{'micro_batch': 4\}, this one has \{'micro_batch': 8\}"),
        ({"max_budget": 60}, r"of an engine with \{'max_budget': 40\}"),
    ],
)
def test_another_engine_is_refused(stopped: Path, options: dict[str, Any], says: str) -> None:
    flow = GaussianFlow().train()
    with pytest.raises(OptionError, match=rf"cannot restore from {stopped}: it is {says}.*; the journal .* knows"):
        restored(stopped, flow, **options)
    assert flow.training  # as it was


def test_another_model_or_reward_is_refused(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"cannot restore from {stopped}: request 'latents': latents must be"):
        restored(stopped, GaussianFlow(shape=(2, 3)))
    first = engine(other := tmp_path / "other")
    ask(first, {"svdd": ASKED["svdd"]})
    first.step()
    dies(first)
    with pytest.raises(OptionError, match=rf"cannot restore from {other}: it has no state.x .* knows 1 requests"):
        restored(other, GaussianFlow(shape=(2, 3)))
    flow = GaussianFlow()
    flow.t_finish = 0.2
    with pytest.raises(OptionError, match=rf"cannot restore from {other}: request 'svdd' means something else"):
        restored(other, flow)
    with pytest.raises(OptionError, match=rf"cannot restore from {stopped}: request '.*': unknown reward 'near'"):
        flowfast.Engine.restore(stopped, GaussianFlow(), {"only": NearTarget()}, **OPTIONS)


def test_a_journal_that_cannot_be_written_takes_nothing_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    first = engine(path)
    first.add_request(id="svdd", **ASKED["svdd"])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(journals.os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            first.add_request(id="bon", **ASKED["bon"])
    assert "bon" not in first._jobs
    first.add_request(id="bon", **ASKED["bon"])  # writes over the line that failed
    dies(first)
    again = restored(path)
    assert finish(again).keys() == {"svdd", "bon"}
    again.close()


# ---- how much is written ----


@pytest.mark.parametrize("waiting", [False, True])
def test_what_is_written_grows_with_the_work(tmp_path: Path, waiting: bool) -> None:
    """Four times the requests, four times the bytes, though all of them wait from the start."""
    written = []
    for count in (40, 160):
        before, of = bytes_written(), engine(tmp_path / f"{count}.state", slots=2, save_seconds=1e6)
        for at in range(count):
            of.add_request(f"prompt {at} of a list", method="bon", budget=8, steps=4)
            if not waiting:
                finish(of)
        finish(of)
        of.close()
        written.append(bytes_written() - before)
    assert written[0] > 40 * 200
    assert written[1] < 4.4 * written[0]


def test_a_journal_does_not_grow_with_requests_that_have_ended(tmp_path: Path) -> None:
    of = engine(tmp_path / "state", slots=2, save_seconds=1e6)
    for _ in range(4):
        for at in range(120):
            of.add_request("a long prompt " * 20 + str(at), method="ode", budget=6, steps=4)
        finish(of)
    assert journal_path(tmp_path / "state").stat().st_size < 3 * journals.SMALL
    of.close()


# ---- mutants: each rule is needed ----


def early_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal says that a request has ended before its caller was told."""
    plain = flowfast.Engine.step

    def step(self: flowfast.Engine) -> Any:
        events = plain(self)
        if self.kept is not None and self._told:
            self.kept.end(self._told)
            with self.kept.path.open() as file:
                os.fsync(file.fileno())  # a moment, in which a kill may come
        return events

    monkeypatch.setattr(flowfast.Engine, "step", step)


def no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "end", lambda self, numbers: None)


def other_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran is put back a slot further."""
    plain = engines.Kept.save

    def save(self: Any, core: Any, asked: Any) -> None:
        kept = snapshots.held

        def moved(of: Any) -> Any:
            tensors, facts = kept(of)
            for group in facts["groups"]:
                numbers = list(group["index_of"].values())
                group["index_of"] = dict(zip(group["index_of"], [*numbers[1:], numbers[0]], strict=True))
            return tensors, facts

        snapshots.held = moved  # type: ignore[assignment]
        try:
            plain(self, core, asked)
        finally:
            snapshots.held = kept  # type: ignore[assignment]

    monkeypatch.setattr(engines.Kept, "save", save)


def no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran forgets how many rounds it has run."""
    plain = snapshots.held

    def held(core: Any) -> Any:
        tensors, facts = plain(core)
        for group in facts["groups"]:
            group["rounds"] = [0] * len(group["rounds"])
        return tensors, facts

    monkeypatch.setattr(snapshots, "held", held)


@pytest.mark.parametrize("mutant", [early_end, no_end, other_slots, no_rounds])
def test_mutants_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Samples, mutant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, OptionError)):
        if mutant is early_end:
            killed_in_files(tmp_path, monkeypatch, expected, range(30, 80, 2))
        else:
            test_killed_at_any_round(tmp_path, expected, 0.0)
