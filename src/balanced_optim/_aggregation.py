"""Other ways to combine task gradients: any callable from their (T, n) matrix to one vector, and what it remembers."""

from __future__ import annotations

import base64
import inspect
from collections.abc import Callable, Sequence
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
    """The vector as one tensor for each parameter, shaped and strided like it."""
    result: list[Tensor | None] = []
    start = 0
    for parameter in like:
        dtype = vector.dtype.to_complex() if parameter.is_complex() else vector.dtype
        gradient = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        into = real(gradient)
        into.copy_(vector[start : start + into.numel()].reshape(into.shape))
        start += into.numel()
        result.append(gradient)
    return result


def remember(aggregator: object) -> dict[str, Any]:
    """What the aggregator keeps between steps, as values that JSON can hold; empty for a plain function.

    The numbers, texts, tensors and arrays among its attributes, and tuples and lists of them, those of its submodules
    included; whatever else it has (a solver's problem, say) it has to build again.
    """
    if not _parts(aggregator):
        return {}
    values = {
        f"{part}.{name}": code
        for part, thing in _parts(aggregator)
        for name, value in _attributes(thing).items()
        if (code := _encode(value)) is not None
    }
    return {"class": _class_of(aggregator), "values": values}


def check_memory(aggregator: object, memory: dict[str, Any]) -> None:
    """Raise ValueError where `memory` is that of another kind of aggregator than this one, if there is one."""
    if aggregator is not None and memory and memory["class"] != _class_of(aggregator):
        raise ValueError(
            f"state dict must be of the same aggregator, got one of {memory['class']}, here {_class_of(aggregator)}; "
            "give the aggregator that was saved"
        )


def recall(aggregator: Aggregator, memory: dict[str, Any], matrix: Tensor) -> None:
    """Make the aggregator go on from what `remember` returned.

    It is run once on a copy of `matrix`, since some build what they need in their first call. Random states are left
    alone.
    """
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        combine(aggregator, matrix.clone())
    parts = dict(_parts(aggregator))
    for part, thing in parts.items():
        for name, value in list(_attributes(thing).items()):
            if f"{part}.{name}" not in memory["values"] and _encode(value) is not None:
                # It was not there yet when the checkpoint was made.
                delattr(thing, name)
    for path, code in memory["values"].items():
        part, _, name = path.rpartition(".")
        if part in parts:
            _restore(parts[part], name, _decode(code, matrix.device))


def _restore(thing: object, name: str, value: Any) -> None:
    now = getattr(thing, name, None)
    if isinstance(now, nn.Parameter):
        now.data.copy_(value)
    elif isinstance(value, tuple) and (make := getattr(now, "_make", None)) is not None:
        # A tuple with names.
        setattr(thing, name, make(value))
    else:
        setattr(thing, name, value)


def _class_of(aggregator: object) -> str:
    return f"{type(aggregator).__module__}.{type(aggregator).__qualname__}"


def _parts(aggregator: object) -> list[tuple[str, object]]:
    """The objects that may remember something, by path; none for a function."""
    if isinstance(aggregator, nn.Module):
        return list(aggregator.named_modules())
    return [("", aggregator)] if hasattr(aggregator, "__dict__") and not inspect.isroutine(aggregator) else []


def _attributes(thing: object) -> dict[str, Any]:
    if not isinstance(thing, nn.Module):
        return vars(thing)
    own = {name: value for name, value in vars(thing).items() if name not in _OF_MODULES}
    return own | thing._buffers | thing._parameters


def _encode(value: object) -> dict[str, Any] | None:
    """A value as JSON holds it, None for what cannot be kept."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return None
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""
        where = {"shape": list(value.shape), "cpu": value.is_cpu}
        return {"tensor": str(value.dtype), "data": base64.b64encode(data).decode(), **where}
    if type(value).__module__ == "numpy":
        return _encode_numpy(value)
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value)}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, tuple | list):
        items = [_encode(item) for item in value]
        return None if None in items else {"tuple" if isinstance(value, tuple) else "list": items}
    return None


def _encode_numpy(value: Any) -> dict[str, Any] | None:
    """Arrays and scalars of numbers; functions, texts, dates and objects are not kept."""
    if getattr(getattr(value, "dtype", None), "kind", "none") not in "biufc":
        return None
    # A copy of at least one dimension, in this machine's order of bytes and without negative strides.
    copy = value.reshape(-1).astype(value.dtype.newbyteorder("="), copy=True)
    try:
        encoded = _encode(torch.from_numpy(copy))
    except TypeError:
        # A type that torch lacks, such as long double.
        return None
    shape = list(value.shape)
    return {"array": encoded, "shape": shape, "scalar": type(value).__name__ != "ndarray"}


def _decode(code: dict[str, Any], device: torch.device) -> Any:
    if "tensor" in code:
        dtype = getattr(torch, code["tensor"].removeprefix("torch."))
        data = bytearray(base64.b64decode(code["data"]))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(code["shape"]).to("cpu" if code["cpu"] else device)
    if "array" in code:
        array = _decode(code["array"], device).numpy().reshape(code["shape"])
        return array[()] if code["scalar"] else array
    if "size" in code:
        return torch.Size(code["size"])
    if "value" in code:
        return code["value"]
    if "dtype" in code:
        return getattr(torch, code["dtype"].removeprefix("torch."))
    if "device" in code:
        return torch.device(code["device"])
    items = [_decode(item, device) for item in code.get("tuple", code.get("list", []))]
    return tuple(items) if "tuple" in code else items
