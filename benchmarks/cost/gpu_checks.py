"""What a GPU shows beside times: bandwidth of the store's kernels, and whether a captured step is the eager one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost.contestants import WARM_UP, Build, balanced_capturable, captured, plain_sum
from benchmarks.cost.timing import quartile
from benchmarks.cost.trunks import build

MEASURED = 9
"""Timings of each kernel; the lower quartile counts."""
AHEAD = 20
"""Copies that keep the device busy while the host enqueues what is measured."""
PARAMETERS = 10
"""Tensors that the shared scalars are split into."""

# --------------------------------------------------- captured against eager


@dataclass(frozen=True)
class Equality:
    """Parameters after as many steps, captured and eager.

    Attributes:
        trunk, tasks, form, steps: what was compared.
        equal: whether all are the same bit for bit.
        largest_difference: over all parameters.
    """

    trunk: str
    tasks: int
    form: str
    steps: int
    equal: bool
    largest_difference: float


def captured_equals_eager(trunk: str, tasks: int, replays: int, device: torch.device) -> list[Equality]:
    """Compare the exact form and the plain sum; the capture itself takes no step."""
    forms: dict[str, Build] = {"exact": balanced_capturable, "plain_sum": partial(plain_sum, capturable=True)}
    return [
        compare(name, form, captured(form), (WARM_UP + replays, replays), (trunk, tasks, device))
        for name, form in forms.items()
    ]


def compare(
    name: str, one: Build, other: Build, steps: tuple[int, int], where: tuple[str, int, torch.device]
) -> Equality:
    """Train from the same weights so many steps each, and compare the weights."""
    trunk, tasks, _ = where
    weights = [train(make, count, where) for make, count in zip((one, other), steps, strict=True)]
    differences = [(a - b).abs().max().item() for a, b in zip(*weights, strict=True)]
    equal = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return Equality(trunk, tasks, name, steps[0], equal, max(differences))


def train(make: Build, steps: int, where: tuple[str, int, torch.device]) -> list[Tensor]:
    """All parameters after so many steps."""
    model, x, labels = build(*where)
    step = make(model, x, labels)
    for _ in range(steps):
        step()
    return [parameter.detach().clone() for parameter in model.parameters()]


# --------------------------------------------------- bandwidth


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of one kernel.

    Attributes:
        kernel: "copy" (from device to device), "average" or "sum".
        store: the class that was measured.
        scalars, tasks: n and T.
        gigabytes: that a second moves, reads and writes that the kernel cannot do without.
        to_copy: the same over the copy's.
    """

    kernel: str
    store: str
    scalars: int
    tasks: int
    gigabytes: float
    to_copy: float


def find_store(device: torch.device) -> Any:
    """The store of the averages on such a device.

    Raises:
        ImportError: this version has none of that form, or Triton is missing.
    """
    if device.type == "cuda":
        return import_module("balanced_optim._cuda_store").DeviceRows
    return import_module("balanced_optim._store").FlatGradientBuffer


def measure_bandwidth(device: torch.device, scalars: int, tasks: int = 3) -> list[Bandwidth]:
    """A copy, the averages of T tasks and their weighted sum over `scalars` float32 each.

    Raises:
        ImportError: no store to measure.
    """
    store = find_store(device)
    parameters = [torch.zeros(scalars // PARAMETERS, device=device) for _ in range(PARAMETERS)]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    rows = store(parameters, tasks)
    source, target = torch.randn(scalars, device=device), torch.empty(scalars, device=device)
    weights = torch.ones(tasks, dtype=rows.norm_dtype, device=device)
    # Bytes a scalar: a copy reads and writes; an average reads g and the old row and writes the new one; the sum
    # reads T rows and writes one.
    copy = partial(target.copy_, source)
    kernels: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (copy, 8),
        "average": (partial(take_in, rows, gradients, terms_of(tasks, device)), 12 * tasks),
        "sum": (partial(rows.combine, weights), 4 * (tasks + 1)),
    }
    found = {}
    for name, (run, size) in kernels.items():
        run()
        seconds = quartile([device_seconds(run, device, copy) for _ in range(MEASURED)], 0.25)
        found[name] = size * scalars / seconds / 1e9
    return [
        Bandwidth(name, type(rows).__name__, scalars, tasks, round(speed, 2), round(speed / found["copy"], 4))
        for name, speed in found.items()
    ]


def take_in(rows: Any, gradients: Sequence[Tensor], terms: Any) -> None:
    """One batch's averages, through the calls that a step makes."""
    one = import_module("balanced_optim._passes").Pass
    rows.start(terms)
    for task in range(len(terms.usable)):
        rows.add(one(task, gradients, {}))


def terms_of(tasks: int, device: torch.device) -> Any:
    """What an average is made with in the middle of a training."""
    terms = import_module("balanced_optim._rule").Terms
    numbers: dict[str, list[Any]] = {
        "keep": [0.9] * tasks,
        "gain": [0.1] * tasks,
        "usable": [True] * tasks,
        "factors": [1.0] * tasks,
    }
    if device.type == "cpu":
        return terms(**numbers, power=1.0, refuses=False)
    tensors = {
        name: torch.tensor(values, device=device, dtype=torch.bool if name == "usable" else torch.float64)
        for name, values in numbers.items()
    }
    return terms(**tensors, power=1.0, refuses=False)


def device_seconds(run: Callable[[], Any], device: torch.device, before: Callable[[], Any]) -> float:
    """Seconds that the device is busy with it; on a GPU it has `before` to do first, while the host runs ahead."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for _ in range(AHEAD):
        before()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
