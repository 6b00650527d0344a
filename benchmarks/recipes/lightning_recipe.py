"""The balanced optimizer in Lightning, by manual optimization. Copy the class and put your own network into it.

The network needs a module `trunk`, the shared part, and `network(*batch)` gives the task losses by name. Works in one
process, in full precision, bf16-mixed and 16-mixed (the scaler is the precision plugin's), and resumes bit for bit
through ``trainer.fit(..., ckpt_path=...)``. To clip, override `on_before_optimizer_step`: gradients are unscaled there.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule

from balanced_optim import DualBalancedOptimizer


class BalancedModule(LightningModule):
    """Trains `network` on all its task losses in balance; `micro_batches` batches make one optimizer step."""

    def __init__(self, network: torch.nn.Module, learning_rate: float = 1e-3, micro_batches: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False  # in place of Trainer(accumulate_grad_batches=...): micro_batches
        self.network, self.learning_rate, self.micro_batches = network, learning_rate, micro_batches

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        """Any optimizer of all parameters goes inside; the scheduler gets the balanced one."""
        base = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        optimizer = DualBalancedOptimizer(base, self.network.trunk)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Raw losses go to `backward` and `accumulate`, never through `self.manual_backward`."""
        losses = self.network(*batch)
        shell = self.optimizers()  # its step() advances trainer.global_step, and steps and updates the scaler
        optimizer = shell.optimizer
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if (batch_idx + 1) % self.micro_batches and not self.trainer.is_last_batch:
            optimizer.accumulate(losses, scaler, samples=len(batch[0]))
            return
        optimizer.backward(losses, scaler, samples=len(batch[0]))
        shell.step()
        optimizer.zero_grad()  # after the step: before it, micro-batches would be dropped
        self.lr_schedulers().step()
        self.log_dict(dict(zip(optimizer.last_balance.tasks, optimizer.last_balance.losses, strict=True)))
