"""A small physics-informed network (PINN): one function of one variable that must obey an equation (made data).

The function is u(x) = sin(pi x) + 0.3 sin(4 pi x) on [0, 1], which solves u'' + u = f with u(0) = u(1) = 0. Three tasks
train one network: the squared residual of the equation at random points, the boundary values, and a few noisy
measurements. Only the measurements are judged: by how much of u on a grid the network explains. Its single-task model
is the network that is fitted to the measurements alone.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data.problem import (
    Batch,
    DataSet,
    MakeProblem,
    Metric,
    MultiTaskModel,
    Problem,
    Task,
    only_hard_sharing,
)

WIDTH = 32
MEASUREMENTS, NOISE = 20, 0.1
VALIDATION_POINTS, TEST_POINTS = 50, 200
WAVES = {1: 1.0, 4: 0.3}
"""Half waves on [0, 1] to their heights."""


def solution(x: Tensor) -> Tensor:
    """Return u, same shape."""
    return sum((height * torch.sin(k * math.pi * x) for k, height in WAVES.items()), torch.zeros_like(x))


def right_hand_side(x: Tensor) -> Tensor:
    """Return f = u'' + u, same shape."""
    waves = (height * (1 - (k * math.pi) ** 2) * torch.sin(k * math.pi * x) for k, height in WAVES.items())
    return sum(waves, torch.zeros_like(x))


def explained(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of the targets' variance that the outputs explain (R squared), 1 at best."""
    return 1 - F.mse_loss(outputs, targets) / targets.var(unbiased=False)


TASKS = (
    Task("residual", F.mse_loss),
    Task("boundary", F.mse_loss),
    Task("measurements", F.mse_loss, (Metric("R2", True, explained),)),
)


class EquationNet(MultiTaskModel):
    """One network for u; everything is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def forward(self, inputs: Tensor | Mapping[str, Tensor], task_names: Iterable[str]) -> dict[str, Tensor]:
        """Return u at each task's own points, and u'' + u for the residual; shape (N, 1)."""
        points = {name: inputs if isinstance(inputs, Tensor) else inputs[name] for name in task_names}
        return {name: self._left_hand_side(x) if name == "residual" else self.u(x) for name, x in points.items()}

    @torch.enable_grad()
    def _left_hand_side(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.u(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        left: Tensor = second + u
        return left

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return all parameters."""
        return list(self.u.parameters())

    def norm_parameters(self) -> list[nn.Parameter]:
        """Return those of the last layer but one, which the residual reaches through both derivatives."""
        return list(self.u[2].parameters())


def equation(seed: int, batch_size: int = 64) -> Problem:
    """Make the problem of one seed.

    Args:
        seed: Fixes the measurements, those that are for validation, and the points of the residual.
        batch_size: Points at which the residual is taken in a step; measurements are all in every batch.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([[0.0], [1.0]])

    def measure(count: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(count, 1, generator=generator)
        return x, solution(x) + NOISE * torch.randn(count, 1, generator=generator)

    def batch(free: Tensor, x: Tensor, values: Tensor) -> Batch:
        targets = {"residual": right_hand_side(free), "boundary": torch.zeros(2, 1), "measurements": values}
        return Batch({"residual": free, "boundary": ends, "measurements": x}, targets)

    train, validation = measure(MEASUREMENTS), measure(VALIDATION_POINTS)
    grid = torch.linspace(0, 1, TEST_POINTS).unsqueeze(1)
    state = generator.get_state()

    def train_batches() -> Iterator[Batch]:
        points = torch.Generator()
        points.set_state(state)
        while True:
            yield batch(torch.rand(batch_size, 1, generator=points), *train)

    return Problem(
        TASKS,
        only_hard_sharing(EquationNet),
        train_batches,
        batch(grid, *validation),
        batch(grid, grid, solution(grid)),
    )


def load(path: Path | None) -> MakeProblem:
    """Return what makes the problem of a seed.

    Raises:
        ValueError: A path is given.
    """
    if path is not None:
        raise ValueError(f"equation is made and takes no file, got {path}")
    return equation


EQUATION = DataSet("a one-dimensional equation (made)", TASKS, load, learning_rate=3e-3, steps=3000)
