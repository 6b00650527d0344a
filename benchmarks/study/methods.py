"""The compared methods by name."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchjd.aggregation as jd
from torch import nn
from torchjd.scalarization import IMTLL, UW

from benchmarks.data.problem import MultiTaskNet, Task
from benchmarks.study.steps import (
    BuildStep,
    Plan,
    aggregated,
    dual_balanced,
    dynamic_weight_average,
    fast_adaptive,
    geometric_mean,
    grad_norm,
    learned_with_the_network,
    one_backward,
    smooth_tchebycheff,
    summed_loss,
)

AGGREGATORS: dict[str, Callable[[int], jd.Aggregator]] = {
    "pcgrad": lambda tasks: jd.PCGrad(),  # noqa: ARG005
    "gradvac": lambda tasks: jd.GradVac(),  # noqa: ARG005
    "imtl_g": lambda tasks: jd.IMTLG(),  # noqa: ARG005
    "cagrad": lambda tasks: jd.CAGrad(c=0.5),  # noqa: ARG005
    "nash_mtl": lambda tasks: jd.NashMTL(n_tasks=tasks),
    "aligned_mtl": lambda tasks: jd.AlignedMTL(),  # noqa: ARG005
    "mgda": lambda tasks: jd.MGDA(),  # noqa: ARG005
    "upgrad": lambda tasks: jd.UPGrad(),  # noqa: ARG005
    "fairgrad": lambda tasks: jd.FairGrad(alpha=1.0),  # noqa: ARG005
    "pcd": lambda tasks: jd.PCD(),  # noqa: ARG005
}
"""Gradient methods by name: what makes a fresh one for so many tasks, with the settings of its paper or of LibMTL. PCD
takes the first task for the primary one."""


SINGLE_TASK = "stl"
"""One network per task, each trained by `summed_loss` on that task alone."""

TUNED_WEIGHTS = "tuned_weights"
"""`fixed_weights` with the weights that a search on validation data finds, see `benchmarks.study.training`."""

NORM_TARGETS = ("mean", "median", "min")
BETAS = (0.1, 0.5, 0.9)
MAX_WEIGHTS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)

DB_MTL: dict[str, dict[str, Any]] = {
    "db_mtl": {},
    "beta_0": {"beta": 0.0},
    **{f"beta_{beta}": {"beta": beta, "beta_decay": 0.0} for beta in BETAS},
    **{f"beta_{beta}_decay": {"beta": beta} for beta in BETAS if beta != 0.9},
    "log_only": {"norm_target": None, "beta": 0.0},
    "average_only": {"norm_target": None, "log_transform": False},
    "max_norm_only": {"log_transform": False},
    "max_norm_only_beta_0": {"log_transform": False, "beta": 0.0},
    **{f"norm_{target}": {"norm_target": target} for target in NORM_TARGETS},
    "norm_1": {"norm_target": 1.0},
    "rms_beta_0": {"norm_target": "rms", "beta": 0.0},
    "rms_beta_0_no_log": {"norm_target": "rms", "beta": 0.0, "log_transform": False},
    **{f"max_weight_{weight:g}": {"max_weight": weight} for weight in MAX_WEIGHTS},
    "fade_solved": {"fade_solved": True},
    **{f"norm_power_{power}": {"norm_power": power} for power in (0.5, 0.75)},
    "warmup_tenth": {"warmup_share": 0.1},
    "warmup_third": {"warmup_share": 1 / 3},
    "norm_power_0.5_warmup_fifth": {"norm_power": 0.5, "warmup_share": 0.2},
    "log_by_unit": {"log_by_unit": True},
    "log_by_unit_no_rescale": {"log_by_unit": True, "norm_target": None, "beta": 0.0},
    "log_by_unit_norm_power_0.5": {"log_by_unit": True, "norm_power": 0.5},
    "bfloat16_averages": {"ema_dtype": torch.bfloat16},
}
"""What `dual_balanced` takes, by the name of the method. `db_mtl` has the library's defaults: beta = 0.9 / sqrt(k), the
largest norm as target, no cap on weights. Methods named after a setting are `db_mtl` with that setting."""

METHODS: dict[str, BuildStep] = {
    "ew": summed_loss,
    "uw": partial(learned_with_the_network, scalarizer=UW),
    "dwa": dynamic_weight_average,
    "gls": geometric_mean,
    "imtl_l": partial(learned_with_the_network, scalarizer=IMTLL),
    "famo": fast_adaptive,
    "stch": smooth_tchebycheff,
    "gradnorm": grad_norm,
    **{name: partial(dual_balanced, **options) for name, options in DB_MTL.items()},
    "one_backward": one_backward,
    "refreshed": partial(one_backward, refresh_every=8),
    **{name: partial(aggregated, aggregator=make, log_transform=False) for name, make in AGGREGATORS.items()},
    **{f"log_{name}": partial(aggregated, aggregator=make, log_transform=True) for name, make in AGGREGATORS.items()},
}
"""By name. `refreshed` measures norms every eighth step; `max_weight_1` keeps the log and the average only."""

ONE_KIND_OF_LOSS: dict[bool, dict[str, str]] = {
    True: {"log_by_unit": "max_norm_only", "log_by_unit_no_rescale": "ew"},
    False: {
        "log_by_unit": "db_mtl",
        "log_by_unit_no_rescale": "log_only",
        "log_by_unit_norm_power_0.5": "norm_power_0.5",
    },
}
"""Methods that are another one where all losses have a natural unit, or none has."""

DEFAULT_METHODS = ["ew", "log_only", "max_norm_only", "db_mtl", "rms_beta_0", "fade_solved", "one_backward"]
"""The methods that `benchmarks.compare` runs unless others are named."""


def canonical(method: str, tasks: Sequence[Task]) -> str:
    """Return the name under which a method is run on these tasks."""
    kinds = {task.natural_unit for task in tasks}
    return ONE_KIND_OF_LOSS[kinds.pop()].get(method, method) if len(kinds) == 1 else method


def unavailable(method: str) -> str:
    """Return why a method cannot run here, as a solver that is not installed, or an empty text if it can."""
    if method not in METHODS:
        return ""
    tasks = [Task(name, nn.functional.mse_loss) for name in ("one", "other")]
    model = MultiTaskNet(nn.Linear(2, 2), {task.name: nn.Linear(2, 1) for task in tasks})
    try:
        METHODS[method](torch.optim.Adam(model.parameters()), model, Plan(tasks, 10))
    # What a library refuses, be it a missing solver or an argument that its version lacks, cannot be compared.
    except (ImportError, TypeError, ValueError) as error:
        return f"{method} is left out: {error}"
    return ""
