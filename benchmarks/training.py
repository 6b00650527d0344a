"""Training one network by one method, and the scores and curves that come out of it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from benchmarks.methods import METHODS, SINGLE_TASK, BuildStep, summed_loss
from benchmarks.problem import MultiTaskNet, Problem, Task


@dataclass(frozen=True)
class Curves:
    """What happened at every step; columns follow the order of the tasks.

    Attributes:
        losses: Raw training losses, shape (steps, T).
        norms: Gradient norms on the shared parameters, shape (steps, T); None for a plain sum.
        weights: Task weights, shape (steps, T); None for a plain sum.
    """

    losses: Tensor
    norms: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True)
class Run:
    """The outcome of one method with one seed: metrics by task name, and curves if it has any."""

    scores: dict[str, float]
    curves: Curves | None = None


@dataclass
class _Recorder:
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def curves(self) -> Curves:
        return Curves(torch.stack(self.losses), _stack(self.norms), _stack(self.weights))


def _stack(rows: list[Tensor]) -> Tensor | None:
    return torch.stack(rows) if rows else None


def train(
    problem: Problem,
    build_step: BuildStep,
    tasks: Iterable[Task],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[], None],
) -> Run:
    """Train a fresh network with Adam and score it once, on the test set, after the last step.

    Args:
        problem: The data and the architecture.
        build_step: The method.
        tasks: The tasks to train; the heads of the others stay as they were initialised.
        steps: Number of optimizer steps, at least 1.
        learning_rate: Adam's, constant.
        seed: Fixes the initial weights.
        on_step: Called after every step, for progress.
    """
    tasks = tuple(tasks)
    names = [task.name for task in tasks]
    torch.manual_seed(seed)
    model = problem.build_model()
    step = build_step(torch.optim.Adam(model.parameters(), lr=learning_rate), model)
    recorder = _Recorder()
    for batch in islice(problem.train_batches(), steps):
        outputs = model(batch.inputs, names)
        losses = {task.name: task.loss(outputs[task.name], batch.targets[task.name]) for task in tasks}
        balance = step(losses)
        recorder.losses.append(torch.stack([losses[name].detach() for name in names]))
        if balance is not None:
            recorder.norms.append(balance.norms)
            recorder.weights.append(balance.weights)
        on_step()
    return Run(evaluate(model, problem, tasks), recorder.curves())


@torch.no_grad()
def evaluate(model: MultiTaskNet, problem: Problem, tasks: Iterable[Task]) -> dict[str, float]:
    """Return each task's metric on the whole test set, by task name.

    Raises:
        RuntimeError: A metric is not finite, so the training has diverged.
    """
    model.eval()
    targets = problem.test.targets
    tasks = tuple(tasks)
    outputs = model(problem.test.inputs, [task.name for task in tasks])
    scores = {task.name: task.score(outputs[task.name], targets[task.name]).item() for task in tasks}
    for name, score in scores.items():
        if not math.isfinite(score):
            raise RuntimeError(f"the test metric of {name!r} must be finite, got {score}: the training diverged")
    return scores


def run_method(
    name: str,
    problem: Problem,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[], None],
) -> Run:
    """Train by the named method: one network for all tasks, or one per task for single-task."""

    def run(build_step: BuildStep, tasks: Iterable[Task]) -> Run:
        return train(
            problem,
            build_step,
            tasks,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            on_step=on_step,
        )

    if name != SINGLE_TASK:
        return run(METHODS[name], problem.tasks)
    scores: dict[str, float] = {}
    for task in problem.tasks:
        scores |= run(summed_loss, [task]).scores
    return Run(scores)
