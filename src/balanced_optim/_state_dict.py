"""The form of a state dict: the base optimizer's, with the averages beside its entries and a header of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._state import State, warn

VERSION = 3
KEY = "balanced_optim"
_BASE = "base_optim"
_EMA = "task_ema_"
_ROLE = "task_role"
# What `task_role` says of a parameter. Text, on purpose: torch.distributed.checkpoint's flattened form of a state dict
# would lose the averages without a word, and it refuses text.
HEAD, SHARED, REACHED, FROZEN = "head", "shared", "reached", "frozen"
_FIELDS = ("tasks", "named", "counts", "beta", "beta_decay", "ages")


@dataclass(frozen=True, slots=True)
class Saved:
    """The method's part of a state dict.

    Attributes:
        header: the numbers: `tasks`, `named`, `counts`, `batches`, `ages`, `beta`, `beta_decay`, `task_weights`.
        roles: what is said of each shared parameter, by its position in the wrapped optimizer.
        averages: for each averaged parameter's position T averages shaped like it.
    """

    header: dict[str, Any]
    roles: dict[int, str]
    averages: dict[int, list[Tensor]]


def merge(base: Any, method: Saved, number: int) -> dict[str, Any]:
    """A new state dict with the method's state added to the base optimizer's, which has `number` parameters.

    Every parameter gets an entry, heads too: torch.distributed.checkpoint refuses a state dict in which
    some parameters have state and others have none. A base with a form of its own is kept whole, under a key.
    """
    if not _is_usual(base, number):
        base = {"state": {}, "param_groups": [{"params": list(range(number))}], _BASE: base}
    state = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in base["state"].items()}
    keys = _keys_of(base)
    for position, key in enumerate(keys):
        state.setdefault(key, {})[_ROLE] = method.roles.get(position, HEAD)
    for position, rows in method.averages.items():
        # One entry a task, shaped like the parameter: what shards or reshapes the parameter can do it here too.
        state[keys[position]].update({f"{_EMA}{task}": row for task, row in enumerate(rows)})
    groups = [dict(group) for group in base["param_groups"]]
    # One value, not a nest of them: what loads value by value into the state dict of a fresh optimizer finds its place.
    groups[0][KEY] = json.dumps({"version": VERSION} | method.header)
    return {**base, "state": state, "param_groups": groups}


def _is_usual(base: Any, number: int) -> bool:
    """Whether a base's state dict has torch's form, with all its parameters and a dictionary for each."""
    groups = base.get("param_groups") if isinstance(base, dict) and isinstance(base.get("state"), dict) else None
    if not groups or not all("params" in group for group in groups):
        return False
    keys = _keys_of(base)
    return len(keys) == number and all(isinstance(base["state"].get(key, {}), dict) for key in keys)


def _keys_of(state_dict: Mapping[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def split(saved: dict[str, Any], shared: Sequence[int], averaged: Sequence[int]) -> tuple[Any, Saved | None]:
    """The base optimizer's part of a state dict and the method's; None for a plain base checkpoint.

    Args:
        saved: the state dict.
        shared: positions of the shared parameters in the wrapped optimizer.
        averaged: positions of those that may have averages.

    Raises:
        ValueError: the method's part has an unknown version, lacks a field, or is of other parameters.
    """
    found = [group[KEY] for group in saved.get("param_groups", ()) if KEY in group]
    if not found:
        return saved, None
    header = _read_header(found[0])
    entries = [saved["state"].get(key, {}) for key in _keys_of(saved)]
    roles = {position: entry[_ROLE] for position, entry in enumerate(entries) if entry.get(_ROLE, HEAD) != HEAD}
    if roles.keys() != set(shared):
        raise ValueError(
            f"state dict must be of the same shared_params, got {len(roles)} shared of "
            f"{len(entries)} parameters, here {len(shared)}; give the shared_params and param groups that were saved"
        )
    names = [f"{_EMA}{task}" for task in range(len(header["tasks"] or ()))]
    kept = {position for position, entry in enumerate(entries) if names and all(name in entry for name in names)}
    some = {position for position, entry in enumerate(entries) if any(name in entry for name in names)}
    wanted = {position for position in averaged if roles[position] != FROZEN}
    lacking = (kept or header["beta"] > 0) and not wanted <= kept
    if names and (kept != some or not kept <= set(averaged) or lacking):
        raise ValueError(
            f"state dict must hold {_EMA}0 to {names[-1]} for the {len(wanted)} parameters that are "
            f"averaged here, got all of them for {len(kept)} and some for {len(some)}; give the norm_params and "
            "max_weight that were saved; for torch.distributed.checkpoint.load also task_weights, by which a fresh "
            "optimizer knows its tasks and makes room for their averages"
        )
    averages = {position: [entries[position][name] for name in names] for position in sorted(kept)}
    return _without_ours(saved), Saved(header, roles, averages)


def _without_ours(saved: dict[str, Any]) -> Any:
    if _BASE in saved:
        return saved[_BASE]
    groups = [{name: value for name, value in group.items() if name != KEY} for group in saved["param_groups"]]
    state = {
        key: {name: v for name, v in entry.items() if not _is_ours(name)} if isinstance(entry, dict) else entry
        for key, entry in saved["state"].items()
    }
    return {**saved, "state": {key: entry for key, entry in state.items() if entry != {}}, "param_groups": groups}


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and (name == _ROLE or name.startswith(_EMA))


def _read_header(text: object) -> dict[str, Any]:
    """The method's numbers as they were saved, checked."""
    try:
        header = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        header = None
    header = header if isinstance(header, dict) else {}
    version = header.get("version")
    if version not in (2, VERSION):
        raise ValueError(
            f"state dict must be of {KEY} version 2 or {VERSION}, got version {version!r}; "
            "load it with the release that wrote it"
        )
    if missing := set(_FIELDS) - header.keys():
        raise ValueError(f"state dict must hold {sorted(missing)} under {KEY!r}, got only {sorted(header)}")
    for name in ("counts", "ages"):
        numbers = header[name]
        if not isinstance(numbers, list) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"state dict must hold {name} that are whole numbers >= 0, got {numbers!r}")
    if header.get("aggregator"):
        warn(
            "the state dict holds what an aggregator remembered under version 0.1, which is ignored: save and load a "
            "stateful aggregator beside the optimizer, as you do with a scaler"
        )
    header["tasks"] = None if header["tasks"] is None else tuple(header["tasks"])
    # What version 2 does not hold.
    return {"batches": max(header["counts"], default=0), "task_weights": None} | header


def check_fits(saved: Saved, state: State, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError where a checkpoint belongs to other tasks or other shapes."""
    theirs, named = saved.header["tasks"], bool(saved.header["named"])
    if theirs is None or not saved.header["counts"]:
        return
    tasks = state.expected
    if tasks is not None and len(tasks) != len(theirs):
        raise ValueError(
            f"state dict must be of {len(tasks)} tasks {list(tasks)}, got {len(theirs)} tasks {list(theirs)}; "
            "load it into an optimizer that has not seen other losses or task_weights, or call reset_averages() first"
        )
    if state.tasks is not None and (state.named != named or (named and tasks != theirs)):
        raise ValueError(
            f"state dict must be of the tasks {list(state.tasks)}, got the tasks {list(theirs)}; "
            "averages belong to names: use the names that were saved"
        )
    for name in ("counts", "ages"):
        if len(saved.header[name]) != len(theirs):
            raise ValueError(f"state dict must hold {len(theirs)} {name}, one a task, got {len(saved.header[name])}")
    for position, rows in saved.averages.items():
        for task, row in enumerate(rows):
            if row.shape != parameters[position].shape:
                raise ValueError(
                    f"{_EMA}{task} of averaged parameter {position} must have shape "
                    f"{tuple(parameters[position].shape)}, got {tuple(row.shape)}; the checkpoint is of another "
                    "network or another list of shared_params"
                )
