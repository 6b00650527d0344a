"""The one-backward form: norms on a subset of the shared parameters, or as last measured, then one joint pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ._micro_batches import MicroBatches, added, sum_of
from ._numbers import Flag, on_device, where
from ._passes import Pass, Passes, Take
from ._rule import Rule
from ._state import Averages
from ._step import Batch, Close, Step, add_rest, apart, by_parameter
from ._store import finite


def is_measured(batch: Batch, refresh_every: int) -> bool:
    """Whether this step measures norms: if a task here has none, or one that is `refresh_every` steps old."""
    return any(not 0 < batch.known.ages[task] < refresh_every for task in batch.running)


def one_backward_step(
    measure: Passes | None, batch: Batch, rule: Rule, joint: Callable[[Tensor, list[int], bool], Passes], close: Close
) -> Step:
    """Weights from the norms of short passes, or from those of an earlier step; then one joint backward.

    Args:
        measure: short passes that stop at `norm_params` and heads; None to reuse the norms that are known.
        batch: its facts.
        rule: how norms become weights.
        joint: makes the joint pass of ``sum_t w_t log(loss_t + eps)`` for weights (T,) and the tasks that count,
            with the heads where asked.
        close: see `exact_step`.
    """
    store, terms, known = batch.known.store, batch.terms, batch.known
    store.start(terms)
    rest: dict[Tensor, Tensor] = {}
    if measure is None:
        norms = _known_norms(batch)
    else:
        for one in measure:
            add_rest(rest, one.rest, store.add(one), masked=not terms.refuses)
            del one
        norms = store.norms()
    # w_t = alpha / ||ema_t|| on the subset.
    weights = rule.joint_weights(norms, terms.power, batch.unsolved, known.task_weights)
    # grad sum_t w_t log(loss_t + eps)
    shared: dict[Tensor, Tensor] = {}
    ok: Flag = True
    counted = _counted(batch, norms)
    for one in joint(weights, counted, measure is None):
        fine = [
            finite(part, store.device) for part in (Pass(-1, one.shared, {}, one.ok), Pass(-1, [], one.rest, one.ok))
        ]
        shared = by_parameter(batch.layout.shared, one.shared)
        own = dict(one.rest)
        if not terms.refuses:
            # Whose fault it is cannot be told any more.
            both = zip(fine, (shared, own), strict=True)
            shared, own = (found if f is True else where(torch.as_tensor(f), found) for f, found in both)
        add_rest(rest, own, True, masked=False)
        ok = (fine[0] & fine[1]) if terms.refuses else True
    norms, rest, reached = close(norms, rest, set(shared))
    everything = apart(shared | rest)
    shared, rest = ({p: everything[p] for p in part} for part in (shared, rest))
    return Step(norms, weights, bool(counted), shared, rest, reached, [] if measure is None else batch.present, ok)


def _known_norms(batch: Batch) -> Tensor:
    """The norms as last measured of the tasks that are here and usable; NaN for all others."""
    known, usable = batch.known.norms, batch.terms.usable
    here = [task in batch.running for task in range(len(known))]
    counts = torch.where(usable, known, torch.nan) if isinstance(usable, Tensor) else known
    numbers = counts.unbind()
    missing = torch.full_like(known[0], torch.nan)
    return torch.stack([number if there else missing for number, there in zip(numbers, here, strict=True)])


def _counted(batch: Batch, norms: Tensor) -> list[int]:
    """The tasks that count, as far as the host knows."""
    if on_device(norms.device):
        return batch.running
    sizes = norms.tolist()
    return [task for task in batch.running if not math.isnan(sizes[task])]


def joint_pass(
    batch: Batch,
    take: Take,
    weights: Tensor,
    counted: Sequence[int],
    heads: Mapping[Tensor, int | None],
    reversible: set[int],
) -> Passes:
    """The source of the joint pass from ``w_t / (loss_t + eps)``; heads get their tasks' own log-losses.

    A head that one task alone reaches gets its gradient in the same pass, divided by w_t after. Any other, of several
    tasks or of one that is not `reversible`, needs a short pass before.

    Args:
        batch: its facts.
        take: how a pass is made.
        weights: w_t, (T,).
        counted: the tasks that count.
        heads: what this pass has to bring beside the shared parameters: the one task that reaches it, or None.
        reversible: tasks by whose weight a gradient can be multiplied and divided again.
    """
    layout = batch.layout
    here = [task for task in counted if batch.losses.losses[task] is not None]
    own = {head: task for head, task in heads.items() if task in reversible}
    others = [head for head in heads if head not in own]
    # Not a product with 0: the start of a bad loss may be NaN.
    usable = torch.as_tensor(batch.terms.usable, device=weights.device)
    rest = _joint(batch, take, here, batch.starts.masked_fill(~usable, 0.0), others, retain_graph=True)
    starts = (batch.starts * weights).masked_fill(~(weights > 0), 0.0)
    # Leaves outside the optimizer are asked for as well: a hook there may run a backward pass into what is shared.
    wanted = [*layout.shared, *own, *(leaf for leaf in layout.outside if leaf not in own)]
    found = _joint(batch, take, here, starts, wanted, retain_graph=False)
    divisors = weights.masked_fill(~(weights > 0), 1.0).unbind()
    rest.update((p, found[p] / divisors[task].to(p.device)) for p, task in own.items() if p in found)
    yield Pass(-1, [found.get(parameter) for parameter in layout.shared], rest)


def _joint(
    batch: Batch, take: Take, tasks: Sequence[int], starts: Tensor, wanted: Sequence[Tensor], *, retain_graph: bool
) -> dict[Tensor, Tensor]:
    """One pass from several losses to some of the parameters: the gradients that are there, of these alone."""
    inputs = [parameter for parameter in wanted if parameter.requires_grad]
    if not inputs or not tasks:
        return {}
    losses, names = [batch.losses.loss(task) for task in tasks], [batch.losses.names[task] for task in tasks]
    everything, each = [*batch.layout.shared, *batch.layout.heads], starts.unbind()
    cotangents = [each[task] for task in tasks]
    gradients = take(losses, cotangents, names, everything, retain_graph=retain_graph, inputs=inputs)
    found = by_parameter(everything, gradients)
    return {parameter: found[parameter] for parameter in inputs if parameter in found}


def with_joint_earlier(
    passes: Passes,
    before: MicroBatches,
    batch: Batch,
    factors: Tensor,
    weights: Tensor,
    counted: Sequence[int],
    with_heads: bool,
) -> Passes:
    """Stage: add what earlier micro-batches brought, heads by their own log-loss, what is shared by weight."""
    inside = set(batch.layout.shared)
    # Not a product with 0: the factor of a bad loss may be NaN.
    factors = factors.masked_fill(~torch.as_tensor(batch.terms.usable, device=factors.device), 0.0)
    shared = sum_of(before, counted, factors * weights.masked_fill(~(weights > 0), 0.0))
    heads = sum_of(before, counted, factors) if with_heads else {}
    more = {p: g for p, g in shared.items() if p in inside} | {p: g for p, g in heads.items() if p not in inside}
    for one in passes:
        yield added(one, more, batch.layout.shared)


def keep_norms(step: Step, known: Averages) -> None:
    """Keep the latest norm of every task, and how many steps ago each was measured."""
    counted = step.norms == step.norms
    known.norms.copy_(torch.where(counted, step.norms, known.norms))
    # A device is not asked which tasks it took.
    took = [True] * len(known.tasks) if on_device(counted.device) else counted.tolist()
    fresh = {task for task in step.measured if took[task]}
    known.ages[:] = [1 if task in fresh else age and age + 1 for task, age in enumerate(known.ages)]
