"""The balanced optimizer in transformers.Trainer. Copy the class; use it like Trainer.

`model(**inputs)` gives the task losses by name; the shared part is `model.base_model`, as in pretrained models.
Works on one device, with any ``TrainingArguments(optim=..., lr_scheduler_type=..., gradient_accumulation_steps=...,
max_grad_norm=...)``, and resumes bit for bit through ``trainer.train(resume_from_checkpoint=...)``. Logged losses, in
training and in evaluation, are sums of the raw task losses.
"""

from typing import Any

import torch
from transformers import Trainer

from balanced_optim import DualBalancedOptimizer


class BalancedTrainer(Trainer):
    """A Trainer that trains on all task losses in balance."""

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Wrap the optimizer that the arguments ask for; Trainer builds the schedule on the result."""
        if self.optimizer is None:
            base = super().create_optimizer(*args)
            self.optimizer = DualBalancedOptimizer(base, self.model.base_model)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The sum of the raw losses, for logs, and the losses themselves."""
        losses = model(**inputs)
        total = torch.stack(list(losses.values())).sum()
        return (total, losses) if return_outputs else total

    def training_step(self, model: Any, inputs: Any, *_: Any) -> torch.Tensor:
        """Fill `.grad`; Trainer then clips, steps the optimizer and the schedule, and clears `.grad`."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            total, losses = self.compute_loss(model, inputs, return_outputs=True)
        balanced = self.optimizer.optimizer  # Trainer has its optimizer wrapped by Accelerate
        take_in = balanced.backward if self.accelerator.sync_gradients else balanced.accumulate
        take_in(losses, self.accelerator.scaler, samples=len(next(iter(inputs.values()))))
        return total.detach() / self.current_gradient_accumulation_steps
