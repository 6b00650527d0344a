"""Ways to take one training step on the same model, from the bare backward passes to this library and its peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from balanced_optim import DualBalancedOptimizer
from benchmarks.cost.trunks import MultiTaskModel

Step = Callable[[], None]
Build = Callable[[MultiTaskModel, Tensor, Tensor], Step]
"""Makes a step (forward, gradients, Adam) from a model, its inputs and labels of shape (T, N)."""


def _adam(model: MultiTaskModel) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-4, foreach=True)


def floor(model: MultiTaskModel, x: Tensor, labels: Tensor) -> Step:
    """T backward passes over one retained graph and the base step, nothing else: what the exact method cannot beat."""
    optimizer, parameters = _adam(model), list(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        losses = model.losses(x, labels)
        for index, loss in enumerate(losses):
            found = torch.autograd.grad(loss, parameters, retain_graph=index < len(losses) - 1, allow_unused=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
        optimizer.step()

    return step


def plain_sum(model: MultiTaskModel, x: Tensor, labels: Tensor) -> Step:
    """The summed loss: one backward pass."""
    optimizer = _adam(model)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(model.losses(x, labels)).sum().backward()
        optimizer.step()

    return step


def balanced(model: MultiTaskModel, x: Tensor, labels: Tensor, *, one_backward: bool = False, **options: Any) -> Step:
    """This library; `one_backward` measures norms on the trunk's last layer."""
    if one_backward:
        options["norm_params"] = model.last_shared_layer()
    optimizer = DualBalancedOptimizer(_adam(model), model.trunk, **options)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.step(model.losses(x, labels))

    return step


def by_hand(model: MultiTaskModel, x: Tensor, labels: Tensor) -> Step:
    """DB-MTL as people write it by hand: autograd.grad, one concatenated vector a task, a stacked T x n matrix."""
    optimizer, shared = _adam(model), list(model.trunk.parameters())
    count = 0
    average: Tensor | None = None

    def step() -> None:
        nonlocal average, count
        optimizer.zero_grad()
        count += 1
        losses = [torch.log(loss + 1e-8) for loss in model.losses(x, labels)]
        rows = []
        for loss in losses:
            found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(shared, found, strict=True)]
            rows.append(torch.cat([gradient.reshape(-1) for gradient in filled]))
        torch.stack(losses).sum().backward(inputs=list(model.heads.parameters()))
        beta = 0.9 / count**0.5
        matrix = torch.stack(rows)
        average = (1 - beta) * matrix if average is None else beta * average + (1 - beta) * matrix
        norms = average.norm(dim=1)
        combined = ((norms.max() / (norms + 1e-8))[:, None] * average).sum(0)
        start = 0
        for parameter in shared:
            parameter.grad = combined[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        optimizer.step()

    return step


def torchjd(model: MultiTaskModel, x: Tensor, labels: Tensor, *, chunk: int | None) -> Step:
    """TorchJD's Jacobian descent with its cheapest aggregator: no average, no rescale. `chunk` None is vmap."""
    from torchjd.aggregation import Sum
    from torchjd.autojac import jac_to_grad, mtl_backward

    optimizer, shared = _adam(model), list(model.trunk.parameters())

    def step() -> None:
        optimizer.zero_grad()
        features = model.trunk(x)
        losses = model.head_losses(features, labels)
        mtl_backward(losses, features=features, parallel_chunk_size=chunk)
        jac_to_grad(shared, Sum())
        optimizer.step()

    return step


CONTESTANTS: dict[str, Build] = {
    "floor": floor,
    "plain_sum": plain_sum,
    "exact": balanced,
    "beta0": partial(balanced, beta=0.0),
    "exact_bf16_rows": partial(balanced, ema_dtype=torch.bfloat16),
    "vectorized": partial(balanced, vectorize=True),
    "one_backward": partial(balanced, one_backward=True),
    "refreshed": partial(balanced, one_backward=True, refresh_every=8),
    "by_hand": by_hand,
    "torchjd_loop": partial(torchjd, chunk=1),
    "torchjd_vmap": partial(torchjd, chunk=None),
}
