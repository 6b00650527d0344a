"""Task gradients as they are in the course of training: how long, how steady, how much at odds with each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

WINDOWS = 10
"""Windows in a run, evenly spread; the last one ends with the training."""

WINDOW_STEPS = 20
"""Consecutive steps in a window, fewer where a tenth of the training is shorter."""


@dataclass(frozen=True)
class Window:
    """The gradients of the raw task losses on the network's norm parameters over consecutive steps.

    Attributes:
        step: The last step of the window, counted from 1.
        norms: Root of the mean squared norm, shape (T,).
        coherence: Squared norm of the mean gradient over the mean squared norm, shape (T,): 1 where all steps give
            the same gradient, near 1 / steps where they are noise around zero. NaN for a task without gradients.
        cosines: Mean cosines between the tasks' gradients at the same step, shape (T, T); 0 where one is zero.
    """

    step: int
    norms: Tensor
    coherence: Tensor
    cosines: Tensor


def window_starts(steps: int) -> dict[int, int]:
    """Return the first step of each window, counted from 1, with its length, for a training of so many steps."""
    windows = min(WINDOWS, steps)
    length = min(WINDOW_STEPS, steps // windows)
    return {steps * (window + 1) // windows - length + 1: length for window in range(windows)}


@dataclass
class Probe:
    """Watches a training of `steps` steps; call `look` before each."""

    steps: int
    windows: list[Window] = field(default_factory=list)
    _rows: list[Tensor] = field(default_factory=list)
    _ends: int = 0

    def look(self, step: int, losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """Measure if this step, counted from 1, is in a window. The graph stays for the step itself."""
        length = window_starts(self.steps).get(step)
        if length is not None:
            self._ends = step + length - 1
        if step > self._ends:
            return
        self._rows.append(torch.stack([_gradient(loss, parameters) for loss in losses]))
        if step == self._ends:
            self.windows.append(summarize_window(step, torch.stack(self._rows)))
            self._rows.clear()


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def summarize_window(step: int, gradients: Tensor) -> Window:
    """Return the window that ends at `step` from its gradients, shape (steps, T, n)."""
    gradients = gradients.double()
    squared = gradients.square().sum(dim=2).mean(dim=0)
    directions = nn.functional.normalize(gradients, dim=2)
    return Window(
        step,
        norms=squared.sqrt(),
        coherence=gradients.mean(dim=0).square().sum(dim=1) / squared,
        cosines=(directions @ directions.transpose(1, 2)).mean(dim=0),
    )
