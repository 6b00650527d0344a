"""What may be changed between steps: priorities, and averages that are forgotten. And arguments that are gone."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from cases import one_thread  # noqa: F401
from conftest import assert_same, header_of, named, snapshot, train
from devices import array
from networks import Net
from oracle import Oracle
from torch import nn
from torch.optim import SGD, Adam

from balanced_optim import DualBalancedOptimizer

FORMS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "capped": {"max_weight": 1.5},
    "one backward": {"norm_params": 2},
    "refreshed": {"norm_params": 2, "refresh_every": 3},
    "warm-up": {"warmup_steps": 10},
}
every_form = pytest.mark.parametrize("form", FORMS)


def network(tasks=3, seed=0):
    return Net(tasks, (4, 6, 5), side=True, seed=seed, dtype=torch.float64)


def wrap(net, base, form="exact", **options):
    options = FORMS[form] | options
    if "norm_params" in options:
        options["norm_params"] = net.trunk[options["norm_params"]]
    return DualBalancedOptimizer(base, net.trunk, **options)


def build(form="exact", seed=0, **options):
    net = network(seed=seed)
    return net, wrap(net, Adam(net.parameters(), lr=0.01), form, **options)


def reload(*states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------- averages that are forgotten


@every_form
@pytest.mark.parametrize("way", [list, named])
def test_after_a_reset_the_method_begins_anew_and_the_base_goes_on(form, way):
    as_given = lambda losses, seed: way(losses)  # noqa: E731
    net, optimizer = build(form)
    train(net, optimizer, 5, form=as_given)
    optimizer.zero_grad()
    optimizer.reset_averages()
    other, base = copy.deepcopy((net, optimizer.base_optim))
    fresh = wrap(other, base, form)
    assert header_of(optimizer)["counts"] == header_of(fresh)["counts"] == []
    for pair in ((net, optimizer), (other, fresh)):
        train(*pair, 4, start=5, form=as_given)
    assert_same(snapshot(net, optimizer), snapshot(other, fresh))


def test_a_reset_before_the_first_batch_changes_nothing():
    (net, optimizer), (other, fresh) = build(), build()
    optimizer.reset_averages()
    train(net, optimizer, 3)
    train(other, fresh, 3)
    assert_same(snapshot(net, optimizer), snapshot(other, fresh))


def test_after_a_reset_there_may_be_other_tasks():
    net, optimizer = build()
    train(net, optimizer, 2)
    optimizer.reset_averages()
    optimizer.zero_grad()
    first, second, _ = net.losses(2)
    optimizer.step({"one": first, "two": second})
    assert optimizer.last_balance.tasks == ("one", "two")


def test_names_that_the_constructor_fixed_stay():
    net, optimizer = build(task_weights={"a": 1.0, "b": 2.0, "c": 0.5})
    train(net, optimizer, 2, form=named)
    optimizer.reset_averages()
    with pytest.raises(ValueError, match="unknown"):
        optimizer.step({"z": net.losses(3)[0]})
    optimizer.step(named(net.losses(3)))
    norms, weights = optimizer.last_balance.norms, optimizer.last_balance.weights
    torch.testing.assert_close(norms * weights, norms.max() * norms.new_tensor([1.0, 2.0, 0.5]))


def test_a_reset_drops_micro_batches_and_averages():
    net, optimizer = build()
    train(net, optimizer, 2)
    optimizer.zero_grad()
    optimizer.accumulate(net.losses(5))
    optimizer.reset_averages()
    with pytest.raises(RuntimeError, match="averaged gradients"):
        optimizer.gradient_cosines()
    other, base = copy.deepcopy((net, optimizer.base_optim))
    fresh = wrap(other, base)
    train(net, optimizer, 1, start=6)
    train(other, fresh, 1, start=6)
    assert_same(snapshot(net, optimizer), snapshot(other, fresh))


def test_parameters_that_no_task_reaches_after_a_reset_get_no_gradient():
    net, optimizer = build()
    train(net, optimizer, 2)
    optimizer.reset_averages()
    optimizer.zero_grad()
    # `side` is the last task's alone.
    optimizer.backward([*net.losses(3)[:2], None])
    assert net.trunk.side.grad is None


@pytest.mark.parametrize("how", ["data", "object"])
def test_a_parameter_of_another_shape_is_named_and_training_goes_on_after_a_reset(how):
    """Such as a table of embeddings that grows."""
    torch.manual_seed(0)
    table, head = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    optimizer = DualBalancedOptimizer(SGD([table, head], lr=0.1), [table])

    def losses():
        return [(table @ head).square().mean(), (table - 1).square().mean()]

    optimizer.step(losses())
    larger = torch.randn(6, 3)
    if how == "data":
        table.data, table.grad = larger, None
    else:
        table = nn.Parameter(larger)
        optimizer.param_groups[0]["params"][0] = table
    before = [parameter.detach().clone() for parameter in (table, head)]
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)(6, 3).*reset_averages\(\)"):
        optimizer.step(losses())
    assert_same([parameter.detach() for parameter in (table, head)], before)
    optimizer.reset_averages()
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(losses())
    assert header_of(optimizer)["counts"] == [2, 2]
    assert not torch.equal(table, before[0])


# ------------------------------------------------- priorities that change


@every_form
def test_priorities_set_between_steps_hold_from_the_next_one(form):
    """As for annealing: the oracle gets a new rule for every step."""
    options = dict(FORMS[form])
    nets = network(), network()
    optimizer = wrap(nets[0], SGD(nets[0].parameters(), lr=0.01), form)
    every, subset = options.pop("refresh_every", 1), options.pop("norm_params", None)
    last = [] if subset is None else list(nets[1].trunk[subset].parameters())
    kind = {"form": "one backward", "norm_params": last, "refresh_every": every} if last else {}
    oracle = Oracle(SGD(nets[1].parameters(), lr=0.01), nets[1].trunk.parameters(), rule=options, **kind)
    for step in range(8):
        weights = [1.0, 0.1 * step, 2.0 / (step + 1)]
        if step:
            optimizer.task_weights = weights
            oracle.rule = dataclasses.replace(oracle.rule, task_weights=weights)
        optimizer.zero_grad()
        oracle.zero_grad()
        optimizer.step(nets[0].losses(step))
        oracle.step(dict(enumerate(nets[1].losses(step))))
        expected = torch.tensor(oracle.balance(range(3))[2])
        torch.testing.assert_close(torch.as_tensor(array(optimizer.last_balance.weights)), expected.double())
        for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [[1.0, 0.5, 2], (1, 0.5, 2.0), {"a": 1, "b": 0.5, "c": 2.0}])
@pytest.mark.parametrize("early", [False, True], ids=["after a step", "before the first"])
def test_every_form_that_the_constructor_takes_can_be_set(weights, early):
    way = named if isinstance(weights, dict) else list
    as_given = lambda losses, seed: way(losses)  # noqa: E731
    net, optimizer = build(task_weights=weights)
    other, late = build()
    if not early:
        # Equal priorities in the first step, for both.
        optimizer.task_weights = dict.fromkeys("abc", 1.0) if isinstance(weights, dict) else [1.0] * 3
        for pair in ((net, optimizer), (other, late)):
            train(*pair, 1, form=as_given)
        optimizer.task_weights = weights
    late.task_weights = weights
    for pair in ((net, optimizer), (other, late)):
        train(*pair, 3, start=1, form=as_given)
    assert_same(list(net.parameters()), list(other.parameters()))
    assert_same(optimizer.last_balance.weights, late.last_balance.weights)


def test_none_makes_priorities_equal_again():
    net, optimizer = build(task_weights=[1.0, 0.5, 2.0])
    train(net, optimizer, 1)
    optimizer.task_weights = None
    optimizer.zero_grad()
    optimizer.step(net.losses(1))
    balance = optimizer.last_balance
    torch.testing.assert_close(balance.norms * balance.weights, balance.norms.max().expand(3))


def test_priorities_are_saved_and_the_loaded_ones_win():
    net, optimizer = build(task_weights=[1.0, 1.0, 1.0])
    train(net, optimizer, 2)
    optimizer.task_weights = [3.0, 0.25, 1.0]
    saved = reload(net.state_dict(), optimizer.state_dict())
    other, resumed = build(seed=1, task_weights=[1.0, 9.0, 9.0])
    for part, state in zip((other, resumed), saved, strict=True):
        part.load_state_dict(state)
    train(net, optimizer, 3, start=2)
    train(other, resumed, 3, start=2)
    assert_same(list(other.parameters()), list(net.parameters()))
    balance = resumed.last_balance
    expected = balance.norms.max() * balance.norms.new_tensor([3.0, 0.25, 1.0])
    torch.testing.assert_close(balance.norms * balance.weights, expected)


def test_a_copy_has_priorities_of_its_own():
    net, optimizer = build(task_weights=[1.0, 2.0, 3.0])
    train(net, optimizer, 1)
    twin_net, twin = copy.deepcopy((net, optimizer))
    optimizer.task_weights = [5.0, 5.0, 5.0]
    twin.zero_grad()
    twin.step(twin_net.losses(1))
    balance = twin.last_balance
    expected = balance.norms.max() * balance.norms.new_tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(balance.norms * balance.weights, expected)


REFUSED = [
    ([1.0, 2.0], "task_weights"),
    ([1.0] * 4, "task_weights"),
    ([1.0, -0.5, 1.0], r"task_weights\[1\] must be a finite number >= 0, got -0.5"),
    ([1.0, math.nan, 1.0], r"task_weights\[1\] must be a finite number >= 0, got nan"),
    ([1.0, math.inf, 1.0], r"task_weights\[1\] must be a finite number >= 0, got inf"),
    ([1.0, True, 1.0], r"task_weights\[1\] must be a finite number >= 0, got True"),
    ([1.0, "2", 1.0], r"task_weights\[1\] must be a finite number >= 0, got '2'"),
    ([], "task_weights must hold one weight a task"),
    (3.0, "task_weights must be a sequence or a mapping"),
    ("abc", "task_weights must be a sequence or a mapping"),
    ({"a": 1.0, "b": 1.0, "z": 1.0}, "task_weights"),
    ({"a": 1.0, "b": 1.0}, "task_weights"),
]


@pytest.mark.parametrize(("weights", "match"), REFUSED, ids=str)
def test_wrong_priorities_are_refused_and_the_old_ones_stay(weights, match):
    given = {"a": 1.0, "b": 2.0, "c": 3.0} if isinstance(weights, dict) else [1.0, 2.0, 3.0]
    way = named if isinstance(weights, dict) else list
    (net, optimizer), (other, untouched) = (build(task_weights=given) for _ in range(2))
    for pair in ((net, optimizer), (other, untouched)):
        train(*pair, 1, form=lambda losses, seed: way(losses))
    with pytest.raises((ValueError, TypeError), match=match):
        optimizer.task_weights = weights
    for pair in ((net, optimizer), (other, untouched)):
        train(*pair, 2, start=1, form=lambda losses, seed: way(losses))
    assert_same(snapshot(net, optimizer), snapshot(other, untouched))


# ------------------------------------------------- arguments that are gone


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(("name", "instead"), [("vectorize", "capture"), ("shard_averages", "fully_shard")])
def test_a_removed_argument_says_what_to_use_instead(name, instead, value):
    net = network()
    with pytest.raises(TypeError, match=f"{name} was removed.*{instead}"):
        wrap(net, Adam(net.parameters()), **{name: value})


def test_an_unknown_argument_is_an_error_as_ever():
    net = network()
    with pytest.raises(TypeError, match="betta"):
        wrap(net, Adam(net.parameters()), betta=0.5)
