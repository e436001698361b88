"""A flow and a reward whose conditions lie on the fake device."""

from fake_device import DEVICE
from torch import Tensor

from tests.toys import GaussianFlow, NearTarget, on


class FlowOnDevice(GaussianFlow):
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return on(super().encode(prompts), DEVICE)


class RewardOnDevice(NearTarget):
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return on(super().encode(prompts), DEVICE)
