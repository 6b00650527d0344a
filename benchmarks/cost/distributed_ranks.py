"""What each rank of `benchmarks.distributed` does: train for equality, count bytes, take times."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from benchmarks.cost.distributed_costs import sent
from benchmarks.cost.distributed_steps import (
    BALANCED,
    COUNTED,
    DIGITS,
    FORMS,
    Batch,
    Job,
    Training,
    make_job,
    part_of,
    size_of,
)

INTERFACES = Path("/proc/net/dev")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        trunks: names, see `make_job`.
        tasks: T of trunks other than the main job.
        equal_steps: how many steps are compared with one process.
        windows: how often bytes are counted.
        window_steps: over how many steps.
        seconds: of turns for each trunk.
        threads: of the CPU, for each rank.
        backend: "gloo" or "nccl".
        timeout: seconds after which a rank gives up waiting for another.
    """

    trunks: tuple[str, ...]
    tasks: int
    equal_steps: int
    windows: int
    window_steps: int
    seconds: float
    threads: int
    backend: str
    timeout: float


@dataclass(frozen=True)
class Equality:
    """The largest relative differences from one process that trains on the whole batches, in float64.

    Attributes:
        ranks, form, steps: what was compared.
        parameters: over all parameters, each difference relative to the largest entry of its parameter.
        balance: over losses, norms and weights of the last `last_balance`.
    """

    ranks: int
    form: str
    steps: int
    parameters: float
    balance: float


@dataclass(frozen=True)
class Traffic:
    """Bytes sent for each rank and step.

    Attributes:
        ranks, trunk, tasks, form: what was measured.
        shared, heads: n and h.
        measured: the loopback's count, headers and acknowledgements included: the least of all windows less the
            least of windows without a step. None where the ranks do not share a loopback, or nothing counts on it.
        predicted: by `benchmarks.cost.distributed_costs`, without headers.
        disturbance: what else went over the loopback in the busiest window without a step, by `measured`.
    """

    ranks: int
    trunk: str
    tasks: int
    form: str
    shared: int
    heads: int
    measured: float | None
    predicted: float
    disturbance: float | None


@dataclass(frozen=True)
class Time:
    """Times of a step, those of the slowest rank in each turn, as ratios within the run.

    Attributes:
        ranks, trunk, tasks, form: what was measured.
        to_plain, to_floor: lower quartile over that of plain DistributedDataParallel, and of the floor.
        spread: upper over lower quartile of its own times.
        turns: how often it took its turn.
        milliseconds: the lower quartile itself on a GPU; None on a CPU, where only ratios mean something.
    """

    ranks: int
    trunk: str
    tasks: int
    form: str
    to_plain: float
    to_floor: float
    spread: float
    turns: int
    milliseconds: float | None


@dataclass(frozen=True)
class Measured:
    """All that R ranks found."""

    equality: list[Equality]
    traffic: list[Traffic]
    time: list[Time]


def measure(options: Options, **connection: Any) -> Measured | None:
    """Join the group, measure, leave it; None but on rank 0.

    Args:
        options: what is measured.
        connection: where the ranks meet, for `torch.distributed.init_process_group`.
    """
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    if options.backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(options.backend, timeout=timedelta(seconds=options.timeout), **connection)
    try:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        console = Console(quiet=rank > 0)
        console.print(f"{ranks} ranks: equality with one process", highlight=False)
        equality = compare(make_job(DIGITS, 0, ranks), options.equal_steps, device)
        traffic, times = [], []
        for name in options.trunks:
            console.print(f"{ranks} ranks: bytes and times of {name}", highlight=False)
            job = make_job(name, options.tasks, ranks)
            trainings = {form: Training(job, FORMS[form], device) for form in FORMS}
            batch = trainings["floor"].prepared(part_of(job.batch(0), rank, ranks))
            for training in trainings.values():
                training.step(batch)
                training.step(batch)
            traffic += count(name, job, trainings, batch, options)
            times += race(name, len(job.losses), trainings, batch, options.seconds, device)
    finally:
        dist.destroy_process_group()
    return Measured(equality, traffic, times) if rank == 0 else None


# --------------------------------------------------- equality


def compare(job: Job, steps: int, device: torch.device) -> list[Equality]:
    """Train every form over all ranks, and on rank 0 alone on the whole batches."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    result = []
    # Forms that differ only in what they send have one process in common.
    known: dict[str, Training] = {}
    for name in BALANCED:
        form = FORMS[name]
        together = Training(job, form, device, torch.float64, learning_rate=1e-3)
        for step in range(steps):
            together.step(together.prepared(part_of(job.batch(step), rank, ranks)))
        weights = together.weights()
        if rank == 0:
            alone = known.get(form.method)
            if alone is None:
                alone = known[form.method] = Training(job, form, device, torch.float64, alone=True, learning_rate=1e-3)
                with warnings.catch_warnings():
                    # One process within a group, without the group: on purpose here.
                    warnings.filterwarnings("ignore", ".*no process_group was given")
                    for step in range(steps):
                        alone.step(alone.prepared(job.batch(step)))
            difference = max(
                ((mine - other).abs().max() / other.abs().max()).item()
                for mine, other in zip(weights, alone.weights(), strict=True)
            )
            result.append(Equality(ranks, name, steps, difference, balance_difference(together, alone)))
        dist.barrier()
    return result


def balance_difference(one: Training, other: Training) -> float:
    """The largest relative difference between what two trainings saw and did last."""
    first, second = one.balance(), other.balance()
    return max((mine / theirs - 1).abs().max().item() for mine, theirs in zip(first, second, strict=True))


# --------------------------------------------------- bytes


def loopback_bytes() -> int | None:
    """What this machine has sent to itself so far; None where nobody counts it."""
    try:
        lines = INTERFACES.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return None


def count(name: str, job: Job, trainings: dict[str, Training], batch: Batch, options: Options) -> list[Traffic]:
    """Bytes of each form's step beside what the model says; empty but on rank 0."""
    ranks = dist.get_world_size()
    size = size_of(job, gloo=options.backend == "gloo")
    on_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) == ranks
    countable = options.backend == "gloo" and on_one_machine and loopback_bytes() is not None
    result = []
    for form in COUNTED:
        measured = disturbance = None
        if countable:
            measured, disturbance = bytes_of(lambda form=form: trainings[form].step(batch), options)  # type: ignore[misc]
        predicted = round(sent(form, size, ranks).bytes)
        record = Traffic(ranks, name, size.tasks, form, size.shared, size.heads, measured, predicted, disturbance)
        result.append(record)
    return result if dist.get_rank() == 0 else []


def bytes_of(step: Callable[[], None], options: Options) -> tuple[float, float]:
    """Bytes of a step for each rank, and the part of them that something else may have sent meanwhile."""
    busy, idle = [], []
    for _ in range(options.windows):
        start = time.perf_counter()
        busy.append(window(lambda: repeat(step, options.window_steps)))
        took = time.perf_counter() - start
        idle.append(window(lambda took=took: time.sleep(took)))  # type: ignore[misc]
    steps = options.window_steps * dist.get_world_size()
    measured = max(min(busy) - min(idle), 0) / steps
    return measured, round((max(idle) - min(idle)) / steps / max(measured, 1.0), 4)


def repeat(step: Callable[[], None], times: int) -> None:
    """Take the step several times."""
    for _ in range(times):
        step()


def window(run: Callable[[], None]) -> int:
    """The loopback's bytes while all ranks run something, with those of two barriers or so."""
    dist.barrier()
    before = loopback_bytes() or 0
    dist.barrier()
    run()
    dist.barrier()
    after = loopback_bytes() or 0
    dist.barrier()
    return after - before


# --------------------------------------------------- time


def race(
    name: str, tasks: int, trainings: dict[str, Training], batch: Batch, seconds: float, device: torch.device
) -> list[Time]:
    """Let all forms take turns for about `seconds`, at least five turns each; empty but on rank 0."""
    ranks = dist.get_world_size()
    start = time.perf_counter()
    for training in trainings.values():
        seconds_of(training, batch, device)
    turns = torch.tensor([seconds / (time.perf_counter() - start)], device=device)
    dist.broadcast(turns, 0)
    mine = [
        [seconds_of(training, batch, device) for training in trainings.values()]
        for _ in range(max(5, round(turns.item())))
    ]
    slowest = torch.tensor(mine, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    times = dict(zip(trainings, slowest.T.tolist(), strict=True))
    low = {form: quartile(values, 0.25) for form, values in times.items()}
    result = [
        Time(
            ranks,
            name,
            tasks,
            form,
            to_plain=round(low[form] / low["plain_ddp"], 4),
            to_floor=round(low[form] / low["floor"], 4),
            spread=round(quartile(values, 0.75) / low[form], 4),
            turns=len(values),
            milliseconds=None if device.type == "cpu" else round(1000 * low[form], 4),
        )
        for form, values in times.items()
    ]
    return result if dist.get_rank() == 0 else []


def seconds_of(training: Training, batch: Batch, device: torch.device) -> float:
    """Seconds of one step that all ranks begin together, the device's queue included."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    training.step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quartile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))
