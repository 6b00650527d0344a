"""What a benchmark trains on: tasks, batches, and a network with one trunk and a head per task."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """One task: how it is trained and how it is judged.

    Attributes:
        name: The key of the task in losses, targets, heads and result files.
        metric: Name of the metric, for tables.
        higher_is_better: Direction of the metric.
        loss: `(output, target) -> scalar`, differentiable.
        score: `(output, target) -> scalar`, the metric on a whole test set.
    """

    name: str
    metric: str
    higher_is_better: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs and targets.

    Attributes:
        inputs: Shape (B, ...), the same for all tasks; or each task's own, by task name.
        targets: Each task's targets, shape (B, ...), by task name.
    """

    inputs: Tensor | Mapping[str, Tensor]
    targets: Mapping[str, Tensor]


class MultiTaskNet(nn.Module):
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


@dataclass(frozen=True)
class Problem:
    """Several tasks on one data set, fixed by one seed.

    Attributes:
        tasks: The tasks, in the order in which they are reported.
        build_model: Makes an untrained network from torch's global random state.
        train_batches: Starts the endless stream of training batches; each call starts the same one.
        test: The whole test set as one batch.
    """

    tasks: tuple[Task, ...]
    build_model: Callable[[], MultiTaskNet]
    train_batches: Callable[[], Iterator[Batch]]
    test: Batch


MakeProblem: TypeAlias = Callable[[int, int], Problem]
"""`(seed, batch_size) -> Problem`."""


@dataclass(frozen=True)
class DataSet:
    """A data set that a benchmark can be run on.

    Attributes:
        title: What tables and result files call it.
        tasks: The tasks of its problems, in the order in which they are reported.
        load: Reads the file at a path, None for none, and returns what makes the problem of a seed.
            Raises `ValueError` if it needs a file and has none that it can use, or takes none.
    """

    title: str
    tasks: tuple[Task, ...]
    load: Callable[[Path | None], MakeProblem]
