"""A search in one TorchScript file: what `flowfast export` writes, for programs without Python (export.py).

The engine inside is the loop of flowfast/rounds/batch.py, scripted; what drives it, in C++ or Python, is this:

    archive.admit(slot, conditions of archive.encode([prompt]), null conditions, key, budget, guidance, until)
    while archive.width() > 0:
        archive.observe(archive.score(archive.propose()))      # search() is this loop
    found = archive.release(slot)

`admit`, `limit` and `release` may come between any two rounds and leave the other slots alone. Clocks, progress
(`lanes`), cancelling (`release`), rewards on the host (in place of `score`) and noise keys belong to the driver. Where
the model lies in packages of its own, the driver makes a round's calls of it:

    archive.lay(); archive.branch()
    for i in range(archive.null_parts()):       # where guidance acts at some transitions only
        archive.keep_null(i, velocity of archive.null_inputs(i))
    for i in range(archive.parts()):
        archive.mean(i, velocity of archive.inputs(i), the same with its null conditions or None)
    for i in range(archive.scored_parts()):     # those whose score decides anything; there may be none
        images[i] = decode(archive.latents(i)); archive.look(i, images[i])
        rewards[i] = reward(images[i], archive.reward_inputs(i))
    archive.observe(cat of rewards)

One thread at a time; without gradients (torch.no_grad, InferenceMode).
"""

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from flowfast.archive.budgets import Budgets
from flowfast.archive.plans import Plans
from flowfast.errors import OptionError, RewardError


class RoundApart(nn.Module):
    """The calls of one round apart, for models outside."""

    if TYPE_CHECKING:
        engine: Any
        partial: bool
        passes: int
        micro_batch: int

    @torch.jit.export
    def lay(self) -> None:
        """Starts a round."""
        self.engine.lay()

    @torch.jit.export
    def branch(self) -> None:
        """The children's latents."""
        self.engine.branch()

    @torch.jit.export
    def parts(self) -> int:
        """Micro-batches of this round."""
        return int(self.engine.padded // self.micro_batch)

    @torch.jit.export
    def scored_parts(self) -> int:
        """Micro-batches of this round that are decoded and scored: the first ones."""
        return int(self.engine.scored_padded // self.micro_batch)

    @torch.jit.export
    def inputs(self, i: int) -> dict[str, Tensor]:
        """What the velocity of micro-batch i takes: x (M, *shape), t (M,), cond/NAME and, where guidance acts
        everywhere, null/NAME."""
        e = self.engine
        found: dict[str, Tensor] = {"x": e.x_shaped[i], "t": e.t_part[i]}
        for name, value in e.take(e.cond, e.slot_part[i]).items():
            found["cond/" + name] = value
        if self.passes == 2 and not self.partial:
            for name, value in e.take(e.null_cond, e.slot_part[i]).items():
                found["null/" + name] = value
        return found

    @torch.jit.export
    def null_parts(self) -> int:
        """Micro-batches of the lanes of this round that need the null condition, where guidance acts at some
        transitions only: these calls come first. Else 0."""
        return int(self.engine.null_padded // self.micro_batch) if self.partial else 0

    @torch.jit.export
    def null_inputs(self, i: int) -> dict[str, Tensor]:
        """What the velocity of micro-batch i of them takes: x (M, *shape), t (M,) and null/NAME."""
        e = self.engine
        x, t, slot = e.null_inputs(i)
        found: dict[str, Tensor] = {"x": x, "t": t}
        for name, value in e.take(e.null_cond, slot).items():
            found["null/" + name] = value
        return found

    @torch.jit.export
    def keep_null(self, i: int, u: Tensor) -> None:
        """Velocities of micro-batch i of them."""
        self.engine.keep_null(i, u)

    @torch.jit.export
    def mean(self, i: int, u: Tensor, null_u: Optional[Tensor]) -> None:
        """Velocities of micro-batch i, which stay the archive's until the round is observed."""
        self.engine.mean(i, u, null_u)

    @torch.jit.export
    def latents(self, i: int) -> Tensor:
        """x0_hat (M, *shape) of micro-batch i, for the decoder."""
        return self.engine.x0_shaped[i]

    @torch.jit.export
    def look(self, i: int, images: Tensor) -> None:
        """The decoder's images (M, 3, H, W) of micro-batch i: one that is not finite never wins. Raises ModelError
        where there are not M."""
        self.engine.look(i, images)

    @torch.jit.export
    def reward_inputs(self, i: int) -> dict[str, Tensor]:
        """What the reward of micro-batch i takes beside its images: t (M,), linear times, and reward/NAME."""
        e = self.engine
        found: dict[str, Tensor] = {"t": e.linear_t_part[i]}
        for name, value in e.take(e.reward_cond, e.slot_part[i]).items():
            found["reward/" + name] = value
        return found


class Archive(RoundApart):
    """The methods of an archive. Conditions are named "cond/NAME" (of the model) and "reward/NAME", a row a prompt."""

    if TYPE_CHECKING:
        engine: Any
        encoder: Any

    null_cond: dict[str, Tensor]

    def __init__(
        self,
        engine: nn.Module,
        encoder: nn.Module,
        manifest: dict[str, str],
        plans: Plans,
        null_cond: dict[str, Tensor],
        hollow: bool = False,
    ):
        """null_cond: of the negative prompt, {} with one pass. hollow: the model lies outside."""
        super().__init__()
        self.engine, self.encoder, self.manifest = engine, encoder, manifest
        self.null_cond, self.hollow = null_cond, hollow
        self.slots, self.passes, self.micro_batch = int(engine.slots), int(engine.passes), int(engine.micro_batch)  # type: ignore[arg-type]
        self.partial = bool(engine.partial)
        self.budgets = Budgets(plans, self.slots)
        self.shape = [int(size) for size in engine.shape]  # type: ignore[union-attr]

    @torch.jit.export
    def info(self) -> dict[str, str]:
        """What the archive is: versions, model, reward, method, sizes, budgets, the whole configuration as JSON."""
        return self.manifest.copy()

    @torch.jit.export
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditions of prompts; "" is the null condition. Raises PromptError."""
        return self.encoder(prompts)

    # ---- requests ----

    @torch.jit.export
    def admit(
        self,
        slot: int,
        cond: dict[str, Tensor],
        null_cond: dict[str, Tensor],
        key: int,
        budget: int,
        guidance: float,
        until: float,
    ) -> None:
        """Puts a request into a slot without touching its neighbours.

        cond: one row of `encode`. null_cond: that of the negative prompt; {}: the one of the export. key: of the noise
        (flowfast.ops.noise.noise_key). budget: NFE. guidance: up to 1: off, as it must be where the archive has one
        pass. until: stop early at this reward, or infinity. Raises OptionError, BudgetError.
        """
        self.check_slot(slot)
        if not (guidance >= 0.0 and guidance <= 1000.0):
            raise OptionError("guidance must be a number from 0 to 1000 (up to 1: off), got " + str(guidance))
        limits = self.budgets.admit(slot, budget)
        null: dict[str, Tensor] = {}
        if self.passes == 2:
            null = named("cond/", null_cond, self.engine.null_cond) if len(null_cond) > 0 else self.null_cond
        elif guidance > 1.0:
            raise OptionError(
                "guidance " + str(guidance) + ": this archive was exported without guidance; give 1 or export it again"
            )
        self.engine.admit(
            slot,
            named("cond/", cond, self.engine.cond),
            null,
            named("reward/", cond, self.engine.reward_cond),
            key,
            limits,
            max(guidance, 1.0),
            until,
            None,
        )

    @torch.jit.export
    def limit(self, slot: int, nfe: int) -> None:
        """From its next round on all chains of the slot together spend at most so much, or what one of them needs to
        finish: a cut of Python's `Plan.forecast`. Raises OptionError."""
        self.check_slot(slot)
        self.engine.limit(slot, self.budgets.cut(slot, self.engine.rounds[slot], nfe))

    @torch.jit.export
    def still(self, slot: int) -> tuple[int, int]:
        """Rounds and NFE that a slot has before it, at most."""
        self.check_slot(slot)
        at = self.engine.rounds[slot]
        widths = self.engine.plans[slot][at:]
        return len(widths), sum(widths) + sum(self.engine.null_plans[slot][at:])

    @torch.jit.export
    def rounds_of(self, budget: int) -> int:
        """Rounds of a budget in NFE, at most. Raises BudgetError."""
        return self.budgets.rounds_of(budget)

    @torch.jit.export
    def budget_within(self, budget: int, rounds: int) -> int:
        """The largest budget up to this one that takes at most so many rounds, or the smallest. Raises BudgetError."""
        return self.budgets.within(budget, rounds)

    @torch.jit.export
    def done(self, slot: int) -> bool:
        """Has the slot nothing left to do: its rounds are spent, or all its chains have ended? Waits for the device."""
        self.check_slot(slot)
        e = self.engine
        over = e.rounds[slot] >= len(e.plans[slot])
        return over or not bool(e.state.alive.narrow(0, slot * e.chains, e.chains).any())

    @torch.jit.export
    def release(self, slot: int) -> dict[str, Tensor]:
        """Takes a request out, finished or not, and frees its slot.

        Its finished samples, best first: reward (top,), -inf where there are fewer; image (top, 3, H, W), but not
        where the decoder lies outside; x0 and x (top, *shape); transition (top,), chain and candidate (top, T): the
        path is (chain[k], k, candidate[k]) for k up to transition; cost (5,): NFE, speculative NFE, reward
        calls, NaN rewards, evaluations.
        """
        self.check_slot(slot)
        found: dict[str, Tensor] = self.engine.release(slot)
        self.budgets.plan_at[slot] = -1
        for name in ("x0", "x"):
            found[name] = found[name].view([-1] + self.shape)
        if not self.hollow:
            images = [self.engine.flow.decode(latent.unsqueeze(0)).float() for latent in found["x0"]]
            found["image"] = torch.cat(images)
            rank(found)
        return found

    @torch.jit.export
    def spent(self) -> Tensor:
        """NFE (S,) of each slot's request so far."""
        return self.engine.state.nfe.clone()

    # ---- rounds ----

    @torch.jit.export
    def width(self) -> int:
        """Lanes that the next round can have at most; 0: every slot is done."""
        return int(self.engine.width())

    @torch.jit.export
    def propose(self) -> Tensor:
        """Evaluates the next children of all slots: images (N, 3, H, W) of the posterior means of those whose score
        decides anything, N = 0 where there is none. Raises OptionError where no slot has anything left to do."""
        if self.engine.width() == 0:
            raise OptionError("no slot has anything left to do: admit a request first")
        return self.engine.propose()

    @torch.jit.export
    def score(self, images: Tensor) -> Tensor:
        """Rewards (N,) of the images just proposed. Raises RewardError where the archive has no reward."""
        return self.engine.score(images)

    @torch.jit.export
    def observe(self, rewards: Tensor) -> None:
        """Rewards (N,) decide how the chains go on; those of lanes that are not live do not matter, NaN never wins.
        Raises RewardError."""
        if list(rewards.shape) != [self.engine.scored_padded]:
            raise RewardError(
                "expected "
                + str(self.engine.scored_padded)
                + " rewards, one an image, got the shape "
                + str(rewards.shape)
            )
        self.engine.observe(rewards)

    @torch.jit.export
    def lanes(self) -> dict[str, Tensor]:
        """Whose the images just proposed are, (N,) each: live, slot, t (linear time), transition, candidate, chain."""
        e, n = self.engine, self.engine.scored_padded
        return {
            "live": torch.logical_and(e.lane_live[:n], e.scored.index_select(0, e.lane_transition[:n])),
            "slot": e.lane_slot[:n].clone(),
            "t": e.lane_real[1, :n].clone(),
            "transition": e.lane_transition[:n].clone(),
            "candidate": e.lane_candidate[:n].clone(),
            "chain": e.lane_chain[:n].clone(),
        }

    @torch.jit.export
    def search(self) -> None:
        """Runs every admitted request to its end."""
        self.engine.search()

    # ---- checks ----

    def check_slot(self, slot: int) -> None:
        if slot < 0 or slot >= self.slots:
            raise OptionError("slot must lie in 0.." + str(self.slots - 1) + ", got " + str(slot))


def rank(found: dict[str, Tensor]) -> None:
    """An image that is not finite has no reward: such samples go behind the others."""
    finite = torch.isfinite(found["image"].flatten(1)).all(1)
    reward = torch.where(finite, found["reward"], -torch.inf)
    reward, order = torch.sort(reward, dim=0, descending=True, stable=True)
    for name in ("x0", "x", "transition", "chain", "candidate", "image"):
        found[name] = found[name].index_select(0, order)
    found["reward"] = reward


def named(prefix: str, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conditions that the engine wants, without their prefix."""
    found: dict[str, Tensor] = {}
    for name, like in wanted.items():
        if prefix + name not in given:
            raise OptionError("conditions without '" + prefix + name + "': give those of encode")
        value = given[prefix + name]
        if value.size(0) != 1 or list(value.shape[1:]) != list(like.shape[1:]):
            raise OptionError(
                "condition '" + prefix + name + "' must be one row of shape " + str(list(like.shape[1:])) + ", got "
                + str(list(value.shape))
            )  # fmt: skip
        found[name] = value
    return found
