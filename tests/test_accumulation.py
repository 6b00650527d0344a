"""Micro-batches: `accumulate` and the call that completes them give the step of one big batch."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cases import with_value
from conftest import assert_same, header_of, named, snapshot
from devices import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Branches
from oracle import Oracle

from balanced_optim import DualBalancedOptimizer

TASKS, ROWS = 3, 12


def mean_losses(net, x, labels):
    """The mean loss of each task over its labelled samples; None without any."""
    return [losses[has].mean() if has.any() else None for losses, has in zip(net(x), labels, strict=True)]


def micro_batches(net, names, x, labels, cuts, form):
    """The losses of each micro-batch, and the keyword that tells their numbers of samples."""
    for rows, has in zip(x.tensor_split(cuts), labels.tensor_split(cuts, dim=1), strict=True):
        counts = dict(zip(sorted(names), has.sum(1).tolist(), strict=True))
        samples = {
            "number": max(*counts.values(), 1),
            "sequence": [0.037 * (counts[name] or 1) for name in names],  # only ratios count
            "mapping": {name: count for name, count in counts.items() if count > 1},
        }
        yield mean_losses(net, rows, has), {"samples": samples[form]}


# Where the batch is cut into micro-batches, the form of `samples`, and the tasks absent from a micro-batch.
SPLITS = {
    "even": ([4, 8], "number", lambda seed, part: []),
    "four": ([2, 7, 8], "number", lambda seed, part: []),
    "by position": ([5, 8], "sequence", lambda seed, part: []),
    "by name": ([1, 7], "mapping", lambda seed, part: []),
    "absent from some": ([5, 8], "number", lambda seed, part: [(seed + part) % 3]),
    "absent from the last": ([3, 7], "number", lambda seed, part: [seed % 3] * (part == 2)),
    "absent from all but one": ([2, 8], "sequence", lambda seed, part: {0, 1, 2} - {(seed + part) % 3}),
    "absent from all": ([4], "number", lambda seed, part: range(3) if seed == 2 else [seed % 3]),
    "all absent from the last": ([4, 6], "mapping", lambda seed, part: range(3 * (part == 2))),
    "all absent from the first": ([4, 6], "number", lambda seed, part: range(3 * (part == 0))),
}


def data(split, seed):
    """Samples, which of them have a label for which task, cuts, form."""
    cuts, form, absent = SPLITS[split]
    source = generator(seed)
    x = torch.randn(ROWS, 4, generator=source, dtype=torch.float64)
    labels = torch.rand(TASKS, ROWS, generator=source) < (0.7 if form in ("sequence", "mapping") else 2)
    for part, rows in enumerate(torch.arange(ROWS).tensor_split(cuts)):
        for task in absent(seed, part):
            labels[task, rows] = False
    return x, labels, cuts, form


SETTINGS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "cap": {"max_weight": 1.5},
    "priorities": {"task_weights": {"c": 2.0, "a": 0.5, "b": 1.0}},
    "no rescale": {"norm_target": None, "beta": 0.0},
    "no log": {"log_transform": False},
    "one backward": {"norm_params": ["last"]},
    "refresh last": {"norm_params": ["last"], "refresh_every": 2},
    "refresh": {"norm_params": ["last"], "refresh_every": 3, "task_weights": {"a": 1.0, "b": 0.5, "c": 2.0}},
    "large": {"large": True},
    "large, beta 0": {"large": True, "beta": 0.0},
    "large, half": {"large": True, "ema_dtype": torch.bfloat16},
    "large, refresh": {"large": True, "norm_params": ["first", "second", "last"], "refresh_every": 2},
    "refresh, no log": {"norm_params": ["last"], "refresh_every": 3, "log_transform": False, "max_weight": 2.0},
}


def build(setting, oracle=False, **options):
    """A network and its optimizer, or an oracle that shares no code with it."""
    options = SETTINGS[setting] | options
    net = Branches(options.pop("large", False))
    base, trunk = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), net.trunk.parameters()
    subset = [parameter for name in options.pop("norm_params", []) for parameter in net.trunk[name].parameters()]
    if not oracle:
        return net, DualBalancedOptimizer(base, trunk, norm_params=subset or None, **options)
    options.pop("ema_dtype", None)
    form = "one backward" if subset else "exact"
    every = options.pop("refresh_every", 1)
    return net, Oracle(base, trunk, form=form, norm_params=subset, refresh_every=every, rule=options)


FINISHES = {
    "step": lambda optimizer, losses, **samples: optimizer.step(losses, **samples),
    "backward": lambda optimizer, losses, **samples: optimizer.backward(losses, **samples) or optimizer.step(),
    "closure": lambda optimizer, losses, **samples: optimizer.step(lambda: losses, **samples),
    "none": lambda optimizer, losses, **samples: optimizer.accumulate(losses, **samples) or optimizer.step(),
    "empty": lambda optimizer, losses, **samples: optimizer.accumulate(losses, **samples) or optimizer.step(print),
}


def assert_near(actual, expected, rtol=1e-10):
    """Nested containers agree; tensors to `rtol` of their largest element."""
    if isinstance(expected, torch.Tensor):
        actual, expected = actual.detach().double(), expected.detach().double()
        atol = rtol * expected.nan_to_num().abs().max()
        assert torch.allclose(actual, expected, rtol=0, atol=atol, equal_nan=True), f"{actual} != {expected}"
    elif isinstance(expected, dict):
        assert_near([*actual.items()], [*expected.items()], rtol)
    elif isinstance(expected, list | tuple):
        for pair in zip(actual, expected, strict=True):
            assert_near(*pair, rtol)
    else:
        assert actual == expected


def check(setting, batches, finish="step"):
    """Micro-batches agree with the oracle after every step, with big batches at the end. Some find a `.grad` there."""
    (net, optimizer), (twin, other), (third, oracle) = (build(setting, oracle=o) for o in (False, False, True))
    names = "".join(SETTINGS[setting].get("task_weights", "012"))
    form, rtol = list if names == "012" else named, 2e-2 if "ema_dtype" in SETTINGS[setting] else 1e-10
    for step, (x, labels, *split) in enumerate(batches):
        for parameter in [*net.parameters(), *twin.parameters(), *third.parameters()]:
            parameter.grad = torch.full_like(parameter, 0.3) if step % 2 else None
        *early, (last, samples) = micro_batches(net, names, x, labels, *split)
        for losses, count in early:
            optimizer.accumulate(form(losses), **count)
        FINISHES[finish](optimizer, form(last), **samples)
        other.step(form(mean_losses(twin, x, labels)))
        oracle.step(dict(zip(sorted(names), mean_losses(third, x, labels), strict=True)))
        for one, expected in zip(net.parameters(), third.parameters(), strict=True):
            assert_near([one, one.grad], [expected, expected.grad], rtol)
    assert_near(snapshot(net, optimizer), snapshot(twin, other), rtol)


FEW = ["by name", "absent from all but one", "all absent from the last"]
MAIN = ["exact", "beta 0", "refresh"]
CASES = [(s, split, "step") for s in SETTINGS for split in (SPLITS if s in MAIN else FEW[: 3 - ("large" in s)])]
FINISHED = [(s, "by position", finish) for s in MAIN for finish in FINISHES]


@pytest.mark.parametrize(("setting", "split", "finish"), dict.fromkeys(CASES + FINISHED))
def test_micro_batches_give_the_step_of_the_big_batch(setting, split, finish):
    steps = 2 if finish != "step" or "large" in setting else 4
    check(setting, [data(split, seed) for seed in range(steps)], finish)


CUTS = st.sets(st.integers(1, ROWS - 1), min_size=1, max_size=3).map(sorted)
BITS = st.lists(st.integers(0, 2**ROWS - 1), min_size=TASKS, max_size=TASKS)
LABELS = BITS.map(lambda bits: torch.tensor(bits)[:, None] >> torch.arange(ROWS) & 1 == 1)
SMALL = st.sampled_from([setting for setting, options in SETTINGS.items() if "large" not in options])


@settings(max_examples=25, deadline=None)
@given(SMALL, st.lists(st.tuples(LABELS, CUTS, st.sampled_from(["sequence", "mapping"])), min_size=1, max_size=3))
def test_any_split_with_any_labels_gives_the_same_step(setting, batches):
    check(setting, [(data("even", seed)[0], *batch) for seed, batch in enumerate(batches)])


# A setting, and the steps taken before: under "refresh last" the next step reuses norms after 1, measures after 2.
PHASES = [("exact", 0), ("exact", 1), ("beta 0", 1), ("refresh last", 1), ("refresh last", 2)]
in_each_phase = pytest.mark.parametrize(("setting", "done"), PHASES)


def part(net, number):
    """The losses of all tasks on a micro-batch."""
    return mean_losses(net, *data("even", number)[:2])


def take(pair, *numbers, form=lambda losses, number: losses):
    """One step from these micro-batches."""
    net, optimizer = pair
    for number in numbers[:-1]:
        optimizer.accumulate(form(part(net, number), number))
    optimizer.step(form(part(net, numbers[-1]), numbers[-1]))


def trained(setting, done, **options):
    """Twice the same network after some steps, with its optimizer."""
    pairs = build(setting, **options), build(setting, **options)
    for pair in pairs:
        for step in range(done):
            take(pair, 10 * step, 10 * step + 1)
    return pairs


def unnamed(pair):
    """Parameters, gradients, counts and state, but neither names nor zero averages, which any first call may bring."""
    seen, header = snapshot(*pair), header_of(pair[1])
    entries = [item for entry in seen["state"]["state"].values() for item in entry.items()]
    state = [(name, value) for name, value in entries if not name.startswith("task_ema") or value.any()]
    return seen["parameters"], seen["gradients"], header["counts"], header["ages"], state


def assert_same_after(one, two, *numbers):
    """A step from these micro-batches makes them equal, or leaves them so."""
    for pair in (one, two):
        take(pair, *numbers)
    assert_same(snapshot(*one), snapshot(*two))


@in_each_phase
@pytest.mark.parametrize("drop", ["zero_grad", "exception"])
def test_pending_micro_batches_change_nothing_and_can_be_dropped(setting, done, drop):
    one, two = trained(setting, done)
    for parameter in [*one[0].parameters(), *two[0].parameters()]:
        parameter.grad = torch.full_like(parameter, 0.3) if done else None
    before = unnamed(one)
    for number in (5, 6):
        one[1].accumulate(part(one[0], number))
        assert_same(unnamed(one), before)
    if drop == "exception":
        handle = one[0].heads[1].weight.register_hook(lambda gradient: {}["from a hook"])
        with pytest.raises((KeyError, RuntimeError), match="from a hook"):
            one[1].accumulate(part(one[0], 7))
        handle.remove()
        assert_same(unnamed(one), before)
    else:
        one[1].zero_grad()
        two[1].zero_grad()
    assert_same_after(one, two, 8, 9)


def bad(losses, value=math.nan):
    return [losses[0], with_value(losses[1], value), losses[2]]


NUMBER = "samples of task '{}' must be a number > 0, got {!r}"
REFUSED = [
    *[(list, samples, NUMBER.format(0, samples)) for samples in (0, -1, math.nan, True, "2")],
    *[(list, [1, 1, count], NUMBER.format(2, count)) for count in (0, True, "2")],
    (list, {"2": -0.5}, NUMBER.format(2, -0.5)),
    (list, [1, 2], "samples must have 3 entries, one a task, got 2"),
    (list, {"z": 1}, r"samples names the unknown task 'z'; the tasks are \['0', '1', '2'\]"),
    (bad, 1, "loss of task '1' must be finite, got nan"),
    (lambda losses: bad(losses, math.inf), 1, "loss of task '1' must be finite, got inf"),
]


@pytest.mark.parametrize("setting", ["exact", "refresh last"])
@pytest.mark.parametrize(("form", "samples", "message"), REFUSED)
def test_what_is_refused_leaves_the_earlier_micro_batches(setting, form, samples, message):
    one, two = trained(setting, 1)
    for pair in (one, two):
        pair[1].accumulate(part(pair[0], 5))
    for call in (one[1].accumulate, one[1].backward, one[1].step):
        with pytest.raises(ValueError, match=message):
            call(form(part(one[0], 6)), samples=samples)
        assert_same(snapshot(*one), snapshot(*two))
    assert_same_after(one, two, 6)


def test_only_the_mean_loss_must_be_positive():
    one, two = trained("exact", 1)
    take(one, 5, 6, form=lambda losses, number: [loss + 100 * (number - 5.5) for loss in losses])
    take(two, 5, 6)
    assert_near(snapshot(*one), snapshot(*two))
    one[1].accumulate(part(one[0], 7))
    with pytest.raises(ValueError, match=r"loss of task '1' must be greater than -eps .*, got -4\d\."):
        one[1].step(bad(part(one[0], 8), -100.0))


@in_each_phase
@pytest.mark.parametrize("spoilt", [5, 7])
@pytest.mark.parametrize("mode", ["skip", "ignore"])
def test_a_bad_loss_of_any_micro_batch_skips_the_batch_or_leaves_out_the_task(setting, done, spoilt, mode):
    one, two = trained(setting, done, nonfinite=mode)
    before = unnamed(one)
    take(one, 5, 6, 7, form=lambda losses, number: bad(losses) if number == spoilt else losses)
    assert one[1].last_balance.skipped is (mode == "skip")
    if mode == "skip":
        assert_same(unnamed(one), before)
    else:
        take(two, 5, 6, 7, form=lambda losses, number: [losses[0], None, losses[2]])
    assert_same_after(one, two, 8, 9)


@in_each_phase
@pytest.mark.parametrize("place", ["first", "last", "head"])
@pytest.mark.parametrize("mode", ["raise", "skip", "ignore"])
def test_a_bad_gradient_of_an_early_micro_batch_goes_nowhere(setting, done, mode, place):
    one, two = trained(setting, done, nonfinite=mode)
    net, optimizer = one
    handle = (net.heads[1] if place == "head" else net.trunk[place]).weight.register_hook(lambda g: g * math.nan)
    optimizer.accumulate([None, part(net, 5)[1], None])
    handle.remove()
    before = unnamed(one)
    with pytest.raises(RuntimeError, match="must be finite") if mode == "raise" else nullcontext():
        take(one, 6)
        assert optimizer.last_balance.skipped is (mode == "skip")
    if mode != "ignore":
        assert_same(unnamed(one)[:2], before[:2])
    elif setting != "refresh last":
        take(two, 6, form=lambda losses, number: [losses[0], None, losses[2]])
        assert_same(unnamed(one), unnamed(two))
    optimizer.zero_grad()
    take(one, 7, 8)
    averages = [value for name, value in unnamed(one)[-1] if name.startswith("task_ema")]
    assert all(tensor.isfinite().all() for tensor in [*net.parameters(), *averages])


@pytest.mark.parametrize("form", [np.int64, np.float32, torch.tensor, int], ids=lambda form: form.__name__)
def test_samples_as_labels_are_counted(form):
    """Counts come from numpy or as tensors, and are 0 for a task without labels, whose loss is None."""
    runs = [build("exact"), build("exact")]
    for (net, optimizer), kind, none in zip(runs, (form, float), (0, 1), strict=True):
        for rows, take_in in ((4, optimizer.accumulate), (3, optimizer.step)):
            first, second, _ = net(torch.ones(rows, 4, dtype=torch.float64))
            take_in([first.mean(), second.mean(), None], samples=[kind(rows), kind(1), kind(none)])
    assert_near(snapshot(*runs[0]), snapshot(*runs[1]), 0)
