"""One batch on its way from the caller's losses to `.grad`: what `backward` and `accumulate` do, stage by stage.

read -> (meeting of the ranks) -> batch -> source -> stages -> form -> verdict -> commit
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._aggregator import Aggregator, aggregated_step, check_aggregator
from ._capture import check_capture, check_replayed, is_capturing
from ._cuda_store import DeviceRows, DeviceSum, is_chosen
from ._graph import check_replay, outside_of, unverified
from ._losses import Losses, Samples, TaskLosses, describe_bad_loss, read_losses, read_samples
from ._members import Layout, Members, are_same
from ._meeting import Alone, Ranks, Totals
from ._micro_batches import Means, MicroBatches, means, no_micro_batches, sums_with, with_earlier
from ._numbers import Scalar, on_device
from ._one_backward import is_measured, joint_pass, one_backward_step, outside_heads, with_joint_earlier
from ._passes import Pass, Passes, set_aside
from ._processes import ALONE, Processes, is_one_of_several
from ._rule import Balance, Rule, Terms, schedule
from ._scaling import Held, check_unscaled, scale_of, unscaled
from ._state import Averages, Pending, State, Store, new_averages, say_once
from ._step import Batch, Step, by_parameter, count, exact_step, gradients_of, put, task_passes
from ._store import FlatGradientBuffer, RunningSum


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


def new_store(parts: Parts, layout: Layout, ranks: Alone, tasks: int) -> Store:
    """Rows where the method looks at all gradients at once or again later, else a running sum."""
    settings, rule = parts.settings, parts.settings.rule
    averaged = ranks.parts(layout.averaged)
    device = averaged[0].device if averaged else layout.parameters[0].device
    # Where every rank has whole rows there is nothing to agree on.
    own = ranks if ranks.agrees else ALONE
    rows = parts.state.beta > 0 or not rule.streams or parts.members.joint or settings.aggregator is not None
    dtype, normalise = settings.ema_dtype, rule.norm_target is not None
    if is_chosen(averaged):
        return DeviceRows(averaged, tasks, dtype, own) if rows else DeviceSum(averaged, own, normalise)
    if rows:
        return FlatGradientBuffer(averaged, tasks, dtype, own, device)
    return RunningSum(averaged, own, normalise, device)


def averages_for(parts: Parts, names: tuple[str, ...], named: bool, layout: Layout, ranks: Alone) -> Averages:
    """The averages as they are; new ones before the first batch; with more rows where a parameter was thawed."""
    known, state = parts.state.averages, parts.state
    if known is None:
        store = new_store(parts, layout, ranks, len(names))
        return new_averages(names, named, store, list(layout.averaged), state.task_weights)
    if are_same(known.rows, layout.averaged):
        return known
    store = new_store(parts, layout, ranks, len(names))
    if store.keeps_rows and known.store.keeps_rows:
        old = dict(zip(known.rows, known.store.averages(), strict=True))
        store.load_averages([old.get(parameter, [None] * len(names)) for parameter in layout.averaged])
    return replace(known, store=store, rows=list(layout.averaged))


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
    marked = [bool(new) for new in unverified(batch.losses)]
    return Given(batch, counted, scale_of(scaler, device), batch.values(device), marked, None)


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


# ------------------------------------------------- backward


def backward(parts: Parts, base_optim: Optimizer, losses: Losses, scaler: Any, samples: Samples) -> None:
    """Fill `.grad` from the task losses; see `DualBalancedOptimizer.backward`."""
    layout = parts.layout(base_optim)
    ranks = parts.processes.over(layout)
    _warn_of_world(parts)
    check_capture(parts, layout, scaler)
    check_aggregator(parts.settings.aggregator, fully_shard=ranks.agrees)
    try:
        given = meet(parts, layout, ranks, "backward()", losses, scaler, samples)
        earlier: MicroBatches | None = parts.pending.micro_batches
        if (parts.members.joint or earlier is not None) and ranks.outside_get_gradients:
            find = outside_heads if parts.members.joint else outside_of
            layout = layout.with_heads(find(given.losses.given, layout.parameters))
        _warn_of_outside(parts, given, layout, ranks)
        batch, mean = make_batch(parts, layout, ranks, given)
        held = None if given.scale is None else Held(batch.terms, ranks, device_of(layout))
        usable = batch.terms.usable
        known_bad = batch.terms.refuses and isinstance(usable, list) and not all(usable)
        error = _bad_loss(parts, batch, given) if known_bad and batch.present else None
        step, new = None, {}
        kept = _rows_before(parts, held)
        try:
            if error is None:
                with set_aside(layout.wanted):
                    step = _step(parts, batch, mean, ranks, given, held)
                error = _verdict(parts, batch, step, given, held)
            if error is None and step is not None:
                new = gradients_of(step, layout, parts.state.reached, given.scale, ranks.wrap)
        except BaseException:
            _undo(parts, kept)
            raise
    finally:
        ranks.reset()
    if error is None and step is not None:
        _commit(parts, batch, step, new, given)
        return
    _undo(parts, kept)
    try:
        if error is not None and not isinstance(error, Overflow) and parts.settings.nonfinite == "raise":
            raise error
        _leave_out(parts, batch, given, isinstance(error, Overflow))
    finally:
        # Bound here it would be part of a cycle that keeps the graph alive.
        del error


def _rows_before(parts: Parts, held: Held | None) -> list[list[Tensor]] | None:
    """Copies of the rows where they take in a batch whose joint pass may still overflow."""
    known = parts.state.averages
    if held is None or not parts.members.joint or known is None or not known.store.keeps_rows:
        return None
    return [[row.clone() for row in rows] for rows in known.store.averages()]


def _undo(parts: Parts, kept: list[list[Tensor]] | None) -> None:
    """Averages that this batch began go back to zero, those that were kept to what they were."""
    known = parts.state.averages
    # What a capture has recorded was not done.
    if known is None or not known.store.keeps_rows or is_capturing():
        return
    if kept is not None:
        known.store.load_averages(kept)
    for task, number in enumerate(known.counts.tolist()):
        if number == 0:
            known.store.clear(task)
    if parts.members.joint:
        known.norms.copy_(torch.where(known.counts > 0, known.store.load_norms(), 0.0))


def _step(parts: Parts, batch: Batch, mean: Means, ranks: Alone, given: Given, held: Held | None) -> Step:
    """The form of the step, with the stages that this call needs. Nothing but the store is touched."""
    settings, layout, joint = parts.settings, batch.layout, parts.members.joint
    earlier = parts.pending.micro_batches
    # In the one-backward form a pass stops at what norms are measured on, and at the heads.
    inputs = [p for p in [*layout.averaged, *layout.heads] if p.requires_grad] if joint else None

    def staged(passes: Passes, tasks: Sequence[int], shared: Sequence[Tensor]) -> Passes:
        passes = ranks.reduced(passes, tasks, shared, held=held is not None)
        return passes if held is None else held(passes)

    def measured() -> Passes:
        passes = task_passes(batch, ranks.take, inputs=inputs, keep_graph=joint)
        passes = _checked(passes, parts, batch, ranks, given)
        passes = passes if given.scale is None else unscaled(passes, given.scale)
        if earlier is not None and mean.earlier is not None:
            passes = with_earlier(passes, earlier, mean.earlier, layout)
        return staged(_reaching(passes, parts, batch, ranks), batch.running, layout.averaged)

    def joint_passes(weights: Tensor, counted: list[int], with_heads: bool) -> Passes:
        passes = joint_pass(batch, ranks.take, weights, counted, with_heads, not ranks.reduces_in_passes)
        passes = _checked(passes, parts, batch, ranks, given) if with_heads else passes
        passes = passes if given.scale is None else unscaled(passes, given.scale)
        if earlier is not None and mean.earlier is not None:
            passes = with_joint_earlier(passes, earlier, batch, mean.earlier, weights, counted, with_heads)
        return staged(passes, [-1], layout.shared)

    if joint:
        with closing(measured()) as passes:
            measure = passes if is_measured(batch, settings.refresh_every) else None
            return one_backward_step(measure, batch, settings.rule, joint_passes, ranks.close)
    with closing(measured()) as passes:
        if settings.aggregator is not None:
            return aggregated_step(passes, batch, settings.aggregator, ranks)
        return exact_step(passes, batch, settings.rule, ranks.close)


def _checked(passes: Passes, parts: Parts, batch: Batch, ranks: Alone, given: Given) -> Passes:
    """Before the first pass: classes that are new in these graphs are run twice, where a graph is walked twice."""
    if any(given.marked) and (parts.members.joint or len(batch.running) > 1):
        check_replayed()
        check_replay(
            ranks.take,
            batch.losses.losses,
            batch.starts.unbind(),
            batch.losses.names,
            batch.layout.parameters,
            given.marked,
        )
    yield from passes


def _reaching(passes: Passes, parts: Parts, batch: Batch, ranks: Alone) -> Passes:
    """Stage: refuse a task that this rank has, if it reaches nothing to average although something can be reached."""
    versions = [parameter._version for parameter in batch.layout.shared]
    for number, one in enumerate(passes):
        if number == 0 and [parameter._version for parameter in batch.layout.shared] != versions:
            raise RuntimeError(_stepped(batch.losses.names[one.task]))
        if all(gradient is None for gradient in one.shared) and not parts.members.all_frozen:
            here = batch.losses.losses[one.task] is not None or one.rest
            if here:
                raise ValueError(_reaches_nothing(batch.losses.names[one.task], parts.members.joint, ranks.hint))
        yield one


def _stepped(name: str) -> str:
    return (
        f"a hook changed shared parameters inside the backward pass of task {name!r} (an optimizer fused into the backward?): "
        "balancing makes one pass a task, so they would be updated once a task, by unbalanced gradients; they have moved "
        "once already; take the hook away and give these parameters to base_optim"
    )


def _reaches_nothing(name: str, joint: bool, hint: str) -> str:
    if joint:
        return (
            f"task {name!r} reaches none of norm_params: its loss does not depend on them, or they are frozen; "
            "choose some that every task depends on, e.g. norm_params=trunk[-1].parameters()"
        )
    return (
        f"task {name!r} reaches no shared parameter: its loss does not depend on shared_params, or a hook took their .grad "
        "inside the pass; leave it out of the losses (add its own .backward()), correct shared_params, or take the hook "
        f"away{hint}"
    )


# ------------------------------------------------- verdict


class Overflow(Exception):
    """A batch whose scaled gradients were not finite: the scaler has to see it and lower its scale."""


def _verdict(parts: Parts, batch: Batch, step: Step, given: Given, held: Held | None) -> Exception | None:
    """Why the batch cannot be used, or None. The one read of a device, after everything is enqueued."""
    refuses = batch.terms.refuses
    if held is None and not refuses:
        return None
    overflown = held is not None and not bool(held.ok)
    if not overflown and on_device(step.norms.device):
        chosen = torch.stack([step.norms.unbind()[task] for task in batch.present] or [step.norms.new_zeros(())])
        if bool(chosen.isfinite().all() & torch.as_tensor(step.ok, device=chosen.device)):
            return None
    missing = [math.isnan(norm) for norm in step.norms.tolist()]
    if not overflown and step.ok is True and not any(missing[task] for task in batch.present):
        return None
    if refuses and (bad := _bad_loss(parts, batch, given)) is not None:
        return bad
    if overflown:
        return Overflow()
    if not refuses:
        return None
    for task in batch.present:
        if missing[task]:
            return RuntimeError(_bad_gradient(f"task {batch.losses.names[task]!r}"))
    if not bool(step.ok):
        if parts.settings.aggregator is not None:
            return RuntimeError(_bad_gradient("all tasks together, as the aggregator combines them"))
        names = [batch.losses.names[task] for task in batch.present]
        return Overflow() if held is not None else RuntimeError(_bad_gradient(f"the tasks {names} together"))
    return None


def _bad_loss(parts: Parts, batch: Batch, given: Given) -> ValueError | None:
    """The error for the first loss that cannot be used."""
    rule, names = parts.settings.rule, batch.losses.names
    usable = rule.usable(batch.values, logged_of(parts, names, batch.values.device)).tolist()
    logs = rule.logs(names)
    for task in batch.present:
        if not usable[task]:
            bad = {} if given.totals is None else given.totals.bad
            rank, value = bad.get(task, (None, batch.values[task].item()))
            if parts.settings.nonfinite == "skip" and math.isfinite(value):
                say_once(
                    parts.pending,
                    f"negative {names[task]}",
                    f"the loss of task {names[task]!r} is {value}, below -eps, so that its logarithm does not exist and "
                    "nonfinite='skip' leaves the batch out, as it will every such batch; for a loss that can be negative "
                    f"pass log_transform={{{names[task]!r}: False}}",
                    stacklevel=5,
                )
            return ValueError(describe_bad_loss(names[task], value, rule.eps, logs[task], rank))
    return None


def _bad_gradient(whose: str) -> str:
    return (
        f"gradient of {whose} must be finite, got NaN or inf behind a finite loss; no parameter was changed; look for "
        "sqrt, norm, log or a division at 0 in the loss, or for a loss or ema_dtype of half precision that cannot hold "
        "1 / (loss + eps); or pass nonfinite='skip' to leave such batches out"
    )


# ------------------------------------------------- commit


def _commit(parts: Parts, batch: Batch, step: Step, new: dict[Tensor, Tensor], given: Given) -> None:
    """Count the batch and set `.grad`; from here on the tasks are fixed."""
    state, pending, known = parts.state, parts.pending, batch.known
    state.averages = known
    if step.averages is not None and known.store.keeps_rows:
        rows = zip(known.store.averages(), step.averages, strict=True)
        known.store.load_averages([[fresh.get(t, row) for t, row in enumerate(old)] for old, fresh in rows])
    count(step, known, parts.members.joint)
    state.reached.update(step.reached)
    put(new)
    pending.balance = Balance(batch.losses.names, batch.values, step.norms, step.weights, skipped=False)
    pending.micro_batches = pending.tasks = None
    pending.waiting, pending.skip_next_step = True, False
    if given.scale is not None and all(parameter.grad is None for parameter in batch.layout.parameters):
        # No task was there. A scaler needs some .grad to look at, and nothing must come of it.
        _signal(batch.layout, 0.0)
        pending.skip_next_step = True
    if "unreached" not in pending.said and step.taken and len(step.measured) == len(batch.losses.names):
        _warn_of_unreached(parts, batch.layout, step)


def _leave_out(parts: Parts, batch: Batch, given: Given, overflow: bool) -> None:
    """Record a batch that is skipped. Under a scaler one `.grad` says whether it was an overflow: inf, or zeros."""
    pending = parts.pending
    nothing = torch.full_like(batch.values, math.nan), torch.zeros_like(batch.values)
    pending.balance = Balance(batch.losses.names, batch.values, *nothing, skipped=True)
    pending.micro_batches = pending.tasks = None
    # After an overflow it is the scaler that skips.
    pending.skip_next_step = not overflow and not pending.waiting
    if given.scale is not None:
        _signal(batch.layout, math.inf if overflow else 0.0)


def _signal(layout: Layout, value: float) -> None:
    """Add `value` to one `.grad`, where a scaler sees it."""
    for parameter in [p for p in [*layout.shared, *layout.parameters] if p.requires_grad][:1]:
        put({parameter: torch.full_like(parameter, value, requires_grad=False)})


def _warn_of_unreached(parts: Parts, layout: Layout, step: Step) -> None:
    """Say once, after the first batch that had every task, which shared parameters no task reaches."""
    if not on_device(step.norms.device) and bool(step.norms.isnan().any()):
        return
    parts.pending.said.add("unreached")
    unreached = [tuple(p.shape) for p in layout.shared if p not in parts.state.reached and p.requires_grad]
    if unreached:
        say_once(
            parts.pending,
            "some unreached",
            f"no task reaches {len(unreached)} of the shared parameters (the first has shape {unreached[0]}); "
            "they get no gradient",
            stacklevel=6,
        )


def _warn_of_world(parts: Parts) -> None:
    if "looked" in parts.pending.said or parts.processes.group is not None:
        return
    parts.pending.said.add("looked")
    if is_one_of_several():
        say_once(
            parts.pending,
            "world",
            "this process is one of several, but no process_group was given: each would train on gradients of its own; "
            "pass process_group=torch.distributed.group.WORLD, or ignore this where the runs are independent",
            stacklevel=6,
        )


def _warn_of_outside(parts: Parts, given: Given, layout: Layout, ranks: Alone) -> None:
    """Say once which parameters get no gradient because they are not in the optimizer."""
    if not isinstance(ranks, Ranks) or ranks.reduces_in_passes or "outside" in parts.pending.said:
        return
    parts.pending.said.add("outside")
    outside = outside_of(given.losses.given, layout.parameters)
    held = [leaf for leaf in outside if isinstance(leaf, torch.nn.Parameter)]
    if held:
        say_once(
            parts.pending,
            "parameters outside",
            f"{len(held)} parameters outside base_optim take part in the losses (the first has shape "
            f"{tuple(held[0].shape)}); with a process_group they get no gradient: give them to base_optim, or "
            "freeze them",
            stacklevel=6,
        )


# ------------------------------------------------- accumulate


def accumulate(parts: Parts, base_optim: Optimizer, losses: Losses, scaler: Any, samples: Samples) -> None:
    """Add one micro-batch to those that wait; see `DualBalancedOptimizer.accumulate`."""
    layout = parts.layout(base_optim)
    check_capture(parts, layout, scaler, micro_batch=True)
    ranks = parts.processes.over(layout)
    try:
        given = meet(parts, layout, ranks, "accumulate()", losses, scaler, samples)
        _check_values(parts, given)
        before = parts.pending.micro_batches or no_micro_batches(given.values)
        # A micro-batch of half precision, or without any task, must not round the losses of the others.
        before.losses = before.losses.to(torch.promote_types(before.losses.dtype, given.values.dtype))
        # A failure in the middle of the passes ends the batch: half a micro-batch must not go into the next one.
        parts.pending.micro_batches = None
        outside = outside_of(given.losses.given, layout.parameters) if ranks.outside_get_gradients else []
        with set_aside([*layout.parameters, *outside]), _settled(ranks):
            _add_passes(before, ranks, layout.with_heads(outside), given)
    finally:
        ranks.reset()
    parts.pending.micro_batches = before
    parts.pending.tasks, parts.pending.named = given.losses.names, given.losses.named


@contextmanager
def _settled(ranks: Alone) -> Iterator[None]:
    """An error of one rank is one of all."""
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        if not isinstance(ranks, Ranks) or ranks.reduces_in_passes:
            raise
        failure = error
    try:
        if isinstance(ranks, Ranks) and not ranks.reduces_in_passes:
            ranks.settle(failure)
    finally:
        del failure


def _check_values(parts: Parts, given: Given) -> None:
    """Refuse a micro-batch with a loss that is not finite; only the mean loss has to be positive."""
    if parts.settings.nonfinite != "raise":
        return
    values = given.values.tolist()
    here = {task: (None, values[task]) for task, loss in enumerate(given.losses.losses) if loss is not None}
    for task, (rank, value) in (here if given.totals is None else given.totals.bad).items():
        if not math.isfinite(value):
            raise ValueError(describe_bad_loss(given.losses.names[task], value, 0.0, False, rank))


def _add_passes(total: MicroBatches, ranks: Alone, layout: Layout, given: Given) -> None:
    """The passes of one micro-batch, added to `total`."""
    losses, samples = given.losses, given.samples
    everything = [*layout.shared, *layout.heads]
    if any(given.marked) and len(losses.present) > 1:
        starts = torch.ones_like(given.values).unbind()
        check_replay(ranks.take, losses.losses, starts, losses.names, layout.parameters, given.marked)
    for task in losses.present:
        # Where passes add up the ranks' gradients, each must bring its number of samples along.
        own = samples[task] * ranks.averaging if ranks.reduces_in_passes else 1.0
        start = torch.full_like(given.values[task], own)
        found = ranks.take(
            [losses.loss(task)],
            [start if given.scale is None else start * given.scale],
            [losses.names[task]],
            everything,
            retain_graph=task != losses.present[-1],
        )
        one = Pass(task, [], by_parameter(everything, found))
        one = one if given.scale is None else next(unscaled(iter([one]), given.scale))
        total.add(task, one.rest, 1.0 if ranks.reduces_in_passes else samples[task])
        if samples[task]:
            # A mean over no samples may be NaN.
            total.losses[task] += given.values[task] * samples[task]
            total.samples[task] += samples[task]
