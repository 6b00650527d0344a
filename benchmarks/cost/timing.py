"""How long a step takes: contestants take turns within one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.cost.contestants import CONTESTANTS, Step
from benchmarks.cost.trunks import build

LEAST_TURNS = 5


@dataclass(frozen=True)
class Cell:
    """Times of one contestant on one trunk with T tasks, as ratios within the run.

    Attributes:
        trunk, tasks, contestant: what was measured.
        to_floor, to_plain: lower quartile over that of the floor and of the plain sum.
        spread: upper over lower quartile of its own times.
        turns: how often it took its turn.
        milliseconds: the lower quartile itself on a GPU; None on a CPU, where only ratios mean something.
    """

    trunk: str
    tasks: int
    contestant: str
    to_floor: float
    to_plain: float
    spread: float
    turns: int
    milliseconds: float | None


def race(
    trunk: str, tasks: int, contestants: Iterable[str], seconds: float, device: torch.device
) -> tuple[list[Cell], dict[str, str]]:
    """Let the contestants take turns for `seconds`, at least five turns each.

    Args:
        trunk: what is trained.
        tasks: T.
        contestants: names, among them "floor" and "plain_sum".
        seconds: for all together, without the first steps.
        device: where.

    Returns:
        The times, and the errors of those who could not take a first step.
    """
    steps, failed = starters(trunk, tasks, contestants, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["floor"]) < LEAST_TURNS:
        for name, step in steps.items():
            times[name].append(seconds_of(step, device, CONTESTANTS[name].cycle))
    low = {name: quartile(values, 0.25) for name, values in times.items()}
    cells = [
        Cell(
            trunk,
            tasks,
            name,
            to_floor=round(low[name] / low["floor"], 4),
            to_plain=round(low[name] / low["plain_sum"], 4),
            spread=round(quartile(values, 0.75) / low[name], 4),
            turns=len(values),
            milliseconds=None if device.type == "cpu" else round(1000 * low[name], 4),
        )
        for name, values in times.items()
    ]
    return cells, failed


def starters(
    trunk: str, tasks: int, contestants: Iterable[str], device: torch.device
) -> tuple[dict[str, Step], dict[str, str]]:
    """Each contestant's step after its first turns, and the errors of those who could not take them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    steps, failed = {}, {}
    for name in contestants:
        try:
            step = CONTESTANTS[name].build(*build(trunk, tasks, device))
            for _ in range(2):
                seconds_of(step, device, CONTESTANTS[name].cycle)
        except Exception as error:
            # The others' figures are worth having, whatever one of them lacks: memory, a compiler, a capture.
            if name in ("floor", "plain_sum"):
                raise
            failed[name] = first_line(error)
        else:
            steps[name] = step
    return steps, failed


def first_line(error: Exception) -> str:
    """What went wrong, in a line; the end of a capture hides behind its own error the one that broke it."""
    said = f"{type(error).__name__}: {error}".split("\n")[0]
    before = error.__context__
    return f"{said} (after {first_line(before)})" if isinstance(before, Exception) else said


def seconds_of(step: Step, device: torch.device, cycle: int = 1) -> float:
    """Seconds of one step on average over a cycle, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(cycle):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / cycle


def quartile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))
