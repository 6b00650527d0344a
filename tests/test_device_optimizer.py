"""The method on the stores of a GPU, through the optimizer; on a CPU under Triton's interpreter.

TRITON_INTERPRET=1 python -m pytest -m interpreter
"""

import copy
import math
import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from cases import one_thread, with_value  # noqa: F401
from conftest import assert_same, header_of
from devices import grad_scaler
from hypothesis import HealthCheck, settings, stateful
from modes import device_path, journal, kernels_are_not_watched, nothing_comes_from_the_host, nothing_is_read
from networks import Net
from oracle import Oracle
from test_capture import (  # noqa: F401
    test_a_graph_goes_on_from_zero_after_a_reset,
    test_what_is_loaded_or_set_goes_where_it_was,
    test_what_was_forgotten_does_not_hold_the_next_batch_back,
)
from test_state_machine import SEEN, Programs
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import _disable_current_modes

from balanced_optim import DualBalancedOptimizer, _kernels
from balanced_optim._cuda_store import DeviceRows, DeviceSum
from balanced_optim._device_layout import PinnedTables
from balanced_optim._running_sum import RunningSum
from balanced_optim._store import FlatGradientBuffer

pytestmark = pytest.mark.interpreter

DEVICE = torch.device("cpu" if _kernels.INTERPRETED else "cuda")
STORES = "balanced_optim._cuda_store.CHOSEN"
FORMS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "capped": {"max_weight": 1.5},
    "capped at beta 0": {"max_weight": 1.5, "beta": 0.0},
    "log alone": {"norm_target": None},
    "log alone at beta 0": {"norm_target": None, "beta": 0.0},
    "rms": {"norm_target": "rms"},
    "median at beta 0": {"norm_target": "median", "beta": 0.0},
    "a number": {"norm_target": 0.5},
    "half power": {"norm_power": 0.5, "beta_decay": 0.0},
    "half power at beta 0": {"norm_power": 0.5, "beta": 0.0},
    "warm-up": {"warmup_steps": 3},
    "warm-up at beta 0": {"warmup_steps": 3, "beta": 0.0},
    "fading": {"fade_solved": True, "eps": 0.1},
    "fading at beta 0": {"fade_solved": True, "eps": 0.1, "beta": 0.0},
    "priorities": {"task_weights": [1.0, 0.5, 0.0]},
    "priorities at beta 0": {"task_weights": [1.0, 0.5, 2.0], "beta": 0.0},
    "log by task": {"log_transform": [True, False, True]},
    "one backward": {"norm_params": True},
    "refreshed": {"norm_params": True, "refresh_every": 2},
}
FEW = ["exact", "beta 0", "one backward"]
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def default_device():
    before = torch.get_default_device()
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(before)


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch, default_device):
    with device_path(monkeypatch):
        monkeypatch.setattr(STORES, lambda parameters: True)
        yield


def build(form="exact", nonfinite="raise", dtype=torch.float32, base=SGD, **more):
    net = Net(3, (3, 4), dtype=dtype)
    options = (FORMS[form] if isinstance(form, str) else form) | more
    if options.get("norm_params") is True:
        options["norm_params"] = net.trunk[0]
    return net, DualBalancedOptimizer(base(net.parameters(), lr=0.01), net.trunk, nonfinite=nonfinite, **options)


def store_of(optimizer):
    return optimizer._parts.state.averages.store


def train(net, optimizer, steps, start=0):
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        losses = net.losses(seed)
        if seed % 3 == 2:
            losses[seed % 2] = None
        optimizer.step(losses)


def outcome(net, optimizer):
    """Copies of what a run comes to."""
    balance = optimizer.last_balance
    found = [p.detach() for p in net.parameters()], balance.losses, balance.norms, balance.weights
    return copy.deepcopy([*found, optimizer.state_dict()])


def oracle_of(net, optimizer, form, nonfinite):
    options = dict(FORMS[form])
    extra = {"refresh_every": options.pop("refresh_every", 1), "nonfinite": nonfinite}
    if options.pop("norm_params", None):
        extra |= {"form": "one backward", "norm_params": list(net.trunk[0].parameters())}
    base = SGD(net.parameters(), lr=0.01)
    return Oracle(base, list(net.trunk.parameters()), rule=options, zeros=nonfinite == "ignore", **extra)


def spoil(net, seed, where):
    """Losses of a batch whose first task is bad there."""

    def at(place, task, values):
        if (place, task) == (where, 0):
            values = values * 1
            values.register_hook(lambda gradient: gradient * math.nan)
        return values

    losses = net.losses(seed, at)
    return [with_value(losses[0], math.nan), *losses[1:]] if where == "loss" else losses


# ------------------------------------------------- against the oracle


def check(net, optimizer, model, other, number=3):
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()), rtol=1e-8, atol=1e-10)
    balance = optimizer.last_balance
    for mine, expected in zip(
        (balance.losses, balance.norms, balance.weights), model.balance(range(number)), strict=True
    ):
        torch.testing.assert_close(mine.cpu(), torch.tensor(expected, dtype=mine.dtype, device="cpu"), equal_nan=True)


@pytest.mark.parametrize(
    ("form", "nonfinite"), [*((form, "ignore") for form in FORMS), *((form, "raise") for form in FEW)]
)
def test_every_form_takes_the_steps_of_the_oracle(form, nonfinite):
    (net, optimizer), other = build(form, nonfinite, torch.float64), Net(3, (3, 4), dtype=torch.float64)
    model = oracle_of(other, optimizer, form, nonfinite)
    for seed in range(4):
        given, mine = net.losses(seed), other.losses(seed)
        if seed == 2:
            given[1] = mine[1] = None
        if seed == 3 and not FORMS[form].get("norm_params"):
            # Its gradient is zero on the trunk.
            given[2], mine[2] = (losses[2].detach() + 0 * losses[2] for losses in (given, mine))
        for each in (optimizer, model):
            each.zero_grad()
        optimizer.step(given)
        model.step(dict(enumerate(mine)))
        check(net, optimizer, model, other)
    assert isinstance(store_of(optimizer), DeviceSum if "beta 0" in form and "capped" not in form else DeviceRows)


@pytest.mark.parametrize("form", FEW)
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("where", ["loss", "trunk", "head"])
def test_a_bad_task_is_refused_skipped_or_ignored_as_by_the_oracle(form, nonfinite, where):
    (net, optimizer), other = build(form, nonfinite, torch.float64), Net(3, (3, 4), dtype=torch.float64)
    model = oracle_of(other, optimizer, form, nonfinite)
    if (form, nonfinite, where) == ("one backward", "ignore", "trunk"):
        pytest.skip("the joint pass serves all tasks, so nothing of it counts")
    for seed, bad in enumerate(["", where, ""]):
        given, mine = (spoil(each, seed, bad) for each in (net, other))
        for each in (optimizer, model):
            each.zero_grad()
        expected = model.step(dict(enumerate(mine)))
        if isinstance(expected, tuple):
            with pytest.raises(expected[0], match=expected[1]):
                optimizer.step(given)
            assert header_of(optimizer)["counts"] == [1, 1, 1]
            continue
        optimizer.step(given)
        assert optimizer.last_balance.skipped is (expected == "skip")
        check(net, optimizer, model, other)


@pytest.mark.filterwarnings("ignore:the loss of task .* is .* below -eps")
def test_random_programs_agree_with_the_oracle():
    SEEN.clear()
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    few = settings(max_examples=200, stateful_step_count=6, derandomize=True, **quiet)
    stateful.run_state_machine_as_test(DevicePrograms, settings=few)
    assert {"taken", "skip", "overflow", "ValueError"} <= SEEN.keys()
    assert SEEN["programs"] >= 200


class DevicePrograms(Programs):
    """Where a bad task is ignored its heads get zeros instead of nothing."""

    def wrap(self, seed=0):
        super().wrap(seed)
        self.model.zeros = self.o["nonfinite"] == "ignore"

    def losses(self, seed, faults, *limit):
        if self.o["joint"] and self.o["nonfinite"] == "ignore":
            # Zero times NaN spoils the joint pass, which then counts for nothing; and norms of bad tasks have ages.
            allowed = ["absent"] if self.o["refresh_every"] > 1 else ["absent", "nan", "inf", "negative"]
            faults = [fault if fault in allowed else "good" for fault in faults]
        return super().losses(seed, faults, *limit)


# ------------------------------------------------- against the store in torch


@pytest.fixture
def in_torch(monkeypatch):
    """A function that runs another on the store in torch."""

    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(STORES, lambda parameters: False)
            return function(*args, **kwargs)

    return run


def run_of(way, form="exact", **options):
    net, optimizer = build(form, **options)
    for seed in range(4):
        optimizer.zero_grad()
        way(net, optimizer, seed)
    return net, optimizer


def plain(net, optimizer, seed):
    optimizer.step(net.losses(seed))


def accumulated(net, optimizer, seed):
    optimizer.accumulate(net.losses(seed + 20), samples=3)
    optimizer.step(net.losses(seed)[:2] + [None])


def scaled(scale):
    def way(net, optimizer, seed):
        scaler = grad_scaler(scale)
        optimizer.backward(net.losses(seed), scaler)
        scaler.step(optimizer)
        scaler.update()

    return way


def thawed(net, optimizer, seed):
    net.trunk[0].bias.requires_grad_(seed > 1)
    optimizer.step(net.losses(seed))


def half(net, optimizer, seed):
    x = net.data(seed).to(torch.bfloat16)
    features = net.trunk.to(torch.bfloat16)(x).float()
    optimizer.step([10.0**task * (head(features) - 1).square().mean() for task, head in enumerate(net.heads)])


WAYS = {
    "micro-batches": (accumulated, {}, 1e-5),
    "micro-batches at beta 0": (accumulated, {"form": "beta 0"}, 1e-5),
    "micro-batches in one backward": (accumulated, {"form": "one backward"}, 1e-5),
    "a scaler": (scaled(2.0**10), {}, 1e-5),
    "a scaler in one backward": (scaled(2.0**10), {"form": "refreshed"}, 1e-5),
    "an aggregator": (plain, {"aggregator": lambda matrix: matrix.sum(0)}, 1e-5),
    "an aggregator at beta 0": (plain, {"form": "beta 0", "aggregator": lambda matrix: matrix.mean(0)}, 1e-5),
    "thawed": (thawed, {}, 1e-5),
    "thawed at beta 0": (thawed, {"form": "beta 0"}, 1e-5),
    "rows of half precision": (plain, {"ema_dtype": torch.bfloat16}, 2e-2),
    "parameters of half precision": (half, {}, 2e-2),
    "parameters of half precision at beta 0": (half, {"form": "beta 0"}, 2e-2),
    "Adam": (plain, {"base": Adam}, 1e-4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_every_way_to_step_agrees_with_the_store_in_torch(way, nonfinite, in_torch):
    step, options, tolerance = WAYS[way]
    ours, theirs = run_of(step, nonfinite=nonfinite, **options), in_torch(run_of, step, nonfinite=nonfinite, **options)
    assert isinstance(store_of(ours[1]), DeviceRows | DeviceSum)
    assert isinstance(store_of(theirs[1]), FlatGradientBuffer | RunningSum)
    for mine, other in zip(outcome(*ours)[:-1], outcome(*theirs)[:-1], strict=True):
        for one, two in zip(mine, other, strict=True):
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert header_of(ours[1]) == header_of(theirs[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_go_from_store_to_store(form, ours_first, in_torch):
    here, there = (lambda f, *a, **k: f(*a, **k)), in_torch
    first, second = (here, there) if ours_first else (there, here)
    (net, saver), (again, loader) = first(build, form), build(form)
    first(train, net, saver, 3)
    again.load_state_dict(net.state_dict())
    state = copy.deepcopy(first(saver.state_dict))
    second(loader.load_state_dict, state)
    assert isinstance(store_of(loader), DeviceRows | DeviceSum) is not ours_first
    assert_same(second(loader.state_dict), state)
    first(train, net, saver, 2, 3)
    second(train, again, loader, 2, 3)
    torch.testing.assert_close(list(net.parameters()), list(again.parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [*FEW, "refreshed", "warm-up"])
@pytest.mark.parametrize("nonfinite", ["raise", "ignore"])
def test_a_resumed_run_is_the_same_bit_for_bit(form, nonfinite):
    (net, whole), (again, resumed) = build(form, nonfinite), build(form, nonfinite)
    train(net, whole, 4)
    train(again, resumed, 1, 7)
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    if form != "beta 0":
        slots = [store_of(each)._segments[0].slots.tolist() for each in (whole, resumed)]
        assert slots[0] != slots[1]
    train(net, whole, 3, 4)
    train(again, resumed, 3, 4)
    assert_same(outcome(again, resumed), outcome(net, whole))
    before = copy.deepcopy(whole.state_dict())
    whole.load_state_dict(whole.state_dict())
    assert_same(whole.state_dict(), before)


@pytest.mark.parametrize("form", [*FEW, "refreshed"])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_a_scaler_changes_no_bit(form, scale):
    plainly, with_scaler = run_of(plain, form), run_of(scaled(scale), form)
    assert_same(outcome(*with_scaler), outcome(*plainly))


def test_cosines_and_a_fresh_start():
    (net, optimizer), (other, fresh) = build(), build()
    train(net, optimizer, 2)
    rows = [
        torch.cat([entry[f"task_ema_{task}"].flatten() for entry in list(optimizer.state_dict()["state"].values())[:2]])
        for task in range(3)
    ]
    expected = torch.stack([torch.stack([torch.cosine_similarity(a, b, 0) for b in rows]) for a in rows])
    torch.testing.assert_close(optimizer.gradient_cosines().float(), expected, rtol=1e-5, atol=1e-6)
    optimizer.reset_averages()
    other.load_state_dict(net.state_dict())
    train(net, optimizer, 2, 5)
    train(other, fresh, 2, 5)
    assert_same(outcome(net, optimizer), outcome(other, fresh))


def test_copies_of_an_optimizer_go_on_alike():
    net, optimizer = build()
    train(net, optimizer, 2)
    again, other = copy.deepcopy((net, optimizer))
    train(net, optimizer, 2, 2)
    train(again, other, 2, 2)
    assert_same(outcome(again, other), outcome(net, optimizer))


# ------------------------------------------------- what the host reads


@pytest.fixture
def unwatched(monkeypatch):
    with kernels_are_not_watched(monkeypatch):
        yield


@every_form
def test_nothing_is_read_where_bad_tasks_are_ignored(form, unwatched):
    net, optimizer = build(form, "ignore")
    for seed, where in enumerate(["", "trunk", "", "head", "loss"]):
        losses = spoil(net, seed, where)
        losses[1] = None if seed == 2 else losses[1]
        optimizer.zero_grad()
        with nothing_is_read():
            optimizer.step(losses)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


@every_form
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_one_read_after_everything_is_under_way(form, nonfinite, unwatched):
    net, optimizer = build(form, nonfinite)
    for seed in range(3):
        optimizer.zero_grad()
        losses = net.losses(seed)
        with journal() as operations:
            optimizer.backward(losses)
        reads = [place for place, operation in enumerate(operations) if operation.reads]
        assert len(reads) == 1, [operations[place].name for place in reads]
        # A layer of the trunk has 12 weights, more than anything that is counted by task.
        assert not [each for each in operations[reads[0] + 1 :] if each.size >= 12]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU has real graphs")
@pytest.mark.parametrize("form", [form for form in FORMS if form != "refreshed"])
def test_a_batch_in_a_graph_takes_no_more_than_addresses_from_the_host(form, unwatched, monkeypatch):
    on = PinnedTables.on

    def from_pinned_memory(*args):
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return on(*args)

    monkeypatch.setattr(PinnedTables, "on", from_pinned_memory)
    net, optimizer = build(form, "ignore")
    optimizer.step(net.losses(0))
    monkeypatch.setattr("balanced_optim._capture.CAPTURING", lambda: True)
    losses = net.losses(1)
    with nothing_is_read(), nothing_comes_from_the_host():
        optimizer.backward(losses)
