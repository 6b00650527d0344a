"""The state dict: the base optimizer's, with the averages beside its entries and the counts in a param group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

VERSION = 2
KEY = "balanced_optim"
_EMA = "task_ema_"
_ROLE = "task_role"
# What `task_role` says of a parameter. Text, on purpose: torch.distributed.checkpoint's flattened form of a state dict
# would lose the averages without a word, and it refuses text.
_HEAD, _SHARED, _REACHED = "head", "shared", "reached"


@dataclass(slots=True)
class MethodState:
    """Everything of the method that a checkpoint holds, apart from the base optimizer's state.

    Attributes:
        tasks: task names, None before the first step.
        named: whether losses come as a mapping.
        counts: k of every task.
        beta, beta_decay: the schedule.
        ages: for each task the steps since its norm was measured; 0 in the exact form.
        reached: for each shared parameter, whether a task ever reached it.
        averages: for each averaged parameter T averages shaped like it; none where it has none.
        memory: what the aggregator keeps between steps; empty without one.
    """

    tasks: tuple[str, ...] | None
    named: bool
    counts: list[int]
    beta: float
    beta_decay: float
    ages: list[int]
    reached: list[bool]
    averages: list[list[Tensor]]
    memory: dict[str, Any]


def merge(base: dict[str, Any], method: MethodState, shared: Sequence[int], averaged: Sequence[int]) -> dict[str, Any]:
    """A new state dict with the method's state added to the base optimizer's.

    Every parameter gets an entry, heads too: torch.distributed.checkpoint refuses a state dict in which
    some parameters have state and others have none.
    """
    state = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in base["state"].items()}
    keys = [key for group in base["param_groups"] for key in group["params"]]
    for key in keys:
        state.setdefault(key, {})[_ROLE] = _HEAD
    for position, reached in zip(shared, method.reached, strict=True):
        state[keys[position]][_ROLE] = _REACHED if reached else _SHARED
    for position, rows in zip(averaged, method.averages, strict=True):
        # One entry a task, shaped like the parameter: what shards or reshapes the parameter can do it here too.
        state[keys[position]].update({f"{_EMA}{task}": row for task, row in enumerate(rows)})
    groups = [dict(group) for group in base["param_groups"]]
    header = {
        "version": VERSION,
        "tasks": method.tasks,
        "named": method.named,
        "counts": method.counts,
        "beta": method.beta,
        "beta_decay": method.beta_decay,
        "ages": method.ages,
        "aggregator": method.memory,
    }
    # One value, not a nest of them: what loads value by value into the state dict of a fresh optimizer finds its place.
    groups[0][KEY] = json.dumps(header)
    return {**base, "state": state, "param_groups": groups}


def _read_header(text: object) -> dict[str, Any]:
    """The method's numbers as they were saved; empty where they are not what this library writes."""
    try:
        header = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        header = None
    return header if isinstance(header, dict) else {}


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and (name == _ROLE or name.startswith(_EMA))


def split(
    saved: dict[str, Any], shared: Sequence[int], averaged: Sequence[int]
) -> tuple[dict[str, Any], MethodState | None]:
    """The base optimizer's part of a state dict and the method's; None for a plain base checkpoint.

    Raises:
        ValueError: the method's part has an unknown version or lacks a field.
    """
    groups = [{name: value for name, value in group.items() if name != KEY} for group in saved["param_groups"]]
    found = [group[KEY] for group in saved["param_groups"] if KEY in group]
    keys = [key for group in groups for key in group["params"]]
    state = {
        key: {name: v for name, v in entry.items() if not _is_ours(name)} if isinstance(entry, dict) else entry
        for key, entry in saved["state"].items()
    }
    base = {**saved, "state": {key: entry for key, entry in state.items() if entry != {}}, "param_groups": groups}
    if not found:
        return base, None
    header = _read_header(found[0])
    version = header.get("version")
    if version != VERSION:
        raise ValueError(
            f"state dict must be of {KEY} version {VERSION}, got version {version!r}; "
            "load it with the release that wrote it"
        )
    missing = {"tasks", "named", "counts", "beta", "beta_decay", "ages"} - header.keys()
    if missing:
        raise ValueError(f"state dict must hold {sorted(missing)} under {KEY!r}, got only {sorted(header)}")
    entries = [saved["state"].get(key, {}) for key in keys]
    roles = [entry.get(_ROLE, _HEAD) for entry in entries]
    if {position for position, role in enumerate(roles) if role != _HEAD} != set(shared):
        raise ValueError(
            f"state dict must be of the same shared_params, got {sum(role != _HEAD for role in roles)} shared of "
            f"{len(roles)} parameters, here {len(shared)}; give the shared_params and param groups that were saved"
        )
    tasks = range(len(header["tasks"] or ()))
    kept = {position for position, entry in enumerate(entries) if all(f"{_EMA}{task}" in entry for task in tasks)}
    some = {position for position, entry in enumerate(entries) if any(f"{_EMA}{task}" in entry for task in tasks)}
    wanted = set(averaged)
    if tasks and (kept != some or (kept != wanted and (kept or float(header["beta"]) > 0))):
        raise ValueError(
            f"state dict must hold {_EMA}0 to {_EMA}{len(tasks) - 1} for the {len(wanted)} parameters that are "
            f"averaged here, got all of them for {len(kept)} and some for {len(some)}; give the norm_params and "
            "max_weight that were saved; for torch.distributed.checkpoint.load also task_weights, by which a fresh "
            "optimizer knows its tasks and makes room for their averages"
        )
    for field in ("counts", "ages"):
        numbers = header[field]
        if not isinstance(numbers, list) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"state dict must hold {field} that are whole numbers >= 0, got {numbers!r}")
    return base, MethodState(
        tasks=None if header["tasks"] is None else tuple(header["tasks"]),
        named=bool(header["named"]),
        counts=list(header["counts"]),
        beta=float(header["beta"]),
        beta_decay=float(header["beta_decay"]),
        ages=list(header["ages"]),
        reached=[roles[position] == _REACHED for position in shared],
        memory=dict(header.get("aggregator", {})),
        averages=[
            [entries[position][f"{_EMA}{task}"] for task in tasks] if position in kept and tasks else []
            for position in averaged
        ],
    )


def check_fits(
    loaded: MethodState, tasks: tuple[str, ...] | None, known: bool, named: bool, parameters: Sequence[Tensor]
) -> None:
    """Raise ValueError where a checkpoint belongs to other tasks or other shapes.

    Args:
        loaded: what the checkpoint holds.
        tasks: the task names here, or None; with `known` false only their number counts.
        known: whether the names are fixed.
        named: whether losses come as a mapping here.
        parameters: the averaged parameters.
    """
    if loaded.tasks is None or not loaded.counts:
        return
    number = len(loaded.tasks)
    if tasks is not None and len(tasks) != number:
        raise ValueError(
            f"state dict must be of {len(tasks)} tasks {list(tasks)}, got {number} tasks {list(loaded.tasks)}; "
            "load it into an optimizer that has not seen other losses or task_weights"
        )
    if known and tasks is not None and (named != loaded.named or (named and tasks != loaded.tasks)):
        raise ValueError(
            f"state dict must be of the tasks {list(tasks)}, got the tasks {list(loaded.tasks)}; "
            "averages belong to names: use the names that were saved"
        )
    for field, numbers in (("counts", loaded.counts), ("ages", loaded.ages)):
        if len(numbers) != number:
            raise ValueError(f"state dict must hold {number} {field}, one a task, got {len(numbers)}")
    for index, (average, parameter) in enumerate(zip(loaded.averages, parameters, strict=True)):
        for task, row in enumerate(average):
            if row.shape != parameter.shape:
                raise ValueError(
                    f"{_EMA}{task} of averaged parameter {index} must have shape {tuple(parameter.shape)}, got "
                    f"{tuple(row.shape)}; the checkpoint is of another network or another list of shared_params"
                )
