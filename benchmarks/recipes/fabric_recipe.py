"""The balanced optimizer in Lightning Fabric. Copy the function and put your own base optimizer and schedule into it.

The network needs a module `trunk`, the shared part, and `network(*batch)` gives the task losses by name. Works in one
process, in full precision, bf16-mixed and 16-mixed. `fabric.save(path, train(...))` saves everything; `resume_from`
goes on from there bit for bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.fabric import Fabric

from balanced_optim import DualBalancedOptimizer


def train(
    fabric: Fabric,
    network: torch.nn.Module,
    loader: Iterable[Any],
    epochs: int,
    *,
    learning_rate: float = 1e-3,
    max_norm: float = 1.0,
    resume_from: str | None = None,
) -> dict[str, Any]:
    """Train on all task losses in balance and return all that has a state."""
    base = torch.optim.Adam(network.parameters(), lr=learning_rate)
    balanced = DualBalancedOptimizer(base, network.trunk)
    scheduler = torch.optim.lr_scheduler.StepLR(balanced, step_size=10)
    module, optimizer = fabric.setup(network, balanced)
    loader = fabric.setup_dataloaders(loader)
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    state = {"network": module, "optimizer": optimizer, "scheduler": scheduler} | ({"scaler": scaler} if scaler else {})
    if resume_from is not None:
        fabric.load(resume_from, state)
    for _ in range(epochs):
        for batch in loader:
            with fabric.autocast():  # the bare network: Fabric's own insists on fabric.backward in mixed precision
                losses = network(*batch)
            balanced.backward(losses, scaler)
            fabric.clip_gradients(module, optimizer, max_norm=max_norm, error_if_nonfinite=False)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return state
