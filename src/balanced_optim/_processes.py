"""Which ranks share the work, and frameworks that own parameters in a way that T backward passes would break."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._meeting import Alone, Ranks
from ._members import Layout
from ._numbers import accumulation_dtype
from ._replicas import Replicas
from ._shards import Shards, is_dtensor

ALONE = Alone()


class Processes:
    """Finds how the ranks work together; what depends on the parameters at first use, since FSDP2 may replace them.

    Args:
        group: the ranks that the batch is split over, None for one process.
        trunk: the shared parameters' module if it was given as one.
    """

    def __init__(self, group: dist.ProcessGroup | None, trunk: nn.Module | None) -> None:
        self.group = group
        self._trunk = None if trunk is None or group is None else weakref.ref(trunk)
        self._found: tuple[Layout, Alone] | None = None

    def over(self, layout: Layout) -> Alone:
        """How the ranks work together on these parameters.

        Raises:
            ValueError: the parameters belong to something that this library cannot work with.
        """
        if self._found is None or self._found[0] is not layout:
            self._found = layout, self._find(layout)
        return self._found[1]

    def _find(self, layout: Layout) -> Alone:
        check_framework(layout.parameters, self.group is not None)
        if self.group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return ALONE
            alone = Alone()
            alone.hint = Ranks.hint
            return alone
        if any(is_dtensor(parameter) for parameter in layout.parameters):
            trunk = None if self._trunk is None else self._trunk()
            return Shards(self.group, layout.parameters, layout.averaged, trunk)
        wide = any(accumulation_dtype(p.dtype) == torch.float64 for p in layout.averaged)
        return Replicas(self.group, layout.shared, layout.heads, torch.float64 if wide else torch.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return Processes(self.group, None if self._trunk is None else self._trunk())

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError("an optimizer with a process_group cannot be pickled; save its state_dict() instead")
        return {"group": None, "_trunk": None, "_found": None}


def check_process_group(group: object) -> None:
    """Raise unless a step can be shared by `group`."""
    if group is not None and (not dist.is_available() or not isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup that this rank is in, or None, got {group!r}; "
            "pass torch.distributed.group.WORLD after init_process_group(), or mesh.get_group()"
        )


def check_framework(parameters: Sequence[Tensor], grouped: bool) -> None:
    """Raise where another library owns the parameters in a way that T backward passes would break without a word.

    Frameworks are known by what they leave on parameters.

    Raises:
        ValueError: FSDP1 or DeepSpeed's ZeRO holds them; or FSDP2 does, and no process group was given.
    """
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise ValueError(
            "parameters must not be partitioned by DeepSpeed's ZeRO, whose gradients exist only inside its own engine; "
            "use FSDP2 (torch.distributed.fsdp.fully_shard) and process_group"
        )
    if any(hasattr(p, "_fsdp_flattened") or type(p).__name__ == "FlatParameter" for p in parameters):
        raise ValueError(
            "parameters must not be sharded by FullyShardedDataParallel (FSDP1), which reduces one backward pass a "
            "step only; use FSDP2: torch.distributed.fsdp.fully_shard, and process_group"
        )
    if not grouped and any(is_dtensor(parameter) for parameter in parameters):
        raise ValueError(
            "process_group is needed where parameters are DTensors, got None; pass the ranks that the batch is split "
            "over: process_group=mesh.get_group() of a mesh of one dimension, or that of its data-parallel dimension"
        )


def is_one_of_several() -> bool:
    """Whether this process is a rank of a larger world."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
