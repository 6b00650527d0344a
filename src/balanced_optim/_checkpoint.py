"""Saving and loading: between the parts of an optimizer and the form of a state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._batch import Parts, new_store
from ._checks import check_schedule, read_task_weights
from ._members import Layout
from ._numbers import on_device
from ._processes import ALONE
from ._state import empty, fits, new_averages, set_weights
from ._state_dict import FROZEN, REACHED, SHARED, Saved, check_fits, merge, split


def saved_state(parts: Parts, base_optim: Optimizer) -> dict[str, Any]:
    """The wrapped optimizer's state dict with the method's part beside its entries.

    Averages are views of the rows, as torch's own entries are.
    """
    state, members = parts.state, parts.members
    layout = parts.layout(base_optim)
    known, tasks = state.averages, state.expected
    ranks = ALONE if known is None and tasks is None else parts.processes.over(layout)
    if known is None and tasks is not None:
        # Zeros, into which torch.distributed.checkpoint.load can put what was saved.
        known = new_averages(tasks, False, new_store(parts, layout, ranks, len(tasks)), list(layout.averaged), None)
    places = {parameter: position for position, parameter in enumerate(layout.parameters)}
    averages: dict[int, list[Tensor]] = {}
    if known is not None and known.store.keeps_rows:
        for parameter, rows in zip(known.rows, known.store.averages(), strict=True):
            averages[places[parameter]] = [ranks.wrap(row, parameter) for row in rows]
    trained, counted = set(layout.shared), state.averages
    if known is not None and known.store.keeps_rows:
        # What has thawed since the last batch has no averages yet.
        trained -= set(layout.averaged) - set(known.rows)
    header = {
        "tasks": state.tasks,
        "named": state.named,
        "counts": [] if counted is None else counted.counts.tolist(),
        "batches": 0 if counted is None else int(counted.batches),
        "ages": [] if counted is None else counted.ages,
        "beta": state.beta,
        "beta_decay": state.beta_decay,
        "task_weights": state.task_weights,
    }
    roles = {}
    for position in members.positions():
        parameter = layout.parameters[position]
        roles[position] = FROZEN if parameter not in trained else REACHED if parameter in state.reached else SHARED
    return merge(base_optim.state_dict(), Saved(header, roles, averages), len(layout.parameters))


def load_state(parts: Parts, base_optim: Optimizer, state_dict: dict[str, Any]) -> None:
    """Go on from a saved state; nothing changes if it does not fit."""
    state, members = parts.state, parts.members
    layout = parts.layout(base_optim)
    base, saved = split(state_dict, members.positions(), members.positions(measured=True))
    if saved is None:
        base_optim.load_state_dict(base)
        start_anew(parts, layout)
        return
    check_fits(saved, state, layout.parameters)
    header = saved.header
    check_schedule(header["beta"], header["beta_decay"])
    base_optim.load_state_dict(base)
    members.keep(saved.averages)
    layout = parts.layout(base_optim)
    ranks = parts.processes.over(layout) if saved.averages else ALONE
    own = {
        layout.parameters[position]: [ranks.own(row, layout.parameters[position]) for row in rows]
        for position, rows in saved.averages.items()
    }
    parts.pending.clear()
    parts.pending.balance, parts.pending.loaded = None, True
    state.beta, state.beta_decay = float(header["beta"]), float(header["beta_decay"])
    state.task_weights = header["task_weights"] or state.task_weights
    state.reached.clear()
    state.reached.update(layout.parameters[position] for position, role in saved.roles.items() if role == REACHED)
    if header["tasks"] is None or not header["counts"]:
        start_anew(parts, layout)
    else:
        _fill(parts, saved, layout, own)


def _fill(parts: Parts, saved: Saved, layout: Layout, rows: dict[Tensor, list[Tensor]]) -> None:
    """Write a checkpoint's numbers into the averages that are there, so that a captured graph goes on, or new ones."""
    state, header = parts.state, saved.header
    known = state.kept
    tasks: tuple[str, ...] = header["tasks"]
    alike = known is not None and (len(known.tasks), known.store.keeps_rows) == (len(tasks), bool(saved.averages))
    if known is None or not alike or not fits(known, layout.averaged):
        store = new_store(parts, layout, parts.processes.over(layout), len(tasks))
        known = new_averages(tasks, False, store, list(layout.averaged), None)
    state.averages, state.emptied = known, None
    known.tasks, known.named = tasks, bool(header["named"])
    known.counts.copy_(torch.tensor(header["counts"], device=known.counts.device))
    known.batches.fill_(header["batches"])
    known.ages[:] = header["ages"]
    set_weights(known, parts.state.task_weights)
    if known.store.keeps_rows:
        missing: list[None] = [None] * len(tasks)
        known.store.load_averages([rows.get(parameter) or missing for parameter in known.rows])
        if parts.members.joint:
            # Norms belong to the averages, so a checkpoint need not hold them.
            known.norms.copy_(known.store.row_norms())


def start_anew(parts: Parts, layout: Layout) -> None:
    """Forget averages, counts, names that the constructor did not fix, and micro-batches."""
    state = parts.state
    parts.pending.clear()
    parts.pending.balance = None
    known = state.emptied if state.averages is None else (state.averages, set(state.reached))
    state.averages = state.emptied = None
    state.reached.clear()
    # Only a GPU has graphs that may still write there.
    if known is not None and on_device(known[0].store.device) and fits(known[0], layout.averaged):
        empty(known[0])
        state.emptied = known


def reset(parts: Parts, base_optim: Optimizer) -> None:
    """Forget, and take the shared parameters as they are now."""
    parts.members.start_anew(base_optim)
    start_anew(parts, parts.layout(base_optim))


def change_weights(parts: Parts, task_weights: Any) -> None:
    """Set the priorities of the tasks.

    Raises:
        TypeError, ValueError: not one number >= 0 for each task.
    """
    state, tasks = parts.state, parts.state.tasks
    names, weights = read_task_weights(task_weights)
    if tasks is None:
        state.names = names
    elif names is not None:
        if not state.named or set(names) != set(tasks):
            raise ValueError(f"task_weights must be of the tasks {list(tasks)}, got {list(names)}")
        by_name = dict(zip(names, weights or (), strict=True))
        weights = [by_name[name] for name in tasks]
    elif weights is not None and len(weights) != len(tasks):
        raise ValueError(f"task_weights must have {len(tasks)} entries, one a task, got {len(weights)}")
    state.task_weights = weights
    known = state.kept
    if known is not None and (weights is None or len(weights) == len(known.tasks)):
        set_weights(known, weights)
