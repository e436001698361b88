"""What leaves a batch: reports of its rounds, which lag behind the device, and the samples of its requests."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flowfast import rewards
from flowfast.engine.loaded import Loaded
from flowfast.engine.request import Event, Found, Job, Progress
from flowfast.engine.transfer import Transfer, Transfers
from flowfast.errors import FlowfastError, ModelError
from flowfast.methods.plan import Plan
from flowfast.rounds.batch import SlotBatch
from flowfast.rounds.state import slice_of
from flowfast.types import Candidate, Ranked, Sample, Winner

STATUS = ("", "best", "accepted", "discarded")
TAKEN, ENDED = ("best", "accepted"), "ended"
LAG = 2
"""Rounds that reports may be behind the device."""
Jobs = Sequence[Job | None]
Taken = tuple[Sample | FlowfastError, int]
"""What a request got, or why it got nothing; and how many of its candidates counted as NaN."""


class Report(NamedTuple):
    """What the host has heard of a round, by slot."""

    jobs: list[Job | None]
    """That were in it."""
    running: list[bool]
    """Has any chain something left to do?"""
    nfe: list[int]
    """Empty, like what follows, where nobody is told."""
    best: list[float]
    """The best reward of a finished sample."""
    candidates: list[list[Candidate]]
    """Empty where they are not recorded."""
    rows: int = 0
    """That the model saw in it, padding included."""


class _Sent(NamedTuple):
    """A report on its way, and what the host knew when the round was sent off."""

    transfer: Transfer
    jobs: list[Job | None]
    rounds: list[int]
    rows: int


class Reports:
    """The reports of one batch."""

    def __init__(self, engine: SlotBatch, transfers: Transfers, tells: bool, records: bool):
        """tells: how much was spent and found goes with them; records: also what rounds evaluated, of all requests
        rather than of those that ask for it."""
        self.engine, self.transfers, self.tells, self.records = engine, transfers, tells or records, records
        self.recording = records
        """Does anybody want to know what the round that is under way evaluates?"""
        self.linear_time: list[float] = engine.linear_time[:-1].tolist()  # the last one is that of a given start
        self.finished: list[bool] = engine.finished.tolist()
        self.seen = [torch.zeros_like(engine.lane[:4]), torch.zeros_like(engine.lane_live)]
        self._sent: deque[_Sent] = deque()

    def wants(self, job: Job | None) -> bool:
        return job is not None and (self.records or job.request.candidates)

    def begin(self, jobs: Jobs) -> None:
        """A round of these jobs is sent off."""
        self.recording = self.tells and any(map(self.wants, jobs))

    def note_lanes(self) -> None:
        """Before `decide` lays the lanes of the next round."""
        if self.recording:
            self.seen[0].copy_(self.engine.lane[:4])
            self.seen[1].copy_(self.engine.lane_live)

    def send(self, jobs: Jobs) -> None:
        e, state = self.engine, self.engine.state
        found = [state.alive]
        if self.tells:
            found += [state.nfe, state.top_reward]
        if self.recording:
            found += [e.dense, e.status, *self.seen]
            found += [self._origins(), state.transition] if e.method.regroups else []
        self._sent.append(_Sent(self.transfers.send(found), list(jobs), list(e.rounds), e.size()[0]))

    def _origins(self) -> Tensor:
        """(B,) the chain whose candidate each chain took at its last transition; -1: it has taken none, or ended."""
        state = self.engine.state
        last = (state.transition - 1).clamp(min=0).unsqueeze(1)
        here = torch.logical_and(state.alive, state.transition > 0)
        return torch.where(here, state.path_chain.gather(1, last).squeeze(1), -1)

    def read(self, all_of_them: bool = False) -> list[Report]:
        """Those that have come, and what is more than LAG rounds old."""
        found = []
        while self._sent and (all_of_them or len(self._sent) > LAG or self._sent[0].transfer.ready()):
            found.append(self._read(self._sent.popleft()))
        return found

    def _read(self, sent: _Sent) -> Report:
        alive, *found = sent.transfer.read()
        slots = len(sent.jobs)
        cells, C = alive.tolist(), self.engine.chains  # a launch on the CPU costs more than a short list
        running = [True in cells[at : at + C] for at in range(0, len(cells), C)]
        if not found:
            return Report(sent.jobs, running, [], [], [])
        nfe, best, *records = found
        spent = nfe.tolist()
        candidates = self._candidates(sent, spent, records) if records else []
        return Report(sent.jobs, running, spent, best.view(slots, -1)[:, 0].tolist(), candidates, sent.rows)

    def _candidates(self, sent: _Sent, nfe: list[int], records: list[Tensor]) -> list[list[Candidate]]:
        found: list[list[Candidate]] = [[] for _ in sent.jobs]
        C, K = self.engine.chains, self.engine.lanes
        reward, status = records[0].flatten().tolist(), records[1].flatten().tolist()
        gone_on = self._gone_on(*(each.tolist() for each in records[4:]))
        for cell, slot, transition, candidate, live in zip(*records[2].tolist(), records[3].tolist(), strict=True):
            job = sent.jobs[slot] if live else None
            if job is not None and self.wants(job):
                chain, word = cell // K % C, STATUS[status[cell]]
                if word in TAKEN and chain not in gone_on.get((slot, transition), (chain,)):
                    word = ENDED
                found[slot].append(
                    Candidate(
                        prompt=job.number,
                        round=sent.rounds[slot] - 1,
                        chain=job.request.params.first_chain + chain,
                        transition=transition,
                        candidate=candidate,
                        t=self.linear_time[transition],
                        reward=None if math.isnan(reward[cell]) else reward[cell],
                        finished=self.finished[transition],
                        status=word,
                        nfe=nfe[slot],
                    )
                )
        for of_slot in found:
            of_slot.sort(key=lambda c: (c.chain, c.transition, c.candidate))
        return found

    def _gone_on(self, origins: Sequence[int] = (), at: Sequence[int] = ()) -> dict[tuple[int, int], set[int]]:
        """Chains that others went on from, by slot and transition, where the method regroups them."""
        found: dict[tuple[int, int], set[int]] = {}
        for cell, (origin, transition) in enumerate(zip(origins, at, strict=True)):
            if origin >= 0:
                found.setdefault((cell // self.engine.chains, transition - 1), set()).add(origin)
        return found


def rows_of(report: Report) -> tuple[int, int]:
    """Of its round: rows that requests spent as NFE, and those that nobody needed; (0, 0) where nobody is told. Each
    report is asked for once."""
    if not report.nfe:
        return 0, 0
    used = 0
    for job, nfe in zip(report.jobs, report.nfe, strict=True):
        if job is not None:
            used += nfe - (nfe if job.counted is None else job.counted)
            job.counted = nfe
    return used, report.rows - used


def events_of(report: Report) -> Iterator[Event]:
    """What its requests are told of a round."""
    for slot, nfe in enumerate(report.nfe):
        job = report.jobs[slot]
        if job is not None:
            job.nfe, budget = nfe, job.request.params.budget or 0
            seen = tuple(report.candidates[slot]) if report.candidates else ()
            yield Progress(job.request.id, nfe, budget, seen)
            if report.best[slot] > job.best:
                job.best = report.best[slot]
                yield Found(job.request.id, job.best, nfe)


def take(loaded: Loaded, engine: SlotBatch, transfers: Transfers, slot: int, job: Job) -> Taken:
    """Frees the slot: what its request got. The only wait of a request."""
    found, params, shape = engine.release(slot), job.request.params, tuple(engine.shape)
    x0, x = (found[name].view(-1, *shape) for name in ("x0", "x"))
    t = engine.linear_time.index_select(0, found["transition"])
    scorer = loaded.reward(job.request.reward)
    on_host = rewards.on_host(scorer)
    loaded.clock.mark()
    images = torch.cat([loaded.decode(x0[k : k + 1]).float() for k in range(len(x0))])
    loaded.clock.mark("decode")
    reward = found["reward"]
    if loaded.previews and not on_host:
        reward = loaded.score_in_full(job.request.reward, images, t, job.reward_cond)
    names = ("reward", "transition", "chain", "candidate", "cost")
    transfer = transfers.send([images, x0, x, t, reward, *(found[name] for name in names)])
    images, x0, x, t, reward, seen, *addresses, cost = (each.clone() for each in transfer.read())
    transition_of, chain_of, candidate_of = addresses
    nfe, speculative, calls, nan, evaluations = cost.tolist()
    there = seen > -math.inf  # there may be fewer finished samples than finalists
    live = there & images.flatten(1).isfinite().all(1)
    nan += int((there & ~live).sum())
    if loaded.previews:
        if on_host and live.any():
            work = partial(scorer, images[live], [job.request.prompt] * int(live.sum()), t[live])
            reward[live] = loaded.one_at_a_time(work)
        calls += int(live.sum())
        nan += int(reward[live].isnan().sum())
    reward = torch.where(live, reward, -math.inf).nan_to_num(-math.inf, posinf=math.inf, neginf=-math.inf)
    job.nfe = nfe
    top, first = [], params.first_chain
    for k in reward.argsort(descending=True, stable=True).tolist()[: params.top_k]:
        if reward[k] == -math.inf:
            continue
        last = int(transition_of[k])
        path = tuple((first + int(chain_of[k, r]), r, int(candidate_of[k, r])) for r in range(last + 1))
        winner = Winner(job.noise_key, path[-1][0], last, path[-1][2], path)
        preview = float(seen[k]) if loaded.previews else None
        top.append(Ranked(float(reward[k]), images[k], x0[k], x[k], winner, preview))
    if not top:
        return ModelError(what_happened(engine, job.plan, slot)), nan
    budget = job.request.params.budget or 0
    return Sample(
        prompt=job.request.prompt, method=params.method, seed=job.seed, top=tuple(top), budget_nfe=budget, nfe=nfe,
        nfe_speculative=speculative, evaluations=evaluations, reward_calls=calls, unspent=budget - nfe,
    ), nan  # fmt: skip


def what_happened(engine: SlotBatch, plan: Plan, slot: int) -> str:
    """Why a request whose slot was just freed got no sample."""
    state, C = engine.state, plan.chains
    calls, nan = (int(counts[slot]) for counts in (state.reward_calls, state.nan_rewards))
    at = slice_of(state.transition, slot, engine.chains).tolist()[:C]
    ended = [(c, r) for c, r in enumerate(at) if r < len(plan.accept)]
    broke = sum(plan.quota[c][r] == 1 for c, r in ended)
    return (
        f"{nan} of its {calls} candidates counted as NaN (a reward that is, or a latent or picture that is not "
        f"finite); of {C} chains {broke} ended where the model's output was not finite, "
        f"{len(ended) - broke} where no child had a reward, {C - len(ended)} came to their end"
        + "; no other reward at an end was above -inf"
        * (nan < calls)
    )
