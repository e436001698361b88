"""The command line. Every error that a user can cause is one line on stderr and exit code 2."""

from __future__ import annotations

import inspect
import io
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flowfast import api, ops, rewards, secrets
from flowfast.bounds import MOST_ROWS
from flowfast.config import SearchConfig, make_config
from flowfast.errors import FlowfastError, OptionError, PromptError
from flowfast.files import locked_file, locked_folder
from flowfast.flow.gradient import parse_guidance
from flowfast.memory import keep_memory
from flowfast.methods import METHODS
from flowfast.prompts import (
    check_each,
    check_no_lists,
    check_prompts,
    fault_of,
    faults_of,
    few_of,
    read_lists,
)
from flowfast.report.config_file import parse_options, read_config
from flowfast.version import __version__, versions

app = typer.Typer(
    name="flowfast",
    help="Better samples from a flow model: search over its noise with a reward, within a fixed budget.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEFAULT_BUDGET = 200
LONGEST_ERROR = 1000


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    keep_memory()
    secrets.forget()  # those of an earlier call in this process
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know the letters of a folder's name
    try:
        code = app(argv, prog_name="flowfast", standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        _drop_stdout()
        return 1
    except typer.Abort:
        return 130
    except (FlowfastError, typer.TyperException, OSError) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if isinstance(error, OSError):
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or message
            _drop_stdout()  # it may be this that cannot be written to
        line = " ".join(secrets.hidden(message).split())
        line = line if len(line) <= LONGEST_ERROR else f"{line[:700]} ... {line[-250:]}"
        print(f"flowfast: {line}", file=sys.stderr)
        return 2


def _drop_stdout() -> None:
    """What is still to be written there goes nowhere, instead of into an error as Python ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Lists = Annotated[
    list[str] | None,  # as a Path "" would be this folder
    typer.Option(
        "--prompts",
        help="A list of prompts, may come several times: .txt (one a line), .jsonl, .json, .csv, .tsv, a folder of "
        ".txt (one each), - for standard input.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        "--prompt-column", help="Where a list's prompts are; default: prompt, caption or text, else the only one."
    ),
]


@app.command()
def generate(
    context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One picture each.")] = None,
    model: Annotated[str | None, typer.Option(help="See `flowfast models`.")] = None,
    reward: Annotated[str | None, typer.Option(help="See `flowfast rewards`; sums: scenes*0.7+sharpness*0.3.")] = None,
    method: Annotated[str | None, typer.Option(help="See `flowfast methods`.")] = None,
    budget: Annotated[int | None, typer.Option(help="NFE a prompt: model evaluations x passes; default 200.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds a prompt, instead of a budget.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to data.")] = None,
    preset: Annotated[str | None, typer.Option(help="Named settings of path, noise and grid, e.g. paper.")] = None,
    interpolant: Annotated[str | None, typer.Option(help="Path of the SDE: linear, vp, ...")] = None,
    diffusion: Annotated[str | None, typer.Option(help="Its noise: zero, sigma:1, square:3, ...")] = None,
    integrator: Annotated[str | None, typer.Option(help="euler-maruyama, exponential, ...")] = None,
    grid: Annotated[str | None, typer.Option(help="Where the steps stand: uniform, paper, ...")] = None,
    tail: Annotated[int | None, typer.Option(help="Noise-free steps that finish a sample.")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(help="Scale of classifier-free guidance (up to 1: off), dps:STRENGTH, or both: 3,dps:0.5."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    chains: Annotated[int | None, typer.Option(help="Particles that go on from step to step.")] = None,
    lanes: Annotated[
        int | None, typer.Option(help="Candidates of a chain evaluated at once; same decisions until the budget ends.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Names the noise; default 0.")] = None,
    repeat: Annotated[int | None, typer.Option(help="Another sample of the same prompt and seed.")] = None,
    top_k: Annotated[int | None, typer.Option(help="How many of the best samples to keep.")] = None,
    finalists: Annotated[
        int | None, typer.Option(help="With a preview decoder: samples to decode in full and score again; default 4.")
    ] = None,
    until: Annotated[float | None, typer.Option(help="Stop a prompt at this reward.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows in one model call.")] = None,
    compile: Annotated[bool | None, typer.Option(help="Run model and decoder through torch.compile.")] = None,
    model_option: Annotated[
        list[str] | None, typer.Option("--model-option", help="NAME=VALUE for a diffusers pipeline: height=512, ...")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="NAME=VALUE, an option of the method.")] = None,
    lists: Lists = None,
    column: Column = None,
    layout: Annotated[
        str | None, typer.Option(help="plain, or geneval: the folders that GenEval's evaluator reads.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.yaml to run again; options override it.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a call that was stopped: goes on there.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a Chrome trace of the search to this file.")] = None,
    out: Out = Path("out"),
) -> None:
    """Search for the best picture of each PROMPT; writes pictures, result and every candidate to --out."""
    from flowfast.report.generate import CALL, GenerateFiles, check_layout
    from flowfast.report.tables import markdown
    from flowfast.report.trace import chrome_trace
    from flowfast.report.video import FPS

    given = {name: value for name, value in locals().items() if name in SearchConfig.model_fields and value is not None}
    if guidance is not None:
        del given["guidance"]
        given |= parse_guidance(guidance)
    if resume is not None:
        out, config = resume, resume / CALL
        if not config.exists():
            if any(resume.glob("*/config.yaml")):
                print(f"nothing left to do: the call into {resume} has finished")
                return
            raise OptionError(f"nothing to resume in {resume}: no {CALL} there (a call that finished leaves none)")
    asked = read_config(config) if config else {}
    check_no_lists(prompts or [])
    texts = [*(prompts or []), *read_lists(lists or [], column)] or asked.get("prompts", [])
    asked.pop("prompts", None)
    before = asked.pop("layout", "plain")
    layout = layout or before
    asked |= given
    if "budget" in given and "seconds" not in given:
        asked["seconds"] = None
    if "seconds" in given and "budget" not in given:
        asked["budget"] = None
    if asked.get("budget") is None and asked.get("seconds") is None:
        asked["budget"] = DEFAULT_BUDGET
    if option:
        asked["method_options"] = {**asked.get("method_options", {}), **parse_options(option)}
    if model_option:
        asked["model_options"] = {**asked.get("model_options", {}), **parse_options(model_option, "--model-option")}
    resolved = make_config(asked)
    if not texts:
        raise PromptError("expected at least one PROMPT, got none: flowfast generate 'two red circles'")
    refused = faults_of(texts)
    if len(refused) == len(texts):
        raise PromptError(few_of(refused))
    check_layout(layout, texts)
    context.with_resource(locked_folder(out))  # until the command ends
    if profile:
        context.with_resource(locked_file(profile))
    if refused:
        print(f"flowfast: {few_of(refused)}; left out, the others are drawn", file=sys.stderr)
    flow = api.load(resolved.model, **resolved.model_options)
    scorer = rewards.load(resolved.reward, flow, resolved.reward_deadline)
    files = GenerateFiles(out, texts, resolved, getattr(flow, "fps", FPS), resume is not None, layout)
    files.start()
    with numbered(texts, flow, scorer), progress() as advance, chrome_trace(profile):
        result = api.search(
            flow,
            files.prompts,
            reward=scorer,
            config=resolved,
            on_round=files.on_round,
            on_sample=files.on_sample,
            on_progress=lambda nfe, whole: advance(nfe, whole, f"{resolved.method} (NFE)"),
            checkpoint=files.checkpoint.path,
        )
    scores = files.finish(flow, result, scorer)
    found = zip(result.samples, scores, files.folders, strict=True)
    rows = [
        [f"{sample.reward:.3f}", "" if score is None else f"{score:g}", str(sample.nfe), str(folder)]
        for sample, score, folder in found
    ]
    print(markdown(("reward", "held-out", "NFE", "folder"), rows))
    parts = ", ".join(f"{name} {spent:.2f}" for name, spent in result.seconds.items() if name != "total")
    print(f"{result.seconds['total']:.2f} s ({parts})")
    if refused:
        raise typer.Exit(2)


@app.command()
def compare(
    lists: Lists = None,
    column: Column = None,
    split: Annotated[str, typer.Option(help="Half of the hard prompts: tuning or heldout.")] = "tuning",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    methods: Annotated[
        str, typer.Option(help="See `flowfast methods`; rbf+dps:1 is steered by the reward.")
    ] = "ode,bon,sop,smc,code,svdd,rbf",
    budgets: Annotated[str, typer.Option(help="NFE a prompt.")] = "100,200,500",
    seconds: Annotated[str, typer.Option(help="Seconds a prompt, beside --budgets.")] = "",
    seeds: Annotated[int, typer.Option(min=1, max=1_000_000, help="Seeds 0 .. N-1.")] = 3,
    interpolants: Annotated[str, typer.Option(help="Paths of the SDE, or presets: linear,vp,paper.")] = "linear",
    model: Annotated[str, typer.Option(help="See `flowfast models`.")] = "scenes",
    reward: Annotated[str, typer.Option(help="See `flowfast rewards`.")] = "scenes",
    steps: Annotated[int | None, typer.Option(help="Steps from noise to data.")] = None,
    chunk: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Prompts in one search call.")] = 16,
    micro_batch: Annotated[int | None, typer.Option(help="Rows in one model call, for all arms.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that share the machine's threads.")] = 1,
    out: Out = Path("compare-out"),
) -> None:
    """Compare methods on the same prompts and seeds; run again with the same --out to go on after a stop."""
    from flowfast.comparison.design import Comparison, check, fitting_batch
    from flowfast.comparison.run import run
    from flowfast.report.tables import HEAD, comparison_rows, markdown

    texts = read_lists(lists, column, seeds=False) if lists else built_in_prompts(model, split)
    texts = texts[:limit]
    plan = Comparison(
        prompts=tuple(dict.fromkeys(texts)),
        methods=tuple(words(methods)),
        budgets=tuple(numbers(budgets, int, "--budgets")),
        seconds=tuple(numbers(seconds, float, "--seconds")),
        interpolants=tuple(words(interpolants)),
        seeds=seeds,
        chunk=chunk,
        model=model,
        reward=reward,
        steps=steps,
        micro_batch=fitting_batch(min(chunk, len(texts))) if micro_batch is None else micro_batch,
    )
    flow = api.load(model)
    check(plan, flow)
    with progress() as advance:
        rows = run(plan, flow, out, advance, workers)
    print(markdown(HEAD, comparison_rows(rows)))
    print(f"{out}/contact.png  {out}/curve.png  {out}/table.md  {out}/results.json")


@app.command("export")
def export_archive(
    model: Annotated[str | None, typer.Option(help="See `flowfast models`.")] = None,
    reward: Annotated[str | None, typer.Option(help="See `flowfast rewards`; host: the server scores.")] = None,
    method: Annotated[str | None, typer.Option(help="See `flowfast methods`.")] = None,
    budget: Annotated[int | None, typer.Option(help="The largest NFE of a request; 500 if not given.")] = None,
    slots: Annotated[int | None, typer.Option(help="Requests that run at once; 4 if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to data.")] = None,
    preset: Annotated[str | None, typer.Option(help="Named settings of path, noise and grid, e.g. paper.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; up to 1: off.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="How many of the best samples to keep.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows in one model call.")] = None,
    model_option: Annotated[
        list[str] | None, typer.Option("--model-option", help="NAME=VALUE for a diffusers pipeline: height=512, ...")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="NAME=VALUE, an option of the method.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Known to the archive, where encoding does not script.")
    ] = None,
    lists: Lists = None,
    column: Column = None,
    config: Annotated[Path | None, typer.Option(help="A config.yaml of a search: its other settings.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="torchscript, or aoti: compiled parts beside it.")
    ] = "torchscript",
    out: Annotated[Path, typer.Option("--out", help="The file.")] = Path("archive.pt"),
) -> None:
    """Write model, reward and search into one file for C++ servers; `flowfast info FILE` says what it is."""
    from flowfast.archive.export import export
    from flowfast.archive.load import read_info

    given = {name: value for name, value in locals().items() if name in SearchConfig.model_fields and value is not None}
    asked = {**(read_config(config) if config else {}), **given, "seconds": None}
    for name in ("prompts", "layout"):
        asked.pop(name, None)
    asked["method_options"] = {**asked.get("method_options", {}), **parse_options(option or [])}
    asked["model_options"] = {**asked.get("model_options", {}), **parse_options(model_option or [], "--model-option")}
    check_no_lists(prompt or [])
    texts = [*(prompt or []), *read_lists(lists or [], column)]
    if texts:
        check_prompts(texts)
    resolved = make_config(asked)
    flow = api.load(resolved.model, **resolved.model_options)
    export(flow, out, prompts=texts, format=form, config=resolved)
    print_names(read_info(out))


@app.command("reward-server")
def reward_server(
    reward: Annotated[str, typer.Option(help="See `flowfast rewards`.")] = "scenes",
    host: Annotated[
        str, typer.Option(help="Address to listen on; where FLOWFAST_REWARD_KEY is set, clients need that key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
) -> None:
    """Serve a reward over HTTP, for `--reward http:URL` of searches on other machines."""
    from flowfast.rewards.server import serve

    serve(reward, host, port)


@app.command()
def info(
    file: Annotated[Path | None, typer.Argument(metavar="[ARCHIVE]", help="Of `flowfast export`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Versions, devices, the compiled libraries, and which backend runs each op, and why; or what an ARCHIVE is."""
    if file is not None:
        from flowfast.archive.load import read_info

        manifest = read_info(file)
        print(json.dumps(manifest, indent=2)) if as_json else print_names(manifest)
        return
    found: dict[str, dict[str, Any]] = {
        "versions": {**versions(), "python": platform.python_version()},
        "devices": {
            "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            **{f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())},
        },
        "libraries": ops.libraries(),
        "ops": {name: {"backend": backend, "reason": reason} for name, (backend, reason) in ops.live().items()},
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for section in ("versions", "devices", "libraries"):
        print_names(found[section])
    print_names({name: f"{live['backend']:<10} {live['reason']}" for name, live in found["ops"].items()})


@app.command("methods")
def list_methods() -> None:
    """The search methods, a line each."""
    print_names({name: " ".join(paragraph(method).split()) for name, method in sorted(METHODS.items())})


@app.command("rewards")
def list_rewards() -> None:
    """The rewards that search can raise, a line each."""
    print_names(rewards.available())


@app.command("models")
def list_models() -> None:
    """The flow models, a line each."""
    print_names(api.MODELS)


def version(value: bool) -> None:
    if value:
        print(f"flowfast {__version__}")
        raise typer.Exit


@app.callback()
def common(
    _version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options before the command."""


def paragraph(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0]


def print_names(lines: dict[str, str]) -> None:
    """Name and text in two columns; the text wraps at the width of the terminal."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(name, text)
    Console(markup=False, highlight=False).print(table)


@contextmanager
def progress() -> Iterator[Any]:
    """A bar on stderr, if that is a terminal; yields advance(done, of, text)."""
    columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn())
    columns += (TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1)

        def advance(done: int, of: int, text: str) -> None:
            bar.update(task, completed=done, total=of, description=text)

        yield advance


@contextmanager
def numbered(texts: list[str], flow: Any, scorer: Any) -> Iterator[None]:
    """Where model or reward refuse a prompt inside, its number is that among all texts, drawn or not."""
    try:
        yield
    except PromptError:
        check_each(texts, lambda text: fault_of(text) or flow.encode([text]))
        on_host = rewards.on_host(scorer)
        check_each(texts, lambda text: fault_of(text) or (scorer.check(text) if on_host else scorer.encode([text])))
        raise


def built_in_prompts(model: str, split: str) -> list[str]:
    """A half of the model's hard prompts. Raises OptionError."""
    if model != "scenes":
        raise OptionError(f"model {model!r} has no built-in prompts: give --prompts FILE")
    if split not in ("tuning", "heldout"):
        raise OptionError(f"unknown split {split!r}: choose tuning or heldout")
    from flowfast.models.scenes.prompts import hard_prompts

    return hard_prompts(split)  # type: ignore[arg-type]


def words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return sorted({kind(word) for word in words(text)})
    except ValueError:
        raise OptionError(f"{option}: expected numbers with commas between them, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
