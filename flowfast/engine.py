"""The public door: `load` a flow, `search` with it, `replay` a winner. Clocks, callbacks and host rewards live here,
outside the loop that scripts."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from itertools import zip_longest
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flowfast import rewards, spans
from flowfast.config import SearchConfig, make_config
from flowfast.errors import BudgetError, FlowfastError, ModelError, OptionError, PromptError
from flowfast.flow import ScheduleSpec
from flowfast.flow.schedule import Schedule
from flowfast.graphs import Graphs, graphs_for
from flowfast.presets import resolve_path
from flowfast.searcher.loop import Search
from flowfast.searcher.methods import make_method
from flowfast.searcher.plan import Method, Plan
from flowfast.types import Candidate, Flow, Ranked, Sample, SearchResult, Winner
from flowfast.version import versions

_BATCH_SECONDS: MutableMapping[Any, dict[Any, deque[float]]] = WeakKeyDictionary()
STATUS = ("", "best", "accepted", "discarded")
MODELS = {"scenes": "the embedded default: 32 x 32 scenes from prompts with counts, colours, kinds and relations"}


def load(name: str) -> Flow:
    """A flow by name. Raises OptionError for an unknown one, WeightError for damaged weights."""
    if name == "scenes":
        from flowfast.models.scenes import load_scenes

        return load_scenes()
    raise OptionError(
        f"unknown model {name!r}: choose one of {', '.join(MODELS)}, or build your own with flowfast.flow_from"
    )


class FunctionFlow:
    """A plain velocity function as a Flow."""

    def __init__(
        self, velocity: Callable, shape: Sequence[int], decode: Callable | None, encode: Callable | None, **facts: Any
    ):
        self.shape = tuple(shape)
        self.interpolant: str = facts["interpolant"]
        self.t_finish: float = facts["t_finish"]
        self.guidance: float = facts["guidance"]
        self._velocity, self._decode, self._encode = velocity, decode, encode

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._encode(prompts) if self._encode else {"index": torch.zeros(len(prompts), 1)}

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        u = self._velocity(x_t, t, cond)
        if u.shape != x_t.shape:
            raise ModelError(
                f"velocity must return the shape of x_t, {tuple(x_t.shape)}, got {tuple(u.shape)}: "
                "see flowfast.flow_from"
            )
        return u

    def decode(self, x0: Tensor) -> Tensor:
        return self._decode(x0) if self._decode else x0


def flow_from(
    velocity: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    shape: Sequence[int],
    decode: Callable[[Tensor], Tensor] | None = None,
    encode: Callable[[list[str]], dict[str, Tensor]] | None = None,
    interpolant: str = "linear",
    t_finish: float = 0.1,
    guidance: float = 1.0,
) -> Flow:
    """An own model: velocity(x_t (N, *shape), t (N,), cond) -> u_t (N, *shape), t = 1 noise.

    decode turns x0 into what the reward sees (default: x0 itself); encode turns prompts into tensors (N, ...);
    t_finish is the linear-equivalent time
    at or below which a posterior mean counts as a finished sample.
    """
    return FunctionFlow(velocity, shape, decode, encode, interpolant=interpolant, t_finish=t_finish, guidance=guidance)


def noise_key(seed: int, prompt: str, repeat: int = 0) -> int:
    """The 64-bit key of a request's noise, as a signed integer: it depends on nothing but seed, prompt and repeat."""
    digest = hashlib.blake2b(f"{seed}\0{prompt}\0{repeat}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Clock:
    """Seconds by part of a round. On CUDA by events, read once at the end, so that no round waits for its clock."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.seconds = dict.fromkeys(("model", "decode", "reward", "search"), 0.0)

    def mark(self, part: str = "") -> None:
        """What ran since the last mark was `part`; "" starts a round."""
        now: Any = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
            self.marks.append((part, now))
            return
        if part:
            self.seconds[part] += now - self.marks[-1][1]
        self.marks = [(part, now)]

    def read(self) -> dict[str, float]:
        """Seconds so far; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            for (_, before), (part, now) in zip(self.marks[:-1], self.marks[1:], strict=True):
                if part:
                    self.seconds[part] += before.elapsed_time(now) / 1000
            self.marks = self.marks[-1:]
        return dict(self.seconds)


class Deadline:
    """How much time of a budget in seconds is left, and what a micro-batch takes at the pace of the last rounds."""

    def __init__(self, seconds: float, pace: float):
        self.seconds, self.pace, self.round_seconds = seconds, pace, 0.0
        self.recent: deque[tuple[float, int]] = deque(maxlen=8)

    def start(self, now: float, device: torch.device) -> None:
        self.begun = self.last = now
        self.events: deque[Any] | None = deque() if device.type == "cuda" else None

    def tick(self, batches: int) -> None:
        """A round of so many micro-batches was sent off. On CUDA at most two rounds are under way, so that the host's
        clock tells what the device has done."""
        if self.events is not None:
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 2:
                self.events.popleft().synchronize()
        now = time.perf_counter()
        self.recent.append((now - self.last, batches))
        self.last = now
        self.pace = sum(seconds for seconds, _ in self.recent) / sum(count for _, count in self.recent)
        self.round_seconds = self.pace * batches

    def left(self) -> float:
        return self.begun + self.seconds - self.last


class Setup:
    """What a configuration means for one flow: schedule, method, passes, plan."""

    def __init__(self, flow: Flow, config: SearchConfig):
        preferred = getattr(flow, "method_defaults", {}).get(config.method, {})
        self.method: Method = make_method(config.method, {**preferred, **config.method_options})
        path = resolve_path(flow, config, self.method)
        self.config = config.model_copy(
            update={**path, "guidance": flow.guidance if config.guidance is None else config.guidance}
        )
        spec = ScheduleSpec(model_interpolant=flow.interpolant, t_finish=flow.t_finish, **path)
        self.schedule: Schedule = self.method.schedule(spec)
        self.passes = 1 if self.config.guidance == 1.0 else 2

    def plan(self, budget: int) -> Plan:
        return self.method.plan(self.schedule, budget // self.passes, self.config.chains, self.config.lanes)


def search(
    flow: Flow,
    prompts: Sequence[str],
    *,
    reward: Any = None,
    config: SearchConfig | None = None,
    latents: Tensor | None = None,
    on_round: Callable[[list[Candidate]], None] | None = None,
    on_sample: Callable[[int, Sample], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> SearchResult:
    """Searches for the best sample of each prompt within a budget.

    reward: a name, a Reward, or a plain callable (images (N, 3, H, W), prompts) -> N scores, higher is better.
    options: fields of SearchConfig, or a
    whole `config` (then options override its fields). latents (P, *shape) or (P, C, *shape): own initial noise of
    each prompt (of each chain).
    on_round gets every candidate, on_sample each prompt's result as soon as it is there, on_progress (NFE spent, NFE
    in all).
    Raises OptionError, BudgetError, PromptError, RewardError, ModelError: all are FlowfastError.
    """
    started = time.perf_counter()
    if config is not None:
        options = {**config.model_dump(), **options}
    if isinstance(reward, str):
        options["reward"] = reward
    setup = Setup(flow, make_config(options))
    chosen = setup.config.reward if reward is None or isinstance(reward, str) else reward
    scorer = rewards.load(chosen, flow, setup.config.reward_deadline)
    if isinstance(prompts, str):
        prompts = [prompts]
    if not prompts:
        raise PromptError("expected at least one prompt, got none: give a list of texts")
    driver = _Driver(flow, list(prompts), scorer, chosen, setup, latents, on_round, on_sample, on_progress)
    return driver.run(started)


class _Driver:
    """Runs the requests of one call through the slots of one batch."""

    def __init__(
        self,
        flow: Flow,
        prompts: list[str],
        scorer: Any,
        named_reward: Any,
        setup: Setup,
        latents: Tensor | None,
        on_round: Any,
        on_sample: Any,
        on_progress: Any,
    ):
        config, self.flow, self.prompts, self.scorer = setup.config, flow, prompts, scorer
        self.on_round, self.on_sample, self.on_progress = on_round, on_sample, on_progress
        self.setup, self.latents, self.named_reward = setup, latents, named_reward
        self.host_reward = rewards.on_host(scorer)
        self.cond = flow.encode(prompts)
        self.null_cond = (
            flow.encode([config.negative_prompt]) if setup.passes == 2 else {k: v[:1] for k, v in self.cond.items()}
        )
        self.reward_cond = {} if self.host_reward else scorer.encode(prompts)
        self.device = next(iter(self.cond.values())).device
        self.clock = Clock(self.device)
        self.measuring = 0.0  # seconds spent on finding out how long a round takes: not part of the search
        if (config.budget is None) == (config.seconds is None):
            raise OptionError(
                f"expected a budget in NFE or seconds, got {config.budget} and {config.seconds}: give one"
            )
        self.deadline: Deadline | None = None
        self.graphs = Graphs(None)  # what measures the pace runs eagerly
        if config.seconds is not None:
            self.budget = self._budget_of(config.seconds)
        else:
            assert config.budget is not None
            self.budget = config.budget
        if self.budget < 1:
            raise BudgetError(f"the budget must be at least 1 NFE, got {self.budget}: raise it")
        self.plan = setup.plan(self.budget)
        if self.deadline is None:
            self.slots, self.micro_batch = self._sizes(self.plan)
        self.cuts: list[tuple[int, int, int]] = list(config.cuts)
        self.engine = self._search(self.plan, self.slots, self.micro_batch)
        self.graphs = graphs_for(self.device, config.cuda_graphs)
        conditions = (self.engine.cond, self.engine.null_cond, self.engine.reward_cond)
        self.static = [self.engine.x_lane, self.engine.u_lane, self.engine.x0_lane, self.engine.lane]
        self.static += [self.engine.lane_real, *(value for group in conditions for value in group.values())]
        self.rows_seen = self.rounds = self.nan_rewards = 0
        self.spent = [0] * len(prompts)

    def _search(self, plan: Plan, slots: int, micro_batch: int) -> Search:
        config, setup = self.setup.config, self.setup
        return Search(
            self.flow,
            nn.Identity() if self.host_reward else self.scorer,
            setup.method.module(plan, slots),
            setup.schedule,
            slots=slots,
            chains=plan.chains,
            lanes=plan.lanes,
            passes=setup.passes,
            micro_batch=micro_batch,
            accept=torch.tensor(plan.accept),
            margin=plan.margin,
            carry=plan.carry,
            finished=torch.tensor(plan.finished) if plan.finished else setup.schedule.finished,
            cond={k: v[:1] for k, v in self.cond.items()},
            reward_cond={k: v[:1] for k, v in self.reward_cond.items()},
            top=config.top_k,
            device=self.device,
        ).to(self.device)

    def _sizes(self, plan: Plan) -> tuple[int, int]:
        """Slots and micro-batch: as configured, else 16 prompts and as many rows as a round fills, at most 32."""
        config = self.setup.config
        slots = config.slots or min(len(self.prompts), 16)
        return slots, config.micro_batch or min(32, 1 << (slots * max(plan.widths()) - 1).bit_length())

    def _budget_of(self, seconds: float) -> int:
        """The largest budget whose rounds fit into `seconds` a prompt, by the time that one micro-batch takes."""
        if not seconds > 0:
            raise BudgetError(f"seconds must be positive, got {seconds}: raise it")
        before = time.perf_counter()
        setup, count = self.setup, len(self.prompts)
        probe = setup.plan(16 * setup.schedule.rows * setup.passes)
        self.slots, self.micro_batch = self._sizes(probe)
        self.deadline = Deadline(seconds * count, self._batch_seconds(probe))
        waves = [self.slots] * (count // self.slots) + [count % self.slots]

        def fits(budget: int) -> bool:
            try:
                widths = setup.plan(budget).widths()
            except BudgetError:  # below what the method needs
                return False
            return sum(self._batches(widths, prompts) for prompts in waves) * pace <= seconds * count

        # Not by halving: more budget may take less time, where it pays for a second chain that fills the batch.
        pace, low = self.deadline.pace, setup.passes
        high = 2 + 2 * int(seconds / pace * self.micro_batch) * setup.passes
        for step in (max(1, high // 64), max(1, high // 2048)):
            low = max([low, *(budget for budget in range(low, min(high, low + 65 * step), step) if fits(budget))])
        self.measuring = time.perf_counter() - before
        try:
            setup.plan(low)
        except BudgetError as error:
            raise BudgetError(
                f"{seconds:g} s a prompt are too short here, where {self.micro_batch} rows take {pace:.3g} s: {error}"
            ) from None
        return low

    def _batches(self, widths: list[int], prompts: int) -> int:
        """Micro-batches of `prompts` prompts that go in step."""
        return sum(-(-prompts * width // self.micro_batch) for width in widths)

    def _batch_seconds(self, plan: Plan) -> float:
        """Seconds of one micro-batch with all that goes with it: of the last such searches in this process, else of
        a few rounds."""
        self.pace_key = None
        if isinstance(self.named_reward, str):
            unimportant = {"seed", "repeat", "seconds", "until", "top_k", "negative_prompt", "cuts"}
            facts = self.setup.config.model_dump_json(exclude=unimportant)
            self.pace_key = (facts, self.slots, self.micro_batch, torch.get_num_threads())
            if self.pace_key in _BATCH_SECONDS.get(self.flow, {}):
                return statistics.median(_BATCH_SECONDS[self.flow][self.pace_key])
        engine, times = self._search(plan, self.slots, self.micro_batch), []
        for slot in range(self.slots):
            self._admit(engine, plan, slot, 0)
        for _ in range(min(8, len(plan.widths()))):
            start = time.perf_counter()
            self._round(engine, {})
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / (engine.padded // self.micro_batch))
        self.clock = Clock(self.device)
        return min(times)  # warm and undisturbed; `_hold` looks after the rest

    def _hold(self, index_of: dict[int, int], waiting: int) -> None:
        """Keeps to the deadline: where the rounds that are planned would end late, running prompts get less. Also
        repeats the cuts that a configuration brings along."""
        engine, deadline = self.engine, self.deadline
        if deadline is None:
            for slot, index in index_of.items():
                cuts = [cut for cut in self.cuts if cut[0] == index and cut[1] <= engine.rounds[slot]]
                if cuts and cuts[-1][1] == engine.rounds[slot]:
                    self._cut(slot, cuts)
            return
        deadline.tick(engine.padded // self.micro_batch)
        rest = {slot: engine.plans[slot][engine.rounds[slot] :] for slot in index_of}
        together = [sum(column) for column in zip_longest(*rest.values(), fillvalue=0)]
        batches = self._batches(together, 1) + waiting * self._batches(self.plan.widths(), self.slots) / self.slots
        over = batches * deadline.pace - deadline.left()
        if not together or over <= deadline.round_seconds:
            return
        share = max(0.0, 1 - over / (batches * deadline.pace))
        for slot, index in index_of.items():
            if rest[slot]:
                evaluations = int(share * sum(rest[slot]))
                self.cuts.append((index, engine.rounds[slot], evaluations))
                self._cut(slot, [cut for cut in self.cuts if cut[0] == index])

    def _cut(self, slot: int, cuts: list[tuple[int, int, int]]) -> None:
        forecast = self.plan.forecast([cut[1:] for cut in cuts])
        self.engine.limit(slot, torch.tensor(forecast.quota), torch.tensor(forecast.left), forecast.widths)

    def _admit(self, engine: Search, plan: Plan, slot: int, index: int) -> None:
        config, setup = self.setup.config, self.setup
        given = None
        if self.latents is not None:
            count, shape = len(self.prompts), tuple(self.flow.shape)
            if tuple(self.latents.shape) not in ((count, *shape), (count, plan.chains, *shape)):
                raise OptionError(
                    f"latents must be (prompts, *shape) or (prompts, chains, *shape), prompts = {len(self.prompts)}, "
                    f"chains = {plan.chains}, shape = {self.flow.shape}, got {tuple(self.latents.shape)}"
                )
            alone = tuple(self.latents.shape) == (count, *shape)
            if alone and plan.chains > 1 and not bool(setup.schedule.searchable[1:].any()):
                raise OptionError(
                    f"method {config.method!r} would run {plan.chains} identical chains from one own latent, for no "
                    "noise follows: give latents (prompts, chains, *shape), chains=1, or a path that adds noise"
                )
            given = self.latents[index].reshape(-1, engine.numel).to(self.device, torch.float32).expand(plan.chains, -1)
        engine.admit(
            slot,
            {k: v[index : index + 1] for k, v in self.cond.items()},
            self.null_cond,
            {k: v[index : index + 1] for k, v in self.reward_cond.items()},
            noise_key(config.seed, self.prompts[index], config.repeat),
            torch.tensor(plan.quota),
            torch.tensor(plan.left),
            torch.tensor(plan.start or [True] * plan.chains),
            plan.widths(),
            float(config.guidance or 1.0),
            math.inf if config.until is None else config.until,
            given,
        )

    def _round(self, engine: Search, index_of: dict[int, int]) -> None:
        """One round, timed by parts."""
        clock = self.clock
        clock.mark()
        with spans.BRANCH:
            engine.branch()
        clock.mark("search")
        if self.graphs.recorder:
            with spans.VELOCITY:  # decoder and device-side reward included
                found = self.graphs.run(engine.padded, self._captured, self.static)
            clock.mark("model")
            values = self._rewards(engine, found, index_of) if self.host_reward else found
        else:
            with spans.VELOCITY:
                engine.evaluate()
            clock.mark("model")
            with spans.DECODE:
                images = engine.decode()
            clock.mark("decode")
            with spans.REWARD:
                values = self._rewards(engine, images, index_of)
        clock.mark("reward")
        with spans.DECIDE:
            if self.on_round:  # observe lays the lanes of the next round
                self.seen = (engine.lane[:4, : engine.padded].clone(), engine.lane_live[: engine.padded].clone())
            engine.observe(values)
        clock.mark("search")

    def _captured(self) -> Tensor:
        """What a CUDA graph holds of a round: model, decoder and, unless it lives on the host, the reward."""
        self.engine.evaluate()
        images = self.engine.decode()
        if self.host_reward:
            return images
        return rewards.score(self.scorer, lambda: self.engine.score(images), images.shape[0])

    def _rewards(self, engine: Search, images: Tensor, index_of: dict[int, int]) -> Tensor:
        """Rewards (N,) of a round's images; those on the host cost one transfer each way and see live lanes only."""
        if not self.host_reward:
            return rewards.score(self.scorer, lambda: engine.score(images), images.shape[0])
        live = engine.lane_live[: engine.padded].nonzero().flatten()
        texts = [self.prompts[index_of.get(slot, 0)] for slot in engine.lane_slot[live].tolist()]
        scores = torch.full((images.shape[0],), -math.inf)
        t = engine.linear_time[engine.lane_row[live]]
        scores[live] = self.scorer(images[live], texts, t)
        return scores.to(self.device)

    @torch.no_grad()
    def run(self, started: float) -> SearchResult:
        engine, samples = self.engine, [cast(Sample | None, None)] * len(self.prompts)
        if self.deadline:
            self.deadline.start(started + self.measuring, self.device)
        waiting, failed = list(range(len(self.prompts))), []
        index_of: dict[int, int] = {}
        while waiting or index_of:
            for slot in range(self.slots):
                if waiting and slot not in index_of:
                    index_of[slot] = waiting.pop(0)
                    self._admit(engine, self.plan, slot, index_of[slot])
            self._round(engine, index_of)
            self.rounds += 1
            self._report(index_of)
            running = (
                engine.state.alive.view(self.slots, -1).any(1).tolist()
                if self.device.type == "cpu"
                else [True] * self.slots
            )
            self._hold(index_of, len(waiting))
            for slot, index in list(index_of.items()):
                if engine.rounds[slot] >= len(engine.plans[slot]) or not running[slot]:
                    del index_of[slot]
                    sample = self._sample(index, engine.release(slot))
                    if sample is None:
                        failed.append(self.prompts[index])
                    elif self.on_sample:
                        self.on_sample(index, sample)
                    samples[index] = sample
        if failed:
            raise ModelError(
                f"no finished sample of prompt {failed[0]!r} has a finite reward ({len(failed)} such prompts): "
                "the model or the reward returned NaN for every particle; check them at float32"
            )
        seconds = {"total": time.perf_counter() - started - self.measuring, **self.clock.read()}
        config = self.setup.config
        if self.deadline and self.pace_key:
            pace = seconds["total"] * self.micro_batch * self.setup.passes / self.rows_seen
            _BATCH_SECONDS.setdefault(self.flow, {}).setdefault(self.pace_key, deque(maxlen=5)).append(pace)
        return SearchResult(
            samples=tuple(samples),  # type: ignore[arg-type]
            config=config.model_copy(
                update={"micro_batch": self.micro_batch, "slots": self.slots, "cuts": tuple(self.cuts)}
            ),
            micro_batch=self.micro_batch,
            rows_padded=self.rows_seen - sum(self.spent),
            rounds=self.rounds,
            nan_rewards=self.nan_rewards,
            seconds=seconds,
            overshoot=None if config.seconds is None else seconds["total"] - config.seconds * len(self.prompts),
            versions=versions(),
        )

    def _report(self, index_of: dict[int, int]) -> None:
        engine = self.engine
        self.rows_seen += engine.padded * self.setup.passes
        if self.on_round:
            self.on_round(self._candidates(index_of))
        if self.on_progress:
            for slot, index in index_of.items():
                self.spent[index] = int(engine.state.nfe[slot])
            self.on_progress(sum(self.spent), self.budget * len(self.prompts))

    def _candidates(self, index_of: dict[int, int]) -> list[Candidate]:
        engine, C, K = self.engine, self.plan.chains, self.plan.lanes
        rewards_, status = engine.dense.flatten().tolist(), engine.status.flatten().tolist()
        nfe, t = engine.state.nfe.tolist(), engine.linear_time.tolist()
        finished = engine.finished.tolist()
        found = []
        lanes, on = self.seen
        for lane, _, row, candidate, live in zip(*lanes.tolist(), on.tolist(), strict=True):
            slot = lane // (C * K)
            if live and slot in index_of:
                found.append(
                    Candidate(
                        prompt=index_of[slot],
                        round=engine.rounds[slot] - 1,
                        chain=lane // K % C,
                        row=row,
                        candidate=candidate,
                        t=t[row],
                        reward=rewards_[lane],
                        finished=finished[row],
                        status=STATUS[status[lane]],
                        nfe=nfe[slot],
                    )
                )
        return sorted(found, key=lambda c: (c.prompt, c.chain, c.row, c.candidate))

    def _sample(self, index: int, found: dict[str, Tensor]) -> Sample | None:
        config, prompt = self.setup.config, self.prompts[index]
        nfe, speculative, calls, nan = found["cost"].tolist()
        self.nan_rewards += nan
        self.spent[index] = nfe
        top = []
        rows, chains, candidates = (found[name].tolist() for name in ("row", "chain", "candidate"))
        for k, reward in enumerate(found["reward"].tolist()):
            if reward == -math.inf:
                continue
            row = rows[k]
            path = tuple(zip(chains[k][: row + 1], range(row + 1), candidates[k][: row + 1], strict=True))
            winner = Winner(noise_key(config.seed, prompt, config.repeat), path[-1][0], row, path[-1][2], path)
            latent = found["x0"][k].view(self.flow.shape)
            image = self.flow.decode(latent[None])[0].float().cpu()
            top.append(Ranked(reward, image, latent.cpu(), found["x"][k].view(self.flow.shape).cpu(), winner))
        if not top:
            return None
        return Sample(
            prompt=prompt,
            method=config.method,
            seed=config.seed,
            top=tuple(top),
            budget_nfe=self.budget,
            nfe=nfe,
            nfe_speculative=speculative,
            evaluations=nfe // self.setup.passes,
            reward_calls=calls,
            unspent=self.budget - nfe,
        )


@torch.no_grad()
def replay(
    flow: Flow, sample: Sample, config: SearchConfig, latents: Tensor | None = None
) -> list[tuple[float, Tensor]]:
    """Walks a winner's path again from its addresses alone: (linear t, image (3, H, W)) of every posterior mean on
    the way.

    The last one is bit-identical to sample.image at equal micro-batch, threads and machine class. latents (*shape):
    the initial noise, where it was given.
    """
    setup = Setup(flow, config)
    M, schedule, winner = config.micro_batch or 1, setup.schedule, sample.winner
    shape, table = [M, *flow.shape], schedule.table.float()
    x, u, x0 = (torch.zeros(M, math.prod(flow.shape)) for _ in range(3))
    cond = {k: v.expand(M, *v.shape[1:]).contiguous() for k, v in flow.encode([sample.prompt]).items()}
    null = (
        {k: v.expand(M, *v.shape[1:]).contiguous() for k, v in flow.encode([config.negative_prompt]).items()}
        if setup.passes == 2
        else {}
    )
    parent = torch.arange(M)
    pictures = []
    for chain, row, candidate in winner.path:
        rows = torch.full((M,), row)
        if row == 0 and latents is not None:
            x.copy_(latents.reshape(1, -1).expand_as(x))
        else:
            address = (torch.full((M,), winner.key), torch.full((M,), candidate), torch.full((M,), chain))
            torch.ops.flowfast.branch_step(x, u, parent, rows, *address, table, x)
        t = schedule.time.float()[rows]
        velocity = flow.velocity(x.view(shape), t, cond).reshape(M, -1)
        uncond = flow.velocity(x.view(shape), t, null).reshape(M, -1) if setup.passes == 2 else None
        guidance = torch.full((M,), float(config.guidance or 1.0)) if setup.passes == 2 else None
        torch.ops.flowfast.posterior_mean(x, velocity, uncond, guidance, rows, table, u, x0)
        image = flow.decode(x0[:1].view([1, *flow.shape]))[0].float().clone()  # decode may hand back x0 itself
        pictures.append((float(schedule.linear_time[row]), image))
    return pictures


__all__ = ["FlowfastError", "flow_from", "load", "noise_key", "replay", "search"]
