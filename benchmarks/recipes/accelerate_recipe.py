"""The balanced optimizer in an Accelerate loop. Copy the function and put your own base optimizer and schedule into it.

The model needs a module `trunk`, the shared part, and `model(*batch)` gives the task losses by name. Works in one
process, with ``Accelerator(gradient_accumulation_steps=...)`` and with its scaler. After the call
``accelerator.save_state(folder)`` saves everything; `resume_from` goes on from there bit for bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator

from balanced_optim import DualBalancedOptimizer


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: Iterable[Any],
    epochs: int,
    *,
    learning_rate: float = 1e-3,
    max_norm: float = 1.0,
    resume_from: str | None = None,
) -> DualBalancedOptimizer:
    """Train on all task losses in balance and return the optimizer."""
    base = torch.optim.Adam(model.parameters(), lr=learning_rate)
    balanced = DualBalancedOptimizer(base, model.trunk)
    scheduler = torch.optim.lr_scheduler.StepLR(balanced, step_size=10)
    # What comes back wraps `balanced`: its step() and zero_grad() know micro-batches and the scaler, no backward().
    model, optimizer, loader, scheduler = accelerator.prepare(model, balanced, loader, scheduler)
    if resume_from is not None:
        accelerator.load_state(resume_from)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = model(*batch)  # raw losses: no accelerator.backward, which scales and divides them
                take_in = balanced.backward if accelerator.sync_gradients else balanced.accumulate
                take_in(losses, accelerator.scaler, samples=len(batch[0]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return balanced
