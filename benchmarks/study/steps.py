"""How one training step is made from the task losses, method by method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torchjd.aggregation as jd
from torch import Tensor
from torch.optim import Optimizer
from torchjd.scalarization import DWA, FAMO, STCH, GeometricMean, Scalarizer

from balanced_optim import DualBalancedOptimizer
from benchmarks.data.problem import MultiTaskModel, Task


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


@dataclass(frozen=True)
class Plan:
    """What a method may know of the training before it starts.

    Attributes:
        tasks: The tasks, in the order of the losses.
        steps: Optimizer steps.
    """

    tasks: Sequence[Task]
    steps: int


Losses: TypeAlias = Mapping[str, Tensor]
"""Task name to loss."""

Step: TypeAlias = Callable[[Losses, Callable[[], Losses]], StepReport]
"""`(losses, recompute)`: updates the parameters; `recompute()` returns the losses on the same batch, without a graph,
as they are by then."""

BuildStep: TypeAlias = Callable[[Optimizer, MultiTaskModel, Plan], Step]
"""Makes a step from the optimizer over all parameters and the network."""


# ------------------------------------------------------------------ weights on losses


def summed_loss(base_optim: Optimizer, model: MultiTaskModel, plan: Plan) -> Step:  # noqa: ARG001
    """Equal weighting: one backward pass from the plain sum of the losses."""

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:  # noqa: ARG001
        base_optim.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        base_optim.step()
        return StepReport()

    return step


def fixed_weights(base_optim: Optimizer, model: MultiTaskModel, plan: Plan, *, weights: Tensor) -> Step:  # noqa: ARG001
    """One backward pass from the weighted sum of the losses."""
    return _backward_through(lambda values: (weights.to(values) * values).sum(), base_optim)


def geometric_mean(base_optim: Optimizer, model: MultiTaskModel, plan: Plan) -> Step:  # noqa: ARG001
    """GLS: one backward pass from the geometric mean of the losses."""
    return _backward_through(GeometricMean(), base_optim)


def learned_with_the_network(
    base_optim: Optimizer, model: MultiTaskModel, plan: Plan, *, scalarizer: Callable[[int], Scalarizer]
) -> Step:
    """UW, IMTL-L: weights that the base optimizer learns, at the network's learning rate."""
    combine = scalarizer(len(plan.tasks)).to(_device(model))
    base_optim.add_param_group({"params": list(combine.parameters())})
    return _backward_through(combine, base_optim)


def dynamic_weight_average(
    base_optim: Optimizer,
    model: MultiTaskModel,  # noqa: ARG001
    plan: Plan,  # noqa: ARG001
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


def fast_adaptive(base_optim: Optimizer, model: MultiTaskModel, plan: Plan) -> Step:
    """FAMO: weights from how much each loss fell in the step, for which a second forward pass is needed."""
    combine = FAMO(len(plan.tasks)).to(_device(model))
    weighted = _backward_through(combine, base_optim)

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:
        report = weighted(losses, recompute)
        combine.update(torch.stack(list(recompute().values())))
        return report

    return step


def smooth_tchebycheff(
    base_optim: Optimizer,
    model: MultiTaskModel,  # noqa: ARG001
    plan: Plan,
    *,
    smoothing: float = 1.0,
    warm_up: int = 50,
) -> Step:
    """STCH on the logarithms of losses over their means in a warm-up, which itself sums the logarithms."""
    combine, tasks = STCH(smoothing), len(plan.tasks)
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
    plan: Plan,
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
    measured, tasks = model.norm_parameters(), len(plan.tasks)
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
    plan: Plan,
    *,
    warmup_share: float = 0.0,
    log_by_unit: bool = False,
    **options: Any,
) -> Step:
    """DB-MTL on the shared parameters; `options` go to `DualBalancedOptimizer` as they are.

    Args:
        base_optim: The optimizer over all parameters.
        model: The network.
        plan: The training.
        warmup_share: Over how much of the training the power of the rescale grows to its value.
        log_by_unit: Whether losses with a natural unit, cross entropies, stay without the log.
        options: Arguments of the optimizer.
    """
    if warmup_share:
        options["warmup_steps"] = max(1, round(warmup_share * plan.steps))
    if log_by_unit:
        options["log_transform"] = {task.name: not task.natural_unit for task in plan.tasks}
    optimizer = DualBalancedOptimizer(base_optim, model.shared_parameters(), **options)
    cosines = optimizer.gradient_cosines if options.get("beta", 0.9) > 0 else None

    def step(losses: Losses, recompute: Callable[[], Losses]) -> StepReport:  # noqa: ARG001
        optimizer.zero_grad()
        optimizer.step(losses)
        balance = optimizer.last_balance
        return StepReport() if balance is None else StepReport(balance.weights, balance.norms, cosines)

    return step


def one_backward(base_optim: Optimizer, model: MultiTaskModel, plan: Plan, **options: Any) -> Step:
    """DB-MTL with norms on `model.norm_parameters()` and one joint backward pass."""
    return dual_balanced(base_optim, model, plan, norm_params=model.norm_parameters(), **options)


def aggregated(
    base_optim: Optimizer,
    model: MultiTaskModel,
    plan: Plan,
    *,
    aggregator: Callable[[int], jd.Aggregator],
    log_transform: bool,
) -> Step:
    """A gradient method on the shared parameters, with or without the log; heads get their own task's gradient."""
    options: dict[str, Any] = {"aggregator": aggregator(len(plan.tasks)), "beta": 0.0, "log_transform": log_transform}
    return dual_balanced(base_optim, model, plan, **options)
