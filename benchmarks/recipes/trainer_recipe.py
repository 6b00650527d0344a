"""The balanced optimizer in transformers.Trainer. Copy the class; use it like Trainer.

`model(**inputs)` gives a dict: under "losses" the task losses by name, beside it whatever metrics are made of. The
shared part is `model.base_model`, as in pretrained models, also under PEFT. Works on one device, with any
``TrainingArguments(optim=..., lr_scheduler_type=..., gradient_accumulation_steps=..., max_grad_norm=...)``, and resumes
bit for bit through ``trainer.train(resume_from_checkpoint=...)``. Logs hold the sum of the raw losses and, by task,
loss, norm and weight. ``TrainingArguments(label_names=[...])`` makes an evaluation report `eval_loss`, and give
`compute_metrics` the rest.
"""

from typing import Any

from transformers import Trainer

from balanced_optim import DualBalancedOptimizer


class BalancedTrainer(Trainer):
    """A Trainer that trains on all task losses in balance."""

    def create_optimizer(self, *args: Any) -> Any:
        """Wrap the optimizer that the arguments ask for; Trainer builds the schedule on the result."""
        if self.optimizer is None:
            bare = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            self.optimizer = DualBalancedOptimizer(super().create_optimizer(*args), bare.base_model)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The sum of the raw losses, for logs, and the outputs."""
        outputs = model(**inputs)
        total = sum(outputs["losses"].values())
        return (total, outputs) if return_outputs else total

    def training_step(self, model: Any, inputs: Any, *_: Any) -> Any:
        """Fill `.grad`; Trainer then clips, steps the optimizer and the schedule, and clears `.grad`."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            total, outputs = self.compute_loss(model, inputs, return_outputs=True)
        balanced = self.optimizer.optimizer  # Trainer has its optimizer wrapped by Accelerate
        take_in = balanced.backward if self.accelerator.sync_gradients else balanced.accumulate
        take_in(outputs["losses"], self.accelerator.scaler, samples=len(next(iter(inputs.values()))))
        return total.detach() / self.current_gradient_accumulation_steps

    def prediction_step(self, model: Any, inputs: Any, loss_only: bool, ignore_keys: Any = None) -> Any:
        """Predictions are all outputs but the losses."""
        return super().prediction_step(model, inputs, loss_only, [*(ignore_keys or []), "losses"])

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Add what the last step saw, by task."""
        balance = self.optimizer.optimizer.last_balance if "loss" in logs else None
        for kind in ("losses", "norms", "weights") if balance else ():
            logs |= {f"{kind}/{t}": v for t, v in zip(balance.tasks, getattr(balance, kind).tolist(), strict=True)}
        super().log(logs, *args)
