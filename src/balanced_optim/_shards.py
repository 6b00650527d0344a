"""Parameters that `fully_shard` (FSDP2) distributes: DTensors, also over meshes of several dimensions.

FSDP2 reduces gradients in each backward pass; what is left is to keep averages of the local shards, and to add up
squared norms over the mesh. A pass cannot stop at some parameters, so that in the one-backward form measuring costs T
full passes (see `refresh_every`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._meeting import Ranks, ordered_sum
from ._numbers import Flag, on_device
from ._passes import Gradients, take_backward

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether FSDP2 or tensor parallelism has distributed it."""
    # Importing torch.distributed.tensor takes time, which one process need not spend.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class Shards(Ranks):
    """Every rank keeps a part of each parameter, and of each average.

    If the trunk was given as a module, its parameters stay gathered between the passes of a batch: (T - 1) n fewer
    scalars are gathered, and n more are in memory for that time. Given as parameters, FSDP2's own setting holds.
    """

    reduces_in_passes = True
    agrees = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        parameters: Sequence[Tensor],
        averaged: Sequence[Tensor],
        trunk: nn.Module | None,
    ) -> None:
        kept = [_dtensor(parameter) for parameter in averaged]
        distributed = [_dtensor(p) for p in parameters if is_dtensor(p) or p.requires_grad]
        super().__init__(group, distributed[0].to_local().device)
        self.averaging = self.size
        ranks = set(dist.get_process_group_ranks(group))
        for tensor in {id(p.device_mesh): p for p in distributed}.values():
            _check_mesh(tensor, ranks)
        mesh = max((p.device_mesh for p in distributed), key=lambda mesh: mesh.ndim)
        self._norm_groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        self.shares = [_held_once(parameter) / mesh.size() for parameter in kept]
        self._modules = _fsdp_modules(trunk)

    def parts(self, averaged: Sequence[Tensor]) -> list[Tensor]:
        """The local shards."""
        return [_dtensor(parameter).to_local().detach() for parameter in averaged]

    def agree(self, ok: Flag) -> Flag:
        """One message of a number: a bool on a CPU, a tensor that the host has not waited for elsewhere."""
        refused = self.total(torch.as_tensor(ok, device=self._device).logical_not().float().reshape(1))[0] > 0
        return refused.logical_not() if on_device(self._device) else not bool(refused)

    def total(self, counted: Tensor) -> Tensor:
        """The sum over all ranks that hold parts, the same bits on each of them and for each element alone."""
        vector = counted.to(self._device).reshape(-1)
        for group in self._norm_groups:
            vector = ordered_sum(self._gather(vector, group))
        return vector.reshape(counted.shape).to(counted.device)

    def _check_presence(self, here: list[list[float]], tasks: Sequence[str]) -> None:
        for task, name in enumerate(tasks):
            ranks = [rank for rank, present in enumerate(here) if present[task]]
            if 0 < len(ranks) < self.size:
                missing = min(set(range(self.size)) - set(ranks))
                raise ValueError(
                    f"loss of task {name!r} must be on every rank or on none where parameters are sharded, got it on "
                    f"{ranks} but not on rank {missing}: FSDP2 communicates in every pass; nothing was changed; on a "
                    "rank that lacks the task compute the loss on any input and pass samples=0 for it"
                )

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Not here: the others wait in a pass for one that has failed, not for its message."""
        yield

    def take(
        self,
        losses: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        names: Sequence[str],
        parameters: Sequence[Tensor],
        *,
        retain_graph: bool,
        inputs: Sequence[Tensor] | None = None,  # noqa: ARG002
    ) -> Gradients:
        """A full `.backward()`, the last one of which leaves the parameters sharded; local shards of the gradients."""
        for module in self._modules:
            module.set_reshard_after_backward(not retain_graph, recurse=False)
        found = take_backward(losses, cotangents, names, parameters, retain_graph=retain_graph)
        if all(gradient is None for gradient in found):
            raise ValueError(f"tasks {list(names)} must reach a sharded parameter, but none got a gradient{self.hint}")
        return [_dtensor(g).to_local() if g is not None and is_dtensor(g) else g for g in found]

    def wrap(self, own: Tensor, parameter: Tensor) -> Tensor:
        """A DTensor laid out like the parameter."""
        if not is_dtensor(parameter) or is_dtensor(own):
            return own
        from torch.distributed.tensor import DTensor

        like = _dtensor(parameter)
        # A DTensor around a piece of a larger tensor cannot be copied or saved.
        alone = own.untyped_storage().nbytes() == own.numel() * own.itemsize
        result: Tensor = DTensor.from_local(
            own if alone else own.clone(),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return result

    def own(self, entry: Tensor, parameter: Tensor) -> Tensor:
        """The local shard of an average that comes whole, or sharded as the parameters are."""
        from torch.distributed.tensor import distribute_tensor

        like = _dtensor(parameter)
        mesh = like.device_mesh
        if is_dtensor(entry):
            tensor = _dtensor(entry)
            if tensor.placements == like.placements and tensor.device_mesh == mesh:
                return tensor.to_local()
            entry = tensor.full_tensor()
        return distribute_tensor(entry.to(mesh.device_type), mesh, like.placements).to_local()

    def reset(self) -> None:
        """Shard again what the passes left gathered."""
        for module in self._modules:
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()


def _dtensor(tensor: Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        raise ValueError(
            "parameters in base_optim must all be sharded or all be plain, got DTensors and a plain one of shape "
            f"{tuple(tensor.shape)}; call fully_shard on the root module too, before the optimizer is built"
        )
    return tensor


def _held_once(parameter: DTensor) -> int:
    """How many ranks of its mesh together hold a parameter once."""
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def _check_mesh(parameter: DTensor, ranks: set[int]) -> None:
    """Raise unless the group holds the ranks over which this parameter's gradient is averaged."""
    mesh = parameter.device_mesh
    covered = [set(dist.get_process_group_ranks(mesh.get_group(d))) <= ranks for d in range(mesh.ndim)]
    # FSDP2's dimensions come first: those it replicates over, then the one it shards over; tensor parallelism after.
    sharded = [not placement.is_replicate() for placement in parameter.placements]
    needed = sharded.index(True) + 1 if any(sharded) else mesh.ndim
    if not all(covered[:needed]):
        raise ValueError(
            f"process_group must hold the ranks that the batch is split over, got ranks {sorted(ranks)} for a "
            f"parameter of shape {tuple(parameter.shape)} on {mesh} with {parameter.placements}; pass the group of the "
            "data-parallel dimension of the mesh, e.g. mesh['dp'].get_group(), or of all its dimensions for hybrid "
            "sharding"
        )


def _fsdp_modules(trunk: nn.Module | None) -> list[Any]:
    if trunk is None:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in trunk.modules() if isinstance(module, FSDPModule)]
