"""`flowfast generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flowfast import api, rewards
from flowfast.cli.config_file import read_config
from flowfast.cli.on_ray import Actors, Address, Gpus, cluster_of, draw_on
from flowfast.cli.options import (
    Column,
    Given,
    Guidance,
    Lists,
    MethodOption,
    ModelOption,
    Out,
    config_options,
    with_options,
)
from flowfast.cli.shown import print_rows, progress
from flowfast.config import SearchConfig, make_config
from flowfast.errors import OptionError, PromptError
from flowfast.files import locked_file, locked_folder
from flowfast.flow.gradient import parse_guidance
from flowfast.models.answers import defaults_of
from flowfast.prompts import check_each, check_no_lists, fault_of, faults_of, few_of, read_lists
from flowfast.types import Flow, SearchResult

DEFAULT_BUDGET = 200


@config_options(defaults={"budget": DEFAULT_BUDGET})
def command(
    context: typer.Context,
    given: Given,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One picture each.")] = None,
    guidance: Guidance = None,
    model_option: ModelOption = None,
    option: MethodOption = None,
    lists: Lists = None,
    column: Column = None,
    layout: Annotated[
        str | None, typer.Option(help="plain, or geneval: the folders that GenEval's evaluator reads.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.yaml to run again; options override it.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a call that was stopped: goes on there.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a Chrome trace of the search to this file.")] = None,
    ray: Address = None,
    actors: Actors = None,
    gpus: Gpus = None,
    out: Out = Path("out"),
) -> None:
    """Search for the best picture of each PROMPT; writes pictures, result and every candidate to --out."""
    from flowfast.report.generate import GenerateFiles, check_layout
    from flowfast.report.video import FPS

    if guidance is not None:
        given |= parse_guidance(guidance)
    if resume is not None:
        out, config = resume, stopped_call(resume)
        if config is None:
            print(f"nothing left to do: the call into {resume} has finished")
            return
    asked = read_config(config) if config else {}
    check_no_lists(prompts or [])
    texts = [*(prompts or []), *read_lists(lists or [], column)] or asked.get("prompts", [])
    layout = layout or asked.get("layout", "plain")
    resolved = make_config(with_options(asked_search(asked, given), option, model_option))
    where = cluster_of(ray, actors, gpus, profile)
    refused = refused_prompts(texts)
    check_layout(layout, texts)
    context.with_resource(locked_folder(out))  # until the command ends
    if profile:
        context.with_resource(locked_file(profile))
    if refused:
        print(f"flowfast: {few_of(refused)}; left out, the others are drawn", file=sys.stderr)
    if where is not None:
        return draw_on(where, out, texts, resolved, resume is not None, layout, refused)
    flow = api.load(resolved.model, **resolved.model_options)
    scorer = rewards.load(resolved.reward, flow, resolved.reward_deadline)
    files = GenerateFiles(out, texts, resolved, defaults_of(flow).fps or FPS, resume is not None, layout)
    files.start()
    with numbered(texts, flow, scorer):
        result = searched(flow, scorer, resolved, files, profile)
    show(result, files.finish(flow, result, scorer), files.folders)
    if refused:
        raise typer.Exit(2)


def stopped_call(folder: Path) -> Path | None:
    """The configuration of the call that was stopped there; None: it has finished. Raises OptionError."""
    from flowfast.report.generate import CALL

    if (folder / CALL).exists():
        return folder / CALL
    if any(folder.glob("*/config.yaml")):
        return None
    raise OptionError(f"nothing to resume in {folder}: no {CALL} there (a call that finished leaves none)")


def asked_search(asked: dict[str, Any], given: Given) -> Given:
    """Fields of the configuration: a config.yaml's, then what the user gave; a budget where there is none at all."""
    found = {name: value for name, value in asked.items() if name not in ("prompts", "layout")} | given
    if "budget" in given and "seconds" not in given:
        found["seconds"] = None
    if "seconds" in given and "budget" not in given:
        found["budget"] = None
    if found.get("budget") is None and found.get("seconds") is None:
        found["budget"] = DEFAULT_BUDGET
    return found


def refused_prompts(texts: list[str]) -> list[str]:
    """Why some prompts cannot be drawn. Raises PromptError where none can."""
    if not texts:
        raise PromptError("expected at least one PROMPT, got none: flowfast generate 'two red circles'")
    refused = faults_of(texts)
    if len(refused) == len(texts):
        raise PromptError(few_of(refused))
    return refused


def searched(flow: Flow, scorer: Any, config: SearchConfig, files: Any, profile: Path | None) -> SearchResult:
    """The search, with its files, its checkpoint and a bar. profile: the file of its trace."""
    from flowfast.report.trace import chrome_trace

    with progress() as advance, chrome_trace(profile):
        return api.search(
            flow,
            files.prompts,
            reward=scorer,
            config=config,
            on_round=files.on_round,
            on_sample=files.on_sample,
            on_progress=lambda nfe, whole: advance(nfe, whole, f"{config.method} (NFE)"),
            checkpoint=files.checkpoint.path,
        )


def show(result: SearchResult, scores: list[float | None], folders: list[Path]) -> None:
    """A line a prompt, and where the seconds went."""
    rewards_and_nfe = zip(result.samples, scores, strict=True)
    print_rows([(sample.reward, score, sample.nfe) for sample, score in rewards_and_nfe], folders)
    picked = result.config.picked
    if picked is not None:
        print(f"auto took {picked.method}: {picked.why} (`flowfast explain` has more)")
    parts = ", ".join(f"{name} {spent:.2f}" for name, spent in result.seconds.items() if name != "total")
    print(f"{result.seconds['total']:.2f} s ({parts})")


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
