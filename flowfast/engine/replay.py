"""A winner drawn again, from its addresses alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowfast import rewards
from flowfast.calibration.auto import as_picked
from flowfast.config import SearchConfig, checked_config
from flowfast.errors import OptionError
from flowfast.models import answers
from flowfast.resolve import real_latents, resolve
from flowfast.rounds.steered import evaluate, frozen
from flowfast.surroundings import evaluating, own_ground
from flowfast.types import Flow, Sample


@own_ground()
def replay(
    flow: Flow, sample: Sample, config: SearchConfig, latents: Tensor | None = None, reward: Any = None
) -> list[tuple[float, Tensor]]:
    """Walks a winner's path again from its addresses alone: (linear t, image (3, H, W)) of every posterior mean on
    the way.

    The last one is bit-identical to sample.image at equal micro-batch, threads and machine class, where the kernels of
    model and reward give a row the same bits wherever in its micro-batch it stands; with `gradient` those of the
    backward pass, too, of which MKL's float32 product of 9 columns without AVX-512 is one that does not (`scenes`).
    latents (*shape): the initial noise, where it was given. reward: the one that steered (`gradient`); default: the
    configuration's.
    """
    resolved, own, flow = resolve(flow, as_picked(checked_config(config))), flow, answers.CheckedFlow(flow)
    M, schedule, winner = config.micro_batch or 1, resolved.schedule, sample.winner
    shape, table = [M, *flow.shape], schedule.table.float()
    conds = [_rows(flow.encode([text]), M) for text in (sample.prompt, config.negative_prompt)[: resolved.passes]]
    device = next(iter(conds[0].values())).device
    scale = torch.full((M,), resolved.guidance, dtype=torch.float32, device=device)
    x, u, x0, grad = (torch.zeros(M, math.prod(flow.shape), dtype=torch.float32, device=device) for _ in range(4))
    latents = None if latents is None else real_latents(latents)
    if latents is not None and tuple(latents.shape) != tuple(flow.shape):
        raise OptionError(f"latents must have the shape of one latent, {tuple(flow.shape)}, got {tuple(latents.shape)}")
    if [k for _, k, _ in winner.path] != list(range(min(len(winner.path), schedule.transitions))) or not winner.path:
        raise OptionError(
            f"the sample's path of {len(winner.path)} steps is none of this configuration's "
            f"{schedule.transitions} transitions: give the config of the result that it came with"
        )
    table, time, parent = table.to(device), schedule.time.float().to(device), torch.arange(M, device=device)
    pictures = []
    scorer = None if config.gradient is None else rewards.load(config.reward if reward is None else reward, flow)
    with evaluating(own, scorer), frozen(*() if scorer is None else (flow, scorer)):
        asked = {} if scorer is None else _rows(_asked(scorer, sample.prompt, device), M)
        for chain, transition, candidate in winner.path:
            rows = torch.full((M,), transition, device=device)
            if transition == 0 and latents is not None:
                x.copy_(latents.reshape(1, -1).expand_as(x))
            else:
                address = (torch.full((M,), value, device=device) for value in (winner.key, candidate, chain))
                torch.ops.flowfast.branch_step(x, u, parent, rows, *address, table, x, None, grad)
            t, linear_t = time[rows], schedule.linear_time[transition].float().expand(M).to(device)
            passes = int(schedule.passes[transition])
            here, guidance = conds[:passes], scale if passes == 2 else None
            if scorer is not None:
                point = (x.view(shape), t, linear_t, here, asked, guidance, rows, table)
                grad = evaluate(flow, rewards.graded(scorer), *point, u, x0).grad
            else:
                velocity, *null = (flow.velocity(x.view(shape), t, cond).reshape(M, -1) for cond in here)
                uncond = null[0] if null else None
                torch.ops.flowfast.posterior_mean(x, velocity, uncond, guidance, rows, table, u, x0)
            image = flow.decode(x0[:1].view([1, *flow.shape]))[0].float().cpu()
            pictures.append((float(schedule.linear_time[transition]), image.clone()))  # decode may hand back x0 itself
    return pictures


def _rows(cond: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """One prompt's conditions, `count` times."""
    return {name: value.expand(count, *value.shape[1:]).contiguous() for name, value in cond.items()}


def _asked(reward: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
    """What a reward that steers knows of one prompt."""
    rewards.check_gradient(reward)
    reward.to(device)
    return {name: value.to(device) for name, value in reward.encode([prompt]).items()}
