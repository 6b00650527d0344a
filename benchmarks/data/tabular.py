"""Regression on tables that scikit-learn makes or ships: targets in their raw units, or z-scored.

- Made: Friedman's three functions (Friedman, 1991) with noise, a task each, as `sklearn.datasets.make_friedman1` to
  `make_friedman3` make them. The second is an impedance in ohms, the third a phase in radians: raw variances differ
  about 1e6-fold. Every seed has rows of its own.
- Shipped: scikit-learn's diabetes data (Efron et al., 2004), 442 patients. From age, sex, body mass index, blood
  pressure and glucose to four blood values and the progression of the disease a year later: real, noisy, and raw
  variances that differ about 4000-fold.

The metric is the root of the mean squared error; Delta_p takes relative gains, so its unit does not matter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, make_friedman1, make_friedman2, make_friedman3
from torch import Tensor, nn

from benchmarks.data.problem import Batch, DataSet, MakeProblem, Metric, MultiTaskNet, Problem, Task, only_hard_sharing

WIDTH = 64
MADE_ROWS = 3000
HELD_OUT = 0.2
"""Of the rows, for validation; as many for the test."""

FRIEDMAN_TASKS = ("friedman1", "friedman2", "friedman3")
NOISE = (1.0, 100.0, 0.1)
"""Standard deviations, in each target's own unit."""

DIABETES_INPUTS = ("age", "sex", "bmi", "bp", "s6")
DIABETES_TASKS = ("cholesterol", "ldl", "hdl", "cholesterol_ratio", "progression")
DIABETES_COLUMNS = ("s1", "s2", "s3", "s4")
"""The columns of the tasks but the last, which is scikit-learn's own target."""


def root_mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the root of the mean squared error."""
    return F.mse_loss(outputs, targets).sqrt()


def _regression(name: str) -> Task:
    return Task(name, F.mse_loss, (Metric("RMSE", False, root_mean_squared_error),))


@dataclass(frozen=True)
class Table:
    """Inputs, shape (N, features), and targets in their raw units, shape (N, T)."""

    inputs: Tensor
    targets: Tensor


def friedman(seed: int) -> Table:
    """Make the rows of a seed; the last two functions have their four inputs in common."""
    first, *others = (
        make(n_samples=MADE_ROWS, noise=noise, random_state=seed)
        for make, noise in zip((make_friedman1, make_friedman2, make_friedman3), NOISE, strict=True)
    )
    inputs = np.hstack([first[0], others[0][0]])
    return _table(inputs, np.stack([first[1], *(target for _, target in others)], axis=1))


def diabetes(seed: int) -> Table:  # noqa: ARG001
    """Return the rows, the same for every seed."""
    data = load_diabetes(scaled=False)
    column = {name: data.data[:, place] for place, name in enumerate(data.feature_names)}
    targets = [*(column[name] for name in DIABETES_COLUMNS), data.target]
    return _table(np.stack([column[name] for name in DIABETES_INPUTS], axis=1), np.stack(targets, axis=1))


def _table(inputs: np.ndarray, targets: np.ndarray) -> Table:
    return Table(torch.from_numpy(inputs).float(), torch.from_numpy(targets).float())


def _z_scored(values: Tensor, train: Tensor) -> Tensor:
    """Return the columns z-scored by their mean and standard deviation in the training rows."""
    return (values - values[train].mean(dim=0)) / values[train].std(dim=0, unbiased=False)


def _head(centre: float) -> nn.Module:
    """Make a linear layer with outputs of shape (N,) that start around the centre of the raw targets."""
    layer = nn.Linear(WIDTH, 1)
    nn.init.constant_(layer.bias, centre)
    return nn.Sequential(layer, nn.Flatten(0))


def regression_on_a_table(
    read: Callable[[int], Table], tasks: tuple[Task, ...], z_scored: bool, seed: int, batch_size: int = 64
) -> Problem:
    """Make the problem of one seed.

    Args:
        read: Seed to all rows.
        tasks: A task for every column of the targets.
        z_scored: Whether the targets are z-scored; inputs always are.
        seed: Fixes made rows, the split and the training batches.
        batch_size: Rows in a training batch, drawn with replacement.
    """
    table = read(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(table.inputs), generator=generator)
    held_out = int(HELD_OUT * len(order))
    test, validation, train = order.tensor_split([held_out, 2 * held_out])
    inputs = _z_scored(table.inputs, train)
    targets = _z_scored(table.targets, train) if z_scored else table.targets
    centres = [0.0] * len(tasks) if z_scored else targets[train].mean(dim=0).tolist()
    batch_state = generator.get_state()

    def build_model() -> MultiTaskNet:
        trunk = nn.Sequential(nn.Linear(inputs.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        return MultiTaskNet(trunk, {task.name: _head(centre) for task, centre in zip(tasks, centres, strict=True)})

    def pick(rows: Tensor) -> Batch:
        columns = zip(tasks, targets[rows].unbind(dim=1), strict=True)
        return Batch(inputs[rows], {task.name: column for task, column in columns})

    def train_batches() -> Iterator[Batch]:
        rows = torch.Generator()
        rows.set_state(batch_state)
        while True:
            yield pick(train[torch.randint(len(train), (batch_size,), generator=rows)])

    return Problem(tasks, only_hard_sharing(build_model), train_batches, pick(validation), pick(test))


def _data_set(
    title: str, names: tuple[str, ...], read: Callable[[int], Table], *, z_scored: bool, steps: int
) -> DataSet:
    tasks = tuple(map(_regression, names))

    def load(path: Path | None) -> MakeProblem:
        if path is not None:
            raise ValueError(f"this table comes with scikit-learn and takes no file, got {path}")
        return partial(regression_on_a_table, read, tasks, z_scored)

    return DataSet(title, tasks, load, steps=steps)


FRIEDMAN = _data_set("Friedman's functions (made), z-scored", FRIEDMAN_TASKS, friedman, z_scored=True, steps=1000)
FRIEDMAN_RAW = _data_set("Friedman's functions (made), raw units", FRIEDMAN_TASKS, friedman, z_scored=False, steps=1000)
DIABETES = _data_set("diabetes, z-scored", DIABETES_TASKS, diabetes, z_scored=True, steps=400)
DIABETES_RAW = _data_set("diabetes, raw units", DIABETES_TASKS, diabetes, z_scored=False, steps=400)
