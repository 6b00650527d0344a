"""Training one network by one method, and the scores and curves that come out of it.

The protocol is the same for all methods: validation data are looked at `CHECKS` times, and the network is scored as it
was when they liked it best.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.problem import Batch, MultiTaskModel, Problem, Task
from benchmarks.study.methods import METHODS, SINGLE_TASK, TUNED_WEIGHTS
from benchmarks.study.metrics import best_scores, mean_gain
from benchmarks.study.probe import Probe, Window
from benchmarks.study.schedules import Schedule
from benchmarks.study.steps import BuildStep, Plan, StepReport, fixed_weights, summed_loss

ROWS_AT_ONCE = 128
"""Rows of a set that a network scores in one go, where rows can be told apart."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
"""The base optimizers by name; each takes the parameters and `lr`."""

CHECKS = 20
"""How often a training looks at validation data, evenly spread; the last time after the last step."""

CANDIDATES = 8
"""Weights that the search for fixed weights tries; the first are all 1."""

CANDIDATE_SHARE = 4
"""A candidate is trained for one over this many of the steps."""

WEIGHT_RANGE = 100.0
"""Before they are normalised, weights of candidates are log-uniform between 1 and this."""


@dataclass(frozen=True)
class Training:
    """How a network is trained, whatever the method.

    Attributes:
        steps: Number of optimizer steps, at least 1.
        learning_rate: The base optimizer's, at its largest.
        seed: Fixes the initial weights.
        optimizer: The base optimizer, a name of `OPTIMIZERS`.
        schedule: What becomes of the learning rate, a name of `schedules.SCHEDULES`.
        architecture: The network, a name that the problem's `build_model` takes.
        device: Where it is trained.
        probe: Whether gradients are measured on the way, outside the time that is taken.
    """

    steps: int
    learning_rate: float
    seed: int
    optimizer: str = "adam"
    schedule: str = "cosine"
    architecture: str = "hard"
    device: torch.device = torch.device("cpu")
    probe: bool = False


@dataclass(frozen=True)
class Curves:
    """What happened at every step; columns follow the order of the tasks.

    Attributes:
        losses: Raw training losses, shape (steps, T).
        norms: Gradient norms that weights come from, shape (steps, T); None where a method has none.
        weights: Task weights, shape (steps, T); None for a plain sum.
    """

    losses: Tensor
    norms: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True)
class Run:
    """The outcome of one method with one seed.

    Attributes:
        scores: Metrics on the test set by task name and metric name, of the step that validation data chose.
        validation: Those on the validation set, of the same step.
        scored_step: That step, counted from 1; 0 where several networks were trained.
        curves: What happened on the way, if anything was recorded.
        windows: Measured gradients, empty without a probe.
        cosines: Cosines between the averaged task gradients after the last step, shape (T, T), where there are any.
        seconds: Median time of a step, forward pass included, of the process on a CPU; 0 for several networks.
        tuned: Weights that a search found, by task name.
    """

    scores: dict[str, dict[str, float]]
    validation: dict[str, dict[str, float]]
    scored_step: int = 0
    curves: Curves | None = None
    windows: tuple[Window, ...] = ()
    cosines: Tensor | None = None
    seconds: float = 0.0
    tuned: dict[str, float] | None = None


class _Recorder:
    """Curves of a training of so many steps, in tensors made once: records kept step by step would scatter memory."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done = steps, 0
        self._curves: dict[str, Tensor] = {}
        self.seconds: list[float] = []

    def add(self, losses: Iterable[Tensor], report: StepReport, seconds: float) -> None:
        self.seconds.append(seconds)
        values = torch.stack([loss.detach() for loss in losses])
        for name, row in (("losses", values), ("norms", report.norms), ("weights", report.weights)):
            if row is not None:
                self._curves.setdefault(name, row.new_full((self._steps, len(row)), math.nan))[self._done] = row
        self._done += 1

    def curves(self) -> Curves:
        found = {name: curve[: self._done].cpu() for name, curve in self._curves.items()}
        return Curves(found["losses"], found.get("norms"), found.get("weights"))


@dataclass(frozen=True)
class Check:
    """A look at validation data.

    Attributes:
        step: After which step, counted from 1.
        validation: The metrics.
        state: The network's state dict, a copy.
    """

    step: int
    validation: dict[str, dict[str, float]]
    state: Mapping[str, Any]


def check_steps(steps: int) -> list[int]:
    """Return the steps after which a training looks at validation data, counted from 1."""
    checks = min(CHECKS, steps)
    return [steps * (check + 1) // checks for check in range(checks)]


def best_check(checks: Sequence[Check], tasks: Iterable[Task]) -> Check:
    """Return the check with the best validation metrics: the largest mean gain over the best of each that any had."""
    tasks = tuple(tasks)
    reference = best_scores([check.validation for check in checks], tasks)
    return max(checks, key=lambda check: mean_gain(check.validation, reference, tasks))


def train(problem: Problem, build_step: BuildStep, tasks: Iterable[Task], training: Training) -> Run:
    """Train a fresh network and score it as it was when validation data liked it best.

    Args:
        problem: The data and the architecture.
        build_step: The method.
        tasks: The tasks to train; the heads of the others stay as they were initialised.
        training: How.
    """
    tasks = tuple(tasks)
    judged = [task for task in tasks if task.metrics]
    torch.manual_seed(training.seed)
    model = problem.build_model(training.architecture).to(training.device)
    base_optim = OPTIMIZERS[training.optimizer](model.parameters(), lr=training.learning_rate)
    step = build_step(base_optim, model, Plan(tasks, training.steps))
    # After the method, which may have added parameters of its own.
    schedule = Schedule(training.schedule, base_optim, training.steps)
    recorder, probe, checks = _Recorder(training.steps), Probe(training.steps), list[Check]()
    report, moments = StepReport(), {*check_steps(training.steps)}
    for number, batch in enumerate(islice(problem.train_batches(), training.steps), start=1):
        compute_losses = partial(_losses, model, batch.to(training.device), tasks)
        start = _now(training.device)
        losses = compute_losses()
        seconds = _now(training.device) - start
        if training.probe:
            probe.look(number, list(losses.values()), model.norm_parameters())
        start = _now(training.device)
        report = step(losses, torch.no_grad()(compute_losses))
        recorder.add(losses.values(), report, seconds + _now(training.device) - start)
        schedule.after_step()
        if number in moments:
            validation = evaluate(model, problem.validation, judged, training.device)
            checks.append(Check(number, validation, deepcopy(model.state_dict())))
            schedule.after_check(mean_gain(validation, checks[0].validation, judged))
    best = best_check(checks, judged)
    model.load_state_dict(best.state)
    return Run(
        scores=evaluate(model, problem.test, judged, training.device),
        validation=best.validation,
        scored_step=best.step,
        curves=recorder.curves(),
        windows=tuple(probe.windows),
        cosines=None if report.cosines is None else report.cosines().cpu(),
        seconds=median(recorder.seconds),
    )


def _losses(model: MultiTaskModel, batch: Batch, tasks: tuple[Task, ...]) -> dict[str, Tensor]:
    outputs = model(batch.inputs, [task.name for task in tasks])
    return {task.name: task.loss(outputs[task.name], batch.targets[task.name]) for task in tasks}


def _now(device: torch.device) -> float:
    """Return seconds: of this process alone on a CPU, so that what else runs there does not count."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def evaluate(
    model: MultiTaskModel, batch: Batch, tasks: Iterable[Task], device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the tasks' metrics on a whole set by task name and metric name.

    Raises:
        RuntimeError: A metric is not finite, so the training has diverged.
    """
    model.eval()
    scores: dict[str, dict[str, float]] = {}
    tasks = tuple(tasks)
    outputs = _predict(model, batch.inputs, [task.name for task in tasks], device)
    for task in tasks:
        target = batch.targets[task.name].to(device)
        scores[task.name] = {
            metric.name: float(metric.score(outputs[task.name], target).item()) for metric in task.metrics
        }
        for name, score in scores[task.name].items():
            if not math.isfinite(score):
                raise RuntimeError(f"{name} of {task.name!r} must be finite, got {score}: the training diverged")
    model.train()
    return scores


def _predict(
    model: MultiTaskModel, inputs: Tensor | Mapping[str, Tensor], names: list[str], device: torch.device
) -> dict[str, Tensor]:
    """Return outputs for all rows, by parts where rows are independent: not where a mapping makes up one input."""
    if isinstance(inputs, Tensor):
        parts = [model(part.to(device), names) for part in inputs.split(ROWS_AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in names}
    if set(names) <= set(inputs):
        return {
            name: torch.cat([model({name: part.to(device)}, [name])[name] for part in inputs[name].split(ROWS_AT_ONCE)])
            for name in names
        }
    moved = {name: part.to(device) for name, part in inputs.items()}
    outputs: dict[str, Tensor] = model(moved, names)
    return outputs


def run_method(name: str, problem: Problem, training: Training) -> Run:
    """Train by the named method.

    Args:
        name: A name of `METHODS`; `TUNED_WEIGHTS`; `SINGLE_TASK` for one network per task, or one of
            `single_task_name` for that task's alone.
        problem: The data and the architecture.
        training: How.
    """
    if name == SINGLE_TASK:
        singles = [run_method(method, problem, training) for method in single_task_names(problem.tasks)]
        scores = {task: metrics for run in singles for task, metrics in run.scores.items()}
        return Run(scores, {task: metrics for run in singles for task, metrics in run.validation.items()})
    for task in problem.tasks:
        if name == single_task_name(task):
            return train(problem, summed_loss, [task], training)
    if name == TUNED_WEIGHTS:
        return _train_with_tuned_weights(problem, training)
    return train(problem, METHODS[name], problem.tasks, training)


def single_task_name(task: Task) -> str:
    """Return the name of the method that trains this task alone."""
    return f"{SINGLE_TASK}-{task.name}"


def single_task_names(tasks: Iterable[Task]) -> list[str]:
    """Return the names of the single-task models: one for each task that is judged."""
    return [single_task_name(task) for task in tasks if task.metrics]


def weight_candidates(tasks: int, seed: int) -> Tensor:
    """Return the weights that the search tries, shape (CANDIDATES, tasks): equal ones first, each row's sum T."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(CANDIDATES, tasks, generator=generator)
    exponents[0] = 0.0
    weights = WEIGHT_RANGE**exponents
    return tasks * weights / weights.sum(dim=1, keepdim=True)


def _train_with_tuned_weights(problem: Problem, training: Training) -> Run:
    """Try every candidate in a shorter training, and train with the one whose validation metrics are best.

    Best is the largest mean gain on validation data over the best value of each metric that any candidate reached. The
    search costs `CANDIDATES` / `CANDIDATE_SHARE` times the steps of the training itself.
    """
    short = replace(training, steps=max(1, training.steps // CANDIDATE_SHARE), probe=False)
    found: list[tuple[Tensor, dict[str, dict[str, float]]]] = []
    for weights in weight_candidates(len(problem.tasks), training.seed):
        # A candidate that diverges is not the one.
        with suppress(RuntimeError):
            run = train(problem, partial(fixed_weights, weights=weights), problem.tasks, short)
            found.append((weights, run.validation))
    if not found:
        raise RuntimeError("none of the fixed weights that were tried gave finite metrics")
    reference = best_scores([scores for _, scores in found], problem.tasks)
    best, _ = max(found, key=lambda candidate: mean_gain(candidate[1], reference, problem.tasks))
    run = train(problem, partial(fixed_weights, weights=best), problem.tasks, training)
    names = [task.name for task in problem.tasks]
    return replace(run, tuned=dict(zip(names, best.tolist(), strict=True)))


def networks(name: str, tasks: int) -> int:
    """Return how many trainings of full length the named method amounts to."""
    if name == SINGLE_TASK:
        return tasks
    return 1 + CANDIDATES // CANDIDATE_SHARE if name == TUNED_WEIGHTS else 1
