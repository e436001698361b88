"""The examples, and the Python of the pages."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import flowfast
from flowfast.engine.request import Job
from flowfast.engine.runner import LiveRunner

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "examples/async_server.py"
PROMPTS = ("two red circles", "three blue squares")
SECONDS = 120  # nothing here may hang


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("async_server", SERVER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    @classmethod
    async def ask(cls, port: int, *prompts: str) -> Client:
        client = cls(*await asyncio.open_connection("127.0.0.1", port))
        client.writer.write("".join(f"{prompt}\n" for prompt in prompts).encode())
        return client

    async def line(self) -> list[str]:
        """number, word, and what follows."""
        return (await self.reader.readline()).decode().rstrip("\n").split(" ", 2)

    async def answer(self, lines: list[list[str]] | None = None) -> bytes | str:
        """The PNG, or why there is none; every line before it goes to `lines`."""
        while True:
            number, word, rest = await self.line()
            if word == "png":
                return await self.reader.readexactly(int(rest))
            if word == "failed":
                return rest
            if lines is not None:
                lines.append([number, word, rest])


async def started(budget: int) -> tuple[asyncio.subprocess.Process, int]:
    """A server, and its port."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, str(SERVER), "0", str(budget))
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=pipe, stderr=pipe)
    assert process.stdout
    return process, int((await process.stdout.readline()).split()[-1])


def test_the_server_answers_what_it_was_asked_before_it_ends() -> None:
    """Three clients at once, of whom one goes away; then SIGTERM, before anybody has an answer."""

    async def run() -> tuple[list[Any], list[list[str]], int | None, bytes]:
        process, port = await started(200)
        gone = await Client.ask(port, "one green triangle")
        clients = [await Client.ask(port, prompt) for prompt in PROMPTS]
        first = await asyncio.gather(*(client.line() for client in (gone, *clients)))
        gone.writer.close()
        process.send_signal(signal.SIGTERM)
        lines: list[list[str]] = []
        pngs = await asyncio.gather(*(client.answer(lines) for client in clients))
        _, errors = await process.communicate()
        assert [words[:2] for words in first] == [["0", "progress"]] * 3
        return pngs, lines, process.returncode, errors

    pngs, lines, code, errors = asyncio.run(asyncio.wait_for(run(), SECONDS))
    assert (code, errors) == (0, b"")
    assert {words[1] for words in lines} == {"progress", "found"}
    assert ["0", "progress", "200 200"] in lines
    options: dict[str, Any] = {"reward": "scenes", "method": "svdd", "budget": 200, "seed": 0, "micro_batch": 8}
    result = flowfast.search(flowfast.load("scenes"), list(PROMPTS), **options)
    for png, sample in zip(pngs, result.samples, strict=True):
        assert png == example().png(sample.image)
        assert Image.open(io.BytesIO(png)).size == sample.image.shape[:0:-1]


def test_who_goes_away_aborts_its_requests_and_a_server_that_ends_takes_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot: who stands behind one that goes away gets it, and the model has seen few rows of that one."""
    budget, began = 400, list[str]()
    admit = LiveRunner.admit

    def seen(runner: LiveRunner, slot: int, job: Job) -> None:
        began.append(job.request.prompt)
        admit(runner, slot, job)

    monkeypatch.setattr(LiveRunner, "admit", seen)

    async def run() -> tuple[int, list[bytes | str]]:
        stop = asyncio.Event()
        inner = flowfast.Engine("scenes", reward="scenes", slots=1, micro_batch=8)
        async with flowfast.AsyncEngine(engine=inner) as engine:
            server = asyncio.create_task(example().serve(engine, 0, budget, stop))
            while not (out := capsys.readouterr().out):
                await asyncio.sleep(0.01)
            port = int(out.split()[-1])
            gone = await Client.ask(port, "one green triangle", "three green triangles")
            await gone.line()  # its first one runs, its second waits
            stays = await Client.ask(port, PROMPTS[0])
            gone.writer.close()
            answers = [await stays.answer()]
            rows = inner.core.rows_seen
            stays.writer.write(f"\n{PROMPTS[1]}\n".encode())
            answers.append(await stays.answer())
            await stays.line()  # it runs
            stop.set()
            while not (server.done() or inner._draining):
                await asyncio.sleep(0.01)
            stays.writer.write(b"one blue square\n")
            answers += [await stays.answer(), await stays.answer()]
            await server
        return rows, answers

    rows, (first, empty, late, second) = asyncio.run(asyncio.wait_for(run(), SECONDS))
    assert began == ["one green triangle", *PROMPTS]
    assert budget <= rows < 1.5 * budget
    assert isinstance(first, bytes) and isinstance(second, bytes)
    assert isinstance(empty, str) and "empty" in empty
    assert isinstance(late, str) and "drained" in late


# ---- one file each, as it runs from the command line ----

SHORT = ["calibration", "flux", "own_model", "own_reward", "robot_policy", "serve_client"]


class Ran(NamedTuple):
    said: str
    folder: Path

    def numbers(self, pattern: str) -> list[float]:
        return [float(found) for found in re.findall(pattern, self.said)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs an example in an empty folder."""

    def run(name: str, *words: str) -> Ran:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return Ran(capsys.readouterr().out, tmp_path)

    return run


def test_examples_are_short_and_each_is_run_here() -> None:
    files = {path.stem: len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py")}
    assert files.keys() == {*SHORT, "async_server"}
    assert all(files[name] <= 50 for name in SHORT)


def test_a_search_over_an_own_model_comes_nearer_than_a_plain_sample(run: Callable[..., Ran]) -> None:
    plain, best_of_n, svdd = run("own_model", "60").said.strip().splitlines()
    away = [[float(each) for each in re.findall(r"([\d.]+) away", line)] for line in (plain, best_of_n, svdd)]
    assert [line.split()[0] for line in (plain, best_of_n, svdd)] == ["ode", "bon", "svdd"]
    assert all(found < plain for found, plain in zip(away[2], away[0], strict=True))


def test_a_search_raises_an_own_reward(run: Callable[..., Ran]) -> None:
    ran = run("own_reward", "two red circles", "80")
    plain, best = ran.numbers(r"reward (-[\d.]+)")
    assert best > plain
    assert {path.name for path in ran.folder.iterdir()} == {"plain.png", "best.png"}


def test_a_robot_gets_to_its_goal(run: Callable[..., Ran]) -> None:
    """By the free way: half of the rest of the way at each of four decisions."""
    ran = run("robot_policy", "100")
    x, y = (ran.numbers(pattern) for pattern in (r"at \(([-\d.]+)", r", ([-\d.]+)\)"))
    assert len(x) == 4 and min(ran.numbers(r"reward (-[\d.]+)")) > -0.2
    assert y[0] < -0.3 and abs(x[-1] - 2) + abs(y[-1]) < 0.5


def test_a_calibration_says_where_a_reward_begins_to_see(run: Callable[..., Ran], monkeypatch: Any) -> None:
    from flowfast import calibrate

    class Small(calibrate.Calibration):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given | {"chains": 3, "prompts": given["prompts"][:1]})

    monkeypatch.setattr(calibrate, "Calibration", Small)
    ran = run("calibration", "small.json")
    *_, last = ran.numbers(r"(?m)^ +[\d.]+ +(-?[\d.]+)")
    assert last == 1 and re.search(r"(?m)^auto at 200 NFE: \w+ .*, because ", ran.said)
    assert [path.name for path in ran.folder.iterdir()] == ["small.json"]


def test_flux_is_searched(run: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The code path of FLUX, from a folder of save_pretrained with a tiny random model in it."""
    from tests.models.tiny.flux import flux

    folder = tmp_path_factory.mktemp("tiny")
    flux(guidance_embeds=False, dynamic_shift=False).save_pretrained(folder, safe_serialization=True)
    sizes = [word for text in ("height=16", "width=32", "steps=3") for word in ("--option", text)]
    ran = run("flux", "a cat", "--model", str(folder), "--reward", "sharpness", "--budget", "24", *sizes)
    plain, best = ran.numbers(r"reward ([\d.]+)")
    assert best >= plain and ran.numbers(r", (\d+) NFE") == [3, 24]
    assert {Image.open(ran.folder / name).size for name in ("plain.png", "best.png")} == {(32, 16)}


# ---- the Python of pages ----


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_about_the_engine_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks("docs/engine.md"):
        exec(compile(block, "docs/engine.md", "exec"), names)
    said = capsys.readouterr().out
    assert re.search(r"^circles has a sample of reward .* after 200 NFE$", said, re.MULTILINE)
    assert re.search(r"^circles: \(3, 32, 32\), 200 NFE in", said, re.MULTILINE)
    assert [type(sample).__name__ for sample in names["samples"]] == ["Sample"] * 3


def ran(page: str, *parts: str) -> dict[str, Any]:
    """The names that the blocks of a page leave which have any of these parts."""
    found = [block for block in blocks(page) if any(part in block for part in parts)]
    assert len(found) == len(parts)
    names: dict[str, Any] = {"__name__": "page", "flowfast": flowfast}
    exec(compile("\n".join(found), page, "exec"), names)
    return names


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_search_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    samples = ran(page, 'flowfast.load("scenes")')["result"].samples
    assert len(samples) == 2 and all(0 < sample.nfe <= 200 for sample in samples)
    assert "calibration" in capsys.readouterr().out


def test_flux_in_five_lines_runs_on_a_tiny_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models.tiny.flux import flux

    def tiny(name: str, dtype: torch.dtype) -> flowfast.types.Flow:
        assert (name, dtype) == ("black-forest-labs/FLUX.1-schnell", torch.bfloat16)
        pipe = flux(guidance_embeds=False, dynamic_shift=False).to(dtype)
        return from_diffusers(pipe, height=16, width=32, steps=3)

    from_diffusers = flowfast.from_diffusers
    monkeypatch.setattr(flowfast, "from_diffusers", tiny)
    own, search = {"reward": "sharpness", "budget": 24}, flowfast.search
    monkeypatch.setattr(flowfast, "search", lambda *given, **options: search(*given, **options | own))
    monkeypatch.chdir(tmp_path)
    sample = ran("README.md", "flowfast.from_diffusers(")["result"].samples[0]
    assert Image.open("best.png").size == (32, 16) and 0 < sample.nfe <= 24


def test_the_engine_of_the_quickstart_runs() -> None:
    assert set(ran("docs/index.md", "flowfast.Engine(")["images"]) == {"0", "1"}


def test_the_page_about_ones_own_runs() -> None:
    result = ran("docs/own.md", "def velocity", "def score")["result"]
    assert [sample.prompt for sample in result.samples] == ["one", "three"]
