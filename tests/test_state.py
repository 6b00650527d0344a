"""Saving and loading: going on bit for bit, taking plain checkpoints, refusing what does not fit."""

import copy
import io
import json

import pytest
import torch
from conftest import assert_same, build, build_plain, every_base, header_of, named, snapshot, train
from networks import Net
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from balanced_optim import DualBalancedOptimizer


def as_list(losses, seed):
    return losses


def absent(losses, seed):
    """Task 0 misses two batches of three, task 1 every fourth, in no common rhythm."""
    return [loss if (seed + task) % (3 if task else 4) else None for task, loss in enumerate(losses)]


def last_comes_late(losses, seed):
    """The last task, the only one that reaches `side`, is not there before batch 4."""
    return [*losses[:-1], losses[-1] if seed >= 4 else None]


SETTINGS = {
    "default": ({}, as_list),
    "beta-0": ({"beta": 0.0}, as_list),
    "constant-beta": ({"beta": 0.5, "beta_decay": 0.0}, as_list),
    "cap": ({"max_weight": 1.5}, as_list),
    "cap-beta-0": ({"max_weight": 1.5, "beta": 0.0}, as_list),
    "mean-no-log": ({"norm_target": "mean", "log_transform": False}, as_list),
    "no-rescale": ({"norm_target": None}, as_list),
    "weights": ({"task_weights": [1.0, 0.0, 3.0]}, as_list),
    "weights-by-name": ({"task_weights": {"c": 1.0, "a": 2.0, "b": 3.0}}, named),
    "weights-then-names": ({"task_weights": [1.0, 2.0, 3.0]}, named),
    "names": ({}, named),
    "tensor": ({}, lambda losses, seed: torch.stack(losses)),
    "absent": ({}, absent),
    "absent-beta-0": ({"beta": 0.0}, absent),
    "bfloat16": ({"ema_dtype": torch.bfloat16}, as_list),
    "float64": ({"ema_dtype": torch.float64}, as_list),
    "partly-reached": ({"side": True}, as_list),
    "partly-reached-late": ({"side": True}, last_comes_late),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def reload(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------- going on


@every_setting
@pytest.mark.parametrize("used_before", [False, True], ids=["fresh", "used"])
def test_resume_bit_for_bit(setting, used_before):
    options, form = SETTINGS[setting]
    net, optimizer = build(tasks=3, **options)
    train(net, optimizer, 3, form=form)
    saved = reload({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    other, resumed = build(tasks=3, seed=1, **options)
    if used_before:
        train(other, resumed, 2, start=20, form=form)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.last_balance is None
    assert_same(resumed.state_dict(), optimizer.state_dict())
    train(net, optimizer, 4, start=3, form=form)
    train(other, resumed, 4, start=3, form=form)
    assert_same(snapshot(other, resumed), snapshot(net, optimizer))


@pytest.mark.parametrize("thawed", [True, False])
@pytest.mark.parametrize("form", [{}, {"norm_params": 0}])
def test_a_state_saved_between_a_thaw_and_the_next_batch_loads(thawed, form):
    def fresh(seed):
        net = Net(sizes=(4, 6, 6), seed=seed)
        options = {"norm_params": net.trunk[0]} if form else {}
        return net, DualBalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), net.trunk, **options)

    def freeze(net, on):
        net.trunk[0].weight.requires_grad_(not on)

    (net, optimizer), (other, resumed) = fresh(0), fresh(1)
    freeze(net, True)
    train(net, optimizer, 3)
    freeze(net, False)
    saved = reload({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    freeze(other, not thawed)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    freeze(other, False)
    for each in ((net, optimizer), (other, resumed)):
        train(*each, 3, start=3)
    assert_same(snapshot(other, resumed), snapshot(net, optimizer))


class Momentum(torch.optim.Optimizer):
    """A base whose state of a parameter is a tensor, not a dictionary."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter] = 0.5 * self.state.get(parameter, 0.0) + parameter.grad
                    parameter -= group["lr"] * self.state[parameter]


def test_a_base_that_keeps_a_tensor_a_parameter_is_saved_and_resumed():
    def fresh(seed):
        net = Net(seed=seed)
        return net, DualBalancedOptimizer(Momentum(net.parameters(), lr=0.01), net.trunk)

    (net, optimizer), (other, resumed) = fresh(0), fresh(1)
    train(net, optimizer, 3)
    saved = reload({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    train(net, optimizer, 3, start=3)
    train(other, resumed, 3, start=3)
    assert_same(list(other.parameters()), list(net.parameters()))


@pytest.mark.parametrize("setting", ["default", "beta-0", "cap-beta-0", "absent", "bfloat16"])
def test_taking_the_state_does_not_change_the_run(setting):
    options, form = SETTINGS[setting]
    (net, optimizer), (twin, other) = build(tasks=3, **options), build(tasks=3, **options)
    for seed in range(6):
        train(net, optimizer, 1, start=seed, form=form)
        optimizer.state_dict()
        train(twin, other, 1, start=seed, form=form)
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("setting", ["default", "beta-0", "names", "weights-by-name"])
def test_a_state_from_before_the_first_step(setting):
    options, form = SETTINGS[setting]
    (net, optimizer), (twin, other) = build(tasks=3, **options), build(tasks=3, **options)
    start = reload({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, 2, start=20, form=form)
    net.load_state_dict(start["net"])
    optimizer.load_state_dict(start["optimizer"])
    train(net, optimizer, 3, form=form)
    train(twin, other, 3, form=form)
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


@every_base
@pytest.mark.parametrize("steps", [0, 2])
def test_loading_its_own_state_changes_nothing(base, steps):
    """Accelerate does so before the first step."""
    (net, optimizer), (twin, other) = build(base), build(base)
    train(net, optimizer, steps)
    train(twin, other, steps)
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert_same(optimizer.state_dict(), other.state_dict())
    train(net, optimizer, 2, start=steps)
    train(twin, other, 2, start=steps)
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


def test_saved_beta_replaces_that_of_the_constructor():
    net, optimizer = build(beta=0.5, beta_decay=1.0)
    train(net, optimizer, 2)
    other, resumed = build(beta=0.9)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert "beta=0.5, beta_decay=1.0" in repr(resumed)
    train(net, optimizer, 2, start=2)
    train(other, resumed, 2, start=2)
    assert_same(snapshot(other, resumed), snapshot(net, optimizer))


@every_base
@pytest.mark.parametrize("used_before", [False, True], ids=["fresh", "used"])
def test_a_plain_checkpoint_loads_and_averages_start_anew(base, used_before):
    net, plain = build_plain(base)
    for seed in range(2):
        plain.zero_grad()
        sum(net.losses(seed)).backward()
        plain.step()
    saved = reload({"net": net.state_dict(), "optimizer": plain.state_dict()})
    twin, inner = build_plain(base)
    twin.load_state_dict(saved["net"])
    inner.load_state_dict(copy.deepcopy(saved["optimizer"]))
    expected = DualBalancedOptimizer(inner, twin.trunk)

    other, optimizer = build(base, seed=1)
    if used_before:
        train(other, optimizer, 2, form=named)
    other.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    assert_same(optimizer.base_optim.state_dict(), plain.state_dict())
    assert_same(optimizer.state_dict(), expected.state_dict())
    train(other, optimizer, 3, start=2)
    train(twin, expected, 3, start=2)
    assert_same(snapshot(other, optimizer), snapshot(twin, expected))


# ------------------------------------------------- the form of the state


@every_base
@pytest.mark.parametrize("steps", [0, 1])
def test_form_of_the_state_dict(base, steps):
    net, optimizer = build(base)
    twin, plain = build_plain(base)
    for seed in range(steps):
        train(net, optimizer, 1, start=seed)
        sum(twin.losses(seed)).backward()
        plain.step()
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
    assert_same(optimizer.state_dict()["param_groups"][0]["params"], plain.state_dict()["param_groups"][0]["params"])

    def check_the_base_knows_nothing():
        assert optimizer.base_optim.param_groups[0].keys() == plain.param_groups[0].keys()
        ours, theirs = optimizer.base_optim.state, plain.state
        assert [ours[p].keys() for p in net.parameters()] == [theirs[p].keys() for p in twin.parameters()]

    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check_the_base_knows_nothing()
    assert len(optimizer.base_optim.state_dict()["state"]) == len(plain.state_dict()["state"])


def test_the_state_dict_holds_only_what_weights_only_loading_takes():
    net, optimizer = build(task_weights={"a": 1, "b": 2})
    train(net, optimizer, 1, form=named)
    assert_same(reload(optimizer.state_dict()), optimizer.state_dict())


@every_base
@pytest.mark.parametrize("fresh", [False, True], ids=["used", "fresh"])
def test_distributed_checkpoint_functions_round_trip(base, fresh):
    net, optimizer = build(base)
    train(net, optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    weights = copy.deepcopy(net.state_dict())
    assert saved.keys() == {"state", "param_groups"}
    assert "trunk.0.weight" in saved["state"]
    other, resumed = build(base, seed=1)
    if not fresh:
        train(other, resumed, 3, start=20)
    other.load_state_dict(weights)
    set_optimizer_state_dict(other, resumed, saved)
    assert_same(header_of(resumed)["counts"], [2, 2])
    for model, one in ((net, optimizer), (other, resumed)):
        train(model, one, 3, start=2)
    assert_same(dict(other.state_dict()), dict(net.state_dict()))
    assert_same(resumed.last_balance.weights, optimizer.last_balance.weights)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}, {"beta": 0.0}], ids=["exact", "one backward", "beta 0"])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_distributed_checkpoint_on_disk_goes_on_bit_for_bit(base, options, tmp_path):
    """A fresh optimizer that knows its tasks makes room for what is loaded value by value."""

    def make(seed):
        net, plain = build_plain(base, seed=seed)
        some = {"norm_params": net.trunk.parameters()} if "refresh_every" in options else {}
        return net, DualBalancedOptimizer(plain, net.trunk, task_weights={"a": 1, "b": 2}, **some, **options)

    def joint_state(net, optimizer):
        model, method = get_state_dict(net, optimizer)
        return {"model": model, "optimizer": method}

    net, optimizer = make(0)
    train(net, optimizer, 3, form=named)
    distributed_checkpoint.save(joint_state(net, optimizer), checkpoint_id=tmp_path, no_dist=True)
    other, resumed = make(1)
    state = joint_state(other, resumed)
    distributed_checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert header_of(resumed) == header_of(optimizer)
    for model, one in ((net, optimizer), (other, resumed)):
        train(model, one, 3, start=3, form=named)
    assert_same(dict(other.state_dict()), dict(net.state_dict()))
    assert_same(resumed.last_balance.weights, optimizer.last_balance.weights)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_without_room_for_averages_is_refused(tmp_path):
    net, optimizer = build()
    train(net, optimizer, 2)
    distributed_checkpoint.save(get_optimizer_state_dict(net, optimizer), checkpoint_id=tmp_path, no_dist=True)
    other, resumed = build(seed=1)
    state = get_optimizer_state_dict(other, resumed)
    distributed_checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    before = snapshot(other, resumed)
    with pytest.raises(ValueError, match="must hold task_ema_0 to task_ema_1 .*also task_weights, by which"):
        set_optimizer_state_dict(other, resumed, state)
    assert_same(snapshot(other, resumed), before)


def test_a_flattened_distributed_checkpoint_is_refused_rather_than_emptied():
    net, optimizer = build()
    train(net, optimizer, 2)
    with pytest.raises(NotImplementedError, match="only supports tensor"):
        get_optimizer_state_dict(net, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))


# ------------------------------------------------- what does not fit


def write_header(state, header):
    state["param_groups"][0]["balanced_optim"] = json.dumps(header)


def edit_header(**values):
    return lambda state: write_header(state, {**header_of(state), **values})


def drop(name):
    return lambda state: write_header(state, {key: v for key, v in header_of(state).items() if key != name})


def edit_average(change, positions=(0, 1)):
    def edit(state):
        for position in positions:
            entry = state["state"][position]
            entry.update({name: change(row) for name, row in entry.items() if name.startswith("task_ema_")})

    return edit


def forget_averages(positions):
    def edit(state):
        for position in positions:
            entry = state["state"][position]
            for name in [name for name in entry if name.startswith("task_ema_")]:
                del entry[name]

    return edit


def forget_last_group_entry(state):
    state["param_groups"][0]["params"].pop()


def shared(*picked):
    """A wrapper of the same network whose trunk is said to be something else."""

    def make():
        net, plain = build_plain()
        found = dict(net.named_parameters())
        return net, DualBalancedOptimizer(plain, [found[name] for name in picked])

    return make


# id: the wrapper that loads, its steps before, their form, the edit of the saved state, the message.
MISFITS = {
    "other-number-of-tasks": (lambda: build(tasks=2), 1, as_list, None, r"of 2 tasks \['0', '1'\], got 3 tasks"),
    "other-number-by-weights": (lambda: build(task_weights=[1, 2]), 0, as_list, None, r"of 2 tasks .*, got 3 tasks"),
    "names-to-positions": (lambda: build(tasks=3), 1, named, None, r"tasks \['a', 'b', 'c'\], got .*\['0', '1', '2'\]"),
    "names-by-weights": (
        lambda: build(tasks=3, task_weights={"x": 1, "y": 1, "z": 1}),
        0,
        lambda losses, seed: dict(zip("xyz", losses, strict=True)),
        None,
        r"tasks \['x', 'y', 'z'\], got .*\['0', '1', '2'\].*use the names that were saved",
    ),
    "other-names": (
        lambda: build(tasks=3),
        1,
        named,
        edit_header(tasks=["a", "b", "z"], named=True),
        r"tasks \['a', 'b', 'c'\], got the tasks \['a', 'b', 'z'\]",
    ),
    "version": (
        lambda: build(tasks=3),
        1,
        as_list,
        edit_header(version=99),
        r"version 2 or 3, got version 99; load it",
    ),
    "no-version": (lambda: build(tasks=3), 1, as_list, drop("version"), r"version 2 or 3, got version None"),
    "no-header": (
        lambda: build(tasks=3),
        1,
        as_list,
        lambda state: state["param_groups"][0].update(balanced_optim=7),
        r"version 2 or 3, got version None",
    ),
    **{
        f"no-{name}": (lambda: build(tasks=3), 1, as_list, drop(name), rf"must hold \['{name}'\]")
        for name in ("tasks", "named", "counts", "beta", "beta_decay")
    },
    "short-counts": (lambda: build(tasks=3), 1, as_list, edit_header(counts=[1]), r"3 counts, one a task, got 1"),
    "beta": (lambda: build(tasks=3), 1, as_list, edit_header(beta=1.5), r"beta must be a number in \[0, 1\), got 1.5"),
    "beta-decay": (lambda: build(tasks=3), 1, as_list, edit_header(beta_decay=-1.0), r"beta_decay must be .* got -1"),
    "average-of-other-shape": (
        lambda: build(tasks=3),
        0,
        as_list,
        edit_average(lambda average: average[:5]),
        r"parameter 0 must have shape \(6, 4\).*got \(5, 4\).*another network",
    ),
    "average-of-one-task-lost": (
        lambda: build(tasks=3),
        0,
        as_list,
        lambda state: state["state"][0].pop("task_ema_2"),
        r"must hold task_ema_0 to task_ema_2 for the 2 .*all of them for 1 and some for 2",
    ),
    "no-averages": (
        lambda: build(tasks=3),
        0,
        as_list,
        forget_averages([0, 1]),
        r"must hold task_ema_0 .*all of them for 0",
    ),
    "one-average-lost": (lambda: build(tasks=3), 0, as_list, forget_averages([1]), r"task_ema"),
    "fewer-parameters": (lambda: build(tasks=3), 0, as_list, forget_last_group_entry, r"doesn't match the size"),
    "other-shared": (
        shared("heads.0.weight", "heads.1.weight"),
        0,
        as_list,
        edit_header(tasks=["0", "1"], counts=[3, 3]),
        r"shared_params",
    ),
    "fewer-shared": (shared("trunk.0.weight"), 0, as_list, None, r"shared_params"),
    "more-shared": (shared("trunk.0.weight", "trunk.0.bias", "heads.1.weight"), 0, as_list, None, r"shared_params"),
}


@pytest.mark.parametrize(("make", "steps", "form", "edit", "message"), MISFITS.values(), ids=MISFITS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(make, steps, form, edit, message):
    net, optimizer = make()
    twin, other = make()
    # The state of the very network that loads, except where the number of tasks is what differs.
    tasks = 3 if "got 3 tasks" in message else len(net.heads)
    source, saver = build(tasks=tasks, seed=5)
    train(source, saver, 3, start=30)
    state = copy.deepcopy(saver.state_dict())
    if edit is not None:
        edit(state)
    train(net, optimizer, steps, form=form)
    train(twin, other, steps, form=form)
    before = snapshot(twin, other)
    assert_same(snapshot(net, optimizer), before)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(snapshot(net, optimizer), before)
    train(net, optimizer, 2, start=steps, form=form)
    train(twin, other, 2, start=steps, form=form)
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


def test_other_shared_params_are_refused_without_averages_too():
    source, saver = build(beta=0.0)
    train(source, saver, 1)
    _, optimizer = shared("heads.0.weight", "heads.1.weight")()
    with pytest.raises(ValueError, match="shared_params"):
        optimizer.load_state_dict(copy.deepcopy(saver.state_dict()))


def test_the_loaded_names_bind_the_next_step():
    net, optimizer = build()
    train(net, optimizer, 1, form=named)
    other, resumed = build()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(TypeError, match=r"losses must be a mapping, since the tasks have names \['a', 'b'\]"):
        resumed.step(other.losses())
    resumed.step(named(other.losses()[::-1][:1]))
