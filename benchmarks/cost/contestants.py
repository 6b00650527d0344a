"""Ways to take one training step on the same model, from the bare backward passes to this library and its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from balanced_optim import DualBalancedOptimizer
from benchmarks.cost.trunks import MultiTaskModel

Step = Callable[[], None]
Build = Callable[[MultiTaskModel, Tensor, Tensor], Step]
"""Makes a step (forward, gradients, Adam) from a model, its inputs and labels of shape (T, N)."""

WARM_UP = 3
"""Eager steps before a capture."""


def _adam(model: MultiTaskModel, capturable: bool = False) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-4, foreach=True, capturable=capturable)


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


def plain_sum(model: MultiTaskModel, x: Tensor, labels: Tensor, *, capturable: bool = False) -> Step:
    """The summed loss: one backward pass."""
    optimizer = _adam(model, capturable)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(model.losses(x, labels)).sum())
        optimizer.step()

    return step


def balanced(
    model: MultiTaskModel,
    x: Tensor,
    labels: Tensor,
    *,
    one_backward: bool = False,
    capturable: bool = False,
    **options: Any,
) -> Step:
    """This library; `one_backward` measures norms on the trunk's last layer."""
    if one_backward:
        options["norm_params"] = model.last_shared_layer()
    optimizer = DualBalancedOptimizer(_adam(model, capturable), model.trunk, **options)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.step(model.losses(x, labels))

    return step


def captured(build: Build) -> Build:
    """The step that `build` makes as one CUDA graph over static tensors; batches before the capture train."""

    def build_captured(model: MultiTaskModel, x: Tensor, labels: Tensor) -> Step:
        step = build(model, x, labels)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def replay(_alive: Step = step) -> None:
            # The default argument keeps all that the graph reads and writes alive as long as itself.
            graph.replay()

        return replay

    return build_captured


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
        torch.autograd.backward(torch.stack(losses).sum(), inputs=list(model.heads.parameters()))
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
        features = model.features(x)
        losses = model.head_losses(features, labels)
        mtl_backward(losses, features=features, parallel_chunk_size=chunk)
        jac_to_grad(shared, Sum())
        optimizer.step()

    return step


def balanced_capturable(model: MultiTaskModel, x: Tensor, labels: Tensor) -> Step:
    """This library with the options that a graph can hold, not yet captured."""
    return balanced(model, x, labels, capturable=True, nonfinite="ignore")


@dataclass(frozen=True)
class Contestant:
    """Somebody who takes part.

    Attributes:
        build: makes the step.
        cycle: steps in one turn, where some steps of a cycle are dearer than others; a time is that of a step on
            average over the turn.
        needs: "torchjd" or "cuda" where it cannot do without.
    """

    build: Build
    cycle: int = 1
    needs: str = ""


CONTESTANTS: dict[str, Contestant] = {
    "floor": Contestant(floor),
    "plain_sum": Contestant(plain_sum),
    "exact": Contestant(balanced),
    "beta0": Contestant(partial(balanced, beta=0.0)),
    "exact_bf16_rows": Contestant(partial(balanced, ema_dtype=torch.bfloat16)),
    "one_backward": Contestant(partial(balanced, one_backward=True)),
    "refreshed": Contestant(partial(balanced, one_backward=True, refresh_every=8), cycle=8),
    "by_hand": Contestant(by_hand),
    "torchjd_loop": Contestant(partial(torchjd, chunk=1), needs="torchjd"),
    "torchjd_vmap": Contestant(partial(torchjd, chunk=None), needs="torchjd"),
    "exact_captured": Contestant(captured(balanced_capturable), needs="cuda"),
    "plain_sum_captured": Contestant(captured(partial(plain_sum, capturable=True)), needs="cuda"),
}


def able(names: Iterable[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Those of the named contestants that can run here, and why the others cannot."""
    missing = {"cuda": "needs a CUDA device"} if device.type != "cuda" else {}
    if find_spec("torchjd") is None:
        missing["torchjd"] = "torchjd is not installed"
    left_out = {name: missing[CONTESTANTS[name].needs] for name in names if CONTESTANTS[name].needs in missing}
    return [name for name in names if name not in left_out], left_out
