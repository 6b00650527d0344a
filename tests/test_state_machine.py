"""Random programs of calls against the float64 oracle.

BALANCED_OPTIM_PROGRAMS=10000 runs that many programs, with a new seed each time.
"""

import dataclasses
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
from devices import array, generator, grad_scaler
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from oracle import Oracle

from balanced_optim import DualBalancedOptimizer

assert_close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
PROGRAMS = int(os.environ.get("BALANCED_OPTIM_PROGRAMS", "0"))
SHARED = ("lower", "upper", "side")
SEEN = Counter()  # what the programs did, so that the test can tell that they did everything


def network(tasks, seed=0):
    """Parameters by name: three shared ones, of which the last task alone uses `side`, and a head for each task."""
    source = generator(seed)
    sizes = {"lower": (3, 4), "upper": (4, 4), "side": (4,)} | {f"head{task}": (4,) for task in range(tasks)}
    draw = lambda size: torch.randn(size, generator=source, dtype=torch.float64).requires_grad_()  # noqa: E731
    return {name: draw(size) for name, size in sizes.items()}


def grow(net):
    """A later parameter of the first head, as a param group."""
    net["late"] = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    return {"params": [net["late"]]}


def losses_of(net, seed, faults, limit=math.inf):
    """A loss a task, None for an absent one. `faults`: what is wrong with each; gradients of `limit` overflow."""
    x = torch.randn(5, 3, generator=generator(seed), dtype=torch.float64)
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


# ------------------------------------------------- the programs


def one_of(*choices):
    return st.sampled_from(choices)


seeds, samples = st.integers(0, 30), one_of(1, 1, 2, 3)
FAULTS = ["good"] * 12 + ["absent"] * 3 + ["nan", "inf", "negative", "trunk", "head", "below"]
faults = st.lists(one_of(*FAULTS), min_size=4, max_size=4)
METHOD = {"beta": one_of(0.0, 0.5, 0.9), "beta_decay": one_of(0.0, 0.5), "eps": one_of(1e-8, 0.1)}
METHOD |= {"log_transform": one_of(True, True, False, "some"), "max_weight": one_of(None, None, 1.0, 2.0)}
METHOD |= {"norm_target": one_of("max", "max", "rms", "mean", "median", "min", 0.5, None)}
METHOD |= {"norm_power": one_of(1.0, 1.0, 0.5, 0.0), "warmup_steps": one_of(0, 0, 3, 8)}
METHOD |= {"fade_solved": one_of(False, False, True)}
OPTIONS = METHOD | {"nonfinite": one_of("raise", "skip", "ignore")}
OPTIONS |= {"tasks": st.integers(1, 4), "joint": st.booleans(), "refresh_every": st.integers(1, 3)}
OPTIONS |= {"form": one_of("list", "mapping", "weights by name"), "adam": st.booleans()}
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
        if o["norm_target"] is None:
            o |= {"fade_solved": False, "norm_power": 1.0, "warmup_steps": 0}
        if o["log_transform"] == "some":
            # By position in a list of losses, else by name, where a name that is left out has the log.
            named = {"t1": False} if tasks > 1 else {}
            o["log_transform"] = [True, False, True, False][:tasks] if o["form"] == "list" else named
        o["fade_solved"] &= o["log_transform"] is not False
        self.o = o | {"priorities": given, "names": [f"{'' if o['form'] == 'list' else 't'}{t}" for t in range(tasks)]}
        self.mine = network(tasks)
        rule = {name: o[name] for name in METHOD}
        if isinstance(o["log_transform"], list):
            rule["log_transform"] = dict(zip(self.o["names"], o["log_transform"], strict=True))
        rule["task_weights"] = given and dict(zip(self.o["names"], given, strict=True))
        form = {"form": "one backward", "norm_params": [self.mine["upper"]]} if o["joint"] else {}
        form |= {"refresh_every": o["refresh_every"], "nonfinite": o["nonfinite"], "rule": rule}
        shared = [self.mine[name] for name in SHARED]
        self.model = Oracle(base_of(self.mine, o["adam"]), shared, **form)
        # Whether a batch was taken in: it fixes the names of the tasks.
        self.began = False
        self.wrap()
        SEEN["programs"] += 1

    def wrap(self, seed=0):
        """A fresh network, optimizer, scheduler and scaler, grown to the size of the model's."""
        o, self.net, self.stepped = self.o, network(self.o["tasks"], seed), False
        shared = [self.net[name] for name in SHARED]
        form = {"norm_params": shared[1:2], "refresh_every": o["refresh_every"]} if o["joint"] else {}
        form["task_weights"] = dict(zip(o["names"], o["priorities"], strict=True)) if self.by_name else o["priorities"]
        form |= {name: o[name] for name in METHOD} | {"nonfinite": o["nonfinite"]}
        self.optimizer = DualBalancedOptimizer(base_of(self.net, o["adam"]), shared, **form)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        if "late" in self.mine:
            self.optimizer.add_param_group(grow(self.net))
        self.scaler = grad_scaler(2.0**20)

    def losses(self, seed, faults, *limit):
        """For the oracle, and for the package: a mapping leaves absent tasks out once it may."""
        faults = faults[: self.o["tasks"]]
        mine, given = (losses_of(net, seed, faults, *limit) for net in (self.mine, self.net))
        mine = dict(zip(self.o["names"], mine, strict=True))
        if self.o["form"] == "list":
            return mine, given
        known = self.by_name or self.began or self.model.micro is not None
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
        self.began |= outcome is None and self.model.pending
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
        for net in (self.net, self.mine) if way == "clip" else ():
            torch.nn.utils.clip_grad_norm_(net.values(), 0.1)

    @stateful.rule()
    def step(self):
        waiting = self.model.micro is not None
        outcome = self.model.backward({}) if waiting else None
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
        self.model.base.add_param_group(grow(self.mine))
        self.optimizer.add_param_group(grow(self.net))

    @stateful.rule(first=one_of(0.0, 1.0, 4.0))
    def set_priorities(self, first):
        weights = dict(zip(self.o["names"], [first, 0.5, 2.0, 1.0], strict=False))
        self.model.rule = dataclasses.replace(self.model.rule, task_weights=weights)
        self.optimizer.task_weights = weights if self.by_name else list(weights.values())

    @stateful.rule()
    def reset(self):
        self.zero_grad()
        self.model.reset_averages()
        self.model.losses = None
        self.optimizer.reset_averages()
        self.began = False

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
        self.model.losses = None

    @stateful.invariant()
    def agrees_with_the_oracle(self):
        model, state, nets = self.model, self.optimizer.state_dict(), (self.net, self.mine)
        assert_close(*nets)
        assert_close(*({name: p.grad for name, p in net.items() if p.grad is not None} for net in nets))
        rates = [[group["lr"] for group in each.param_groups] for each in (self.optimizer, model.base)]
        assert rates[0] == rates[1]
        names = self.o["names"]
        assert header_of(state)["counts"] == ([model.count.get(name, 0) for name in names] if self.began else [])
        for task, name in enumerate(names):
            rows = {place: state["state"][index].get(f"task_ema_{task}") for index, place in enumerate(self.net)}
            self.compare(name, {place: row for place, row in rows.items() if row is not None})
        model.moved = {}
        balance = self.optimizer.last_balance
        assert (balance is None) == (model.losses is None)
        if balance is not None:
            actual = np.stack([array(each) for each in (balance.losses, balance.norms, balance.weights)])
            np.testing.assert_allclose(actual, model.balance(names), rtol=1e-7)
            assert (list(balance.tasks), balance.skipped) == (names, model.skipped)

    def compare(self, task, rows):
        """A task's averages; after a batch that was refused they may be those that it would have had."""
        model = self.model
        assert bool(rows) or self.o["beta"] == 0 or not self.began
        moved = model.moved.get(task)
        if rows and moved is not None:
            key = id(self.mine["upper"])
            if torch.allclose(rows["upper"].flatten(), moved[key]):
                model.ema[task] = moved
        assert_close(rows, {place: model.average(task, self.mine[place]) for place in rows})


@pytest.mark.filterwarnings("ignore:the loss of task .* is .* below -eps")
def test_random_programs_agree_with_the_oracle():
    SEEN.clear()
    many = {"max_examples": PROGRAMS or 100, "stateful_step_count": 12, "derandomize": not PROGRAMS}
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    stateful.run_state_machine_as_test(Programs, settings=settings(**many, **quiet))
    print(dict(SEEN))
    assert {"taken", "skip", "overflow", "ValueError", "RuntimeError"} <= SEEN.keys()
