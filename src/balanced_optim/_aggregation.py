"""Other ways to combine task gradients: any callable from their (T, n) matrix to one vector, and what it remembers."""

from __future__ import annotations

import base64
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._numbers import accumulation_dtype, real

Aggregator = Callable[[Tensor], Tensor]

# Attributes of every module that are not what an aggregator has learned.
_OF_MODULES = set(vars(nn.Module())) | {"training"}


def check_aggregator(aggregator: object, **excluded: object) -> None:
    """Raise unless `aggregator` is None, or callable with every one of `excluded` None or False."""
    if aggregator is None:
        return
    if not callable(aggregator) or inspect.isclass(aggregator):
        raise TypeError(
            f"aggregator must be a callable from a (T, n) matrix to a vector of n, got {aggregator!r}; pass an object "
            "such as torchjd.aggregation.UPGrad(), or a function"
        )
    for name, value in excluded.items():
        if value is not None and value is not False:
            raise ValueError(
                f"aggregator cannot be used with {name}, got {name}={value!r}: it takes the place of the weights, and "
                "needs every gradient whole; leave one of them out"
            )


def matrix_of(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Task gradients as a matrix, shape (T, n): for each task its parameters one after the other, each flattened.

    A complex parameter counts as pairs of real numbers.
    """
    dtype, device = torch.float32, rows[0][0].device
    for part in rows[0]:
        dtype = torch.promote_types(dtype, accumulation_dtype(part.dtype))
    return torch.stack([torch.cat([real(part).reshape(-1).to(device, dtype) for part in row]) for row in rows])


def combine(aggregator: Aggregator, matrix: Tensor) -> Tensor:
    """What the aggregator makes of the matrix, checked.

    Raises:
        TypeError, ValueError: it is not one vector of n.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        vector = aggregator(matrix)
    if not isinstance(vector, Tensor):
        raise TypeError(f"aggregator must return a tensor, got {type(vector).__name__} {vector!r}")
    if vector.shape != matrix.shape[1:]:
        raise ValueError(
            f"aggregator must return a vector of shape {tuple(matrix.shape[1:])} for a matrix of shape "
            f"{tuple(matrix.shape)}, got shape {tuple(vector.shape)}"
        )
    return vector.detach().to(matrix.dtype)


def cut(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor | None]:
    """The vector as one tensor for each parameter, shaped like it."""
    result: list[Tensor | None] = []
    start = 0
    for parameter in like:
        shape = (*parameter.shape, 2) if parameter.is_complex() else parameter.shape
        part = vector[start : start + math.prod(shape)].reshape(shape).clone()
        start += part.numel()
        part = part.to(parameter.device)
        result.append(torch.view_as_complex(part) if parameter.is_complex() else part)
    return result


def remember(aggregator: object) -> dict[str, Any]:
    """What the aggregator keeps between steps, as values that JSON can hold.

    The numbers, texts, tensors and arrays among its attributes, those of its submodules included; whatever else it
    has (a solver's problem, say) it has to build again.
    """
    return {
        f"{part}.{name}": code
        for part, thing in _parts(aggregator)
        for name, value in _attributes(thing).items()
        if (code := _encode(value)) is not None
    }


def recall(aggregator: Aggregator, memory: dict[str, Any], matrix: Tensor) -> None:
    """Make the aggregator go on from what `remember` returned.

    It is run once on `matrix`, since some build what they need in their first call. Random states are left alone.
    """
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        combine(aggregator, matrix)
    parts = dict(_parts(aggregator))
    for path, value in memory.items():
        part, _, name = path.rpartition(".")
        if part not in parts:
            raise ValueError(
                f"state dict must be of the same aggregator, got a value for {path!r}, which "
                f"{type(aggregator).__name__} does not have; give the aggregator that was saved"
            )
        setattr(parts[part], name, _decode(value, matrix.device))


def _parts(aggregator: object) -> Iterator[tuple[str, object]]:
    if isinstance(aggregator, nn.Module):
        yield from aggregator.named_modules()
    elif hasattr(aggregator, "__dict__") and not inspect.isroutine(aggregator):
        yield "", aggregator


def _attributes(thing: object) -> dict[str, Any]:
    if not isinstance(thing, nn.Module):
        return vars(thing)
    own = {name: value for name, value in vars(thing).items() if name not in _OF_MODULES}
    return own | dict(thing._buffers)


def _encode(value: object) -> Any:
    """A value as JSON holds it, None for what cannot be kept."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""
        return {"tensor": str(value.dtype), "shape": list(value.shape), "data": base64.b64encode(data).decode()}
    if isinstance(value, bool | int | float | str):
        return {"value": value}
    if value is None:
        return {"value": None}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value)}
    if isinstance(value, tuple | list):
        items = [_encode(item) for item in value]
        return None if None in items else {type(value).__name__: items}
    if type(value).__module__ == "numpy":
        return {"array": _encode(torch.as_tensor(value))}
    return None


def _decode(code: dict[str, Any], device: torch.device) -> Any:
    if "tensor" in code:
        dtype = getattr(torch, code["tensor"].removeprefix("torch."))
        data = bytearray(base64.b64decode(code["data"]))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(code["shape"]).to(device)
    if "value" in code:
        return code["value"]
    if "dtype" in code:
        return getattr(torch, code["dtype"].removeprefix("torch."))
    if "device" in code:
        return torch.device(code["device"])
    if "array" in code:
        return _decode(code["array"], torch.device("cpu")).numpy()
    items = [_decode(item, device) for item in code.get("tuple", code.get("list", []))]
    return tuple(items) if "tuple" in code else items
