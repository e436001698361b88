"""`flowfast bench`, whose words are those of `vllm bench`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from flowfast import api, rewards, secrets
from flowfast.benchmark.load_config import MOST_REQUESTS, LoadConfig
from flowfast.bounds import MOST_ROWS
from flowfast.cli.compare import built_in_prompts, numbers, words
from flowfast.cli.generate import DEFAULT_BUDGET
from flowfast.cli.options import (
    WITHOUT,
    Column,
    Given,
    Guidance,
    Lists,
    MethodOption,
    ModelOption,
    config_options,
    with_options,
)
from flowfast.cli.shown import progress
from flowfast.config import SearchConfig, make, make_config
from flowfast.errors import OptionError
from flowfast.files import locked_folder
from flowfast.flow.gradient import parse_guidance
from flowfast.prompts import check_prompts, read_lists
from flowfast.serve.config import KEY

app = typer.Typer(help="How fast requests are, through the engine that a server has, and through a server.")
NOT_HERE = {*WITHOUT, "seconds", "repeat", "first_chain", "pool", "pool_wave"}
HELP = {"budget": "NFE of a request.", "seed": "Of the first request, each has the next one: any whole number."}
DEFAULTS = {"budget": DEFAULT_BUDGET}
Count = Annotated[
    int,
    typer.Option("--num-prompts", min=1, max=MOST_REQUESTS, help="Requests; a shorter list begins again."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for bench.json and bench.png.")]


@app.command()
@config_options(without=NOT_HERE, help=HELP, defaults=DEFAULTS)
def latency(
    given: Given,
    guidance: Guidance = None,
    model_option: ModelOption = None,
    option: MethodOption = None,
    lists: Lists = None,
    column: Column = None,
    count: Count = 30,
    warmup: Annotated[int, typer.Option(min=0, max=MOST_REQUESTS, help="Requests before, not counted.")] = 5,
    baseline: Annotated[
        str | None,
        typer.Option(help="diffusers: the pipeline's own loop, in turns, as many plain samples as the budget pays."),
    ] = None,
    out: Out = Path("bench-out"),
) -> None:
    """One request after the other: how long each takes, and where the time goes."""
    from flowfast.benchmark.pipeline import PipelineLoop
    from flowfast.benchmark.results import latency_results
    from flowfast.benchmark.run import latency as run

    if baseline not in (None, "diffusers"):
        raise OptionError(f"unknown --baseline {baseline!r}: choose diffusers, or leave it out")
    config = asked(given, guidance, option, model_option)
    with workload(config, lists, column, count, out) as work:
        loop = PipelineLoop(work.flow, config) if baseline else None
        with progress() as advance:
            found = run(work, count, warmup, loop, advance)
        show(latency_results(work, found, warmup, out), out)


@app.command()
@config_options(without=NOT_HERE, help=HELP, defaults=DEFAULTS)
def throughput(
    given: Given,
    guidance: Guidance = None,
    model_option: ModelOption = None,
    option: MethodOption = None,
    lists: Lists = None,
    column: Column = None,
    slots: Annotated[str, typer.Option(help=f"Requests at once, several numbers (1 .. {MOST_ROWS:,}).")] = "4,8,16",
    micro_batch: Annotated[
        str, typer.Option(help=f"Rows in one model call, several numbers (1 .. {MOST_ROWS:,}).")
    ] = "4,8,16",
    count: Count = 64,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_REQUESTS, help="Requests before, in each turn, not counted; default: slots."),
    ] = None,
    turns: Annotated[
        int,
        typer.Option(min=1, max=1000, help="Each pair runs a part of the requests in each, every other one backwards."),
    ] = 2,
    out: Out = Path("bench-out"),
) -> None:
    """Many requests, as fast as it goes, with each pair of --slots and --micro-batch, in turns: which to choose."""
    from flowfast.benchmark.results import throughput_results
    from flowfast.benchmark.run import throughput as run

    settings = list(product(numbers(slots, int, "--slots"), numbers(micro_batch, int, "--micro-batch")))
    if not settings:
        raise OptionError("expected at least one number in --slots and in --micro-batch: --slots 4,8 --micro-batch 8")
    for pair in settings:
        config = asked(given | dict(zip(("slots", "micro_batch"), pair, strict=True)), guidance, option, model_option)
    config = config.model_copy(update={"slots": None, "micro_batch": None})
    with workload(config, lists, column, count, out) as work:
        with progress() as advance:
            found = run(work, settings, count, warmup, turns, advance)
        show(throughput_results(work, found, warmup, out), out)


@app.command("serve")
@config_options(
    config=LoadConfig,
    only=LoadConfig.model_fields.keys() - {"goodput", "extra_body"},
    defaults={"max_concurrency": "all of them"},
)
def load(
    given: Given,
    lists: Lists = None,
    column: Column = None,
    goodput: Annotated[
        str | None,
        typer.Option(
            help="Milliseconds that a good request has to its picture, to a slot, to its first partial image where it "
            "streams: e2e:2000,queue:500,partial:800."
        ),
    ] = None,
    extra_body: Annotated[
        str | None, typer.Option(help="""Other fields of each request, in JSON: '{"method": "svdd", "budget": 100}'.""")
    ] = None,
    out: Out = Path("bench-out"),
) -> None:
    """A load on a running server, and what its clients see; a key is taken from FLOWFAST_API_KEY."""
    from flowfast.benchmark.load import load as run
    from flowfast.benchmark.load_results import load_results
    from flowfast.benchmark.results import JSON, PICTURE
    from flowfast.report.write import check_places

    more = {"goodput": goals(goodput) if goodput else {}, "extra_body": fields(extra_body) if extra_body else {}}
    config = make(LoadConfig, given | more)
    config.check()
    texts = read_lists(lists, column) if lists else built_in_prompts("scenes", "tuning")
    texts = check_prompts(texts[: config.num_prompts])
    check_places([out], [JSON, PICTURE])
    with locked_folder(out):
        with progress() as advance:
            found = asyncio.run(run(config, texts, secrets.value_of(KEY), advance))
        show(load_results(config, len(texts), found, out), out)


def goals(text: str) -> dict[str, Any]:
    """Of "e2e:2000,queue:500". Raises OptionError."""
    found = dict[str, Any]()
    for word in words(text):
        name, _, value = word.partition(":")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise OptionError(f"--goodput: expected milliseconds as e2e:2000,partial:800, got {text!r:.80}") from None
    return found


def fields(text: str) -> dict[str, Any]:
    """Of a JSON object. Raises OptionError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--extra-body: expected JSON, got {text!r:.80} ({error})") from None
    if not isinstance(found, dict):
        raise OptionError(f"--extra-body: expected a JSON object, got {text!r:.80}")
    return found


def asked(given: Given, guidance: str | None, option: list[str] | None, model_option: list[str] | None) -> SearchConfig:
    """Raises OptionError, BudgetError."""
    found: Given = {"budget": DEFAULT_BUDGET, **given, **(parse_guidance(guidance) if guidance is not None else {})}
    return make_config(with_options(found, option, model_option))


@contextmanager
def workload(config: SearchConfig, lists: list[str] | None, column: str | None, count: int, out: Path) -> Iterator[Any]:
    """The requests, model and reward loaded and prompts checked; `out` is this call's own meanwhile."""
    from flowfast.benchmark.results import JSON, PICTURE
    from flowfast.benchmark.run import Workload
    from flowfast.report.write import check_places

    texts = read_lists(lists, column) if lists else built_in_prompts(config.model, "tuning")
    texts = check_prompts(texts[:count])
    check_places([out], [JSON, PICTURE])
    with locked_folder(out):
        flow = api.load(config.model, **config.model_options)
        work = Workload(config, tuple(texts), flow, rewards.load(config.reward, flow, config.reward_deadline))
        work.check()
        yield work


def show(text: str, out: Path) -> None:
    print(text)
    print(f"{out}/bench.json  {out}/bench.png")
