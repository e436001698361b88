"""What a batch takes of the memory."""

import torch

from flowfast.errors import OptionError
from flowfast.memory import size_of


def bytes_of(latent: int, transitions: int, kept: int, *, slots: int, chains: int, lanes: int, micro_batch: int) -> int:
    """Of a batch's own tensors. latent: bytes of one; kept: samples that each slot keeps."""
    all_chains, all_kept = slots * chains, slots * kept
    all_lanes = -(-all_chains * lanes // micro_batch) * micro_batch
    needed = latent * (4 * all_chains + 2 * all_kept + 3 * all_lanes) + 64 * all_lanes
    return needed + 8 * transitions * (3 * all_chains + 2 * all_kept)


def check_room(needed: int, device: torch.device, *, slots: int, chains: int, lanes: int, micro_batch: int) -> None:
    """A slip such as slots=60000 is an OptionError before memory is taken, not a killed process."""
    if needed > size_of(device):
        raise OptionError(
            f"a batch of {slots} slots with {chains} chains of {lanes} lanes and micro-batches of {micro_batch} needs "
            f"{needed / 1e9:,.0f} GB, but {device} has {size_of(device) / 1e9:,.0f} GB: lower slots, chains, lanes, "
            "top_k or micro_batch, or the budget"
        )
