"""What a device runs, on CPU tensors: the host reads nothing, or once a batch, after everything is under way."""

import math
import sys

import pytest
import torch
from cases import one_thread, with_value  # noqa: F401
from conftest import assert_same, header_of
from devices import grad_scaler
from modes import device_path, journal, no_double, nothing_is_read
from networks import Net
from torch.optim import SGD

from balanced_optim import DualBalancedOptimizer

# A layer of the trunk has this many weights, more than anything that is counted by task.
WIDE = 16 * 32
FORMS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "capped": {"max_weight": 1.5},
    "capped at beta 0": {"max_weight": 1.5, "beta": 0.0},
    "priorities": {"task_weights": [1.0, 0.5, 2.0]},
    "one backward": {"norm_params": True},
    "refreshed": {"norm_params": True, "refresh_every": 3},
    "warm-up": {"warmup_steps": 5, "norm_target": "rms"},
    "median": {"norm_target": "median", "fade_solved": True},
    "log by task": {"log_transform": [True, False, True]},
    "half": {"ema_dtype": torch.bfloat16},
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    with device_path(monkeypatch):
        yield


def build(form, nonfinite="ignore", dtype=torch.float32, **more):
    net = Net(3, (4, 16, 32), dtype=dtype)
    options = FORMS[form] | more
    if "norm_params" in options:
        options["norm_params"] = net.trunk[2]
    return net, DualBalancedOptimizer(SGD(net.parameters(), lr=0.01), net.trunk, nonfinite=nonfinite, **options)


def bad_gradient(where):
    """The second task's gradient is not finite there. By a hook: functions of one's own are replayed, which is read."""

    def at(place, task, values):
        if (place, task) == (where, 1):
            values = values * 1
            values.register_hook(lambda gradient: gradient * math.nan)
        return values

    return at


def spoiled(net, seed, where):
    losses = net.losses(seed, bad_gradient(where))
    return [losses[0], with_value(losses[1], math.nan), losses[2]] if where == "loss" else losses


# ------------------------------------------------- "ignore": nothing is read


@every_form
@pytest.mark.parametrize("call", ["step", "backward"])
def test_nothing_is_read(form, call):
    net, optimizer = build(form)
    for seed in range(5):
        optimizer.zero_grad()
        losses = net.losses(seed)
        if seed % 2:
            losses[0] = None
        with nothing_is_read():
            getattr(optimizer, call)(losses)
        assert optimizer.last_balance.weights.isfinite().all()


@every_form
@pytest.mark.parametrize("where", ["loss", "trunk", "head"])
def test_nothing_is_read_where_a_task_is_left_out(form, where):
    net, optimizer = build(form)
    optimizer.step(net.losses(0))
    for seed in (1, 2, 3):
        optimizer.zero_grad()
        losses = spoiled(net, seed, where)
        with nothing_is_read():
            optimizer.step(losses)
        assert all(parameter.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("form", ["exact", "beta 0", "one backward"])
def test_a_record_of_the_balance_waits_for_nobody(form):
    net, optimizer = build(form)
    losses = net.losses(0)
    with nothing_is_read():
        optimizer.backward(losses)
        balance = optimizer.last_balance
        total = (balance.weights * balance.norms).sum() + balance.losses.sum()
        assert balance.skipped is False
    assert total.isfinite()


# ------------------------------------------------- "raise" and "skip": one read, at the end


@every_form
@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_one_read_after_everything_is_under_way(form, mode):
    net, optimizer = build(form, mode)
    for seed in range(5):
        optimizer.zero_grad()
        losses = net.losses(seed)
        with journal() as operations:
            optimizer.backward(losses)
        reads = [place for place, operation in enumerate(operations) if operation.reads]
        assert len(reads) == 1, [operations[place].name for place in reads]
        after = [operation for operation in operations[reads[0] + 1 :] if operation.size >= WIDE]
        assert not after, after
        optimizer.step()


@every_form
@pytest.mark.parametrize("where", ["loss", "trunk", "head"])
@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_refused_batch_is_under_way_before_it_is_read_and_is_not_committed(form, mode, where):
    net, optimizer = build(form, mode)
    for seed in range(2):
        optimizer.zero_grad()
        optimizer.step(net.losses(seed))
    optimizer.zero_grad()
    before = [parameter.detach().clone() for parameter in net.parameters()], header_of(optimizer)
    losses = spoiled(net, 5, where)
    with journal() as operations:
        if mode == "raise":
            with pytest.raises((ValueError, RuntimeError), match="task '1'|together"):
                optimizer.step(losses)
        else:
            optimizer.step(losses)
            assert optimizer.last_balance.skipped
    # What follows the first read says what was wrong, and measures averages that took the batch in.
    first = next(place for place, operation in enumerate(operations) if operation.reads)
    after = {operation.name for operation in operations[first + 1 :] if operation.size >= WIDE}
    assert after <= {"aten.view.default", "aten.linalg_vector_norm.default"}
    assert_same(([parameter.detach() for parameter in net.parameters()], header_of(optimizer)), before)
    assert all(parameter.grad is None for parameter in net.parameters())
    state = optimizer.state_dict()["state"]
    rows = [value for entry in state.values() for name, value in entry.items() if name.startswith("task_ema_")]
    assert all(row.isfinite().all() for row in rows)
    optimizer.step(net.losses(6))


# ------------------------------------------------- the numbers are those of a CPU


@every_form
@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_the_device_path_takes_the_steps_of_the_other(form, nonfinite, monkeypatch):
    ends = []
    for device in (True, False):
        net, optimizer = build(form, nonfinite, torch.float64)
        with monkeypatch.context() as patch:
            if not device:
                patch.setattr("balanced_optim._numbers.ON_DEVICE", lambda where: False)
            for seed in range(7):
                losses = net.losses(seed)
                if seed % 3 == 2:
                    losses[seed % 2] = None
                optimizer.zero_grad()
                optimizer.step(losses)
        ends.append([*net.parameters(), optimizer.last_balance.weights, optimizer.last_balance.norms])
    for one, other in zip(*ends, strict=True):
        rtol = 1e-2 if form == "half" else 1e-9
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * 1e-2, equal_nan=True)


@pytest.mark.parametrize("form", ["exact", "beta 0", "capped"])
@pytest.mark.parametrize("where", ["loss", "trunk", "head"])
def test_a_task_that_is_left_out_is_like_an_absent_one(form, where):
    """Up to zeros in place of no gradient, which SGD without momentum does not see, and its count."""
    (net, optimizer), (other, absent) = build(form), build(form)
    for each, wrapper in ((net, optimizer), (other, absent)):
        wrapper.step(each.losses(0))
        wrapper.zero_grad()
    optimizer.step(spoiled(net, 1, where))
    first, _, last = other.losses(1)
    absent.step([first, None, last])
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()))
    assert optimizer.last_balance.weights[1] == 0


@pytest.mark.parametrize("value", [math.nan, -1.0])
@pytest.mark.parametrize("options", [{}, {"fade_solved": True}, {"task_weights": [1.0, 0.0, 1.0]}])
def test_a_bad_loss_gives_its_head_nothing_where_norms_are_reused(options, value):
    net, optimizer = build("refreshed", **options)
    optimizer.step(net.losses(0))
    optimizer.zero_grad()
    losses = net.losses(1)
    with nothing_is_read():
        optimizer.backward([losses[0], with_value(losses[1], value), losses[2]])
    one, other, _ = net.heads
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert not any(parameter.grad.any() for parameter in other.parameters())
    assert all(parameter.grad.any() for parameter in [*one.parameters(), *net.trunk.parameters()])


# ------------------------------------------------- devices without double precision


@pytest.fixture
def single(monkeypatch):
    """What is widest on a device says so everywhere."""
    for name, module in list(sys.modules.items()):
        if name.startswith("balanced_optim.") and hasattr(module, "widest"):
            monkeypatch.setattr(module, "widest", lambda device: torch.float32)


def accumulated(net, optimizer, seed):
    optimizer.accumulate(net.losses(seed + 20), samples=3)
    optimizer.step(net.losses(seed))


def scaled(net, optimizer, seed):
    """Without the scaler's own step, which divides in double precision."""
    optimizer.backward(net.losses(seed), grad_scaler(8.0))


WAYS = {
    "step": lambda net, optimizer, seed: optimizer.step(net.losses(seed)),
    "micro-batches": accumulated,
    "scaler": scaled,
    "new priorities": lambda net, optimizer, seed: (
        setattr(optimizer, "task_weights", [1.0, seed + 1.0, 1.0]),
        optimizer.step(net.losses(seed)),
    ),
}


@every_form
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_nothing_is_of_double_precision(form, way, nonfinite, single):
    net, optimizer = build(form, nonfinite)
    with no_double():
        for seed in range(4):
            optimizer.zero_grad()
            WAYS[way](net, optimizer, seed)
        if optimizer.last_balance is not None and FORMS[form].get("beta") != 0:
            optimizer.gradient_cosines()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step(net.losses(9))


def test_nothing_is_of_double_precision_with_an_aggregator(single):
    net, optimizer = build("exact", "raise", aggregator=lambda matrix: matrix.sum(0))
    with no_double():
        for seed in range(3):
            optimizer.zero_grad()
            optimizer.step(net.losses(seed))
        optimizer.gradient_cosines()
