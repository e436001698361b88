"""One call of `flowfast.search` whose prompts share their budget: a search a wave, until all is spent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor

from flowfast.calibration.auto import recorded
from flowfast.config import SearchConfig
from flowfast.engine import clock
from flowfast.engine.call import Call, Told, identity, without_sample
from flowfast.engine.checkpoint import Checkpoint, Held
from flowfast.errors import FlowfastError
from flowfast.ops.noise import noise_key
from flowfast.pool.ledger import Ledger
from flowfast.pool.wave import Wave, ceiling_of, check_pool, wave_of
from flowfast.prompts import fields_of
from flowfast.resolve import Resolved
from flowfast.types import Candidate, Flow, Sample, SearchResult
from flowfast.version import versions


@dataclass
class Spent:
    """What the waves have cost together."""

    rounds: int
    rows_padded: int
    nan_rewards: int
    seconds: dict[str, float]


class PoolCall:
    """As `flowfast.engine.call.Call`, with `config.pool`; `pace_name` is not read.

    Wave w of a prompt is the search of its chains w m to w m + m - 1: no noise comes twice, and who gets how many
    waves depends on nothing but seeds, prompts and rewards. Equal prompts of one seed are one. A checkpoint has whole
    waves, and beside it lies that of the wave that runs. Raises OptionError, BudgetError: what does not go together.
    """

    def __init__(
        self, flow: Flow, prompts: list[str], scorer: Any, resolved: Resolved, latents: Tensor | None,
        pace_name: str | None, told: Told, config: SearchConfig, *, checkpoint: Checkpoint | None = None,
        checkpoint_seconds: float | None = None, before: Held | None = None, asked_micro_batch: int | None = None,
        started: float = 0.0,
    ):  # fmt: skip
        budget = check_pool(config, latents)
        self.flow, self.prompts, self.scorer, self.resolved, self.told = flow, prompts, scorer, resolved, told
        self.config, self.checkpoint, self.checkpoint_seconds = config, checkpoint, checkpoint_seconds
        self.asked_micro_batch, self.started = asked_micro_batch, started
        self.wave: Wave = wave_of(resolved, config, budget)
        keys = [noise_key(int(fields_of(text).get("seed", config.seed)), text, config.repeat) for text in prompts]
        unlike = list(dict.fromkeys(keys))
        self.first = [keys.index(key) for key in unlike]  # of unlike prompts: where each stands first
        self.unlike = [unlike.index(key) for key in keys]  # of each prompt: which of these it is
        until = math.inf if config.until is None else config.until
        self.ledger = Ledger(unlike, budget, self.wave.nfe, ceiling_of(scorer), until, shares=len(prompts))
        self.found: list[list[Sample]] = [[] for _ in unlike]
        self.rounds = [0] * len(unlike)
        self.lost: dict[int, FlowfastError] = {}
        self.ended: set[int] = set()
        self.spent = Spent(0, 0, 0, dict.fromkeys(("model", "decode", "reward", "search"), 0.0))
        self.identity = identity(config, resolved, prompts, scorer, flow.shape, budget)
        self.held: dict[int, Sample] = {}
        """Samples of whole waves, by wave x prompts + prompt."""
        self.waves_held = 0
        if before is not None and checkpoint is not None:
            checkpoint.check_same(before.facts, self.identity)
            self.held, self.waves_held = dict(before.samples), before.facts["waves"]
            self.spent, self.rounds = Spent(**before.facts["spent"]), before.facts["rounds_of"]

    # ---- the whole call ----

    def run(self) -> SearchResult:
        waves = 0
        while chosen := self.ledger.next():
            samples = self._earlier(chosen) if waves < self.waves_held else self._run(chosen)
            waves += 1
            for at, sample in zip(chosen, samples, strict=True):
                self.ledger.heard(at, None if sample is None else sample.reward)
                self.found[at] += [] if sample is None else [sample]
            if waves > self.waves_held:
                self.waves_held = waves
                self._save()
            self._tell_ended(at for at in range(len(self.first)) if not self.ledger.may_have_more(at))
        self._tell_ended(range(len(self.first)))
        nothing = [at for at, samples in enumerate(self.found) if not samples]
        if nothing:
            raise without_sample([self.prompts[self.first[at]] for at in nothing], self.lost.get(nothing[0]))
        return self._result()

    def _number(self, at: int) -> int:
        """Of the prompt's wave that was paid for last."""
        return (self.ledger.waves[at] - 1) * len(self.prompts) + self.first[at]

    def _earlier(self, chosen: Sequence[int]) -> list[Sample | None]:
        return [self.held.get(self._number(at)) for at in chosen]

    def _run(self, chosen: Sequence[int]) -> list[Sample | None]:
        """A wave of these prompts."""
        file = None if self.checkpoint is None else Checkpoint(wave_file(self.checkpoint))
        texts = [self.prompts[self.first[at]] for at in chosen]
        done, now = self.spent.rounds, {"pool": False, "budget": self.wave.nfe}
        splits = tuple((at - done, rows) for at, rows in self.config.splits if at > done)
        call = Call(
            self.flow, texts, self.scorer, self.resolved, None, None, self._told_of(chosen),
            self.config.model_copy(update={**now, "splits": splits}), checkpoint=file,
            checkpoint_seconds=self.checkpoint_seconds, before=None if file is None else file.read(texts),
            started=clock.now(), first_chains=[(self.ledger.waves[at] - 1) * self.wave.chains for at in chosen],
        )  # fmt: skip
        samples = call.walk()
        self._count(call, chosen)
        for at, (index, sample) in zip(chosen, enumerate(samples), strict=True):
            if sample is None:
                self.lost[at] = call.lost[index]
            else:
                self.held[self._number(at)] = sample
        return samples

    def _count(self, call: Call, chosen: Sequence[int]) -> None:
        """What a wave has cost. Later ones have its micro-batch, so that all have one where memory suffices."""
        core, spent = call.core, self.spent
        before = tuple(split for split in self.config.splits if split[0] <= spent.rounds)
        now = tuple((spent.rounds + at, rows) for at, rows in core.splits)
        self.config = self.config.model_copy(update={"splits": before + now, "micro_batch": core.last_micro_batch})
        spent.rounds += core.rounds
        spent.rows_padded += core.rows_seen - sum(job.nfe for job in call.jobs)
        spent.nan_rewards += core.nan_rewards
        for part, seconds in call.loaded.clock.read().items():
            spent.seconds[part] += seconds
        for at, job in zip(chosen, call.jobs, strict=True):
            self.rounds[at] += len(job.forecast.widths)

    # ---- who hears of it ----

    def _told_of(self, chosen: Sequence[int]) -> Told:
        """For the search of one wave: places and counts become those of the whole call."""
        before = sum(sample.nfe for sample in chain(*self.found))
        whole = self.ledger.share * len(self.prompts)
        spent = [sum(sample.nfe for sample in self.found[at]) for at in chosen]
        rounds = [self.rounds[at] for at in chosen]

        def on_round(candidates: list[Candidate]) -> None:
            assert self.told.on_round
            self.told.on_round([
                each._replace(
                    prompt=self.first[chosen[each.prompt]],
                    round=rounds[each.prompt] + each.round,
                    nfe=spent[each.prompt] + each.nfe,
                )
                for each in candidates
            ])  # fmt: skip

        def on_progress(nfe: int, _: int) -> None:
            assert self.told.on_progress
            self.told.on_progress(before + nfe, whole)

        return Told(
            on_round=on_round if self.told.on_round else None,
            on_progress=on_progress if self.told.on_progress else None,
        )

    def _tell_ended(self, places: Iterable[int]) -> None:
        """Prompts that get nothing more, and those that are equal to them."""
        for at in places:
            if at in self.ended or not self.found[at]:
                continue
            self.ended.add(at)
            for index, same in enumerate(self.unlike):
                if same == at and self.told.on_sample:
                    self.told.on_sample(index, self._sample(index))

    def _sample(self, index: int) -> Sample:
        """What a prompt has of all its waves."""
        found = self.found[self.unlike[index]]
        top = sorted(chain(*(sample.top for sample in found)), key=lambda each: -each.reward)[: self.config.top_k]
        names = ("nfe", "nfe_speculative", "evaluations", "reward_calls")
        sums = {name: sum(getattr(sample, name) for sample in found) for name in names}
        share = self.ledger.share
        return replace(
            found[0], top=tuple(top), budget_nfe=share, unspent=share - sums["nfe"], waves=len(found), **sums
        )  # fmt: skip

    def _result(self) -> SearchResult:
        seconds = {"total": clock.now() - self.started, **self.spent.seconds}
        return SearchResult(
            samples=tuple(self._sample(index) for index in range(len(self.prompts))),
            config=recorded(self.config.model_copy(update={"slots": self.config.slots})),
            micro_batch=self.config.micro_batch or 1,
            rows_padded=self.spent.rows_padded,
            rounds=self.spent.rounds,
            nan_rewards=self.spent.nan_rewards,
            seconds=seconds,
            versions=versions(),
        )

    # ---- checkpoints ----

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        picked = None if self.config.picked is None else self.config.picked.model_dump()
        facts = {
            **self.identity, "seconds": None, "asked_micro_batch": self.asked_micro_batch, "picked": picked,
            "micro_batch": self.config.micro_batch, "splits": self.config.splits, "waves": self.waves_held,
            "spent": vars(self.spent), "rounds_of": self.rounds,
        }  # fmt: skip
        self.checkpoint.write(Held({}, facts, self.held, []))
        Checkpoint(wave_file(self.checkpoint)).remove()


def wave_file(checkpoint: Checkpoint) -> Any:
    """Of the wave that runs."""
    return checkpoint.path.with_name(checkpoint.path.name + ".wave")
