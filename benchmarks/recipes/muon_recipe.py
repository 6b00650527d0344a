"""Muon for the matrices of the shared part and AdamW for all else under one balance. Copy the class and the function.

One balance needs one optimizer that holds every parameter: `Chain` makes one of several. Schedulers, checkpoints and
`param_groups` work on it as on any other; the groups are those of its parts, in order, and none may be added later.
"""

from collections.abc import Callable
from typing import Any

import torch

from balanced_optim import DualBalancedOptimizer


class Chain(torch.optim.Optimizer):
    """Several optimizers of different parameters as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._join()

    def _join(self) -> None:
        """Let the parts live on the state and the groups of the whole."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[start:end]
            start = end

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parts; a closure is called once, before."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and hand the loaded state to the parts."""
        super().load_state_dict(state_dict)
        self._join()


def muon_beside_adamw(model: torch.nn.Module, trunk: torch.nn.Module, **options: Any) -> DualBalancedOptimizer:
    """Muon takes matrices only: heads, biases, norms and embeddings go to AdamW."""
    kinds = {id(m.weight): isinstance(m, torch.nn.Linear) for m in trunk.modules() if hasattr(m, "weight")}
    matrices = [p for p in trunk.parameters() if kinds.get(id(p))]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    base = Chain(torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3))
    return DualBalancedOptimizer(base, trunk, **options)
