"""All that a search remembers between two rounds, as tensors on the device (docs/design.md, "The loop never waits").

S slots (one prompt each) x C chains; B = S * C. A chain owns two rows of the store: its parent, and the best child of
the current step so far. `active` says which of the two is the parent, so that a step is taken by flipping a bit, not by
copying a latent.
"""

import torch
from torch import Tensor, nn

from flowfast.ops.layout import (
    ACTIVE,
    BEST_CHILD,
    CHAIN_TRANSITION,
    CHILD,
    CHILD_REWARD,
    FIRST_CHAIN,
    GUIDANCE,
    KEY,
    LEFT,
    NAN_REWARDS,
    NFE,
    NFE_SPECULATIVE,
    QUOTA,
    REWARD,
    REWARD_CALLS,
    THRESHOLD,
    TRIED,
    UNTIL,
    Sizes,
)


class State(nn.Module):
    """What a search of these sizes remembers, latents of n elements; `fields` are the views of the packed buffers
    (flowfast/ops/layout.py), of which the names below are parts."""

    x: Tensor
    u: Tensor
    chain: Tensor
    score: Tensor
    slot: Tensor
    slot_real: Tensor
    alive: Tensor
    stopped: Tensor
    given: Tensor
    quota_table: Tensor
    path_chain: Tensor
    path_candidate: Tensor
    top_reward: Tensor
    top_x0: Tensor
    top_x: Tensor
    top_transition: Tensor
    top_chain: Tensor
    top_candidate: Tensor

    def __init__(self, fields: dict[str, Tensor], sizes: Sizes, numel: int, dtype: torch.dtype, device: torch.device):
        super().__init__()

        def latents(name: str, rows: int) -> None:
            # A plain attribute is found without nn.Module.__getattr__, which took half of a round's host time.
            setattr(self, name, torch.zeros([rows, numel], dtype=dtype, device=device))

        latents("x", 2 * sizes.batch)  # store: parent and best child of chain b are rows 2b and 2b + 1
        latents("u", 2 * sizes.batch)  # their guided velocities: each point is evaluated once
        latents("top_x0", sizes.slots * sizes.top)
        latents("top_x", sizes.slots * sizes.top)
        self.chain = fields["chain"]
        self.active = self.chain[ACTIVE]  # which of the two rows is the parent
        self.transition = self.chain[CHAIN_TRANSITION]  # that the chain is proposing now
        self.quota = self.chain[QUOTA]  # candidates it may still try at this transition
        self.left = self.chain[LEFT]  # NFE it may still spend in all
        self.tried = self.chain[TRIED]  # candidates tried at this transition
        self.child = self.chain[CHILD]  # candidate number of the best child of this transition
        self.score = fields["score"].fill_(-torch.inf)
        self.threshold = self.score[THRESHOLD]  # r*: best reward of the children that took the chain on
        self.best_child = self.score[BEST_CHILD]  # score of the best child of this transition
        self.child_reward = self.score[CHILD_REWARD]
        self.reward = self.score[REWARD]  # reward of the parent, of the last transition that was scored
        self.slot = fields["slot"]
        self.key, self.first_chain = self.slot[KEY], self.slot[FIRST_CHAIN]
        self.nfe, self.nfe_speculative = self.slot[NFE], self.slot[NFE_SPECULATIVE]
        self.reward_calls, self.nan_rewards = self.slot[REWARD_CALLS], self.slot[NAN_REWARDS]
        self.counters = self.slot[NFE:]  # NFE, speculative NFE, reward calls, NaN rewards, evaluations
        self.slot_real = fields["slot_real"]
        self.guidance, self.until = self.slot_real[GUIDANCE], self.slot_real[UNTIL]
        self.alive = fields["alive"]
        self.stopped = torch.zeros_like(self.alive)  # taken out for lack of time; stays out when chains are regrouped
        self.given = fields["given"]  # the caller gave the initial latents
        self.quota_table = fields["quota_table"]
        self.path_chain, self.path_candidate = fields["path_chain"], fields["path_candidate"]
        self.top_reward = fields["top_reward"].fill_(-torch.inf)
        self.top_transition = fields["top_transition"]
        self.top_chain, self.top_candidate = fields["top_chain"], fields["top_candidate"]

    @torch.jit.export
    def admit(
        self,
        slot: int,
        key: int,
        quota: Tensor,
        left: Tensor,
        start: Tensor,
        guidance: float,
        until: float,
        first_chain: int,
    ) -> None:
        """Lays slot anew. quota (C, T) int64: candidates a chain tries at each transition; left (C,) int64: NFE it may
        spend in all;
        start (C,) bool: which chains run from the beginning; first_chain: the number that the first of them has in
        addresses of noise."""
        C = quota.size(0)
        self.key[slot] = key
        self.first_chain[slot] = first_chain
        self.guidance[slot] = guidance
        self.given[slot] = False
        self.until[slot] = until
        self.counters[:, slot] = 0
        for zeroed in (self.transition, self.tried, self.active, self.child):
            slice_of(zeroed, slot, C).zero_()
        slice_of(self.stopped, slot, C).fill_(False)
        for emptied in (self.threshold, self.best_child, self.child_reward, self.reward):
            slice_of(emptied, slot, C).fill_(-torch.inf)
        slice_of(self.quota_table, slot, C).copy_(quota)
        slice_of(self.quota, slot, C).copy_(quota[:, 0])
        slice_of(self.left, slot, C).copy_(left)
        slice_of(self.alive, slot, C).copy_(start)
        slice_of(self.path_chain, slot, C).zero_()
        slice_of(self.path_candidate, slot, C).zero_()
        self.top_reward[slot].fill_(-torch.inf)


def slice_of(tensor: Tensor, slot: int, chains: int) -> Tensor:
    """The view (C, ...) of one slot in a tensor (B, ...)."""
    return tensor.narrow(0, slot * chains, chains)
