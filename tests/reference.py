"""DB-MTL as a textbook writes it: a slow float64 oracle that shares no code with the package.

Every quantity is a plain number or a flat numpy vector, every task has an entry in a dictionary, and the logarithm
is really built. Nothing is fused, saved or avoided.
"""

import numpy as np
import torch


def common_length(norms, norm_target):
    """alpha from the norms of the tasks that count."""
    ordered = sorted(norms)
    if norm_target == "median":
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    if norm_target == "mean":
        return sum(ordered) / len(ordered)
    return ordered[-1] if norm_target == "max" else ordered[0]


def weights_of(norms, norm_target="max", max_weight=None, priorities=None, unsolved=None):
    """Dictionary task -> w_t for a dictionary task -> ||ema_t|| of the tasks in the batch."""
    weights = dict.fromkeys(norms, 0.0)
    counting = {task: norm for task, norm in norms.items() if norm > 0}
    for task, norm in counting.items():
        weight = 1.0 if norm_target is None else common_length(counting.values(), norm_target) / norm
        weight *= 1.0 if unsolved is None else max(0.0, unsolved[task])
        if max_weight is not None:
            weight = min(weight, max_weight)
        weights[task] = weight * (1.0 if priorities is None else priorities[task])
    return weights


def to_vector(gradient, parameter):
    """A gradient (None, sparse, complex, any dtype) as a flat float64 vector."""
    if gradient is None:
        gradient = torch.zeros_like(parameter)
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    return gradient.detach().double().reshape(-1).numpy().copy()


def to_gradient(vector, parameter):
    """The way back from `to_vector`."""
    vector = torch.from_numpy(vector)
    if parameter.is_complex():
        return torch.view_as_complex(vector.reshape(*parameter.shape, 2)).to(parameter.dtype)
    return vector.reshape(parameter.shape).to(parameter.dtype)


def accumulate(parameter, gradient):
    """``parameter.grad += gradient``."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class Reference:
    """The method around `base`; losses come as a dictionary task -> loss, None for an absent task."""

    def __init__(
        self,
        base,
        shared,
        *,
        beta=0.9,
        beta_decay=0.5,
        eps=1e-8,
        log_transform=True,
        norm_target="max",
        max_weight=None,
        task_weights=None,
        fade_solved=False,
    ):
        self.base = base
        self.shared = [parameter for parameter in shared if parameter.requires_grad]
        self.beta, self.beta_decay = beta, beta_decay
        self.eps, self.log_transform = eps, log_transform
        self.rule = (norm_target, max_weight, task_weights)
        self.fade_solved = fade_solved
        self.ema, self.count, self.reached = {}, {}, set()
        self.norms, self.weights = {}, {}

    def step(self, losses):
        self.backward(losses)
        self.base.step()

    def backward(self, losses):
        present = {task: loss for task, loss in losses.items() if loss is not None}
        all_parameters = [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]
        is_shared = {id(parameter) for parameter in self.shared}
        heads = [parameter for parameter in all_parameters if id(parameter) not in is_shared]
        self.norms = {}
        for task, loss in present.items():
            value = torch.log(loss + self.eps) if self.log_transform else loss
            gradients = torch.autograd.grad(value, self.shared + heads, retain_graph=True, allow_unused=True)
            shared_gradients, head_gradients = gradients[: len(self.shared)], gradients[len(self.shared) :]
            for parameter, gradient in zip(heads, head_gradients, strict=True):
                if gradient is not None:
                    accumulate(parameter, gradient)
            self.reached |= {i for i, gradient in enumerate(shared_gradients) if gradient is not None}
            g = np.concatenate([to_vector(*pair) for pair in zip(shared_gradients, self.shared, strict=True)])
            k = self.count[task] = self.count.get(task, 0) + 1
            beta_k = self.beta / k**self.beta_decay
            self.ema[task] = beta_k * self.ema.get(task, np.zeros_like(g)) + (1 - beta_k) * g
            self.norms[task] = float(np.linalg.norm(self.ema[task]))
        unsolved = {task: (loss / (loss + self.eps)).item() for task, loss in present.items()}
        self.weights = weights_of(self.norms, *self.rule, unsolved if self.fade_solved else None)
        if not present:
            return
        combined = sum(self.weights[task] * self.ema[task] for task in present)
        start = 0
        for index, parameter in enumerate(self.shared):
            size = parameter.numel() * (2 if parameter.is_complex() else 1)
            if index in self.reached:
                accumulate(parameter, to_gradient(combined[start : start + size], parameter))
            start += size
