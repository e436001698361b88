"""The files of `flowfast generate`: one folder a prompt, filled while the search runs.

candidates.jsonl  every candidate, as rounds come        best.png     the winner (best-02.png, ... with --top-k)
result.json       what was found and what it cost        search.png   the winner's path, and reward against NFE
timing.json       seconds of the call, by parts          config.yaml  reruns the call: --config config.yaml

With --layout geneval folders and pictures have other names (flowfast/report/geneval.py).

While it runs, call.yaml and checkpoint.safetensors (and .done) lie beside the folders: `--resume` goes on from them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from flowfast import api
from flowfast.config import SearchConfig
from flowfast.engine.checkpoint import Checkpoint
from flowfast.errors import OptionError
from flowfast.files import sweep
from flowfast.models.heldout import heldout
from flowfast.prompts import Prompt, check_each, fault_of
from flowfast.report import geneval
from flowfast.report.pictures import search_picture
from flowfast.report.video import FPS, strip, write_video
from flowfast.report.write import (
    Lines,
    check_places,
    damaged,
    drawn,
    json_line,
    number,
    read_lines,
    write_bytes,
    write_json,
    write_picture,
    write_same,
    write_text,
    write_yaml,
)
from flowfast.types import Candidate, Flow, Sample, SearchResult


def folder_name(index: int, prompt: str) -> str:
    """ "00-three-red-circles"."""
    return f"{index:02d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:48].rstrip('-')}"


CALL = "call.yaml"
GATHERED = "gathered.jsonl"
"""What is done of a call with --ray (flowfast/report/gathered.py)."""
FILES = ("best.png", "search.png", "result.json", "timing.json", "candidates.jsonl", "config.yaml")
LAYOUTS = ("plain", "geneval")


def check_layout(layout: str, prompts: Sequence[str]) -> None:
    """Raises OptionError for an unknown one, PromptError for a prompt it cannot hold."""
    if layout not in LAYOUTS:
        raise OptionError(f"unknown --layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if layout == "geneval":
        check_each(prompts, lambda prompt: fault_of(prompt) or geneval.metadata(prompt))


class GenerateFiles:
    """`on_round` and `on_sample` of one search, then `finish`."""

    def __init__(
        self,
        out: Path,
        prompts: Sequence[str],
        config: SearchConfig,
        fps: float = FPS,
        resumed: bool = False,
        layout: str = "plain",
    ) -> None:
        """prompts: those that cannot be drawn keep their number, but `prompts` of the files are the others. fps: of
        videos, frames a second. resumed: the folders hold what an earlier, stopped call wrote. layout: as
        `check_layout` has found it right."""
        self.out, self.config, self.model, self.fps = out, config, config.model, fps
        drawn = [(number, prompt) for number, prompt in enumerate(prompts) if not fault_of(prompt)]
        self.prompts = [prompt for _, prompt in drawn]
        self.folders = [out / folder_name(number, prompt) for number, prompt in drawn]
        if layout == "geneval":
            self.folders = [out / f"{number:05d}" for number, _ in drawn]
        self.candidates: list[list[Candidate]] = [[] for _ in drawn]
        entries = [prompt.as_entry() if isinstance(prompt, Prompt) else prompt for prompt in prompts]
        entries = ["" if fault_of(prompt) else entry for prompt, entry in zip(prompts, entries, strict=True)]
        self.call: dict[str, Any] = {"prompts": entries, **({} if layout == "plain" else {"layout": layout})}
        self.layout = layout
        self.resumed = resumed
        self.checkpoint = Checkpoint(out / "checkpoint.safetensors")
        self.undrawn: list[Path] = []
        self._lines: dict[int, Lines] = {}

    def start(self) -> None:
        """Looks at the places of all files, and forgets a call that was stopped here, unless this one resumes it.

        Raises OutputError, OptionError."""
        check_places([self.out], [CALL, GATHERED])
        check_places(self.folders, FILES)
        if self.layout == "geneval":
            geneval.check_folders(self.out, self.folders)
        for folder in self.folders:
            for place in (folder, folder / "samples"):
                sweep(place)
        if not self.resumed:
            (self.out / CALL).unlink(missing_ok=True)
            self.checkpoint.remove()
        (self.out / GATHERED).unlink(missing_ok=True)

    def on_round(self, candidates: list[Candidate]) -> None:
        if not self._lines and not self.resumed:  # now there is something to resume
            self._remove_earlier()
            write_yaml(self.out / CALL, self.call | self.config.model_dump())
        for index in sorted({candidate.prompt for candidate in candidates}):
            of_prompt = [candidate for candidate in candidates if candidate.prompt == index]
            if index not in self._lines:
                self._open(index, before=of_prompt[0].round)
            self._lines[index].add(*(candidate._asdict() for candidate in of_prompt))
            self.candidates[index] += of_prompt

    def _remove_earlier(self) -> None:
        """Pictures of an earlier call that this one will not overwrite: nobody could tell whose they are."""
        if self.layout == "geneval":
            return geneval.remove_earlier(self.out, self.folders, self.call, self.config)
        for path in (path for folder in self.folders for path in folder.glob("best*")):
            place = re.fullmatch(r"best(?:-(\d+))?\.(png|mp4)", path.name)
            if place and (place[2] == "mp4" or int(place[1] or 1) > self.config.top_k):
                path.unlink(missing_ok=True)

    def _open(self, index: int, before: int) -> None:
        """The candidates' file; of an earlier call only the rounds before stay, and those only where this one resumes
        it."""
        if self.layout == "geneval":
            about = json.dumps(geneval.metadata(self.prompts[index]))
            write_text(self.folders[index] / "metadata.jsonl", about + "\n")
        path = self.folders[index] / "candidates.jsonl"
        kept = self._earlier(index, before) if self.resumed else []
        write_text(path, "".join(json_line(candidate._asdict()) for candidate in kept))
        self._lines[index] = Lines(path)
        self.candidates[index] = kept

    def _earlier(self, index: int, before: float) -> list[Candidate]:
        path, found = self.folders[index] / "candidates.jsonl", []
        for count, line in enumerate(read_lines(path), 1):
            try:
                reward = None if line["reward"] is None else number(line["reward"])
                candidate = Candidate(**{**line, "prompt": index, "reward": reward})
                if candidate.round < before:
                    found.append(candidate)
            except (KeyError, TypeError, ValueError) as error:
                raise damaged(path, count, error) from None
        return found

    def on_sample(self, index: int, sample: Sample) -> None:
        """A prompt is done: its pictures and result are on disk even if a later prompt fails."""
        if index in self._lines:
            self._lines[index].close()
        for place, ranked in enumerate(sample.top):
            path = self._place(index, place)
            shown = strip(ranked.image) if ranked.image.dim() == 4 else ranked.image
            self._draw(path, partial(write_picture, path, shown))
            if ranked.image.dim() == 4:
                path = path.with_suffix(".mp4")
                self._draw(path, partial(write_video, path, ranked.image, self.fps))
        for place in range(len(sample.top), self.config.top_k):  # an earlier call may have found more
            for suffix in (".png", ".mp4"):
                self._place(index, place).with_suffix(suffix).unlink(missing_ok=True)
        self._write_result(index, sample, {})

    def _place(self, index: int, place: int) -> Path:
        """Of the picture at `place` of the best."""
        if self.layout == "geneval":
            return geneval.sample_path(self.folders[index], self.config, place)
        return self.folders[index] / (f"best-{place + 1:02d}.png" if place else "best.png")

    def finish(self, flow: Flow, result: SearchResult, reward: Any = None) -> list[float | None]:
        """What only the whole call knows: costs, versions, and last the pictures of the searches, for they run the
        model again. What could not be drawn is in `undrawn`. Returns the held-out scores.

        reward: as it was loaded for the search; default: loaded again where a replay needs it."""
        scores: list[float | None] = []
        config: SearchConfig = result.config
        for index, sample in enumerate(result.samples):
            folder = self.folders[index]
            whole = {
                "rows_padded": result.rows_padded,
                "method": config.method,
                "picked": None if config.picked is None else config.picked.model_dump(),
                "micro_batch": result.micro_batch,
                "splits": config.splits,
                "nan_rewards": result.nan_rewards,
                "versions": result.versions,
            }
            scores.append(self._write_result(index, sample, whole))
            timing = {"prompts": len(self.prompts), "seconds": result.seconds, "overshoot": result.overshoot}
            write_json(folder / "timing.json", timing)
            # Seconds became a budget in NFE and cuts; the rerun takes these, or it would measure anew and differ.
            resolved = config.model_copy(update={"budget": sample.budget_nfe, "seconds": None})
            if index == 0:
                write_yaml(folder / "config.yaml", self.call | resolved.model_dump())
            else:  # written with each prompt, a list of all prompts would grow with their square
                write_same(folder / "config.yaml", self.folders[0] / "config.yaml")
        for index, sample in enumerate(result.samples):
            if self.resumed and index not in self._lines:  # it was done before
                self.candidates[index] = self._earlier(index, math.inf)
            path = self.folders[index] / "search.png"
            self._draw(path, partial(self._draw_search, path, index, sample, scores[index], flow, config, reward))
        if not self.undrawn:
            self.checkpoint.remove()
            (self.out / CALL).unlink(missing_ok=True)
        return scores

    def _draw_search(
        self, path: Path, index: int, sample: Sample, score: float | None, flow: Flow, config: SearchConfig, reward: Any
    ) -> None:
        steps = api.replay(flow, sample, config, reward=reward)
        write_bytes(path, search_picture(sample, steps, self.candidates[index], score))

    def _draw(self, path: Path, write: Callable[[], Any]) -> None:
        if not drawn(path, write, f"flowfast generate --resume {self.out}"):
            self.undrawn.append(path)

    def _write_result(self, index: int, sample: Sample, whole: dict[str, Any]) -> float | None:
        found = heldout(self.model, [sample.image], [sample.prompt])
        score = None if found is None else found[0]
        fields = {
            "prompt": sample.prompt,
            "method": sample.method,
            "seed": sample.seed,
            "budget_nfe": sample.budget_nfe,
            "nfe": sample.nfe,
            "nfe_speculative": sample.nfe_speculative,
            "evaluations": sample.evaluations,
            "unspent": sample.unspent,
            "waves": sample.waves,
            "reward_calls": sample.reward_calls,
            "reward": sample.reward,
            "preview_reward": sample.top[0].preview_reward,
            "heldout": score,
            "winner": asdict(sample.winner),
            "top": [{"reward": ranked.reward, "winner": asdict(ranked.winner)} for ranked in sample.top[1:]],
        }
        write_json(self.folders[index] / "result.json", fields | whole)
        return score
