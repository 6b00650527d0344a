"""What becomes of the learning rate in the course of a training."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

SCHEDULES = ("cosine", "constant", "steps", "plateau")
"""Falling to zero along a cosine; as it is; a tenth of it from half and from three quarters of the training on; halved
whenever validation data have not liked the network better for `PATIENCE` checks."""

WARM_UP = 0.02
"""Over this share of the training the rate grows to its value first, but for "plateau", which sets the rate itself."""

PATIENCE = 2


def rate_factor(step: int, *, schedule: str, steps: int) -> float:
    """Return what the learning rate is multiplied by in a step, counted from 0, of a training of so many."""
    grown = min(1.0, (step + 1) / max(1, round(WARM_UP * steps)))
    if schedule == "cosine":
        return grown * 0.5 * (1 + math.cos(math.pi * step / steps))
    if schedule == "steps":
        return grown * 0.1 ** ((step >= steps // 2) + (step >= 3 * steps // 4))
    return grown


class Schedule:
    """Sets the learning rate of an optimizer; to be told of every step and of every look at validation data."""

    def __init__(self, name: str, optimizer: Optimizer, steps: int) -> None:
        """Begin.

        Args:
            name: One of `SCHEDULES`.
            optimizer: The optimizer, with all its parameter groups.
            steps: Of the training.
        """
        self.plateau: ReduceLROnPlateau | None = None
        self.by_step: LambdaLR | None = None
        if name == "plateau":
            self.plateau = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=PATIENCE)
        else:
            self.by_step = LambdaLR(optimizer, partial(rate_factor, schedule=name, steps=steps))

    def after_step(self) -> None:
        """Set the rate for the next step."""
        if self.by_step is not None:
            self.by_step.step()

    def after_check(self, gain: float) -> None:
        """Take in how well validation data like the network; more is better."""
        if self.plateau is not None:
            self.plateau.step(gain)
