"""Scalars, squares and finite tests: Python numbers on a CPU, tensors that nobody waits for on another device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor

# A CPU sums squares in pieces of this many elements: in one go over 1e8 elements float32 is 1 % off.
_PIECE = 1 << 19
# Up to this many elements it is cheaper on a CPU to copy tensors into one than to look at each.
_SMALL = 1 << 12

# What a CPU knows at once is a Python number, what another device computes a scalar tensor that nobody waits for.
Scalar = float | Tensor
Flag = bool | Tensor

# Where the host must not wait: there results stay tensors. Tests set it, to run that path on a CPU.
ON_DEVICE: Callable[[torch.device], bool] = lambda device: device.type != "cpu"  # noqa: E731


def on_device(device: torch.device) -> bool:
    """Whether results on `device` stay tensors that the host does not read."""
    return ON_DEVICE(device)


@cache
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where `dtype` is double precision."""
    return torch.promote_types(dtype.to_real(), torch.float32)


# torch >= 2.9 lets `.grad` have a dtype of its own.
_GRAD_DTYPE = attrgetter("grad_dtype") if hasattr(Tensor, "grad_dtype") else None


def grad_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that `parameter.grad` has."""
    own: torch.dtype | None = None if _GRAD_DTYPE is None else _GRAD_DTYPE(parameter)
    return own or parameter.dtype


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def dense(gradient: Tensor) -> Tensor:
    """The gradient as a strided tensor; the same tensor where it is one."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def real(gradient: Tensor) -> Tensor:
    """The gradient as a dense real tensor; a complex one becomes pairs of real numbers."""
    gradient = dense(gradient)
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def square_of(values: Tensor) -> Scalar:
    """The sum of squares in float32 or wider: a number for a CPU tensor, else a scalar tensor."""
    flat, dtype = values.reshape(-1), accumulation_dtype(values.dtype)
    if on_device(flat.device):
        norm: Tensor = torch.linalg.vector_norm(flat, dtype=dtype)
        return norm.square()
    if flat.numel() <= _PIECE:
        flat = flat if flat.dtype == dtype else flat.to(dtype)
        return torch.dot(flat, flat).item()
    return math.fsum(torch.dot(piece, piece).item() for part in torch.split(flat, _PIECE) if [piece := part.to(dtype)])


def squares_of(gradients: Iterable[Tensor]) -> list[Scalar]:
    """The sums of squares of gradients of any layout, by device and dtype; finite where every element is."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    found: list[Scalar] = []
    for gradient in gradients:
        values = real(gradient if gradient.layout is torch.strided else gradient.coalesce().values())
        if values.numel() <= _SMALL or on_device(values.device):
            alike.setdefault((values.device, values.dtype), []).append(values)
        else:
            found.append(square_of(values))
    for (device, dtype), together in alike.items():
        if on_device(device):
            norms = torch._foreach_norm(together, dtype=accumulation_dtype(dtype))
            found.append(torch.stack(norms).square().sum())
        else:
            found.append(square_of(torch.cat([values.reshape(-1) for values in together])))
    return found


def as_scalar(value: Scalar, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or a scalar tensor as a tensor on `device`, without a copy from the host."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def total_of(squares: Sequence[Scalar], device: torch.device) -> Scalar:
    """The sum of squares from several devices and dtypes; a tensor on `device` as soon as one is a tensor."""
    tensors = [square for square in squares if isinstance(square, Tensor)]
    if not tensors:
        return sum(squares)
    dtype = torch.float64 if any(square.dtype == torch.float64 for square in tensors) else torch.float32
    return torch.stack([as_scalar(square, dtype, device) for square in squares]).sum()


def stack_scalars(values: Sequence[Scalar], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers and scalar tensors as one vector on `device`."""
    if on_device(device):
        return torch.stack([as_scalar(value, dtype, device) for value in values])
    return torch.tensor([float(value) for value in values], dtype=dtype, device=device)


def where(ok: Tensor, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The gradients by parameter, dense, or zeros if a device says that `ok` is not so; nobody waits for it."""
    zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    result = {}
    for parameter, gradient in gradients.items():
        kind = gradient.device, gradient.dtype
        if kind not in zeros:
            zeros[kind] = torch.zeros((), device=gradient.device, dtype=gradient.dtype)
        # Not a product: 0 * NaN is NaN. A number in place of the zeros would be made anew for each.
        result[parameter] = torch.where(ok.to(gradient.device), dense(gradient), zeros[kind])
    return result


def add_gradients(old: Tensor | None, new: Tensor) -> Tensor:
    """old + new, neither of them written to."""
    if old is None:
        return new
    return new + old if old.layout is not torch.strided else old + new
