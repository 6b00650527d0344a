"""Random programs of calls against a slow float64 model of the method that shares no code with the package.

BALANCED_OPTIM_PROGRAMS=10000 runs that many programs, with a new seed each time.
"""

import io
import math
import os
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from cases import BadGradient, one_thread, with_value  # noqa: F401
from conftest import header_of
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from reference import weights_of

from balanced_optim import DualBalancedOptimizer

assert_close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
PROGRAMS = int(os.environ.get("BALANCED_OPTIM_PROGRAMS", "0"))
SHARED = ("lower", "upper", "side")
SEEN = Counter()  # what the programs did, so that the test can tell that they did everything


def network(tasks, seed=0):
    """Parameters by name: three shared ones, of which the last task alone uses `side`, and a head for each task."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"lower": (3, 4), "upper": (4, 4), "side": (4,)} | {f"head{task}": (4,) for task in range(tasks)}
    draw = lambda size: torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    return {name: draw(size) for name, size in sizes.items()}


def grow(net):
    """A later parameter of the first head, as a param group."""
    net["late"] = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    return {"params": [net["late"]]}


def losses_of(net, seed, faults, limit=math.inf):
    """A loss a task, None for an absent one. `faults`: what is wrong with each; gradients of `limit` overflow."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden, losses = torch.tanh(x @ net["lower"]), []
    for task, fault in enumerate(faults):
        poison = lambda tensor, place, fault=fault: BadGradient.apply(tensor, math.nan) if fault == place else tensor  # noqa: E731
        features = poison(torch.tanh(poison(hidden, "below") @ net["upper"]), "trunk")
        features = features * net["side"] if task == len(faults) - 1 else features
        head = poison(net[f"head{task}"], "head") + (net["late"] if task == 0 and "late" in net else 0)
        loss = 4.0**task * ((features @ head - 1).square().mean() + 0.1)
        loss.register_hook(lambda gradient: torch.where(gradient.abs() < limit, gradient, math.inf))
        values = {"nan": math.nan, "inf": math.inf, "negative": -1.0}
        losses.append(None if fault == "absent" else with_value(loss, values[fault]) if fault in values else loss)
    return losses


# ------------------------------------------------- the model: gradients are dictionaries by name


class Gradients(dict):
    """By name of the parameter; a name that is missing counts as zero."""

    def __add__(self, other):
        return Gradients({name: self.get(name, 0) + other.get(name, 0) for name in self | other})

    def __mul__(self, factor):
        return Gradients({name: gradient * factor for name, gradient in self.items()})

    def only(self, names):
        return Gradients({name: gradient for name, gradient in self.items() if name in names})

    def zeros(self):
        return Gradients({name: torch.zeros_like(gradient) for name, gradient in self.items()})

    def finite(self):
        return all(bool(gradient.isfinite().all()) for gradient in self.values())


class Model:
    """The method around a plain optimizer. A batch ends in None, "skip", "overflow" or (error, words)."""

    def __init__(self, net, base, options):
        self.net, self.base, self.o, self.tasks = net, base, options, range(options["tasks"])
        self.counts, self.age, self.ema, self.reached = None, {}, {}, set()
        self.zero_grad()
        self.balance, self.moved = None, {}

    def zero_grad(self, set_to_none=True):
        self.micro, self.pending, self.skip = None, False, False
        self.base.zero_grad(set_to_none)

    def gradient(self, loss, start, names, scale):
        leaves = [self.net[name] for name in names]
        found = torch.autograd.grad(loss * start * (scale or 1), leaves, retain_graph=True, allow_unused=True)
        return Gradients({n: g / (scale or 1) for n, g in zip(names, found, strict=True) if g is not None})

    def accumulate(self, losses, samples, scale=None):
        bad = [task for task in self.tasks if losses[task] is not None and not losses[task].isfinite()]
        if bad and self.o["nonfinite"] == "raise":
            return ValueError, f"loss of task '{self.o['names'][bad[0]]}'"
        self.micro = self.micro or {task: [] for task in self.tasks}
        for task, loss in enumerate(losses):
            if loss is not None:
                found = self.gradient(loss, samples, list(self.net), scale)
                part = lambda start, names, found=found: found.only(names) * start  # noqa: E731
                self.micro[task].append((samples, samples * loss.item(), part))
        return None

    def backward(self, losses, samples=1.0, scale=None):
        o, total, self.mean, parts = self.o, {}, {}, {}
        for task, loss in enumerate(losses):
            part = lambda start, names, loss=loss: self.gradient(loss, samples * start, names, scale)  # noqa: E731
            last = [] if loss is None else [(samples, samples * loss.item(), part)]
            if each := (self.micro[task] if self.micro else []) + last:
                counts, values, parts[task] = zip(*each, strict=True)
                total[task], self.mean[task] = sum(counts), sum(values) / sum(counts)

        def of_mean_loss(task, names, weight=1.0):
            start = weight / total[task] / (self.mean[task] + o["eps"] if o["log_transform"] else 1.0)
            return sum((part(start, names) for part in parts[task]), Gradients())

        least = -o["eps"] if o["log_transform"] else -math.inf
        fine = [task for task, value in self.mean.items() if least < value < math.inf]
        bad = [task for task in self.mean if task not in fine]
        if o["nonfinite"] != "ignore" and bad:
            return self.refuse(ValueError, f"loss of task '{o['names'][bad[0]]}'", scale)
        strict = scale is not None or o["nonfinite"] != "ignore"
        heads, subset = [name for name in self.net if name not in SHARED], ["upper"] if o["joint"] else list(SHARED)
        known = self.counts and all(self.counts[task] and self.age[task] < o["refresh_every"] for task in fine)
        measured = not o["joint"] or not known
        own, proposed, taken, combined = Gradients(), {}, [], Gradients()
        for task in fine:
            found = of_mean_loss(task, subset + heads if measured else heads)
            if measured and not found.finite():
                if strict:
                    return self.refuse(RuntimeError, f"'{o['names'][task]}' must be finite", scale, proposed)
                continue
            if measured:
                beta = o["beta"] / (1 + (self.counts[task] if self.counts else 0)) ** o["beta_decay"]
                proposed[task] = self.ema.get(task, Gradients()) * beta + found.only(subset) * (1 - beta)
            own += found.only(heads)
            taken.append(task)
        averages = {task: (self.ema | proposed)[task] for task in taken}
        norms = {task: math.sqrt(sum(float(g.square().sum()) for g in averages[task].values())) for task in taken}
        unsolved = (
            {task: self.mean[task] / (self.mean[task] + o["eps"]) for task in taken} if o["fade_solved"] else None
        )
        weights = weights_of(norms, o["norm_target"], o["max_weight"], o["priorities"], unsolved)
        for task, weight in weights.items():
            combined += of_mean_loss(task, SHARED, weight) if o["joint"] else averages[task] * weight
        if strict and not Gradients(own | combined).finite():  # one pass serves all tasks
            return self.refuse(RuntimeError, "together must be finite", scale, proposed)
        self.reached |= combined.keys()
        combined = Gradients({name: self.net[name] for name in self.reached if taken}).zeros() + combined
        for gradients in (own, combined):
            for name, gradient in (gradients if gradients.finite() else gradients.zeros()).items():
                old = self.net[name].grad
                self.net[name].grad = gradient if old is None else old + gradient
        self.counts = [count + (task in proposed) for task, count in enumerate(self.counts or [0] * len(self.tasks))]
        self.age = {task: 1 if task in proposed else self.age.get(task, 0) + 1 for task in self.tasks}
        self.ema |= proposed
        self.record(norms, weights, False)
        self.micro, self.pending, self.skip = None, True, False
        return None

    def refuse(self, error, words, scale, proposed=()):
        """Nothing moves; without a scaler averages of tasks before the bad one may have taken the batch in."""
        overflow = scale is not None and error is RuntimeError
        if scale is None and self.counts:
            self.moved = {task: proposed[task] for task in proposed if self.counts[task]}
        if self.o["nonfinite"] == "raise" and not overflow:
            return error, words
        self.record({}, {}, True)
        self.micro, self.skip = None, overflow or not self.pending
        return "overflow" if overflow else "skip"

    def record(self, norms, weights, skipped):
        columns = (self.mean, math.nan), (norms, math.nan), (weights, 0.0)
        self.balance = [[known.get(task, missing) for task in self.tasks] for known, missing in columns], skipped

    def step(self):
        if not self.skip:
            self.base.step()
        self.skip = self.pending = False


# ------------------------------------------------- the programs


def one_of(*choices):
    return st.sampled_from(choices)


seeds, samples = st.integers(0, 30), one_of(1, 1, 2, 3)
FAULTS = ["good"] * 12 + ["absent"] * 3 + ["nan", "inf", "negative", "trunk", "head", "below"]
faults = st.lists(one_of(*FAULTS), min_size=4, max_size=4)
METHOD = {"beta": one_of(0.0, 0.5, 0.9), "beta_decay": one_of(0.0, 0.5), "eps": one_of(1e-8, 0.1)}
METHOD |= {"log_transform": one_of(True, True, False), "max_weight": one_of(None, None, 1.0, 2.0)}
METHOD |= {"norm_target": one_of("max", "max", "mean", "median", "min", None)}
METHOD |= {"fade_solved": one_of(False, False, True)}
METHOD |= {"nonfinite": one_of("raise", "skip", "ignore")}
OPTIONS = METHOD | {"tasks": st.integers(1, 4), "joint": st.booleans(), "refresh_every": st.integers(1, 3)}
OPTIONS |= {"form": one_of("list", "mapping", "weights by name"), "adam": st.booleans()}
OPTIONS |= {"vectorize": st.booleans()}
OPTIONS |= {"priorities": one_of(None, None, (1.0, 0.5, 2.0, 1.0), (3.0, 1.0, 0.0, 1.0))}


def base_of(net, adam):
    parameters = list(net.values())
    return torch.optim.Adam(parameters, 0.02, eps=1e-3) if adam else torch.optim.SGD(parameters, 0.02, momentum=0.9)


class Programs(stateful.RuleBasedStateMachine):
    """The package's optimizer and the model, each with a network of its own, get the same calls."""

    @stateful.initialize(o=st.fixed_dictionaries(OPTIONS))
    def start(self, o):
        tasks, self.by_name = o["tasks"], o["form"] == "weights by name"
        given = (o["priorities"] or (1.0,) * 4)[:tasks] if self.by_name or o["priorities"] else None
        o["fade_solved"] &= o["log_transform"] and o["norm_target"] is not None
        self.o = o | {"priorities": given, "names": [f"{'' if o['form'] == 'list' else 't'}{t}" for t in range(tasks)]}
        net = network(tasks)
        self.model = Model(net, base_of(net, o["adam"]), self.o)
        self.wrap()
        SEEN["programs"] += 1

    def wrap(self, seed=0):
        """A fresh network, optimizer, scheduler and scaler, grown to the size of the model's."""
        o, self.net, self.stepped = self.o, network(self.o["tasks"], seed), False
        shared = [self.net[name] for name in SHARED]
        form = {"norm_params": shared[1:2], "refresh_every": o["refresh_every"]} if o["joint"] else {}
        form["task_weights"] = dict(zip(o["names"], o["priorities"], strict=True)) if self.by_name else o["priorities"]
        form |= {name: o[name] for name in METHOD} | {"vectorize": o["vectorize"] and not o["joint"]}
        self.optimizer = DualBalancedOptimizer(base_of(self.net, o["adam"]), shared, **form)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        if "late" in self.model.net:
            self.optimizer.add_param_group(grow(self.net))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)

    def losses(self, seed, faults, *limit):
        """For the model, and for the package: a mapping leaves absent tasks out once it may."""
        faults = faults[: self.o["tasks"]]
        mine, given = (losses_of(net, seed, faults, *limit) for net in (self.model.net, self.net))
        if self.o["form"] == "list":
            return mine, given
        known = self.by_name or self.model.counts or self.model.micro is not None
        return mine, {n: loss for n, loss in zip(self.o["names"], given, strict=True) if loss is not None or not known}

    def expect(self, outcome, call, step=False):
        """The call ends in `outcome`; with `step` it steps too. Whether it raised no error."""
        SEEN["calls"] += 1
        SEEN[outcome[0].__name__ if isinstance(outcome, tuple) else outcome or "taken"] += 1
        if isinstance(outcome, tuple):
            with pytest.raises(outcome[0], match=outcome[1]):
                call()
            return False
        call()
        if step:
            self.model.step()
            self.stepped = True
        return True

    @stateful.rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none)
        self.optimizer.zero_grad(set_to_none)

    @stateful.rule(seed=seeds, faults=faults, samples=samples, way=one_of("step", "closure", "backward", "clip"))
    def batch(self, seed, faults, samples, way):
        stepping = way in ("step", "closure")
        if stepping and self.model.micro is None:
            self.zero_grad()
        mine, given = self.losses(seed, faults)
        call = self.optimizer.step if stepping else self.optimizer.backward
        first = (lambda: given) if way == "closure" else given
        self.expect(self.model.backward(mine, samples), lambda: call(first, samples=samples), stepping)
        for net in (self.net, self.model.net) if way == "clip" else ():
            torch.nn.utils.clip_grad_norm_(net.values(), 0.1)

    @stateful.rule()
    def step(self):
        waiting = self.model.micro is not None
        outcome = self.model.backward([None] * self.o["tasks"]) if waiting else None
        self.expect(outcome, self.optimizer.step, step=True)

    @stateful.rule(seed=seeds, faults=faults, samples=samples)
    def accumulate(self, seed, faults, samples, *scaled):
        mine, given = self.losses(seed, faults, *scaled[2:])
        outcome = self.model.accumulate(mine, samples, *scaled[1:2])
        self.expect(outcome, lambda: self.optimizer.accumulate(given, *scaled[:1], samples=samples))

    @stateful.rule(seed=seeds, faults=faults, early=st.booleans(), unscale=st.booleans())
    def batch_with_a_scaler(self, seed, faults, early, unscale):
        self.zero_grad()
        scaler, scale, limit = self.scaler, self.scaler.get_scale(), 3e6
        if early:
            self.accumulate(seed + 1, faults[::-1], 2, scaler, scale, limit)
        mine, given = self.losses(seed, faults, limit)
        outcome = self.model.backward(mine, 1.0, scale)
        if self.expect(outcome, lambda: self.optimizer.backward(given, scaler)):
            if unscale:
                scaler.unscale_(self.optimizer)
            scaler.step(self.optimizer)
            scaler.update()
            assert scaler.get_scale() == scale * (0.5 if outcome == "overflow" else 1)
            if outcome != "overflow":
                self.model.step()
                self.stepped = True
        self.zero_grad()

    @stateful.precondition(lambda self: self.stepped)
    @stateful.rule()
    def schedule(self):
        self.scheduler.step()
        for group in self.model.base.param_groups:
            group["lr"] /= 2

    @stateful.precondition(lambda self: "late" not in self.net)
    @stateful.rule()
    def add_param_group(self):
        self.model.base.add_param_group(grow(self.model.net))
        self.optimizer.add_param_group(grow(self.net))

    @stateful.rule(seed=seeds)
    def save_and_load(self, seed):
        names, file = ("optimizer", "scheduler", "scaler"), io.BytesIO()
        torch.save([self.net, *(getattr(self, name).state_dict() for name in names)], file)
        file.seek(0)
        parameters, *states = torch.load(file, weights_only=True)
        self.wrap(seed + 1)
        for name, parameter in self.net.items():
            parameter.data.copy_(parameters[name].detach())
        for name, state in zip(names, states, strict=True):
            getattr(self, name).load_state_dict(state)
        self.model.zero_grad()
        self.model.balance = None

    @stateful.invariant()
    def agrees_with_the_model(self):
        model, state, nets = self.model, self.optimizer.state_dict(), (self.net, self.model.net)
        assert_close(*nets)
        assert_close(*({name: p.grad for name, p in net.items() if p.grad is not None} for net in nets))
        rates = [[group["lr"] for group in each.param_groups] for each in (self.optimizer, model.base)]
        assert rates[0] == rates[1]
        assert header_of(state)["counts"] == (model.counts or [])
        capped = self.o["max_weight"] is not None and self.o["norm_target"] is not None
        for task in model.tasks if model.counts else ():
            rows = {name: state["state"][index].get(f"task_ema_{task}") for index, name in enumerate(self.net)}
            rows = Gradients({name: row for name, row in rows.items() if row is not None})
            assert bool(rows) == (self.o["beta"] > 0 or capped or self.o["joint"])
            if rows and task in model.moved and torch.allclose(rows["upper"], model.moved[task]["upper"]):
                model.ema[task] = model.moved[task]
            assert_close(dict(rows), dict(rows.zeros() + model.ema.get(task, Gradients()).only(rows)))
        model.moved = {}
        balance = self.optimizer.last_balance
        assert (balance is None) == (model.balance is None)
        if balance is not None:
            actual = np.stack([each.numpy() for each in (balance.losses, balance.norms, balance.weights)])
            np.testing.assert_allclose(actual, model.balance[0], rtol=1e-7)
            assert (list(balance.tasks), balance.skipped) == (self.o["names"], model.balance[1])


@pytest.mark.filterwarnings("ignore:vectorize=True, but")
def test_random_programs_agree_with_the_model():
    SEEN.clear()
    many = {"max_examples": PROGRAMS or 200, "stateful_step_count": 12, "derandomize": not PROGRAMS}
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    stateful.run_state_machine_as_test(Programs, settings=settings(**many, **quiet))
    print(dict(SEEN))
    assert {"taken", "skip", "overflow", "ValueError", "RuntimeError"} <= SEEN.keys()
