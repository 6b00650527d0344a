"""DB-MTL as a textbook writes it: a slow float64 oracle that shares no code with the package.

Every quantity is a plain number or a flat float64 vector, tasks and parameters are keys of dictionaries, the logarithm
is really built, and a pass is made wherever one is named. Nothing is fused, saved or avoided.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rule:
    """How losses become gradients, and norms weights; by task as a mapping, or a list where tasks are numbers."""

    beta: float = 0.9
    beta_decay: float = 0.5
    eps: float = 1e-8
    log_transform: Any = True
    norm_target: Any = "max"
    norm_power: float = 1.0
    warmup_steps: int = 0
    max_weight: float | None = None
    fade_solved: bool = False
    task_weights: Any = None

    def has_log(self, task):
        if isinstance(self.log_transform, Mapping):
            return self.log_transform.get(task, True)
        return self.log_transform if isinstance(self.log_transform, bool) else self.log_transform[task]

    def least(self, task):
        """What the loss must be greater than."""
        return -self.eps if self.has_log(task) else -math.inf

    def power(self, k):
        """p_k in the k-th batch."""
        return self.norm_power * (min(1.0, k / self.warmup_steps) if self.warmup_steps else 1.0)

    def unsolved(self, task, loss):
        return max(0.0, loss / (loss + self.eps)) if self.fade_solved and self.has_log(task) else 1.0

    def priority(self, task):
        return 1.0 if self.task_weights is None else self.task_weights[task]


def common_length(norms, target):
    """alpha from the norms of the tasks that count."""
    if not isinstance(target, str):
        return float(target)
    ordered = sorted(norms)
    middle = len(ordered) // 2
    return {
        "max": lambda: ordered[-1],
        "rms": lambda: math.sqrt(sum(norm**2 for norm in ordered) / len(ordered)),
        "mean": lambda: sum(ordered) / len(ordered),
        "median": lambda: ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2,
        "min": lambda: ordered[0],
    }[target]()


def weights_of(norms, rule, losses=None, k=1, *, zero=0.0):
    """Dictionary task -> w_t for a dictionary task -> ||ema_t|| of the tasks in the batch.

    `zero`: the factor of a task whose norm is 0. The exact form has nothing to rescale there; the one-backward form
    has measured elsewhere.
    """
    weights = {}
    counting = [norm for norm in norms.values() if norm > 0]
    for task, norm in norms.items():
        factor = zero
        if norm > 0:
            factor = 1.0
            if rule.norm_target is not None:
                factor = (common_length(counting, rule.norm_target) / norm) ** rule.power(k)
        weight = factor * (1.0 if losses is None else rule.unsolved(task, losses[task]))
        weight = weight if rule.max_weight is None else min(weight, rule.max_weight)
        weights[task] = weight * rule.priority(task)
    return weights


# ------------------------------------------------- vectors


def to_vector(gradient, parameter, device="cpu"):
    """A gradient (None, sparse, complex, any dtype) as a flat float64 vector."""
    gradient = torch.zeros_like(parameter) if gradient is None else gradient
    gradient = (gradient.to_dense() if gradient.is_sparse else gradient).detach().to(device)
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    return gradient.double().reshape(-1).clone()


def to_gradient(vector, parameter):
    """The way back from `to_vector`."""
    vector = vector.to(parameter.device)
    if parameter.is_complex():
        return torch.view_as_complex(vector.reshape(*parameter.shape, 2)).to(parameter.dtype)
    return vector.reshape(parameter.shape).to(parameter.dtype)


class Vectors(dict):
    """Vectors by parameter; one that is missing counts as zero."""

    def __add__(self, other):
        return Vectors({key: self.get(key, 0) + other.get(key, 0) for key in [*self, *(other.keys() - self.keys())]})

    def __mul__(self, factor):
        return Vectors({key: vector * factor for key, vector in self.items()})

    def only(self, keys):
        return Vectors({key: self[key] for key in keys if key in self})

    def zeros(self):
        return self * 0.0 if self.finite() else Vectors({key: torch.zeros_like(v) for key, v in self.items()})

    def finite(self):
        return all(bool(vector.isfinite().all()) for vector in self.values())

    def norm(self):
        return math.sqrt(sum(float(vector @ vector) for vector in self.values()))


# ------------------------------------------------- the method


@dataclass
class Objective:
    """What a task is differentiated through: a value with a graph, and what came of micro-batches that are gone."""

    value: Any
    earlier: Vectors


class Oracle:
    """The method around `base`; losses come as a dictionary task -> loss, None for an absent task.

    A batch ends in None, "skip", "overflow" (under a scaler's scale) or a pair (error, words of its message).

    Args:
        base: a plain optimizer of all parameters.
        shared: the shared ones; those that do not train are passed over.
        form: "exact", "one backward" or "aggregator".
        rule: a `Rule`, or its fields.
        norm_params, refresh_every: of the one-backward form.
        aggregator: a function from a matrix, tasks by scalars, to a vector; both of numpy.
        nonfinite: "raise", "skip" or "ignore".
        outside: parameters that the losses reach and `base` does not hold.
        zeros: a task that is left out gets zeros instead of nothing, as on a device that is not asked.
        device: where the vectors are, whatever device the parameters are on.
    """

    def __init__(
        self,
        base,
        shared,
        *,
        form="exact",
        rule=None,
        norm_params=(),
        refresh_every=1,
        aggregator=None,
        nonfinite="raise",
        outside=(),
        zeros=False,
        device="cpu",
    ):
        self.base, self.form, self.device = base, form, device
        self.rule = rule if isinstance(rule, Rule) else Rule(**(rule or {}))
        self.shared = [parameter for parameter in shared if parameter.requires_grad]
        self.measured = list(norm_params) if form == "one backward" else self.shared
        self.refresh_every, self.aggregator, self.nonfinite = refresh_every, aggregator, nonfinite
        self.outside, self.zeros = list(outside), zeros
        self.reset_averages()
        self.losses = self.norms = self.weights = None
        self.skipped, self.matrix, self.moved = False, None, {}
        self.pending, self.skip = False, False

    # ------------------------------------------------- what a training loop calls

    def reset_averages(self):
        # k counts batches, `count` those of each task; `age` is the number of batches since a norm was measured.
        self.k, self.count, self.age, self.ema, self.reached = 0, {}, {}, {}, set()
        self.micro = None

    def step(self, losses=None, samples=1.0):
        """A whole step with `losses`; without, the base's own on what `.grad` holds."""
        outcome = None if losses is None else self.backward(losses, samples)
        if not self.skip and not isinstance(outcome, tuple):
            self.base.step()
        self.skip = self.pending = False
        return outcome

    def zero_grad(self, set_to_none=True):
        self.micro, self.pending, self.skip = None, False, False
        self.base.zero_grad(set_to_none)

    def accumulate(self, losses, samples=1.0, scale=None):
        """Raw gradients of one micro-batch, to be added up."""
        present = {task: loss for task, loss in losses.items() if loss is not None}
        bad = [task for task, loss in present.items() if not loss.isfinite()]
        if bad and self.nonfinite == "raise":
            return ValueError, f"loss of task '{bad[0]}'"
        self.micro = {} if self.micro is None else self.micro
        for task, loss in present.items():
            found = self.gradients(loss * samples, scale)
            self.micro.setdefault(task, []).append((samples, samples * loss.item(), found))
        return None

    def backward(self, losses, samples=1.0, scale=None):
        """The gradients of a batch into `.grad`, unscaled."""
        values, objectives = self.read(losses, samples)
        usable = [task for task, value in values.items() if self.rule.least(task) < value < math.inf]
        bad = [task for task in values if task not in usable]
        if bad and self.nonfinite != "ignore":
            return self.refuse(values, ValueError, f"loss of task '{bad[0]}'", scale)
        strict = scale is not None or self.nonfinite != "ignore"
        heads = [id(p) for p in self.trained() if not any(p is other for other in self.shared)]
        subset = [id(parameter) for parameter in self.measured]
        fresh = all(task in self.count and self.age[task] < self.refresh_every for task in usable)
        measures = self.form != "one backward" or not fresh

        own, proposed, taken, empty = Vectors(), {}, [], Vectors()
        for task in bad if self.zeros else ():
            empty += self.differentiate({task: 0.0}, objectives, scale).zeros()
        for task in usable:
            g = self.differentiate({task: 1.0}, objectives, scale).only([*subset, *heads] if measures else heads)
            if measures and not g.finite():
                if strict:
                    return self.refuse(values, RuntimeError, f"'{task}' must be finite", scale, proposed)
                empty += g.zeros() if self.zeros else Vectors()
                continue
            if measures:
                beta_k = self.rule.beta / (self.count.get(task, 0) + 1) ** self.rule.beta_decay
                proposed[task] = self.ema.get(task, Vectors()) * beta_k + g.only(subset) * (1 - beta_k)
            own += g.only(heads)
            taken.append(task)

        averages = {task: (self.ema | proposed)[task] for task in taken}
        norms = {task: average.norm() for task, average in averages.items()}
        zero = float(self.form == "one backward")
        weights = weights_of(norms, self.rule, values, self.k + 1, zero=zero)
        own += empty.only(heads)
        combined = self.combine(averages, weights, objectives, scale) + empty.only([id(p) for p in self.shared])
        if strict and not Vectors(own | combined).finite():  # one pass serves all tasks
            return self.refuse(values, RuntimeError, "together must be finite", scale, proposed)
        if self.form == "aggregator":
            weights = dict.fromkeys(taken, math.nan)
        self.commit(values, norms, weights, proposed, own, combined, taken)
        return None

    # ------------------------------------------------- parts of a batch

    def trained(self):
        """All parameters that a loss may reach."""
        inside = [parameter for group in self.base.param_groups for parameter in group["params"]]
        return [parameter for parameter in [*inside, *self.outside] if parameter.requires_grad]

    def gradients(self, value, scale=None):
        """By parameter, for those that `value` reaches."""
        trained = self.trained()
        found = torch.autograd.grad(value * (scale or 1.0), trained, retain_graph=True, allow_unused=True)
        pairs = [pair for pair in zip(trained, found, strict=True) if pair[1] is not None]
        return Vectors({id(p): to_vector(g, p, self.device) / (scale or 1.0) for p, g in pairs})

    def read(self, losses, samples):
        """The mean loss of each task over its micro-batches, as a number, and what it is differentiated through."""
        values, objectives, micro = {}, {}, self.micro or {}
        for task in [*losses, *(task for task in micro if task not in losses)]:
            parts, loss = micro.get(task, []), losses.get(task)
            if not parts and loss is None:
                continue
            number = sum(count for count, _, _ in parts) + (0 if loss is None else samples)
            mean = (sum(total for _, total, _ in parts) + (0 if loss is None else samples * loss)) / number
            values[task] = mean.item() if isinstance(mean, torch.Tensor) else mean
            factor, logged = 1 / number, self.rule.has_log(task)
            if logged:
                # grad log(mean loss) = sum_m grad(loss_m) / (number * mean loss)
                factor = math.nan if values[task] == -self.rule.eps else factor / (values[task] + self.rule.eps)
            value = None if loss is None else torch.log(mean + self.rule.eps) if logged else mean
            earlier = Vectors()
            for _, _, found in parts:
                earlier += found * factor
            objectives[task] = Objective(value, earlier)
        return values, objectives

    def differentiate(self, weights, objectives, scale):
        """The gradient of sum_t w_t * objective_t in one pass."""
        graphs = [w * objectives[task].value for task, w in weights.items() if objectives[task].value is not None]
        total = self.gradients(sum(graphs), scale) if graphs else Vectors()
        for task, weight in weights.items():
            total += objectives[task].earlier * weight
        return total

    def combine(self, averages, weights, objectives, scale):
        """The shared gradient of all tasks."""
        shared = [id(parameter) for parameter in self.shared]
        if not averages:
            return Vectors()
        if self.form == "one backward":
            return self.differentiate(weights, objectives, scale).only(shared)
        if self.form == "aggregator":
            return self.aggregate(averages)
        total = Vectors()
        for task, average in averages.items():
            total += average * weights[task]
        return total

    def aggregate(self, averages):
        """`aggregator` on the rows of the tasks that are there, cut into parameters again."""
        rows = [
            torch.cat([average.get(id(p), to_vector(None, p, self.device)) for p in self.shared])
            * self.rule.priority(task)
            for task, average in averages.items()
        ]
        self.matrix = torch.stack(rows).cpu().numpy()
        vector = torch.as_tensor(self.aggregator(self.matrix), device=self.device)
        sizes = [parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in self.shared]
        known = self.reached.union(*averages.values())
        parts = zip(self.shared, vector.split(sizes), strict=True)
        return Vectors({id(parameter): part for parameter, part in parts if id(parameter) in known})

    def refuse(self, values, error, words, scale, proposed=()):
        """Nothing moves; without a scaler averages of tasks before the bad one may have taken the batch in."""
        overflow = scale is not None and error is RuntimeError
        if scale is None:
            self.moved = {task: proposed[task] for task in proposed if self.count.get(task, 0)}
        if self.nonfinite == "raise" and not overflow:
            return error, words
        self.losses, self.norms, self.weights, self.skipped = values, {}, {}, True
        self.micro, self.skip = None, overflow or not self.pending
        return "overflow" if overflow else "skip"

    def commit(self, values, norms, weights, proposed, own, combined, taken):
        by_id = {id(parameter): parameter for parameter in self.trained()}
        self.reached |= combined.keys()
        reached = [key for key in self.reached if (taken or combined) and key in by_id]
        combined = Vectors({key: to_vector(None, by_id[key], self.device) for key in reached}) + combined
        for found in (own, combined):
            # With "ignore" what is not finite goes nowhere.
            for key, vector in (found if found.finite() else found.zeros()).items():
                gradient, parameter = to_gradient(vector, by_id[key]), by_id[key]
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self.k += bool(taken)
        self.age = {task: age + 1 for task, age in self.age.items()} | dict.fromkeys(proposed, 1)
        self.count |= {task: self.count.get(task, 0) + 1 for task in proposed}
        self.ema |= proposed
        self.losses, self.norms, self.weights, self.skipped = values, norms, weights, False
        self.micro, self.pending, self.skip = None, True, False

    # ------------------------------------------------- what tests look at

    def balance(self, tasks):
        """Losses, norms and weights in the order of `tasks`; None before the first batch."""
        if self.losses is None:
            return None
        columns = (self.losses, math.nan), (self.norms, math.nan), (self.weights, 0.0)
        return [[known.get(task, missing) for task in tasks] for known, missing in columns]

    def average(self, task, parameter):
        """A task's average on one parameter, shaped like it."""
        return to_gradient(self.ema.get(task, {}).get(id(parameter), to_vector(None, parameter)), parameter)
