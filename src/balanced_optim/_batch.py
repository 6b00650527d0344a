"""What one batch is made of: the parts of an optimizer, what the caller hands in, what all ranks have of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._aggregator import Aggregator
from ._capture import is_capturing
from ._cuda_store import DeviceRows, DeviceSum, is_chosen
from ._graph import outside_of, reach_of, unverified
from ._losses import Losses, Samples, TaskLosses, read_losses, read_samples
from ._meeting import Alone, Ranks, Totals
from ._members import Layout, Members, are_same
from ._micro_batches import Means, means, sums_with
from ._numbers import Scalar, on_device
from ._passes import set_aside, take_grad
from ._processes import ALONE, Processes
from ._rule import Rule, Terms, schedule
from ._running_sum import RunningSum
from ._scaling import check_unscaled, scale_of
from ._state import Averages, Pending, State, Store, fits, kinds_of, new_averages, set_weights
from ._step import Batch
from ._store import FlatGradientBuffer


@dataclass(frozen=True, slots=True)
class Settings:
    """What the constructor fixed, beside the rule and the parameters."""

    rule: Rule
    nonfinite: str
    refresh_every: int
    ema_dtype: torch.dtype | None
    aggregator: Aggregator | None


@dataclass(frozen=True, slots=True)
class Parts:
    """What one optimizer is made of; the parts change, the record does not."""

    settings: Settings
    members: Members
    state: State
    pending: Pending
    processes: Processes

    def layout(self, base_optim: Optimizer) -> Layout:
        """The parameters as they are now."""
        if not is_capturing():
            self.state.notice()
        layout = self.members.layout(base_optim)
        moved, known = self.members.replaced, self.state.averages
        if moved:
            reached = [moved.get(parameter, parameter) for parameter in self.state.reached]
            self.state.reached.clear()
            self.state.reached.update(reached)
            if known is not None:
                known.rows[:] = [moved.get(parameter, parameter) for parameter in known.rows]
            moved.clear()
        return layout


def needs_rows(parts: Parts) -> bool:
    """Whether the method looks at all gradients at once, or again later."""
    settings = parts.settings
    return parts.state.beta > 0 or not settings.rule.streams or parts.members.joint or settings.aggregator is not None


def new_store(parts: Parts, layout: Layout, ranks: Alone, tasks: int) -> Store:
    """Rows, or a running sum where that is enough."""
    settings = parts.settings
    averaged, rows = ranks.parts(layout.averaged), needs_rows(parts)
    device = averaged[0].device if averaged else layout.parameters[0].device
    # Where every rank has whole rows there is nothing to agree on.
    own = ranks if ranks.agrees else ALONE
    dtype, normalise = settings.ema_dtype, settings.rule.norm_target is not None
    if is_chosen(averaged):
        return DeviceRows(averaged, tasks, dtype, own) if rows else DeviceSum(averaged, own, normalise)
    if rows:
        return FlatGradientBuffer(averaged, tasks, dtype, own, device)
    return RunningSum(averaged, own, normalise, device)


def averages_for(parts: Parts, names: tuple[str, ...], named: bool, layout: Layout, ranks: Alone) -> Averages:
    """The averages as they are; new ones before the first batch; with more rows where a parameter was thawed."""
    known, state = parts.state.averages, parts.state
    if known is None:
        if state.emptied is not None and _is_for(parts, state.emptied[0], len(names), layout):
            set_weights(state.emptied[0], state.task_weights)
            return replace(state.emptied[0], tasks=names, named=named)
        # Its memory is needed.
        state.emptied = None
        store = new_store(parts, layout, ranks, len(names))
        return new_averages(names, named, store, list(layout.averaged), state.task_weights)
    if are_same(known.rows, layout.averaged):
        return known
    store = new_store(parts, layout, ranks, len(names))
    if store.keeps_rows and known.store.keeps_rows:
        old = dict(zip(known.rows, known.store.averages(), strict=True))
        store.load_averages([old.get(parameter, [None] * len(names)) for parameter in layout.averaged])
    return replace(known, store=store, rows=list(layout.averaged), kinds=kinds_of(layout.averaged))


def _is_for(parts: Parts, known: Averages, tasks: int, layout: Layout) -> bool:
    return len(known.tasks) == tasks and fits(known, layout.averaged) and known.store.keeps_rows == needs_rows(parts)


# ------------------------------------------------- what the caller hands in


@dataclass(frozen=True, slots=True)
class Given:
    """One call's losses, and what all ranks have of them."""

    losses: TaskLosses
    samples: list[float]
    scale: Scalar | None
    values: Tensor
    marked: list[bool]
    totals: Totals | None


def read(parts: Parts, layout: Layout, ranks: Alone, losses: Losses, scaler: Any, samples: Samples) -> Given:
    """What the caller handed in, checked; nothing is changed."""
    state, pending, rule = parts.state, parts.pending, parts.settings.rule
    tasks = state.tasks or pending.tasks
    batch = read_losses(losses, tasks, state.named if state.tasks else pending.named)
    if state.task_weights is not None and len(state.task_weights) != len(batch.names):
        raise ValueError(
            f"losses must have {len(state.task_weights)} entries, one for each of task_weights, got {len(batch.names)}"
        )
    check_log_transform(rule, batch.names)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}; under bf16 leave it out"
        )
    first = pending.balance is None and pending.micro_batches is None and not is_capturing()
    if (scaler is not None and scaler.is_enabled()) or first:
        check_unscaled(batch, scaler if scaler is not None and scaler.is_enabled() else None, rule.logs(batch.names))
    device = device_of(layout)
    counted = read_samples(samples, batch, may_be_zero=isinstance(ranks, Ranks))
    if isinstance(ranks, Ranks) and not ranks.reduces_in_passes:
        _refuse_hidden(parts, layout, batch)
    marked = [bool(new) for new in unverified(batch.losses)]
    return Given(batch, counted, scale_of(scaler, device), batch.values(device), marked, None)


def _refuse_hidden(parts: Parts, layout: Layout, batch: TaskLosses) -> None:
    """Once for each task: with ranks a pass asks for parameters only, so that hooks on other leaves would not run."""
    new = {name: loss for name, loss in zip(batch.names, batch.losses, strict=True) if loss is not None}
    new = {name: loss for name, loss in new.items() if f"hidden {name}" not in parts.pending.said}
    outside = outside_of(reach_of(list(new.values())), layout.parameters)
    if outside:
        starts = [torch.ones_like(loss, requires_grad=False) for loss in new.values()]
        with set_aside(layout.parameters):
            take_grad(list(new.values()), starts, list(new), layout.parameters, retain_graph=True, inputs=outside)
    parts.pending.said.update(f"hidden {name}" for name in new)


def device_of(layout: Layout) -> torch.device:
    """Where vectors of T values live."""
    return (layout.averaged or layout.parameters)[0].device


def check_log_transform(rule: Rule, names: Sequence[str]) -> None:
    """Raise ValueError where `log_transform` is of other tasks."""
    logs = rule.log_transform
    unknown = [name for name in logs if name not in names] if hasattr(logs, "keys") else []  # type: ignore[union-attr]
    if unknown:
        raise ValueError(f"log_transform names the unknown task {unknown[0]!r}; the tasks are {list(names)}")
    if isinstance(logs, tuple) and len(logs) != len(names):
        raise ValueError(f"log_transform must have {len(names)} entries, one a task, got {len(logs)}")


def meet(parts: Parts, layout: Layout, ranks: Alone, call: str, losses: Losses, scaler: Any, samples: Samples) -> Given:
    """The same from all ranks; an error of one is one of all."""
    if not isinstance(ranks, Ranks):
        return read(parts, layout, ranks, losses, scaler, samples)
    state, known = parts.state, parts.state.averages
    settings = replace(parts.settings, aggregator=None), state.task_weights, parts.members.joint
    facts: dict[str, Any] = {
        "the call": call,
        "the settings": repr((*settings, parts.members.positions(), parts.members.positions(measured=True))),
        "the aggregator": repr(type(parts.settings.aggregator)),
        "the schedule": (state.beta, state.beta_decay),
        "the counts of batches": known.counts.tolist() if known is not None and parts.pending.loaded else None,
        "the ages of norms": known.ages if known is not None else None,
        "the parameters": [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in layout.parameters],
    }
    try:
        given = read(parts, layout, ranks, losses, scaler, samples)
    except Exception as error:
        ranks.meet(facts, error)
        raise
    before = parts.pending.micro_batches if call == "backward()" else None
    sums, total, _ = sums_with(before, given.values, given.samples)
    here = [float(loss is not None) for loss in given.losses.losses]
    totals = ranks.meet(
        facts | {"the tasks": given.losses.names},
        None,
        sums=sums,
        by_task=(total.tolist(), here, [float(mark) for mark in given.marked]),
        scale=given.scale,
    )
    parts.pending.loaded = False
    return replace(given, totals=totals, marked=totals.marked)


# ------------------------------------------------- the batch


def logged_of(parts: Parts, names: tuple[str, ...], device: torch.device) -> Tensor | bool:
    """By task whether its logarithm is taken: one bool where all are alike."""
    logs = parts.settings.rule.logs(names)
    if len(set(logs)) == 1:
        return logs[0]
    kept = parts.pending.logged
    if (names, device) not in kept:
        kept[names, device] = torch.tensor(logs, device=device)
    return kept[names, device]


def make_batch(parts: Parts, layout: Layout, ranks: Alone, given: Given) -> tuple[Batch, Means]:
    """The facts of a batch, before its first pass."""
    rule, losses = parts.settings.rule, given.losses
    known = averages_for(parts, losses.names, losses.named, layout, ranks)
    mean = means(given.values, given.samples, parts.pending.micro_batches, given.totals, ranks.averaging)
    logged = logged_of(parts, losses.names, given.values.device)
    starts = rule.starts(mean.values, logged)
    last = starts if mean.last is None else starts * mean.last
    last = last if given.scale is None else last * given.scale
    mean = mean if mean.earlier is None else replace(mean, earlier=starts * mean.earlier)
    unsolved = rule.unsolved(mean.values, logged)
    terms = terms_of(parts, known, rule.usable(mean.values, logged), unsolved, mean.present)
    return Batch(losses, mean.values, mean.present, last, terms, unsolved, layout, known), mean


def terms_of(parts: Parts, known: Averages, usable: Tensor, unsolved: Tensor | None, present: Sequence[int]) -> Terms:
    """What the store needs to know; Python numbers on a CPU."""
    rule, state = parts.settings.rule, parts.state
    refuses = parts.settings.nonfinite != "ignore"
    keep, gain = schedule(state.beta, state.beta_decay, known.counts)
    factors = known.task_weights if unsolved is None else known.task_weights * unsolved.to(known.task_weights.dtype)
    power = rule.power(known.batches)
    if not on_device(usable.device):
        flags = usable.tolist()
        if refuses:
            flags = [all(flags[task] for task in present)] * len(flags)
        return Terms(keep, gain, flags, factors.tolist(), power, refuses)
    if refuses and present:
        # One bad loss refuses the batch; no average takes in any part of it.
        usable = torch.stack([usable.unbind()[task] for task in present]).all().expand_as(usable)
    return Terms(keep, gain, usable, factors, power, refuses)
