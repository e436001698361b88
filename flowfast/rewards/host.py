"""Any Python callable as a reward: it runs on the host, and its images reach it in one transfer a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flowfast.errors import RewardError
from flowfast.rewards.policy import guarded


class CallableReward:
    """`function(images (N, 3, H, W) in [0, 1] on the CPU, prompts) -> N scores`, higher is better.

    Args:
        function: any callable; a list, an array or a tensor of N real numbers will do as its answer.
        name: for reports and errors; default: the function's own.
        deadline: seconds one call may take; None: no limit.
    """

    differentiable = False

    def __init__(
        self,
        function: Callable[[Tensor, Sequence[str]], Any],
        name: str | None = None,
        range: tuple[float, float] = (-math.inf, math.inf),
        deadline: float | None = None,
    ) -> None:
        if deadline is not None and not deadline > 0:
            raise RewardError(f"the deadline of a reward must be positive seconds, got {deadline}")
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.range = range
        self.deadline = deadline

    def __call__(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Scores (N,) float32 on the CPU. t (N,), the linear times of the posterior means, is for rewards that take it.

        Raises:
            RewardError: by the policy of flowfast/rewards/policy.py.
        """
        host, texts = images.detach().float().cpu(), prompts if isinstance(prompts, list) else list(prompts)
        return guarded(self.name, lambda: self.function(host, texts), len(prompts), self.deadline).detach().cpu()
