"""A reward that many searchers share: a named, detached actor of the cluster, with a GPU or a fraction of one and an
environment of its own. `flowfast reward-server --ray NAME` or `start_reward` starts it, `--reward ray:NAME` asks it.

Requests are those of flowfast/rewards/http.py, 8-bit pictures in a safetensors file. What has come while a batch was
scored is the next batch. A reward on the device sees calls of one size, filled up, so that scores do not depend on who
else asked; a callable that does not say that it scores each image by itself sees one request in a call. Where a batch
fails, each of its requests is asked for alone, and only the guilty fail.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor, nn

from flowfast import rewards, secrets
from flowfast.errors import FlowfastError, OptionError, PromptError, RewardError
from flowfast.prompts import show
from flowfast.ray.cluster import NAMESPACE, as_ours, connect
from flowfast.ray.searcher import know
from flowfast.rewards.combine import all_scores
from flowfast.rewards.host import MOST_IMAGES, CallableReward
from flowfast.rewards.http import pack, unpack
from flowfast.rewards.pixels import to_pixels
from flowfast.rewards.policy import guarded
from flowfast.rewards.worker import Worker

DEADLINE = 300.0
"""Seconds for one call, a restart of the actor included."""
START_SECONDS = 600.0
ROWS = 16
"""Images of each call of a reward on the device."""
MOST_WAITING = 1024
"""Images that are held; who asks then is told to come back."""
BACKOFF = 0.2


class Asked(NamedTuple):
    """A request that waits."""

    images: Tensor
    prompts: list[str]
    answer: asyncio.Future[Any]


class RewardActor:
    """The actor. Its answers are {"scores": [...]}, {"error": why, "kind": prompt or reward} or {"busy": seconds}.

    Args:
        reward: as `flowfast.rewards.load` takes it.
        rows: images of each call of a reward on the device.
        threads, folder, secrets: as `flowfast.ray.Searcher` takes them.
    """

    def __init__(
        self, reward: Any, rows: int = ROWS, threads: int = 1, folder: str | None = None,
        secrets: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        know(secrets or {})
        torch.set_num_threads(threads)
        if folder is not None and os.path.isdir(folder):
            os.chdir(folder)
        self.reward, self.rows = rewards.load(reward), rows
        self.on_host = rewards.on_host(self.reward)
        self.independent = not self.on_host or self.reward.independent
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(self.reward, nn.Module):
            self.reward = self.reward.to(self.device).eval()
        self.waiting: list[Asked] = []
        self.held, self.pace = 0, 0.0  # images; seconds of the last batch
        self.worker = Worker("reward")
        self.running: asyncio.Task[None] | None = None

    async def about(self) -> dict[str, Any]:
        low, high = getattr(self.reward, "range", (-math.inf, math.inf))
        about = {"name": rewards.name_of(self.reward), "range": (low, high), "independent": self.independent}
        return {**about, "pid": os.getpid()}

    async def score(self, body: bytes) -> dict[str, Any]:
        try:
            images, prompts = unpack(body)
        except FlowfastError as error:
            return failed(error)
        if self.held and self.held + len(prompts) > MOST_WAITING:
            return {"busy": max(self.pace, BACKOFF)}
        asked = Asked(images, prompts, asyncio.get_running_loop().create_future())
        self.held += len(prompts)
        self.waiting.append(asked)
        if self.running is None or self.running.done():
            self.running = asyncio.create_task(self.run())
        try:
            return await asked.answer
        finally:
            self.held -= len(prompts)

    async def run(self) -> None:
        """Scores what waits, batch by batch, until nothing does."""
        while self.waiting:
            batch, begun = self.next_batch(), time.monotonic()
            answers = await asyncio.wrap_future(self.worker.submit(partial(self.answers, batch)))
            self.pace = time.monotonic() - begun
            for asked, answer in zip(batch, answers, strict=True):
                if not asked.answer.done():  # who asked may be gone
                    asked.answer.set_result(answer)

    def next_batch(self) -> list[Asked]:
        """The first that waits, and those that may stand beside it in a call."""
        first, rest, count = self.waiting[0], [], len(self.waiting[0].prompts)
        batch = [first]
        for asked in self.waiting[1:]:
            fits = asked.images.shape[1:] == first.images.shape[1:] and count + len(asked.prompts) <= MOST_IMAGES
            if self.independent and fits:
                batch.append(asked)
                count += len(asked.prompts)
            else:
                rest.append(asked)
        self.waiting = rest
        return batch

    def answers(self, batch: list[Asked]) -> list[dict[str, Any]]:
        """On the thread of the reward."""
        try:
            prompts = [prompt for asked in batch for prompt in asked.prompts]
            scores = self.scores(torch.cat([asked.images for asked in batch]), prompts)
        except Exception as error:
            if len(batch) > 1:
                return [answer for asked in batch for answer in self.answers([asked])]
            return [failed(error)]
        ends = torch.tensor([len(asked.prompts) for asked in batch]).cumsum(0).tolist()
        return [{"scores": scores[end - len(asked.prompts) : end]} for asked, end in zip(batch, ends, strict=True)]

    @torch.no_grad()
    def scores(self, pixels: Tensor, prompts: list[str]) -> list[float]:
        step, found = (MOST_IMAGES if self.on_host else self.rows), list[float]()
        for start in range(0, len(prompts), step):
            images, texts = pixels[start : start + step], prompts[start : start + step]
            missing = 0 if self.on_host else step - len(texts)
            images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
            asked = images.to(self.device).float().div_(255)
            found += all_scores([self.reward], asked, texts + texts[-1:] * missing, None)[0].tolist()[: len(texts)]
        return found


def failed(error: Exception) -> dict[str, Any]:
    text = str(error) if isinstance(error, FlowfastError) else f"{type(error).__name__}: {error}"
    return {"error": secrets.hidden(text), "kind": "prompt" if isinstance(error, PromptError) else "reward"}


class RayReward(CallableReward):
    """The scores of a `RewardActor`; one that died is asked again once it is there again, within the deadline.

    Args:
        actor: its name.
        deadline: seconds one call may take; default: the search's reward_deadline, else DEADLINE.

    Raises:
        OptionError: there is no cluster, or no actor of that name.
    """

    def __init__(self, actor: str, deadline: float | None = None):
        self.actor = actor
        if not ray.is_initialized():
            connect(os.environ.get("RAY_ADDRESS") or "auto")
        about = self.within(DEADLINE, "about")
        super().__init__(
            self.scores, f"ray:{actor}", range=about["range"], deadline=deadline, independent=about["independent"]
        )

    def score(self, images: Tensor, prompts: list[str], t: Tensor | None, deadline: float | None) -> Tensor:
        limit = deadline or DEADLINE
        return guarded(self.name, partial(self.scores, images, prompts, limit), len(prompts)).cpu()

    def scores(self, images: Tensor, prompts: Sequence[str], limit: float = DEADLINE) -> list[float]:
        """Scores of images (N, 3, H, W) in [0, 1]. Raises RewardError, PromptError."""
        answer = self.within(limit, "score", pack(to_pixels(images), prompts))
        if "error" in answer:
            kind = PromptError if answer["kind"] == "prompt" else RewardError
            raise kind(f"reward actor {self.actor!r}: {answer['error']}")
        return answer["scores"]

    def within(self, limit: float, method: str, *given: Any) -> Any:
        """What the actor answers within `limit` seconds, wherever it starts anew in between, once it has room."""
        until = time.monotonic() + limit
        why = ""
        while (left := until - time.monotonic()) > 0:
            try:
                answer = ray.get(getattr(handle_of(self.actor), method).remote(*given), timeout=left)
                if "busy" not in answer:
                    return answer
                why, wait = f": more than {MOST_WAITING} images wait there", answer["busy"]
            except ray.exceptions.GetTimeoutError:
                break
            except ray.exceptions.RayActorError as error:  # it died, or starts anew
                why, wait = f": {type(error).__name__}; see its log on the cluster", BACKOFF
            except ray.exceptions.RayError as error:
                raise RewardError(f"reward actor {self.actor!r}: {as_ours(error)}") from None
            time.sleep(max(0.0, min(wait, until - time.monotonic())))
        raise RewardError(f"reward actor {self.actor!r} did not answer within {limit:g} s{why}")


def handle_of(name: str) -> Any:
    """Raises OptionError: there is no such actor."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise OptionError(
            f"no reward actor {name!r} on this cluster (namespace {NAMESPACE}): start it with "
            f"`flowfast reward-server --ray {name} --reward ...`"
        ) from None


def start_reward(
    name: str,
    reward: Any = "scenes",
    *,
    gpus: float = 0,
    cpus: float = 1,
    rows: int = ROWS,
    runtime_env: Mapping[str, Any] | None = None,
    start_seconds: float = START_SECONDS,
) -> dict[str, Any]:
    """Starts the reward actor `name` on the cluster that this process is connected to, and returns its `about` once it
    can score. It outlives this process; `stop_reward` ends it.

    gpus, cpus: its share. rows: images of each call on the device. runtime_env: Ray's, for packages of its own.
    Raises OptionError: there is one of this name, or it did not start within start_seconds; what loading raises.
    """
    if not name or not isinstance(name, str):
        raise OptionError(f"expected a name for the actor, got {show(name)}")
    text = secrets.sealed(reward) if isinstance(reward, str) else reward
    try:
        actor = ray.remote(RewardActor).options(
            name=name, namespace=NAMESPACE, lifetime="detached", num_gpus=gpus, num_cpus=cpus, max_restarts=-1,
            max_concurrency=MOST_WAITING, runtime_env=dict(runtime_env or {}),
        ).remote(
            text, rows, threads=max(1, int(cpus)), folder=os.getcwd(), secrets=secrets.named_in(text),
        )  # fmt: skip
    except ValueError as error:
        raise OptionError(f"cannot start the actor {name!r}: {error}; stop the other one, or choose a name") from None
    try:
        return ray.get(actor.about.remote(), timeout=start_seconds)
    except ray.exceptions.GetTimeoutError:
        ray.kill(actor)
        has = ", ".join(
            f"{count:g} {kind}" for kind, count in ray.cluster_resources().items() if kind in ("CPU", "GPU")
        )
        raise OptionError(
            f"the actor {name!r} did not start within {start_seconds:g} s: it takes {cpus:g} CPU and {gpus:g} GPU, the "
            f"cluster has {has}, which others may hold"
        ) from None
    except ray.exceptions.RayError as error:
        raise as_ours(error) from None


def stop_reward(name: str) -> None:
    """Ends it. Raises OptionError: there is no such actor."""
    ray.kill(handle_of(name))
