"""Prompts to conditions inside an archive: scripted, or a table of the prompts that were encoded at export."""

import io
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowfast.errors import OptionError, PromptError
from flowfast.types import Conditions

log = logging.getLogger("flowfast.archive")


class Encoder(nn.Module):
    """Prompt encoding of a model and a reward that script theirs."""

    if TYPE_CHECKING:
        flow: Any
        reward: Any

    def __init__(self, flow: nn.Module, reward: nn.Module):
        super().__init__()
        self.flow, self.reward = flow, reward

    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in self.flow.encode(prompts).items():
            found["cond/" + name] = value
        for name, value in self.reward.encode(prompts).items():
            found["reward/" + name] = value
        return found


class Table(nn.Module):
    """Prompts that were encoded at export, looked up by their text."""

    def __init__(self, prompts: list[str], cond: dict[str, Tensor]):
        super().__init__()
        self.index = {prompt: i for i, prompt in enumerate(prompts)}
        self.cond = cond

    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        rows: list[int] = []
        for prompt in prompts:
            if prompt not in self.index:
                raise PromptError(
                    "prompt '" + prompt + "' is not in this archive, which holds " + str(len(self.index))
                    + " encoded prompts: export it with this one, too"
                )  # fmt: skip
            rows.append(self.index[prompt])
        found: dict[str, Tensor] = {}
        for name, value in self.cond.items():
            found[name] = value.index_select(0, torch.tensor(rows, dtype=torch.int64, device=value.device))
        return found


def scripted_encoder(flow: Any, reward: Any) -> nn.Module:
    """Prompts to conditions, scripted, without the weights. Raises OptionError."""
    try:
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.freeze(torch.jit.script(Encoder(flow, reward)).eval()), buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)  # one that was frozen cannot become a part of a module, one that was loaded can
    except Exception as error:  # TorchScript may refuse in any way
        log.info("prompt encoding does not script: %s", error)
        raise OptionError(
            "this model's or this reward's prompt encoding does not script: give all prompts that the archive shall "
            "know (prompts=[...], --prompt, --prompts)"
        ) from None


def table_of(prompts: list[str], cond: Conditions, asked: Conditions) -> Table:
    named = {f"cond/{name}": value for name, value in cond.items()}
    return Table(
        [str(prompt) for prompt in prompts], named | {f"reward/{name}": value for name, value in asked.items()}
    )
