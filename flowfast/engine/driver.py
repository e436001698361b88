"""Runs the requests of one call through batches of slots. Clocks, callbacks and host rewards live here, outside the
loop that scripts.

A *group* is one batch of slots, a `SlotBatch`. There is one; with a reward on the host there are two that take turns,
so that the host scores the images of one while the device runs the other.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, MutableMapping
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flowfast import rewards, secrets
from flowfast.config import SearchConfig
from flowfast.engine import checkpoint as checkpoints
from flowfast.engine import clock, deadline, spans
from flowfast.engine.graphs import Graphs, Recorder, recorder_for
from flowfast.engine.group import Group, Report
from flowfast.engine.transfer import Transfer, Transfers
from flowfast.errors import BudgetError, ModelError, OptionError, RewardError
from flowfast.files import plain
from flowfast.methods.plan import Plan
from flowfast.models.answers import CheckedFlow, asked, conditions_of, defaults_of
from flowfast.models.compiled import PreviewFlow, compiled
from flowfast.ops.noise import noise_key
from flowfast.prompts import encoded, fields_of
from flowfast.resolve import Resolved, checked_latents, fitting_rows
from flowfast.rewards.worker import Worker
from flowfast.rounds.batch import Limits, SlotBatch
from flowfast.rounds.state import slice_of
from flowfast.rounds.steered import frozen
from flowfast.types import Candidate, Flow, Ranked, Sample, SearchResult, Winner
from flowfast.version import versions

log = logging.getLogger("flowfast.engine")
BATCH_CAPS: MutableMapping[Any, int] = WeakKeyDictionary()
"""The micro-batch that fitted into memory, of flows for which the default did not."""
STATUS = ("", "best", "accepted", "discarded")
CHECKPOINT_SECONDS = 30.0
LAG = 2  # rounds that records may be behind the device
DECIDING, DECODING = ", as it decided on one", ", as a sample was decoded"  # where a smaller micro-batch is no help
MEMORY_OPTIONS = {"device", "offload", "vae_slicing", "vae_tiling"}
"""Options of a model that a search may be resumed with where it ran out of memory."""


class OtherBatch(Exception):
    """The search goes on with another micro-batch, from what is held (None: from the start)."""

    def __init__(self, config: SearchConfig, held: checkpoints.Held | None):
        super().__init__(config.micro_batch)
        self.config, self.held = config, held


class Driver:
    """One call of `flowfast.search`. pace_name: names the reward if its pace may be kept for later calls, else None."""

    def __init__(
        self,
        flow: Flow,
        prompts: list[str],
        scorer: Any,
        resolved: Resolved,
        latents: Tensor | None,
        pace_name: str | None,
        on_round: Callable[[list[Candidate]], None] | None,
        on_sample: Callable[[int, Sample], None] | None,
        on_progress: Callable[[int, int], None] | None,
        checkpoint: checkpoints.Checkpoint | None = None,
        checkpoint_seconds: float | None = None,
        *,
        config: SearchConfig,
        held: checkpoints.Held | None = None,
        asked_micro_batch: int | None = None,
    ):
        self.config, self.resolved, self.prompts, self.scorer = config, resolved, prompts, scorer
        self.original, self.previews = flow, config.finalists is not None
        self.asked_micro_batch = asked_micro_batch
        seen = compiled(cast(Any, flow)) if config.compile else PreviewFlow(flow) if self.previews else flow
        checked = CheckedFlow(seen, "preview" if self.previews else "decode")
        self.flow = cast(Flow, checked)
        self.decode = CheckedFlow(flow).decode if self.previews else self.flow.decode
        self.on_round, self.on_sample, self.on_progress = on_round, on_sample, on_progress
        self.checkpoint, self.saved, self.held = checkpoint, clock.now(), held
        self.most_images = held.most_images if held else None
        self.seconds = held.facts["seconds"] if held else config.seconds
        self.checkpoint_seconds = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
        self.latents: Tensor | None = None  # until the plan is there: not where a round is only measured
        self.host_reward = rewards.on_host(scorer)
        self.steered = () if config.gradient is None else (self.flow, scorer)
        if self.steered:
            rewards.check_gradient(scorer)
        self.cond = encoded(self.flow.encode, prompts)
        self.null_cond = self.flow.encode([config.negative_prompt]) if resolved.passes == 2 else {}
        self.device = next(iter(self.cond.values())).device
        if isinstance(scorer, nn.Module):
            scorer.to(self.device)
        self.reward_cond: dict[str, Tensor] = {}
        if not self.host_reward:
            what = f"encode of reward {rewards.name_of(scorer)!r}"
            encode = partial(rewards.encode_alone, scorer) if self.steered else scorer.encode
            known = asked(what, partial(encoded, encode), prompts, kind=RewardError)
            self.reward_cond = conditions_of(known, len(prompts), what, RewardError, self.device)
        self.polls = bool(self.device.type == "cpu" or on_round or on_progress or config.until is not None)
        self.clock, self.pool = clock.Clock(self.device), cast(Worker | None, None)
        self.measuring = 0.0  # seconds spent on finding out how long a round takes: not part of the search
        self.deadline: deadline.Deadline | None = None
        self.rounds, self.stage = held.facts["counts"]["rounds"] if held else 0, ""
        if held and held.clocks:
            self.clock, self.deadline, self.measuring = held.clocks
        self.pace_key: Any = None
        if (config.budget is None) == (config.seconds is None):
            raise OptionError(
                f"expected a budget in NFE or seconds, got {config.budget} and {config.seconds}: give one"
            )
        if config.seconds is None:
            self.budget = config.budget or 0
        else:
            self.budget = held.facts["budget"] if held else self._budget_of(config.seconds, pace_name)
        if self.budget < 1:
            raise BudgetError(f"the budget must be at least 1 NFE, got {self.budget}: raise it")
        self.plan = resolved.plan(self.budget)
        if latents is not None:
            self.latents = checked_latents(latents, len(prompts), flow, resolved, self.plan)
        if self.deadline is None or held:
            self._choose_sizes(self.plan)
        self.cuts: list[tuple[int, int, int]] = list(config.cuts)
        recorder = recorder_for(self.device, config.cuda_graphs)  # one pool of memory
        waits = defaults_of(flow).waits_because
        if recorder and waits:
            log.warning("runs without CUDA graphs, more slowly, because %s", waits)
            recorder = None
        self.groups = [self._group(self.plan, recorder) for _ in range(self.group_count)]
        checked.keeps_velocity = resolved.passes == 2 or (self.group_count > 1 and self.groups[0].engine.direct)
        self.limits = self._limits(self.plan)
        self.linear_time = resolved.schedule.linear_time.tolist()
        self.finished = self.groups[0].engine.finished.tolist()
        self.rows_seen = self.nan_rewards = 0
        self.spent = [0] * len(prompts)
        self.samples: list[Sample | None] = [None] * len(prompts)
        self.identity = self._identity() if checkpoint else {}
        self.lost: dict[int, str] = {}  # what happened to prompts that got no sample

    # ---- sizes and budgets ----

    def _choose_sizes(self, plan: Plan) -> None:
        """Slots and micro-batch: as configured, else 16 prompts and as many rows as a round of a group fills, at most
        32."""
        config = self.config
        slots = config.slots or min(len(self.prompts), 16)
        self.group_count = 2 if self.host_reward and config.overlap and slots > 1 else 1
        self.slots = -(-slots // self.group_count)  # of a group
        fitting = min(fitting_rows(self.slots, plan), BATCH_CAPS.get(self.original, 32))
        self.last_micro_batch = config.micro_batch or fitting
        split = (rows for rounds, rows in config.splits if self.rounds < rounds)
        self.micro_batch = next(split, self.last_micro_batch)

    def _budget_of(self, seconds: float, pace_name: str | None) -> int:
        """The largest budget whose rounds fit into `seconds` a prompt, by the time that one micro-batch takes."""
        if not seconds > 0:
            raise BudgetError(f"seconds must be positive, got {seconds}: raise it")
        before = clock.now()
        resolved, count = self.resolved, len(self.prompts)
        probe = resolved.plan(16 * resolved.schedule.transitions * resolved.passes)
        self._choose_sizes(probe)
        try:
            with frozen(*self.steered):
                self.deadline = deadline.Deadline(seconds * count, self._pace(probe, pace_name))
        except torch.OutOfMemoryError as error:
            raise self._half(error, None) from None
        budget = deadline.largest_budget(
            resolved, seconds, self.deadline.pace, prompts=count, slots=self.slots, micro_batch=self.micro_batch
        )
        self.measuring = clock.now() - before
        return budget

    @torch.no_grad()
    def _pace(self, plan: Plan, pace_name: str | None) -> deadline.Pace:
        """What a micro-batch takes with all that goes with it: in the last such searches of this process, else in a few
        rounds, of which the first half is decoded and scored."""
        if pace_name is not None:
            unimportant = {"seed", "repeat", "seconds", "until", "top_k", "negative_prompt", "cuts"}
            facts = self.config.model_dump_json(exclude=unimportant)
            self.pace_key = (pace_name, facts, self.slots, self.micro_batch, torch.get_num_threads())
            known = deadline.known_pace(self.original, self.pace_key)
            if known is not None:
                return known
        everywhere = replace(plan, scored=[])
        group, times = self._group(everywhere), list[float]()
        self.limits = self._limits(everywhere)
        for slot in range(self.slots):
            self._admit(group, everywhere, slot, 0)
        rounds = min(8, len(plan.widths()))
        half = rounds if all(plan.scored) else (rounds + 1) // 2
        for each in range(rounds):
            if each == half:
                for slot, widths in enumerate(group.engine.plans):
                    group.engine.expect(slot, widths, [0] * len(widths))
            start = clock.now()
            self._start(group)
            self._finish(group)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((clock.now() - start) / (group.engine.padded // self.micro_batch))
        self.clock = clock.Clock(self.device)
        scored, plain = min(times[:half]), min(times[half:], default=math.inf)  # warm and undisturbed
        return deadline.Pace(plain, max(0.0, scored / plain - 1)) if plain < scored else deadline.Pace(scored, 0.0)

    def _hold(self, group: Group, waiting: int) -> None:
        """Keeps to the deadline: where the rounds that are planned would end late, prompts of this group get less. Also
        repeats the cuts that a configuration brings along."""
        engine = group.engine
        if self.deadline is None:
            for slot, index in group.index_of.items():
                cuts = [cut for cut in self.cuts if cut[0] == index and cut[1] <= engine.rounds[slot]]
                if cuts and cuts[-1][1] == engine.rounds[slot]:
                    self._cut(group, slot, cuts)
            return
        pace, M = self.deadline.pace, self.micro_batch
        self.deadline.tick(pace.work([engine.padded], [engine.scored_padded], 1, M))
        work = waiting * pace.work(*self.plan.forecast()[:2], self.slots, M) / self.slots
        for each in self.groups:
            work += pace.work(each.rest(each.engine.plans), each.rest(each.engine.scored_plans), 1, M)
        share = self.deadline.share(work)
        if share == 1.0:
            return
        for slot, index in group.index_of.items():
            rest_of = sum(engine.plans[slot][engine.rounds[slot] :])
            if rest_of:
                self.cuts.append((index, engine.rounds[slot], int(share * rest_of)))
                self._cut(group, slot, [cut for cut in self.cuts if cut[0] == index])

    def _cut(self, group: Group, slot: int, cuts: list[tuple[int, int, int]]) -> None:
        forecast = self.plan.forecast([cut[1:] for cut in cuts])
        quota, left = (torch.tensor(values, device="cpu") for values in (forecast.quota, forecast.left))
        group.engine.limit(slot, Limits(quota, left, left > 0, forecast.widths, forecast.scored))

    # ---- groups ----

    def _group(self, plan: Plan, recorder: Recorder | None = None) -> Group:
        reward = nn.Identity() if self.host_reward else self.scorer
        engine = self.resolved.batch(
            self.flow,
            rewards.graded(reward) if self.steered else reward,
            plan,
            self.slots,
            self.micro_batch,
            {k: v[:1] for k, v in self.cond.items()},
            {k: v[:1] for k, v in self.reward_cond.items()},
            self.device,
            null_cond=self.null_cond,
        )
        engine.ahead = recorder is None
        return Group(engine, Graphs(recorder), Graphs(recorder), Transfers(self.device, LAG + 1))

    def _limits(self, plan: Plan) -> Limits:
        start, forecast = plan.start or [True] * plan.chains, plan.forecast()
        quota, left, begin = (torch.tensor(values, device=self.device) for values in (plan.quota, plan.left, start))
        return Limits(quota, left, begin, forecast.widths, forecast.scored)

    def _admit(self, group: Group, plan: Plan, slot: int, index: int) -> None:
        config, resolved = self.config, self.resolved
        given = None
        if self.latents is not None:
            given = self.latents[index].reshape(-1, group.engine.numel).to(self.device).expand(plan.chains, -1)
        group.engine.admit(
            slot,
            {k: v[index : index + 1] for k, v in self.cond.items()},
            self.null_cond,
            {k: v[index : index + 1] for k, v in self.reward_cond.items()},
            self._noise_key(index),
            self.limits,
            resolved.guidance,
            math.inf if config.until is None else config.until,
            given,
        )

    def _noise_key(self, index: int) -> int:
        prompt, config = self.prompts[index], self.config
        return noise_key(fields_of(prompt).get("seed", config.seed), prompt, config.repeat)

    # ---- one round of a group ----

    def _start(self, group: Group) -> None:
        """Sends a round off; it waits for the host's rewards where there are any."""
        engine = group.engine
        self.clock.mark()
        engine.lay()
        if group.whole.recorder and not self.host_reward and not group.whole.eager_because:
            with spans.VELOCITY:  # all of the round
                group.whole.run(engine.size(), partial(self._device_round, group), group.static)
            engine.turn()
            self.clock.mark("model")
            return
        with spans.BRANCH:
            engine.branch()
        self.clock.mark("search")
        if group.forward.recorder:
            with spans.VELOCITY:  # decoder included
                images = group.forward.run(engine.size(), partial(self._forward, engine), group.static)
            self.clock.mark("model")
        else:
            with spans.VELOCITY:
                engine.evaluate()
            self.clock.mark("model")
            with spans.DECODE:
                images = engine.decode()
            self.clock.mark("decode")
        if not self.host_reward:
            with spans.REWARD:
                found = self._device_rewards(engine, images)
            self.clock.mark("reward")
            self._decide(group, found)
            return
        n = images.shape[0]
        if n == 0:  # nobody reads a score of this round; its turn to be decided comes all the same
            group.scored = _done(lambda: group.scores[:0])
            return
        read = engine.scored.index_select(0, engine.lane_transition[:n]).logical_and_(engine.lane_live[:n])
        lanes = (read, engine.lane_slot[:n], engine.lane_real[1, :n], engine.image_sum[:n])
        transfer = group.transfers.send([images, *lanes])
        texts = [self.prompts[group.index_of.get(slot, 0)] for slot in range(self.slots)]
        work = partial(self._host_rewards, group, transfer, texts)
        group.scored = self.pool.submit(work) if self.pool else _done(work)

    def _finish(self, group: Group) -> None:
        """Takes the host's rewards where a round waits for them."""
        if group.scored is None:
            return
        self.clock.mark()
        scores, group.scored = group.scored.result(), None
        self.clock.mark("reward")
        self._decide(group, group.rewards[: len(scores)].copy_(scores, non_blocking=True))

    def _decide(self, group: Group, found: Tensor) -> None:
        with spans.DECIDE:
            self._note_lanes(group)
            self.stage = DECIDING
            group.engine.observe(found)
            self.stage = ""
        self.clock.mark("search")

    def _device_round(self, group: Group) -> Tensor:
        """All that a round does on the device, for a CUDA graph; returns the rewards."""
        group.engine.branch()
        found = self._device_rewards(group.engine, self._forward(group.engine))
        self._note_lanes(group)
        self.stage = DECIDING
        group.engine.decide(found)
        self.stage = ""
        return found

    def _forward(self, engine: SlotBatch) -> Tensor:
        engine.evaluate()
        return engine.decode()

    def _note_lanes(self, group: Group) -> None:
        if self.on_round:  # before `decide` lays the lanes of the next round
            group.seen[0].copy_(group.engine.lane[:4])
            group.seen[1].copy_(group.engine.lane_live)

    def _device_rewards(self, engine: SlotBatch, images: Tensor) -> Tensor:
        if engine.scored_padded == 0:
            return engine.score(images)
        return rewards.score(self.scorer, lambda: engine.score(images), images)

    @torch.no_grad()
    def _host_rewards(self, group: Group, transfer: Transfer, texts: list[str]) -> Tensor:
        """Rewards (N,) of a round's images on the host; the reward sees finite images of lanes whose score is read."""
        images, on, slot, t, image_sum = transfer.read()
        live = on.logical_and(image_sum.isfinite()).nonzero().flatten()
        scores = group.scores[: len(on)].fill_(-math.inf)
        if len(live):
            with spans.REWARD:
                for part in live.split(self.most_images or len(live)):
                    scores[part] = self.scorer(images[part], [texts[i] for i in slot[part].tolist()], t[part])
        return scores

    # ---- the whole call ----

    @torch.no_grad()
    def run(self, started: float) -> SearchResult:
        if self.deadline and not self.held:
            self.deadline.start(started + self.measuring, self.device)
        with Worker("host reward") as pool, frozen(*self.steered):
            self.pool = pool if len(self.groups) > 1 else None
            self.waiting = self._resume()
            try:
                self._run_all()
            except (torch.OutOfMemoryError, OtherBatch) as error:
                wait([group.scored for group in self.groups if group.scored])  # a reward never runs twice at once
                if isinstance(error, OtherBatch):
                    raise
                raise self._half(error, self._hold_all()) from None
        failed = [prompt for prompt, sample in zip(self.prompts, self.samples, strict=True) if sample is None]
        if failed:
            why = self.lost.get(self.samples.index(None), "so an earlier call found")
            raise ModelError(
                f"no finished sample of prompt {failed[0]!r} has a reward ({len(failed)} such prompts): {why}; check "
                "model, decoder and reward at float32"
            )
        seconds = {"total": clock.now() - started - self.measuring, **self.clock.read()}
        config = self.config
        if self.deadline and self.pace_key and not config.splits:
            pace = self.deadline.pace._replace(seconds=seconds["total"] / self.deadline.worked)
            deadline.learn_pace(self.original, self.pace_key, pace)
        slots = self.slots * len(self.groups)
        return SearchResult(
            samples=tuple(cast(list[Sample], self.samples)),
            config=config.model_copy(
                update={"micro_batch": self.last_micro_batch, "slots": slots, "cuts": tuple(sorted(self.cuts))}
            ),
            micro_batch=self.micro_batch,
            rows_padded=self.rows_seen - sum(self.spent),
            rounds=self.rounds,
            nan_rewards=self.nan_rewards,
            seconds=seconds,
            overshoot=None if config.seconds is None else seconds["total"] - config.seconds * len(self.prompts),
            versions=versions(),
        )

    def _run_all(self) -> None:
        for group in self.groups:
            self._hand_out(group)  # what was finished when the search was held
        for group in self.groups:
            self._fill_and_start(group)
        while any(group.index_of for group in self.groups):
            for group in self.groups:
                if group.index_of:
                    self._finish(group)
                    self._after_round(group)
                    if self.checkpoint and clock.now() - self.saved >= self.checkpoint_seconds:
                        self._save()
                    if self.rounds in dict(self.config.splits):
                        raise OtherBatch(self.config, self._hold_all())
                    self._fill_and_start(group)
        if self.checkpoint:
            self._save()

    def _fill_and_start(self, group: Group) -> None:
        for slot in range(self.slots):
            if self.waiting and slot not in group.index_of:
                self._admit(group, self.plan, slot, self.waiting[0])
                group.index_of[slot] = self.waiting.popleft()
        if group.index_of:
            self._start(group)

    # ---- checkpoints ----

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a search to go on where another one stopped."""
        latents, apart = self.latents, {"micro_batch", "splits", "slots", "budget", "seconds", "cuts"}
        # As it will be read again: tuples are lists there, and what JSON does not know is a text.
        config = json.loads(json.dumps(plain(self.config.model_dump(exclude=apart)), default=repr))
        options = config["model_options"].items()
        config["model_options"] = {
            name: value for name, value in options if name not in MEMORY_OPTIONS and not secrets.is_secret(name)
        }
        config["reward"] = secrets.without_login(config["reward"])
        schedule = self.resolved.schedule
        times = torch.cat([schedule.table, schedule.time[:, None], schedule.linear_time[:, None]], 1)
        return {
            "prompts": checkpoints.digest_of_prompts(self.prompts),
            "config": config,
            "reward": secrets.without_login(rewards.name_of(self.scorer)),
            "shape": list(self.flow.shape),
            "budget": self.budget,
            "micro_batch": self.last_micro_batch,
            "slots": self.slots * len(self.groups),
            "latents": None if latents is None else checkpoints.digest_of(latents.cpu().numpy().tobytes()),
            "threads": torch.get_num_threads(),
            "noise_stream": versions()["noise_stream"],
            "schedule": checkpoints.digest_of(times.cpu().numpy().tobytes()),
        }

    def _save(self) -> None:
        assert self.checkpoint
        self.checkpoint.write(self._hold_all())
        self.saved = clock.now()

    def _hold_all(self) -> checkpoints.Held:
        """What all groups remember between two rounds; a round that is under way will be run again."""
        tensors: dict[str, Tensor] = {}
        groups = []
        for g, group in enumerate(self.groups):
            self._read_reports(group, all_of_them=True)
            tensors |= {f"group{g}.{name}": tensor for name, tensor in checkpoints.state_of(group.engine).items()}
            groups.append(group.held())
        samples = {index: sample for index, sample in enumerate(self.samples) if sample}
        counts = {name: getattr(self, name) for name in ("rows_seen", "rounds", "nan_rewards")}
        facts = {**self.identity, "budget": self.budget, "micro_batch": self.last_micro_batch, "seconds": self.seconds}
        facts |= {"asked_micro_batch": self.asked_micro_batch, "splits": self.config.splits}
        facts |= {"groups": groups, "counts": counts, "waiting": len(self.waiting)}
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        clocks = (self.clock, self.deadline, self.measuring)
        return checkpoints.Held(tensors, facts, samples, list(self.cuts), clocks, self.most_images)

    def _half(self, error: torch.OutOfMemoryError, held: checkpoints.Held | None) -> OtherBatch:
        """The way on with half of the micro-batch that was too much. Raises ModelError where that does not help."""
        rows = self.micro_batch
        if self.stage or rows == 1:
            kept = (
                f"; {self.checkpoint.path} has what was found, the same call goes on there" if self.checkpoint else ""
            )
            raise ModelError(
                f"out of memory with micro-batches of {rows} after {self.rounds} rounds{self.stage}: choose a smaller "
                f"micro_batch, fewer slots or finalists, or load the model with offload or vae_tiling{kept}"
            ) from error
        log.warning("out of memory with micro-batches of %d: trying %d", rows, rows // 2)
        BATCH_CAPS[self.original] = rows // 2
        splits = [split for split in self.config.splits if split[0] <= self.rounds]
        if self.rounds > max((rounds for rounds, _ in splits), default=0):
            splits.append((self.rounds, rows))
        config = self.config.model_copy(update={"micro_batch": rows // 2, "splits": tuple(splits)})
        if self.deadline:
            self.deadline.restart()
        return OtherBatch(config, held and replace(held, most_images=rows // 2))

    def _resume(self) -> deque[int]:
        """The prompts that wait; where a search was held, goes back to it."""
        if self.held is None:
            return deque(range(len(self.prompts)))
        held, facts = self.held, self.held.facts
        if self.checkpoint and not held.clocks:  # of another process
            self.checkpoint.check_same(facts, self.identity)
        for g, (group, found) in enumerate(zip(self.groups, facts["groups"], strict=True)):
            for slot, index in found["index_of"].items():
                group.index_of[int(slot)] = index
                self._admit(group, self.plan, int(slot), index)
            try:
                checkpoints.load_into(group.engine, held.tensors, f"group{g}.")
            except ValueError as error:
                raise self.checkpoint.refused(str(error)) if self.checkpoint else error from None
            group.go_on(found)
        waiting = range(len(self.prompts) - facts["waiting"], len(self.prompts))
        self.cuts = held.cuts + [cut for cut in self.config.cuts if cut[0] in waiting and cut not in held.cuts]
        for index, sample in held.samples.items():
            self.samples[index], self.spent[index] = sample, sample.nfe
        for name, value in facts["counts"].items():
            setattr(self, name, value)
        return deque(waiting)

    # ---- after a round ----

    def _after_round(self, group: Group) -> None:
        """Records, the deadline, and the prompts that are done: these are on disk before the decoder runs."""
        engine, state = group.engine, group.engine.state
        self.rounds += 1
        self.rows_seen += engine.padded * self.resolved.passes
        if self.polls:
            records = [engine.dense, engine.status, *group.seen] if self.on_round else []
            transfer = group.transfers.send([state.alive, state.nfe, *records])
            group.reports.append(Report(transfer, dict(group.index_of), list(engine.rounds)))
            self._read_reports(group)
        self._hold(group, len(self.waiting))
        if self.checkpoint and any(group.is_done(slot) for slot in group.index_of):
            self._save()
        self._hand_out(group)

    def _hand_out(self, group: Group) -> None:
        """Decodes what is done and frees its slots."""
        for slot, index in list(group.index_of.items()):
            if group.is_done(slot):
                self.stage = DECODING
                sample = self._sample(group, index, group.engine.release(slot))
                self.stage = ""
                self._read_reports(group, all_of_them=True)
                del group.index_of[slot]
                group.over.discard(slot)
                self.samples[index] = sample
                if sample is None:
                    self.lost[index] = self._what_happened(group, slot)
                if sample and self.on_sample:
                    self.on_sample(index, sample)

    def _read_reports(self, group: Group, all_of_them: bool = False) -> None:
        """Reports that have come, and what is more than LAG rounds old."""
        while group.reports and (all_of_them or len(group.reports) > LAG or group.reports[0].transfer.ready()):
            report = group.reports.popleft()
            alive, nfe, *records = report.transfer.read()
            running = alive.view(self.slots, -1).any(1).tolist()
            group.over |= {
                slot for slot, index in report.index_of.items()
                if not running[slot] and group.index_of.get(slot) == index
            }  # fmt: skip
            if self.on_round:
                self.on_round(self._candidates(report, nfe.tolist(), records))
            if self.on_progress:
                for slot, index in report.index_of.items():
                    self.spent[index] = int(nfe[slot])
                self.on_progress(sum(self.spent), self.budget * len(self.prompts))

    def _candidates(self, report: Report, nfe: list[int], records: list[Tensor]) -> list[Candidate]:
        C, K = self.plan.chains, self.plan.lanes
        reward, status = records[0].flatten().tolist(), records[1].flatten().tolist()
        found = []
        for cell, slot, transition, candidate, live in zip(*records[2].tolist(), records[3].tolist(), strict=True):
            if live and slot in report.index_of:
                found.append(
                    Candidate(
                        prompt=report.index_of[slot],
                        round=report.rounds[slot] - 1,
                        chain=cell // K % C,
                        transition=transition,
                        candidate=candidate,
                        t=self.linear_time[transition],
                        reward=None if math.isnan(reward[cell]) else reward[cell],
                        finished=self.finished[transition],
                        status=STATUS[status[cell]],
                        nfe=nfe[slot],
                    )
                )
        return sorted(found, key=lambda c: (c.prompt, c.chain, c.transition, c.candidate))

    def _sample(self, group: Group, index: int, found: dict[str, Tensor]) -> Sample | None:
        """What a prompt got; the only wait of a request."""
        config, prompt, shape = self.config, self.prompts[index], tuple(self.flow.shape)
        x0, x = (found[name].view(-1, *shape) for name in ("x0", "x"))
        t = group.engine.linear_time.index_select(0, found["transition"])
        self.clock.mark()
        images = torch.cat([self.decode(x0[k : k + 1]).float() for k in range(len(x0))])
        self.clock.mark("decode")
        on_device = self.previews and not self.host_reward
        reward = self._rewards_in_full(index, images, t) if on_device else found["reward"]
        names = ("reward", "transition", "chain", "candidate", "cost")
        transfer = group.transfers.send([images, x0, x, t, reward, *(found[name] for name in names)])
        images, x0, x, t, reward, seen, last_of, chain_of, candidate_of, cost = (
            each.clone() for each in transfer.read()
        )
        nfe, speculative, calls, nan = cost.tolist()
        there = seen > -math.inf  # there may be fewer finished samples than finalists
        live = there & images.flatten(1).isfinite().all(1)
        nan += int((there & ~live).sum())
        if self.previews:
            if self.host_reward and live.any():
                work = partial(self.scorer, images[live], [prompt] * int(live.sum()), t[live])
                reward[live] = (self.pool.submit(work) if self.pool else _done(work)).result()  # never two at once
            calls += int(live.sum())
            nan += int(reward[live].isnan().sum())
        reward = torch.where(live, reward, -math.inf).nan_to_num(-math.inf, posinf=math.inf, neginf=-math.inf)
        self.nan_rewards += nan
        self.spent[index] = nfe
        top = []
        for k in reward.argsort(descending=True, stable=True).tolist()[: config.top_k]:
            if reward[k] == -math.inf:
                continue
            last = int(last_of[k])
            path = tuple((int(chain_of[k, at]), at, int(candidate_of[k, at])) for at in range(last + 1))
            winner = Winner(self._noise_key(index), path[-1][0], last, path[-1][2], path)
            preview = float(seen[k]) if self.previews else None
            top.append(Ranked(float(reward[k]), images[k], x0[k], x[k], winner, preview))
        if not top:
            return None
        return Sample(
            prompt=prompt,
            method=config.method,
            seed=fields_of(prompt).get("seed", config.seed),
            top=tuple(top),
            budget_nfe=self.budget,
            nfe=nfe,
            nfe_speculative=speculative,
            evaluations=nfe // self.resolved.passes,
            reward_calls=calls,
            unspent=self.budget - nfe,
        )

    def _what_happened(self, group: Group, slot: int) -> str:
        """Why a prompt whose slot was just freed got no sample."""
        state, plan, C = group.engine.state, self.plan, self.plan.chains
        calls, nan = (int(counts[slot]) for counts in (state.reward_calls, state.nan_rewards))
        ended = [(c, at) for c, at in enumerate(slice_of(state.transition, slot, C).tolist()) if at < len(plan.accept)]
        broke = sum(plan.quota[c][at] == 1 for c, at in ended)
        return (
            f"{nan} of its {calls} candidates counted as NaN (a reward that is, or a latent or picture that is not "
            f"finite); of {C} chains {broke} ended where the model's output was not finite, "
            f"{len(ended) - broke} where no child had a reward, {C - len(ended)} came to their end"
            + "; no other reward at an end was above -inf"
            * (nan < calls)
        )

    def _rewards_in_full(self, index: int, images: Tensor, t: Tensor) -> Tensor:
        """Device-side rewards (K,) of a prompt's images (K, ...) by the full decoder, at linear times t (K,)."""
        cond = {name: value[index : index + 1] for name, value in self.reward_cond.items()}
        parts = [
            rewards.score(self.scorer, partial(self.scorer, image, time, cond), image)
            for image, time in zip(images.split(1), t.split(1), strict=True)
        ]
        return torch.cat(parts)


def _done(work: Callable[[], Tensor]) -> Future[Tensor]:
    """A future that is there already."""
    future: Future[Tensor] = Future()
    future.set_result(work())
    return future
