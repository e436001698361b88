"""Operand checks of the reference kernels; csrc/cpu/checks.h says the same about the same mistakes."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.errors import FlowfastError

LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # float64: ground truth in tests


class OperandError(FlowfastError, RuntimeError):
    """An operand of an op has a wrong dtype, shape, layout or value; a RuntimeError like those of the compiled ops."""


def check_dense(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise OperandError(
            f"{op}: {name} must be on {device} like the other operands, got {tensor.device}; move it there"
        )
    if not tensor.is_contiguous():
        raise OperandError(f"{op}: {name} must be contiguous; pass {name}.contiguous()")


def check_latents(op: str, name: str, tensor: Tensor) -> None:
    """The latent matrix (rows, elements) that fixes dtype, device and shape for the other operands."""
    check_dense(op, name, tensor, tensor.device)
    if tensor.dim() != 2:
        raise OperandError(f"{op}: {name} must have shape (rows, elements), got {tuple(tensor.shape)}")
    if tensor.dtype not in LATENT_DTYPES:
        raise OperandError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_operand(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    check_dense(op, name, tensor, device)
    if tensor.dtype != dtype:
        raise OperandError(f"{op}: {name} must have dtype {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise OperandError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_range(op: str, name: str, values: Tensor, live: Tensor, limit: int) -> None:
    """Values of live lanes lie in 0..limit-1. Looked at on the CPU only: on a device it would make the host wait."""
    if values.device.type != "cpu":
        return
    wrong = values[live & ((values < 0) | (values >= limit))]
    if wrong.numel():
        raise OperandError(f"{op}: {name} must lie in 0..{limit - 1}, got {int(wrong[0])}")
