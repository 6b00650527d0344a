"""Norms and scalars: Python numbers on a CPU, tensors that nobody waits for on another device."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# A CPU sums squares in pieces of this many elements: in one go over 1e8 elements float32 is 1 % off.
_DOT_PIECE = 1 << 17

# What a CPU knows at once is a Python number, what another device computes a scalar tensor that nobody waits for.
Scalar = float | Tensor
Flag = bool | Tensor


@cache
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where `dtype` is double precision."""
    return torch.promote_types(dtype.to_real(), torch.float32)


def real(gradient: Tensor) -> Tensor:
    """The gradient as a dense real tensor; a complex one becomes pairs of real numbers."""
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        return torch.view_as_real(gradient.resolve_conj())
    return gradient


def vector_norm(row: Tensor) -> Scalar:
    """The norm of a contiguous stretch, summed in float32 or wider; a number on a CPU."""
    dtype = accumulation_dtype(row.dtype)
    if row.is_cpu:
        # A dot product takes half the time of a norm here, and pieces keep a half precision row's copies small.
        if row.dtype == dtype and row.numel() <= _DOT_PIECE:
            return math.sqrt(_square(row))
        return math.sqrt(sum([_square(piece.to(dtype)) for piece in torch.split(row, _DOT_PIECE)]))
    norm: Tensor = torch.linalg.vector_norm(row, dtype=dtype)
    return norm


def _square(vector: Tensor) -> float:
    return torch.dot(vector, vector).item()


def joint_norm(norms: Sequence[Scalar], device: torch.device, shares: Sequence[float] | None = None) -> Scalar:
    """||(a, b, ...)||_2 from the norms of the parts: a number on a CPU, a tensor on another `device`.

    `shares` says what part of each square counts.
    """
    if shares is not None and any(share != 1 for share in shares):
        norms = [norm if share == 1 else norm * math.sqrt(share) for norm, share in zip(norms, shares, strict=True)]
    if device.type == "cpu":
        return math.hypot(*[float(norm) for norm in norms])
    tensors = [torch.as_tensor(norm).to(device) for norm in norms]
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in tensors) else torch.float32
    joint: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in tensors]))
    return joint


def stack_scalars(values: Sequence[Scalar], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers and scalar tensors as one vector on `device`; NaN numbers stand for what is missing."""
    if device.type == "cpu":
        return torch.tensor([float(value) for value in values], dtype=dtype, device=device)
    return torch.stack(
        [
            v.to(device, dtype) if isinstance(v, Tensor) else torch.full((), v, dtype=dtype, device=device)
            for v in values
        ]
    )


def storage_uses(tensor: Tensor) -> int:
    """How many tensors, and variables that hold its storage, use the tensor's memory, and a number that is fixed."""
    storage = tensor.untyped_storage()
    uses: int = torch._C._storage_Use_Count(storage._cdata)
    return uses + sys.getrefcount(storage)


# For a tensor on its own.
USES_ALONE = storage_uses(torch.empty(1))


def is_free(tensor: Tensor, own_uses: int = 1) -> bool:
    """Whether a CPU tensor's memory is whole and used by nothing but `own_uses` tensors, here or in another process."""
    whole = tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
    return whole and storage_uses(tensor) == USES_ALONE + own_uses - 1 and not tensor.is_shared()  # type: ignore[no-untyped-call]
