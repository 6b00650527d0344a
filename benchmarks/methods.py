"""The compared methods: each name to how one training step is made from the task losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torchjd.aggregation as jd
from torch import Tensor
from torch.optim import Optimizer
from torchjd.scalarization import DWA, FAMO, IMTLL, STCH, UW, GeometricMean, Scalarizer

from balanced_optim import DualBalancedOptimizer
from benchmarks.problem import MultiTaskModel


@dataclass(frozen=True)
class StepReport:
    """What a step did, as far as the method knows it.

    Attributes:
        weights: What each task's loss or gradient was multiplied by, shape (T,).
        norms: Gradient norms that the weights come from, shape (T,).
        cosines: Returns the cosines between the averaged task gradients, shape (T, T).
    """

    weights: Tensor | None = None
    norms: Tensor | None = None
    cosines: Callable[[], Tensor] | None = None


Losses: TypeAlias = Mapping[str, Tensor]
"""Task name to loss."""

Step: TypeAlias = Callable[[Losses, Callable[[], Losses]], StepReport]
"""`(losses, recompute)`: updates the parameters; `recompute()` returns the losses on the same batch, without a graph,
as they are by then."""

BuildStep: TypeAlias = Callable[[Optimizer, MultiTaskModel, int], Step]
"""Makes a step from the optimizer over all parameters, the network and the number of tasks."""


# ------------------------------------------------------------------ weights on losses


def summed_loss(base_optim: Optimizer, model: MultiTaskModel, tasks: int) -> Step:  # noqa: ARG001
    """Equal weighting: one backward pass from the plain sum of the losses."""

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:  # noqa: ARG001
        base_optim.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        base_optim.step()
        return StepReport()

    return step


def fixed_weights(base_optim: Optimizer, model: MultiTaskModel, tasks: int, *, weights: Tensor) -> Step:  # noqa: ARG001
    """One backward pass from the weighted sum of the losses."""
    return _backward_through(lambda values: (weights.to(values) * values).sum(), base_optim)


def geometric_mean(base_optim: Optimizer, model: MultiTaskModel, tasks: int) -> Step:  # noqa: ARG001
    """GLS: one backward pass from the geometric mean of the losses."""
    return _backward_through(GeometricMean(), base_optim)


def learned_with_the_network(
    base_optim: Optimizer, model: MultiTaskModel, tasks: int, *, scalarizer: Callable[[int], Scalarizer]
) -> Step:
    """UW, IMTL-L: weights that the base optimizer learns, at the network's learning rate."""
    combine = scalarizer(tasks).to(_device(model))
    base_optim.add_param_group({"params": list(combine.parameters())})
    return _backward_through(combine, base_optim)


def dynamic_weight_average(
    base_optim: Optimizer,
    model: MultiTaskModel,  # noqa: ARG001
    tasks: int,  # noqa: ARG001
    *,
    epoch: int = 50,
) -> Step:
    """DWA: weights from how fast the losses fell between the last two epochs of `epoch` steps each."""
    combine = DWA()
    weighted, done = _backward_through(combine, base_optim), 0

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:
        nonlocal done
        report = weighted(losses, recompute)
        done += 1
        if done % epoch == 0:
            combine.step()
        return report

    return step


def fast_adaptive(base_optim: Optimizer, model: MultiTaskModel, tasks: int) -> Step:
    """FAMO: weights from how much each loss fell in the step, for which a second forward pass is needed."""
    combine = FAMO(tasks).to(_device(model))
    weighted = _backward_through(combine, base_optim)

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:
        report = weighted(losses, recompute)
        combine.update(torch.stack(list(recompute().values())))
        return report

    return step


def smooth_tchebycheff(
    base_optim: Optimizer,
    model: MultiTaskModel,  # noqa: ARG001
    tasks: int,
    *,
    smoothing: float = 1.0,
    warm_up: int = 50,
) -> Step:
    """STCH on the logarithms of losses over their means in a warm-up, which itself sums the logarithms."""
    combine = STCH(smoothing)
    total, done = torch.zeros(tasks), 0

    def scalarize(values: Tensor) -> Tensor:
        nonlocal total, done
        done += 1
        if done <= warm_up:
            total = total.to(values) + values.detach()
            return values.log().sum()
        combine.weights = torch.ones_like(values)
        # Times T, as the sum of the warm-up: both pull at every task with a weight of 1 where all losses are even.
        return tasks * combine((values / (total / warm_up)).log())

    return _backward_through(scalarize, base_optim)


def _backward_through(combine: Callable[[Tensor], Tensor], base_optim: Optimizer) -> Step:
    """Return a step with one backward pass from what `combine` makes of the losses, shape (T,)."""

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:  # noqa: ARG001
        values = torch.stack(list(losses.values()))
        values.retain_grad()
        base_optim.zero_grad()
        combine(values).backward()
        base_optim.step()
        return StepReport(weights=values.grad)

    return step


def grad_norm(
    base_optim: Optimizer,
    model: MultiTaskModel,
    tasks: int,
    *,
    restoring_force: float = 1.5,
    learning_rate: float = 0.025,
) -> Step:
    """GradNorm (arXiv 1711.02257): weights learned so that gradient norms follow the speed of training.

    With `norm_t` the norm of task t's gradient on `model.norm_parameters()` and `r_t` its loss over its first loss,
    divided by the mean of these ratios, Adam lowers `sum_t |w_t norm_t - target_t|`, where
    `target_t = mean(w norm) * r_t**restoring_force` counts as a constant. Weights are renormalised to the sum T after
    every step, and kept at 0 or more.
    """
    measured = model.norm_parameters()
    weights = measured[0].new_ones(tasks).requires_grad_()
    weight_optim = torch.optim.Adam([weights], lr=learning_rate)
    first: Tensor | None = None

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:  # noqa: ARG001
        nonlocal first
        values = torch.stack(list(losses.values()))
        first = values.detach() if first is None else first
        norms = torch.stack([_norm(torch.autograd.grad(loss, measured, retain_graph=True)) for loss in losses.values()])
        applied = weights.detach().clone()
        base_optim.zero_grad()
        (applied * values).sum().backward()
        base_optim.step()
        ratios = values.detach() / first
        target = (applied * norms).mean() * (ratios / ratios.mean()) ** restoring_force
        weight_optim.zero_grad()
        (weights * norms - target).abs().sum().backward()
        weight_optim.step()
        with torch.no_grad():
            weights.clamp_(min=0)
            weights.mul_(tasks / weights.sum())
        return StepReport(applied, norms)

    return step


def _norm(gradients: tuple[Tensor, ...]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    return norm


def _device(model: MultiTaskModel) -> torch.device:
    return next(model.parameters()).device


# ------------------------------------------------------------------ gradients


def dual_balanced(
    base_optim: Optimizer,
    model: MultiTaskModel,
    tasks: int,  # noqa: ARG001
    **options: Any,
) -> Step:
    """DB-MTL on the shared parameters; `options` go to `DualBalancedOptimizer` as they are."""
    optimizer = DualBalancedOptimizer(base_optim, model.shared_parameters(), **options)
    cosines = optimizer.gradient_cosines if options.get("beta", 0.9) > 0 else None

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:  # noqa: ARG001
        optimizer.zero_grad()
        optimizer.step(losses)
        balance = optimizer.last_balance
        return StepReport() if balance is None else StepReport(balance.weights, balance.norms, cosines)

    return step


def one_backward(base_optim: Optimizer, model: MultiTaskModel, tasks: int, **options: Any) -> Step:
    """DB-MTL with norms on `model.norm_parameters()` and one joint backward pass."""
    return dual_balanced(base_optim, model, tasks, norm_params=model.norm_parameters(), **options)


def aggregated(
    base_optim: Optimizer,
    model: MultiTaskModel,
    tasks: int,
    *,
    aggregator: Callable[[int], jd.Aggregator],
    log_transform: bool,
) -> Step:
    """A gradient method on the shared parameters, with or without the log; heads get their own task's gradient."""
    options = {"aggregator": aggregator(tasks), "beta": 0.0, "log_transform": log_transform}
    return dual_balanced(base_optim, model, tasks, **options)


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
}
"""Gradient methods by name: what makes a fresh one for so many tasks, with the settings of its paper or of LibMTL."""


def missing_package(method: str) -> str:
    """Return why a method cannot run here and what to install, or an empty text if it can."""
    make = AGGREGATORS.get(method.removeprefix("log_"))
    if make is not None:
        try:
            make(2)
        except ImportError as error:
            return f"{method} is left out: {error}"
    return ""


# ------------------------------------------------------------------ names

SINGLE_TASK = "stl"
"""One network per task, each trained by `summed_loss` on that task alone."""

TUNED_WEIGHTS = "tuned_weights"
"""`fixed_weights` with the weights that a search on validation data finds, see `benchmarks.training`."""

NORM_TARGETS = ("mean", "median", "min")
BETAS = (0.1, 0.5, 0.9)
MAX_WEIGHTS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)

METHODS: dict[str, BuildStep] = {
    "ew": summed_loss,
    "uw": partial(learned_with_the_network, scalarizer=UW),
    "dwa": dynamic_weight_average,
    "gls": geometric_mean,
    "imtl_l": partial(learned_with_the_network, scalarizer=IMTLL),
    "famo": fast_adaptive,
    "stch": smooth_tchebycheff,
    "gradnorm": grad_norm,
    "log_only": partial(dual_balanced, norm_target=None, beta=0.0),
    "max_norm_only": partial(dual_balanced, log_transform=False),
    "max_norm_only_beta_0": partial(dual_balanced, log_transform=False, beta=0.0),
    "average_only": partial(dual_balanced, log_transform=False, norm_target=None),
    "db_mtl": dual_balanced,
    "db_mtl_one_backward": one_backward,
    "db_mtl_bfloat16_averages": partial(dual_balanced, ema_dtype=torch.bfloat16),
    "fade_solved": partial(dual_balanced, fade_solved=True),
    "beta_0": partial(dual_balanced, beta=0.0),
    **{f"beta_{beta}": partial(dual_balanced, beta=beta, beta_decay=0.0) for beta in BETAS},
    **{f"beta_{beta}_decay": partial(dual_balanced, beta=beta) for beta in BETAS if beta != 0.9},
    **{f"norm_{target}": partial(dual_balanced, norm_target=target) for target in NORM_TARGETS},
    **{f"max_weight_{weight:g}": partial(dual_balanced, max_weight=weight) for weight in MAX_WEIGHTS},
    **{name: partial(aggregated, aggregator=make, log_transform=False) for name, make in AGGREGATORS.items()},
    **{f"log_{name}": partial(aggregated, aggregator=make, log_transform=True) for name, make in AGGREGATORS.items()},
}
"""By name. `db_mtl` has the library's defaults: beta = 0.9 / sqrt(k), the largest norm as target, no cap on weights.
Methods named after a setting are `db_mtl` with that setting; `max_weight_1` keeps the log and the average only."""

DEFAULT_METHODS = ["ew", "log_only", "max_norm_only", "db_mtl", "db_mtl_one_backward"]
"""The methods that `benchmarks.compare` runs unless others are named."""
