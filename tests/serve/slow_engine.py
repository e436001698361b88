"""An engine for the processes of tests/serve/test_fleet.py, on a toy flow whose calls take a while."""

from __future__ import annotations

import os
import time

from torch import Tensor

import flowfast
from flowfast.engine.engine import Engine
from flowfast.serve.config import ServeConfig
from tests.toys import GaussianFlow, NearTarget


class Slow(GaussianFlow):
    """Its pictures are 6 x 4. A prompt may be fatal to its process, or to the engine's thread in it."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__((3, 4, 6))
        self.seconds, self.doomed = seconds, False

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        self.doomed |= "thread" in prompts
        return super().encode(prompts)

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if self.doomed:
            raise SystemExit("doomed")
        time.sleep(self.seconds)
        return super().velocity(x_t, t, cond)

    def decode(self, x0: Tensor) -> Tensor:
        return x0.sigmoid()


def make(config: ServeConfig) -> flowfast.AsyncEngine:
    engine = Engine(Slow(0.02), {"near": NearTarget(), "far": NearTarget()}, **config.engine_options)
    return flowfast.AsyncEngine(engine=engine)


def broken(config: ServeConfig) -> flowfast.AsyncEngine:
    os._exit(7)
