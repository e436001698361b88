"""All that a search remembers between two rounds, as tensors on the device (docs/design.md, "The loop never waits").

S slots (one prompt each) x C chains; B = S * C. A chain owns two rows of the store: its parent, and the best child of
the current step so far. `active` says which of the two is the parent, so that a step is taken by flipping a bit, not by
copying a latent.
"""

import torch
from torch import Tensor, nn


class State(nn.Module):
    """Buffers of S slots with C chains, T transitions and latents of n elements; `top` finished samples are kept a
    slot. What the ops take whole (flowfast/ops/assign_lanes.py, decide.py) lies in four matrices, a quantity a row;
    the names below are views of these rows."""

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
    top_row: Tensor
    top_chain: Tensor
    top_candidate: Tensor

    def __init__(
        self, slots: int, chains: int, rows: int, numel: int, top: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        B = slots * chains

        def buffer(name: str, shape: tuple[int, ...], kind: torch.dtype, fill: float = 0) -> None:
            # A plain attribute is found without nn.Module.__getattr__, which took half of a round's host time.
            setattr(self, name, torch.full(shape, fill, dtype=kind, device=device))

        buffer("x", (2 * B, numel), dtype)  # store: parent and best child of chain b are rows 2b and 2b + 1
        buffer("u", (2 * B, numel), dtype)  # their guided velocities: each point is evaluated once
        buffer("chain", (6, B), torch.int64)
        self.active = self.chain[0]  # which of the two rows is the parent
        self.row = self.chain[1]  # transition that the chain is proposing now
        self.quota = self.chain[2]  # candidates it may still try at this transition
        self.left = self.chain[3]  # evaluations it may still spend in all
        self.tried = self.chain[4]  # candidates tried at this transition
        self.child = self.chain[5]  # candidate number of the best child of this transition
        buffer("score", (4, B), torch.float32, -torch.inf)
        self.threshold = self.score[0]  # r*: best reward of the children that took the chain on
        self.best_child = self.score[1]  # score of the best child of this transition
        self.child_reward = self.score[2]
        self.reward = self.score[3]  # reward of the parent
        buffer("slot", (5, slots), torch.int64)
        self.key, self.nfe, self.nfe_speculative = self.slot[0], self.slot[1], self.slot[2]
        self.reward_calls, self.nan_rewards = self.slot[3], self.slot[4]
        buffer("slot_real", (2, slots), torch.float32)
        self.guidance, self.until = self.slot_real[0], self.slot_real[1]
        buffer("alive", (B,), torch.bool)
        buffer("stopped", (B,), torch.bool)  # taken out for lack of time; stays out when chains are regrouped
        buffer("given", (slots,), torch.bool)  # the caller gave the initial latents
        buffer("quota_table", (B, rows), torch.int64)
        buffer("path_chain", (B, rows), torch.int64)
        buffer("path_candidate", (B, rows), torch.int64)
        buffer("top_reward", (slots, top), torch.float32, -torch.inf)
        buffer("top_x0", (slots * top, numel), dtype)
        buffer("top_x", (slots * top, numel), dtype)
        buffer("top_row", (slots, top), torch.int64)
        buffer("top_chain", (slots, top, rows), torch.int64)
        buffer("top_candidate", (slots, top, rows), torch.int64)

    @torch.jit.export
    def admit(
        self, slot: int, key: int, quota: Tensor, left: Tensor, start: Tensor, guidance: float, until: float
    ) -> None:
        """Lays slot anew. quota (C, T) int64: candidates a chain tries at each transition; left (C,) int64:
        evaluations it may spend in all;
        start (C,) bool: which chains run from the beginning."""
        C = quota.size(0)
        self.key[slot] = key
        self.guidance[slot] = guidance
        self.given[slot] = False
        self.until[slot] = until
        for counter in (self.nfe, self.nfe_speculative, self.reward_calls, self.nan_rewards):
            counter[slot] = 0
        for zeroed in (self.row, self.tried, self.active, self.child):
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
