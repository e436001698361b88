"""Any Python callable as a reward: it runs on the host, and its images reach it in one transfer a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flowfast.errors import RewardError
from flowfast.rewards.policy import guarded

MOST_IMAGES = 64
"""Images of one call."""
MOST_VALUES = 2**25
"""Values of one call's images, 128 MiB in float32: 10 images of 1024 x 1024, 42 of 512 x 512."""

MOST_SECONDS = 1_000_000


class CallableReward:
    """`function(images (N, 3, H, W) in [0, 1] on the CPU, prompts) -> N scores`, higher is better.

    A round may have hundreds of images. The function gets at most MOST_IMAGES and MOST_VALUES of them in a call, in
    their order, so that neither its memory nor what a deadline means depends on the size of a round.

    Args:
        function: any callable; a list, an array or a tensor of N real numbers will do as its answer.
        name: for reports and errors; default: the function's own.
        deadline: seconds one call may take; None: no limit.
        independent: is each image scored by itself, to the bit whatever stands beside it? Then a long-lived engine may
            show it the images of several requests in a call.
    """

    differentiable = False

    def __init__(
        self,
        function: Callable[[Tensor, Sequence[str]], Any],
        name: str | None = None,
        range: tuple[float, float] = (-math.inf, math.inf),
        deadline: float | None = None,
        independent: bool = False,
    ) -> None:
        check_deadline(deadline)
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.range = range
        self.deadline, self.independent = deadline, independent

    def __call__(self, images: Tensor, prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Scores (N,) float32 on the CPU. t (N,), the linear times of the posterior means, is for rewards that take it.

        Raises:
            RewardError: by the policy of flowfast/rewards/policy.py.
        """
        texts = prompts if isinstance(prompts, list) else list(prompts)
        scores = [
            self.score(images[part], texts[part], None if t is None else t[part], self.deadline)
            for part in parts_of(images, MOST_IMAGES)
        ]
        return torch.cat(scores) if scores else torch.zeros(0, dtype=torch.float32, device="cpu")

    def check(self, prompt: str) -> None:
        """Called with each prompt before a search begins. Raises PromptError for one that cannot be scored."""

    def score(self, images: Tensor, prompts: list[str], t: Tensor | None, deadline: float | None) -> Tensor:
        """One call: scores (N,) float32 on the CPU."""
        host = images.detach().float().cpu()
        return guarded(self.name, lambda: self.function(host, prompts), len(prompts), deadline).detach().cpu()


def check_deadline(deadline: float | None) -> None:
    """Raises RewardError: no clock can wait for so long, or for so little."""
    if deadline is not None and not 0 < deadline <= MOST_SECONDS:
        raise RewardError(
            f"the deadline of a reward must be positive seconds, at most {MOST_SECONDS}, got {deadline}; leave it out "
            "for none"
        )


def parts_of(images: Tensor, most: int) -> Iterator[slice]:
    """Slices of images (N, ...) of at most `most` images and MOST_VALUES values, at least one image each."""
    step = max(1, min(most, MOST_VALUES // max(1, images[:1].numel())))
    return (slice(start, start + step) for start in range(0, len(images), step))
