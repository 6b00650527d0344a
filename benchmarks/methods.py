"""The compared methods: each name to how one training step is made from the task losses."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from balanced_optim import Balance, DualBalancedOptimizer
from benchmarks.problem import MultiTaskNet

Step: TypeAlias = Callable[[Mapping[str, Tensor]], Balance | None]
"""Updates the parameters from the loss of each task name; returns the balance if there is one."""

BuildStep: TypeAlias = Callable[[torch.optim.Optimizer, MultiTaskNet], Step]
"""Makes a step from the optimizer over all parameters and the network."""


def summed_loss(base_optim: torch.optim.Optimizer, model: MultiTaskNet) -> Step:  # noqa: ARG001
    """Equal weighting: one backward pass from the plain sum of the losses."""

    def step(losses: Mapping[str, Tensor]) -> None:
        base_optim.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        base_optim.step()

    return step


def dual_balanced(base_optim: torch.optim.Optimizer, model: MultiTaskNet, **options: Any) -> Step:
    """DB-MTL on the trunk's parameters; `options` go to `DualBalancedOptimizer` as they are."""
    optimizer = DualBalancedOptimizer(base_optim, model.trunk.parameters(), **options)

    def step(losses: Mapping[str, Tensor]) -> Balance | None:
        optimizer.zero_grad()
        optimizer.step(losses)
        return optimizer.last_balance

    return step


def one_backward(base_optim: torch.optim.Optimizer, model: MultiTaskNet) -> Step:
    """DB-MTL with norms on the trunk's last layer that has weights and one joint backward pass."""
    layers = [module for module in model.trunk.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return dual_balanced(base_optim, model, norm_params=layers[-1].parameters())


SINGLE_TASK = "stl"
"""One network per task, each trained by `summed_loss` on that task alone."""

METHODS: dict[str, BuildStep] = {
    "ew": summed_loss,
    "log_only": partial(dual_balanced, norm_target=None, beta=0.0),
    "max_norm_only": partial(dual_balanced, log_transform=False),
    "db_mtl": dual_balanced,
    "db_mtl_one_backward": one_backward,
    "db_mtl_bfloat16_averages": partial(dual_balanced, ema_dtype=torch.bfloat16),
}

DEFAULT_METHODS = [name for name in METHODS if name != "db_mtl_bfloat16_averages"]
"""The methods that run unless others are named."""
