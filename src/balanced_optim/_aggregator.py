"""Other ways to combine task gradients: any callable from their (T, n) matrix to one vector."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._meeting import Alone
from ._numbers import Flag, Scalar, accumulation_dtype, real, squares_of, total_of
from ._passes import Pass, Passes
from ._step import Batch, Step, add_rest, by_parameter
from ._store import finite

Aggregator = Callable[[Tensor], Tensor]


def check_aggregator(aggregator: object, **excluded: object) -> None:
    """Raise unless `aggregator` is None, or callable with every one of `excluded` as None, False or the default."""
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


def aggregated_step(passes: Passes, batch: Batch, aggregator: Aggregator, ranks: Alone) -> Step:
    """One pass a task, averaged beside the rows, and combined by `aggregator`. It may fail and leave nothing.

    Ranks use one vector, and an error on one is one on all.

    Memory: T * n scalars for the matrix beside the rows.
    """
    store, terms, layout = batch.known.store, batch.terms, batch.layout
    number = len(batch.losses.names)
    assert store.keeps_rows
    averages = store.averages()
    # Complex parameters count as pairs.
    width = sum(real(rows[0]).numel() for rows in averages)
    matrix = torch.zeros(number, width, dtype=store.norm_dtype, device=store.device)
    norms = torch.full((number,), math.nan, dtype=matrix.dtype, device=store.device)
    rest: dict[Tensor, Tensor] = {}
    reached: set[Tensor] = set()
    healthy: Flag = True
    for one in passes:
        ok = _as_stored(one, averages, store.device) & terms.usable[one.task] & one.ok & healthy
        healthy = ok if terms.refuses else healthy
        add_rest(rest, one.rest, ok, masked=not terms.refuses)
        if ok is False:
            continue
        # ema_t <- beta_k * ema_t + (1 - beta_k) * g_t, in the matrix.
        _write(matrix[one.task], averages, one, terms.keep[one.task], terms.gain[one.task])
        norm = torch.linalg.vector_norm(matrix[one.task])
        norms[one.task] = torch.where(ok, norm, math.nan) if isinstance(ok, Tensor) else norm
        reached.update(by_parameter(layout.averaged, one.shared))
    norms, rest, reached = ranks.close(norms, rest, reached)
    return _combined(matrix, norms, rest, reached, batch, aggregator, ranks)


def _combined(
    matrix: Tensor,
    norms: Tensor,
    rest: dict[Tensor, Tensor],
    reached: set[Tensor],
    batch: Batch,
    aggregator: Aggregator,
    ranks: Alone,
) -> Step:
    """The step that the aggregator makes of the matrix; none where a task has refused the batch."""
    layout, known = batch.layout, batch.known
    sizes = norms.tolist()
    weights = torch.full_like(norms, math.nan).masked_fill(~(norms > 0), 0.0)
    refused = batch.terms.refuses and any(math.isnan(sizes[task]) for task in batch.present)
    # A zero gradient takes no part, as under the max-norm rule.
    tasks = [task for task in batch.present if sizes[task] > 0]
    new = {t: _cut(matrix[t], layout.averaged) for t in batch.present if not math.isnan(sizes[t])}
    averages = [{task: row[index] for task, row in new.items()} for index in range(len(layout.averaged))]
    vector, ok = matrix.new_zeros(matrix.shape[1]), True
    if tasks and not refused:
        # A matrix of its own: the aggregator may write to it.
        rows = matrix[tasks] * known.task_weights[tasks].to(matrix.dtype)[:, None]
        vector = ranks.everywhere(lambda: combine(aggregator, rows))
        ok = bool(vector.isfinite().all())
    shared = (
        dict(zip(layout.averaged, _cut(vector, layout.averaged), strict=True)) if ok and new and not refused else {}
    )
    ok = ok or not batch.terms.refuses
    return Step(norms, weights, bool(shared), shared, rest, reached, batch.present, ok, averages)


def _as_stored(one: Pass, averages: Sequence[Sequence[Tensor]], device: torch.device) -> Flag:
    """Whether the gradients are finite in the dtypes of their rows."""
    stored = [g.to(rows[0].dtype) for g, rows in zip(one.shared, averages, strict=True) if g is not None]
    return (total_of(squares_of(stored), device) < math.inf) & finite(Pass(one.task, [], one.rest), device)


def _write(row: Tensor, averages: Sequence[Sequence[Tensor]], one: Pass, keep: Scalar, gain: Scalar) -> None:
    """row <- keep * ema_t + gain * g_t, parameters one after the other, rounded as the store rounds."""
    start = 0
    for rows, gradient in zip(averages, one.shared, strict=True):
        old = real(rows[one.task])
        wide = accumulation_dtype(old.dtype)
        new = old.to(wide) * keep
        if gradient is not None:
            new = new + real(gradient).to(wide) * gain
        row[start : start + new.numel()] = new.to(old.dtype).reshape(-1)
        start += new.numel()


def combine(aggregator: Aggregator, matrix: Tensor) -> Tensor:
    """What the aggregator makes of the matrix, checked.

    Raises:
        TypeError, ValueError: it is not one vector of n.
    """
    shape, dtype = tuple(matrix.shape), matrix.dtype
    with torch.autocast(matrix.device.type, enabled=False):
        vector = aggregator(matrix)
    if not isinstance(vector, Tensor):
        raise TypeError(f"aggregator must return a tensor, got {type(vector).__name__} {vector!r}")
    if vector.shape != shape[1:]:
        raise ValueError(
            f"aggregator must return a vector of shape {shape[1:]} for a matrix of shape "
            f"{shape}, got shape {tuple(vector.shape)}"
        )
    return vector.detach().to(dtype)


def _cut(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The vector as one tensor for each parameter, shaped and strided like it."""
    result: list[Tensor] = []
    start = 0
    for parameter in like:
        dtype = vector.dtype.to_complex() if parameter.is_complex() else vector.dtype
        gradient = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        into = real(gradient)
        into.copy_(vector[start : start + into.numel()].reshape(into.shape))
        start += into.numel()
        result.append(gradient)
    return result
