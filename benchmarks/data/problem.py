"""What a benchmark trains on: tasks with their metrics, batches, networks, and data sets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Metric:
    """One number by which a task is judged.

    Attributes:
        name: What tables and result files call it; unique within its task.
        higher_is_better: Its direction.
        score: `(outputs, targets) -> scalar` on a whole set.
    """

    name: str
    higher_is_better: bool
    score: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One task: how it is trained and how it is judged.

    Attributes:
        name: The key of the task in losses, targets, heads and result files.
        loss: `(output, target) -> scalar`, differentiable.
        metrics: What counts; Delta_p averages the metrics of a task, then the tasks. A task without any helps
            the others only: it has no single-task model and no part in Delta_p.
        natural_unit: Whether its loss has one: a cross entropy is in nats, a squared error in what the target has.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[Metric, ...] = ()
    natural_unit: bool = False


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is the label, 0 to 1.

    Args:
        logits: Shape (B, classes).
        labels: Class indices, shape (B,).
    """
    return (logits.argmax(dim=1) == labels).float().mean()


def classification(name: str) -> Task:
    """Return a task that is trained by the cross entropy and judged by the accuracy."""
    return Task(name, F.cross_entropy, (Metric("accuracy", True, accuracy),), natural_unit=True)


@dataclass(frozen=True)
class Batch:
    """Inputs and targets.

    Attributes:
        inputs: Shape (B, ...), the same for all tasks; or each task's own, by task name; or the parts of one
            input, by names that only the network knows.
        targets: Each task's targets, shape (B, ...), by task name.
    """

    inputs: Tensor | Mapping[str, Tensor]
    targets: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on that device."""
        inputs = self.inputs
        moved = inputs.to(device) if isinstance(inputs, Tensor) else {k: v.to(device) for k, v in inputs.items()}
        return Batch(moved, {name: target.to(device) for name, target in self.targets.items()})


class MultiTaskModel(nn.Module, ABC):
    """A network with an output for every task."""

    @abstractmethod
    def forward(self, inputs: Tensor | Mapping[str, Tensor], task_names: Iterable[str]) -> dict[str, Tensor]:
        """Return the outputs of the named tasks only, by task name."""

    @abstractmethod
    def shared_parameters(self) -> list[nn.Parameter]:
        """Return what is shared: the parameters that `DualBalancedOptimizer` balances."""

    @abstractmethod
    def norm_parameters(self) -> list[nn.Parameter]:
        """Return a small subset of the shared parameters that every task reaches, as the last shared layer."""


class MultiTaskNet(MultiTaskModel):
    """A shared trunk and one head per task (hard parameter sharing)."""

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        """Join a trunk and its heads.

        Args:
            trunk: Maps inputs to features. Its parameters are the shared ones.
            heads: Task name to the module that maps features to that task's output.
        """
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)

    def forward(self, inputs: Tensor | Mapping[str, Tensor], task_names: Iterable[str]) -> dict[str, Tensor]:
        """Return the outputs of the named tasks only; the other heads do not run.

        The trunk runs once on inputs of all tasks, or once for each named task on that task's own.
        """
        if isinstance(inputs, Tensor):
            features = self.trunk(inputs)
            return {name: self.heads[name](features) for name in task_names}
        return {name: self.heads[name](self.trunk(inputs[name])) for name in task_names}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the trunk's parameters."""
        return list(self.trunk.parameters())

    def norm_parameters(self) -> list[nn.Parameter]:
        """Return those of the trunk's last linear layer or convolution."""
        layers = [module for module in self.trunk.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        return list(layers[-1].parameters())


@dataclass(frozen=True)
class Problem:
    """Several tasks on one data set, fixed by one seed.

    Attributes:
        tasks: The tasks, in the order in which they are reported.
        build_model: Makes an untrained network by the name of its architecture, "hard", "cross_stitch" or "mtan",
            from torch's global random state.
        train_batches: Starts the endless stream of training batches; each call starts the same one.
        validation: The validation set as one batch, for what a method tunes.
        test: The whole test set as one batch.
    """

    tasks: tuple[Task, ...]
    build_model: Callable[[str], MultiTaskModel]
    train_batches: Callable[[], Iterator[Batch]]
    validation: Batch
    test: Batch


MakeProblem: TypeAlias = Callable[[int, int], Problem]
"""`(seed, batch_size) -> Problem`."""


@dataclass(frozen=True)
class DataSet:
    """A data set that a benchmark can be run on.

    Attributes:
        title: What tables and result files call it; made data say "synthetic" here.
        tasks: The tasks of its problems, in the order in which they are reported.
        load: Reads the data at a path, None for none, and returns what makes the problem of a seed.
            Raises `ValueError` if it needs a path and has none that it can use, or takes none; the message names
            the path, what was expected and where the data come from.
        architectures: The names that its `Problem.build_model` takes.
        batch_size: Rows in a training batch, or rows of every task where each has inputs of its own.
        learning_rate: Adam's.
        steps: Training steps of a run.
    """

    title: str
    tasks: tuple[Task, ...]
    load: Callable[[Path | None], MakeProblem]
    architectures: tuple[str, ...] = ("hard",)
    batch_size: int = 64
    learning_rate: float = 1e-3
    steps: int = 1000


def only_hard_sharing(build: Callable[[], MultiTaskModel]) -> Callable[[str], MultiTaskModel]:
    """Return a `Problem.build_model` for a data set that has hard sharing alone."""

    def build_model(architecture: str) -> MultiTaskModel:
        if architecture != "hard":
            raise ValueError(f"architecture must be 'hard', got {architecture!r}")
        return build()

    return build_model
