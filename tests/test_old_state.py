"""State dicts of version 0.1, written out by hand, load and go on as the oracle does from the same averages."""

import copy
import json

import numpy as np
import pytest
import torch
from cases import one_thread  # noqa: F401
from conftest import assert_same, header_of
from devices import array, generator
from oracle import Oracle, Vectors
from torch import nn
from torch.optim import SGD

from balanced_optim import DualBalancedOptimizer

# The averages of two tasks on the trunk, of shape (2, 3).
AVERAGES = [[[0.5, -1.0, 2.0], [0.25, 0.0, -0.5]], [[-3.0, 1.0, 0.0], [0.5, 0.5, 1.0]]]
HEADER = {
    "version": 2,
    "tasks": ["depth", "normal"],
    "named": True,
    "counts": [4, 7],
    "beta": 0.8,
    "beta_decay": 0.5,
    "ages": [0, 0],
    "aggregator": {},
}
MEMORY = {"type": "somewhere.Rule", "values": {"calls": 3}}


class Pair(nn.Module):
    """A trunk of one matrix and two heads."""

    def __init__(self):
        super().__init__()
        source = generator(5)
        draw = lambda *size: nn.Parameter(torch.randn(*size, generator=source, dtype=torch.float64))  # noqa: E731
        self.trunk, self.heads = draw(2, 3), nn.ParameterList([draw(3), draw(3)])

    def losses(self, seed):
        x = torch.randn(4, 2, generator=generator(seed), dtype=torch.float64)
        features = torch.tanh(x @ self.trunk)
        found = [10.0**task * (features @ head - 1).square().mean() for task, head in enumerate(self.heads)]
        return dict(zip(HEADER["tasks"], found, strict=True))


def saved(rows=True, **changes):
    """What version 0.1 wrote for a `Pair` under SGD with momentum."""
    header = {name: value for name, value in (HEADER | changes).items() if value is not ...}
    shared = {"momentum_buffer": torch.full((2, 3), 0.1, dtype=torch.float64), "task_role": "reached"}
    if rows:
        shared |= {f"task_ema_{task}": torch.tensor(row, dtype=torch.float64) for task, row in enumerate(AVERAGES)}
    heads = [{"momentum_buffer": torch.full((3,), -0.2, dtype=torch.float64), "task_role": "head"} for _ in range(2)]
    [group] = SGD([torch.zeros(1) for _ in range(3)], lr=0.05, momentum=0.9).state_dict()["param_groups"]
    return {
        "state": {0: shared, 1: heads[0], 2: heads[1]},
        "param_groups": [group | {"balanced_optim": json.dumps(header)}],
    }


def build(**options):
    net = Pair()
    base = SGD(net.parameters(), lr=0.5)
    return net, DualBalancedOptimizer(base, [net.trunk], **options)


def textbook(ages=None, **options):
    """The oracle as it stands after the batches that the state dict is of."""
    net = Pair()
    base = SGD(net.parameters(), lr=0.05, momentum=0.9)
    for parameter, value in zip(net.parameters(), (0.1, -0.2, -0.2), strict=True):
        base.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    if options.pop("norm_params", None):
        options |= {"form": "one backward", "norm_params": [net.trunk]}
    rule = {"beta": 0.8, **options.pop("rule", {})}
    oracle = Oracle(base, [net.trunk], rule=rule, **options)
    rows = [torch.tensor(row, dtype=torch.float64).flatten() for row in AVERAGES]
    for task, row, count in zip(HEADER["tasks"], rows, HEADER["counts"], strict=True):
        oracle.ema[task] = Vectors({id(net.trunk): row.to(oracle.device)})
        oracle.count[task] = count
        oracle.age[task] = 0 if ages is None else ages[task]
    oracle.k, oracle.reached = max(HEADER["counts"]), {id(net.trunk)}
    return net, oracle


def assert_goes_on(pair, twin, steps=4):
    (net, optimizer), (slow, oracle) = pair, twin
    for step in range(steps):
        optimizer.zero_grad()
        oracle.zero_grad()
        optimizer.step(net.losses(step))
        oracle.step(slow.losses(step))
        balance = optimizer.last_balance
        expected = oracle.balance(HEADER["tasks"])
        for found, numbers in zip((balance.losses, balance.norms, balance.weights), expected, strict=True):
            np.testing.assert_allclose(array(found), numbers, rtol=1e-9)
        for mine, theirs in zip(net.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", [{}, {"max_weight": 1.5}, {"norm_target": "mean"}], ids=str)
def test_averages_counts_and_schedule_go_on(rule):
    net, optimizer = build(**rule)
    optimizer.load_state_dict(saved())
    assert_goes_on((net, optimizer), textbook(rule=rule))


def test_the_counter_of_batches_is_the_largest_count():
    """Version 0.1 counted by task only."""
    net, optimizer = build(warmup_steps=9)
    optimizer.load_state_dict(saved())
    assert_goes_on((net, optimizer), textbook(rule={"warmup_steps": 9}))


def test_ages_of_norms_go_on():
    net = Pair()
    options = {"norm_params": [net.trunk], "refresh_every": 3}
    optimizer = DualBalancedOptimizer(SGD(net.parameters(), lr=0.5), [net.trunk], **options)
    optimizer.load_state_dict(saved(ages=[2, 2]))
    assert_goes_on((net, optimizer), textbook({"depth": 2, "normal": 2}, norm_params=True, refresh_every=3))


def test_a_state_without_averages_loads_at_beta_zero():
    net, optimizer = build(beta=0.0)
    optimizer.load_state_dict(saved(rows=False, beta=0.0))
    slow, oracle = textbook(rule={"beta": 0.0})
    assert_goes_on((net, optimizer), (slow, oracle))


def test_tasks_without_names_stay_so():
    net, optimizer = build()
    optimizer.load_state_dict(saved(tasks=["0", "1"], named=False))
    optimizer.step(list(net.losses(0).values()))
    assert optimizer.last_balance.tasks == ("0", "1")
    assert header_of(optimizer)["counts"] == [5, 8]


def test_a_state_from_before_the_first_batch_loads():
    (net, optimizer), (other, fresh) = build(beta=0.8), build(beta=0.8)
    state = saved(rows=False, tasks=None, named=False, counts=[], ages=[])
    for entry in state["state"].values():
        entry["task_role"] = "shared" if entry["task_role"] == "reached" else entry["task_role"]
    optimizer.load_state_dict(state)
    fresh.base_optim.load_state_dict(copy.deepcopy(optimizer.base_optim.state_dict()))
    for each, wrapper in ((net, optimizer), (other, fresh)):
        wrapper.step(each.losses(0))
    assert_same(list(net.parameters()), list(other.parameters()))


def test_what_it_loads_it_can_save_and_load_again():
    (net, optimizer), (other, resumed) = build(), build()
    optimizer.load_state_dict(saved())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, wrapper in ((net, optimizer), (other, resumed)):
        wrapper.step(each.losses(0))
    assert_same(list(net.parameters()), list(other.parameters()))
    assert_same(resumed.state_dict(), optimizer.state_dict())


def test_an_aggregators_memory_is_ignored_with_a_warning():
    net, optimizer = build(aggregator=lambda matrix: matrix.sum(0))
    with pytest.warns(UserWarning, match="aggregator"):
        optimizer.load_state_dict(saved(aggregator=MEMORY))
    slow, oracle = textbook(form="aggregator", aggregator=lambda matrix: matrix.sum(0))
    for step in range(3):
        optimizer.zero_grad()
        oracle.zero_grad()
        optimizer.step(net.losses(step))
        oracle.step(slow.losses(step))
    for mine, theirs in zip(net.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_one_without_a_memory_needs_no_warning():
    _, optimizer = build(aggregator=lambda matrix: matrix.sum(0))
    optimizer.load_state_dict(saved(aggregator={}))
    optimizer.load_state_dict(saved(aggregator=...))


WRONG = [
    ({"version": 1}, "version"),
    ({"version": 99}, "version 99"),
    ({"version": ...}, "version None"),
    ({"counts": ...}, "counts"),
    ({"counts": [4]}, "2 counts, one a task, got 1"),
    ({"counts": [4, -1]}, "counts that are whole numbers >= 0"),
    ({"counts": [4, 0.5]}, "counts that are whole numbers >= 0"),
    ({"ages": [0, 0, 0]}, "2 ages, one a task, got 3"),
    ({"beta": 1.5}, "beta must be a number in"),
    ({"tasks": ["depth"], "counts": [4], "ages": [0]}, "task_ema_|1 tasks"),
]


@pytest.mark.parametrize(("changes", "match"), WRONG, ids=str)
def test_a_state_that_does_not_fit_changes_nothing(changes, match):
    net, optimizer = build()
    optimizer.step(net.losses(0))
    before = optimizer.state_dict()["state"][0]["task_ema_0"].clone()
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved(**changes))
    assert_same(optimizer.state_dict()["state"][0]["task_ema_0"], before)
    optimizer.step(net.losses(1))
    assert header_of(optimizer)["counts"] == [2, 2]
