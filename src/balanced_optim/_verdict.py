"""Whether a batch can be used, and what is said where it cannot, or where something looks wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._batch import Given, Parts, logged_of
from ._graph import outside_of, reach_of
from ._losses import describe_bad_loss
from ._meeting import Alone, Ranks
from ._members import Layout
from ._numbers import on_device
from ._processes import is_one_of_several
from ._scaling import Held
from ._state import say_once, warn
from ._step import Batch, Step


class Overflow(Exception):
    """A batch whose scaled gradients were not finite: the scaler has to see it and lower its scale."""


def verdict(parts: Parts, batch: Batch, step: Step, given: Given, held: Held | None) -> Exception | None:
    """Why the batch cannot be used, or None. The one read of a device, after everything is enqueued."""
    overflown = held is not None and not bool(held.ok)
    if not batch.terms.refuses:
        return Overflow() if overflown else None
    if not overflown and on_device(step.norms.device):
        chosen = torch.stack([step.norms.unbind()[task] for task in batch.present] or [step.norms.new_zeros(())])
        if bool(chosen.isfinite().all() & torch.as_tensor(step.ok, device=chosen.device)):
            return None
    norms, names = step.norms.tolist(), batch.losses.names
    missing = [names[task] for task in batch.present if math.isnan(norms[task])]
    if not overflown and step.ok is True and not missing:
        return None
    if (bad := bad_loss(parts, batch, given)) is not None:
        return bad
    if overflown:
        return Overflow()
    if missing:
        return RuntimeError(_bad_gradient(f"task {missing[0]!r}"))
    if bool(step.ok):
        return None
    if parts.settings.aggregator is not None:
        return RuntimeError(_bad_gradient("all tasks together, as the aggregator combines them"))
    together = [names[task] for task in batch.present]
    return Overflow() if held is not None else RuntimeError(_bad_gradient(f"the tasks {together} together"))


def bad_loss(parts: Parts, batch: Batch, given: Given) -> ValueError | None:
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
                    f"the loss of task {names[task]!r} is {value}, below -eps, so that its logarithm does not exist "
                    "and nonfinite='skip' leaves the batch out, as it will every such batch; for a loss that can be "
                    f"negative pass log_transform={{{names[task]!r}: False}}",
                )
            return ValueError(describe_bad_loss(names[task], value, rule.eps, logs[task], rank))
    return None


def _bad_gradient(whose: str) -> str:
    return (
        f"gradient of {whose} must be finite, got NaN or inf behind a finite loss; no parameter was changed; look for "
        "sqrt, norm, log or a division at 0 in the loss, or for a loss or ema_dtype of half precision that cannot hold "
        "1 / (loss + eps); or pass nonfinite='skip' to leave such batches out"
    )


def versions_of(parameters: Sequence[Tensor]) -> list[int]:
    """How often each parameter was written to."""
    return [parameter._version for parameter in parameters]


def stepped(name: str) -> str:
    """The message for a hook that updates parameters inside a pass."""
    return (
        f"a hook changed shared parameters inside the backward pass of task {name!r} (an optimizer fused into the "
        "backward?): balancing makes one pass a task, so they would be updated once a task, by unbalanced "
        "gradients; they have moved once already; take the hook away and give these parameters to base_optim"
    )


def reaches_nothing(name: str, joint: bool, hint: str) -> str:
    """The message for a task that reaches nothing to average."""
    if joint:
        return (
            f"task {name!r} reaches none of norm_params: its loss does not depend on them, or they are frozen; "
            "choose some that every task depends on, e.g. norm_params=trunk[-1].parameters()"
        )
    return (
        f"task {name!r} reaches no shared parameter: its loss does not depend on shared_params, or a hook took their "
        ".grad inside the pass; leave it out of the losses (add its own .backward()), correct shared_params, or "
        f"take the hook away{hint}"
    )


def warn_of_unreached(parts: Parts, layout: Layout, step: Step) -> None:
    """Say once, after the first batch that had every task, which shared parameters no task reaches."""
    if not on_device(step.norms.device) and bool(step.norms.isnan().any()):
        return
    parts.pending.said.add("unreached")
    unreached = [tuple(p.shape) for p in layout.shared if p not in parts.state.reached and p.requires_grad]
    if unreached:
        warn(
            f"no task reaches {len(unreached)} of the shared parameters (the first has shape {unreached[0]}); "
            "they get no gradient; or a hook takes their .grad inside the pass",
        )


def warn_of_world(parts: Parts) -> None:
    if "looked" in parts.pending.said or parts.processes.group is not None:
        return
    parts.pending.said.add("looked")
    if is_one_of_several():
        warn(
            "this process is one of several, but no process_group was given: each would train on gradients of its own; "
            "pass process_group=torch.distributed.group.WORLD, or ignore this where the runs are independent",
        )


def warn_of_outside(parts: Parts, given: Given, layout: Layout, ranks: Alone) -> None:
    """Say once which parameters get no gradient because they are not in the optimizer."""
    if not isinstance(ranks, Ranks) or ranks.reduces_in_passes or "outside" in parts.pending.said:
        return
    parts.pending.said.add("outside")
    outside = outside_of(reach_of(given.losses.losses), layout.parameters)
    held = [leaf for leaf in outside if isinstance(leaf, torch.nn.Parameter)]
    if held:
        warn(
            f"{len(held)} parameters outside base_optim take part in the losses (the first has shape "
            f"{tuple(held[0].shape)}); with a process_group they get no gradient: give them to base_optim, or "
            "freeze them",
        )
