"""A model and rewards as an engine runs them: checked, compiled where that was asked for, on one device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowfast import rewards
from flowfast.engine.clock import Clock
from flowfast.engine.graphs import Recorder, recorder_for
from flowfast.errors import OptionError, RewardError
from flowfast.models.answers import CheckedFlow, asked, conditions_of, defaults_of
from flowfast.models.compiled import PreviewFlow, compiled
from flowfast.prompts import encoded
from flowfast.rewards.worker import Worker
from flowfast.types import Conditions, Flow

log = logging.getLogger("flowfast.engine")


class Loaded:
    """What all batches of an engine share.

    Args:
        flow: the model.
        scorers: rewards by name, as `flowfast.rewards.load` made them.
        cuda_graphs, compile, previews: as `EngineConfig` has them; previews: the model has a preview decoder, which
            the search looks through.
        by_request: rewards on the host see the images of one request in a call, so that its scores do not depend on its
            neighbours, and a call that fails ends that request alone. Else a call has those of a whole round, and one
            that fails ends the search.
    """

    def __init__(
        self,
        flow: Flow,
        scorers: dict[str, Any],
        *,
        cuda_graphs: bool = True,
        compile: bool = False,
        by_request: bool = True,
    ):
        self.original, self.scorers, self.by_request = flow, scorers, by_request
        self.previews = defaults_of(flow).preview is not None
        seen = compiled(cast(Any, flow)) if compile else PreviewFlow(flow) if self.previews else flow
        self.checked = CheckedFlow(seen, "preview" if self.previews else "decode")
        self.flow = cast(Flow, self.checked)
        self.decode = CheckedFlow(flow).decode if self.previews else self.flow.decode
        self.cuda_graphs = cuda_graphs
        self.device = torch.device("cpu")  # until the model has encoded a prompt
        self.clock = Clock(self.device)
        self.most_images: int | None = None
        """Images that a reward on the host gets at once, where memory ran out."""
        self._recorder: Recorder | None = None
        self._worker: Worker | None = None

    def encode(self, prompts: list[str]) -> Conditions:
        """What the model knows of prompts, together. The first call says on which device everything runs."""
        cond = encoded(self.flow.encode, prompts)
        device = next(iter(cond.values())).device
        if device != self.device:
            self.device, self.clock = device, Clock(device)
        return cond

    def encode_for_reward(self, name: str, prompts: list[str], steered: bool) -> Conditions:
        """What a reward on the device knows of prompts; {} of one on the host. steered: its gradient is taken."""
        scorer = self.scorers[name]
        if steered:
            rewards.check_gradient(scorer)
        if isinstance(scorer, nn.Module):
            scorer.to(self.device)
        if rewards.on_host(scorer):
            return {}
        what = f"encode of reward {rewards.name_of(scorer)!r}"
        encode = partial(rewards.encode_alone, scorer) if steered else scorer.encode
        known = asked(what, partial(encoded, encode), prompts, kind=RewardError)
        return conditions_of(known, len(prompts), what, RewardError, self.device)

    def reward(self, name: str) -> Any:
        """Raises OptionError for one that the engine does not have."""
        if name not in self.scorers:
            raise OptionError(f"unknown reward {name!r}: this engine has {', '.join(self.scorers)}")
        return self.scorers[name]

    def recorder(self) -> Recorder | None:
        """The recorder of CUDA graphs, one pool of memory for all of them."""
        if self._recorder is None:
            self._recorder = recorder_for(self.device, self.cuda_graphs)
            waits = defaults_of(self.original).waits_because
            if self._recorder and waits:
                log.warning("runs without CUDA graphs, more slowly, because %s", waits)
                self._recorder, self.cuda_graphs = None, False
        return self._recorder

    def worker(self) -> Worker:
        """The thread on which rewards run while the device runs another batch."""
        if self._worker is None:
            self._worker = Worker("host reward")
        return self._worker

    def one_at_a_time(self, work: Callable[[], Any]) -> Any:
        """What a reward on the host answers; two of its calls never run at once."""
        return work() if self._worker is None else self._worker.submit(work).result()

    def close(self) -> None:
        """Nobody waits for a reward that is still at work."""
        if self._worker is not None:
            self._worker.__exit__()
            self._worker = None

    def score_in_full(self, name: str, images: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """Rewards (K,) on the device of one prompt's images (K, ...) by the full decoder, at linear times t (K,)."""
        scorer = self.scorers[name]
        parts = [
            rewards.score(scorer, partial(scorer, image, time, cond), image)
            for image, time in zip(images.split(1), t.split(1), strict=True)
        ]
        return torch.cat(parts)
