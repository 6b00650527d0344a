"""Models, batches and training steps that every rank of `benchmarks.distributed` builds alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from balanced_optim import DualBalancedOptimizer
from benchmarks.cost.distributed_costs import Size
from benchmarks.cost.trunks import build

DIGITS = "two_digits"
DIGIT_ROWS = 32
"""Rows of a batch on every rank."""

Batch = tuple[Tensor, list[Tensor]]
"""Inputs of shape (N, ...) and each task's targets, shape (N, ...)."""


class Model(nn.Module):
    """A trunk and a head for each task."""

    def __init__(self, trunk: nn.Module, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Every task's output."""
        features = self.trunk(x)
        return [head(features) for head in self.heads]

    def last_shared_layer(self) -> list[nn.Parameter]:
        """The parameters of the trunk's last module that has any."""
        with_parameters = [m for m in self.trunk.modules() if list(m.parameters(recurse=False))]
        return list(with_parameters[-1].parameters(recurse=False))


@dataclass(frozen=True)
class Job:
    """Something to train.

    Attributes:
        build: makes the model, the same weights at every call and on every rank.
        losses: a function of output and target for each task.
        batch: the batch of all ranks together at a step, in equal parts, one for each rank.
    """

    build: Callable[[], Model]
    losses: tuple[Callable[[Tensor, Tensor], Tensor], ...]
    batch: Callable[[int], Batch]

    def task_losses(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """A scalar for each task."""
        return [loss(o, t) for loss, o, t in zip(self.losses, outputs, targets, strict=True)]


def part_of(batch: Batch, rank: int, ranks: int) -> Batch:
    """The rows of one rank."""
    inputs, targets = batch
    return inputs.tensor_split(ranks)[rank], [target.tensor_split(ranks)[rank] for target in targets]


def make_job(name: str, tasks: int, ranks: int) -> Job:
    """The main job for `DIGITS`, else one of `benchmarks.cost.trunks` with `tasks` heads."""
    return digits_job(ranks) if name == DIGITS else trunk_job(name, tasks, ranks)


def digits_job(ranks: int) -> Job:
    """Two overlaid digits and their image: the network, images and losses of `benchmarks.digits`."""
    # Kept in this one function: all that is used of the main job.
    from benchmarks.data.digits import MAX_PIXEL, build_model, load_images, overlay

    images, labels = load_images()

    def make() -> Model:
        torch.manual_seed(0)
        network = build_model()
        return Model(network.trunk, [network.heads[name] for name in ("left", "right", "reconstruction")])

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        left, right = torch.randint(len(images), (2, DIGIT_ROWS * ranks), generator=generator)
        canvas = overlay(images[left], images[right])
        return canvas / MAX_PIXEL, [labels[left], labels[right], canvas]

    return Job(make, (F.cross_entropy, F.cross_entropy, F.mse_loss), batch)


def trunk_job(name: str, tasks: int, ranks: int) -> Job:
    """A trunk with linear heads on one random batch, each rank's rows as many as one process would take."""
    parts = [build(name, tasks, torch.device("cpu"), seed=rank)[1:] for rank in range(ranks)]
    whole = torch.cat([x for x, _ in parts]), list(torch.cat([labels for _, labels in parts], 1))

    def make() -> Model:
        model = build(name, tasks, torch.device("cpu"))[0]
        return Model(model.trunk, model.heads)

    return Job(make, (F.cross_entropy,) * tasks, lambda _: whole)


def size_of(job: Job, gloo: bool) -> Size:
    """What a step of the job is made of."""
    model = job.build()
    return Size(
        len(job.losses),
        shared=sum(parameter.numel() for parameter in model.trunk.parameters()),
        heads=sum(parameter.numel() for parameter in model.heads.parameters()),
        measured=sum(parameter.numel() for parameter in model.last_shared_layer()),
        tensors=len(list(model.parameters())),
        gloo=gloo,
    )


# --------------------------------------------------- one training step in each form

Step = Callable[[list[Tensor]], None]
"""Takes one step from the losses of this rank; `.grad` is clear before."""


@dataclass(frozen=True)
class Form:
    """A way to train over several ranks.

    Attributes:
        options: of `DualBalancedOptimizer`; None where it takes no part.
        wrapper: "ddp", "fsdp2" or "" for the bare model.
        one_backward: whether norms are taken on the last shared layer.
        waits: whether every message arrives before the next pass begins.
    """

    options: dict[str, Any] | None = field(default_factory=dict)
    wrapper: str = "ddp"
    one_backward: bool = False
    waits: bool = False

    @property
    def method(self) -> str:
        """A name for what is computed, the same for forms that only send it in another way."""
        return repr((self.options, self.one_backward))


FORMS = {
    "plain_ddp": Form(None),
    "floor": Form(None, ""),
    "exact": Form(),
    "beta0": Form({"beta": 0.0}),
    "one_backward": Form(one_backward=True),
    "fsdp2_plain": Form(None, "fsdp2"),
    "fsdp2": Form(wrapper="fsdp2"),
    "exact_waiting": Form(waits=True),
}
BALANCED = [name for name, form in FORMS.items() if form.options is not None and not form.waits]
"""This library's own forms."""
COUNTED = [name for name, form in FORMS.items() if not form.waits]
"""Forms that send something of their own: waiting does not change how much is sent."""


class Training:
    """A model in training on this rank.

    Args:
        job: what is trained.
        form: how.
        device: where.
        dtype: of the parameters and of inputs of floating point.
        alone: one process on its own with the same options, no group.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        job: Job,
        form: Form,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        alone: bool = False,
        learning_rate: float = 1e-4,
    ) -> None:
        self._job, self._device, self._dtype = job, device, dtype
        model = job.build().to(device, dtype)
        self._wrapped: nn.Module = model
        group = None if alone else dist.group.WORLD
        if not alone and form.wrapper == "ddp":
            self._wrapped = DistributedDataParallel(model)
        if not alone and form.wrapper == "fsdp2":
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            fully_shard(model.trunk, mesh=mesh)
            fully_shard(model, mesh=mesh)
            group = mesh.get_group()
        self._parameters = list(model.parameters())
        base = torch.optim.Adam(self._parameters, lr=learning_rate, foreach=True)
        self._optimizer: DualBalancedOptimizer | None = None
        self._base: torch.optim.Optimizer = base
        self._step = self._plain_step if form.wrapper else _floor_step(model, base)
        if form.options is not None:
            # A module lets FSDP2 keep the trunk gathered between the passes.
            norms = model.last_shared_layer() if form.one_backward else None
            optimizer = DualBalancedOptimizer(base, model.trunk, process_group=group, norm_params=norms, **form.options)
            self._optimizer, self._step = optimizer, _waiting(optimizer.step) if form.waits else optimizer.step

    def _plain_step(self, losses: list[Tensor]) -> None:
        torch.autograd.backward(torch.stack(losses).sum())
        self._base.step()

    def prepared(self, batch: Batch) -> Batch:
        """The batch where and as the model takes it."""
        inputs, targets = batch
        return self._cast(inputs), [self._cast(target) for target in targets]

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def step(self, batch: Batch) -> None:
        """Forward, gradients, Adam."""
        inputs, targets = batch
        self._base.zero_grad()
        self._step(self._job.task_losses(self._wrapped(inputs), targets))

    def balance(self) -> list[Tensor]:
        """Losses, norms and weights of the last step, each of shape (T,).

        Raises:
            ValueError: nothing was balanced.
        """
        last = None if self._optimizer is None else self._optimizer.last_balance
        if last is None:
            raise ValueError("only a form that balances has a balance, and only after a step")
        return [last.losses, last.norms, last.weights]

    def weights(self) -> list[Tensor]:
        """Every parameter, whole; all ranks must call it."""
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self._parameters]
        return [parameter.detach().clone() for parameter in whole]


def _floor_step(model: Model, base: torch.optim.Optimizer) -> Step:
    """T backward passes, each sent as one flat message while the next runs, and one message for the heads."""
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())

    def flat(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [p.new_zeros(p.numel()) if g is None else g.reshape(-1) for g, p in zip(found, like, strict=True)]
        )

    def step(losses: list[Tensor]) -> None:
        rows, under_way = [], []
        of_heads = flat([None] * len(heads), heads)
        for index, loss in enumerate(losses):
            last = index == len(losses) - 1
            found = torch.autograd.grad(loss, trunk + heads, retain_graph=not last, allow_unused=True)
            rows.append(flat(found[: len(trunk)], trunk))
            under_way.append(dist.all_reduce(rows[-1], async_op=True))
            of_heads += flat(found[len(trunk) :], heads)
        dist.all_reduce(of_heads)
        for work in under_way:
            work.wait()
        for row in rows[1:]:
            rows[0] += row
        for parameters, gradient in ((trunk, rows[0]), (heads, of_heads)):
            gradient /= dist.get_world_size()
            pieces = torch.split(gradient, [parameter.numel() for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)
        base.step()

    return step


def _waiting(step: Callable[[list[Tensor]], Any]) -> Step:
    """The same step, every message of which arrives before anything else is done."""

    def at_once(send: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            work = send(*arguments, **options)
            if work is not None:
                work.wait()
            return work

        return run

    def run(losses: list[Tensor]) -> None:
        with ExitStack() as stack:
            for name in ("all_reduce", "all_to_all_single", "reduce_scatter_single", "reduce_scatter_tensor"):
                if hasattr(dist, name):
                    stack.enter_context(patch.object(dist, name, at_once(getattr(dist, name))))
            step(losses)

    return run
