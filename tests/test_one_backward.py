"""The one-backward form: norms on a subset of the shared parameters, then one joint backward pass."""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import assert_same, header_of, snapshot
from devices import array
from networks import Graph
from oracle import Oracle
from torch import nn

from balanced_optim import DualBalancedOptimizer

TASKS = 3
BASES = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}


def textbook(net, subset=None, base="sgd", lr=0.01, refresh_every=1, **rule):
    subset = list(net.upper.parameters()) if subset is None else subset
    own = {id(parameter) for parameter in net.trained}
    outside = [parameter for parameter in net.others if id(parameter) not in own]
    options = {"norm_params": subset, "refresh_every": refresh_every, "outside": outside}
    return Oracle(BASES[base](net.trained, lr), net.shared, form="one backward", rule=rule, **options)


def wrap(net, base="adam", subset=None, lr=0.01, **options):
    subset = list(net.upper.parameters()) if subset is None else subset
    return DualBalancedOptimizer(BASES[base](net.trained, lr), net.shared, norm_params=subset, **options)


def build(kind="plain", **options):
    net = Graph(kind)
    return net, wrap(net, **options)


def train(net, optimizer, steps, form=lambda losses, seed: losses):
    for seed in steps:
        optimizer.zero_grad()
        optimizer.step(form(net.losses(seed), seed))


def some(losses, seed):
    """Without the third task before step 3, and later with each task in about three of four steps."""
    here = np.random.default_rng(seed).random(TASKS) < 0.75
    here[2] &= seed >= 3
    here[0] |= not here.any()
    return [loss if keep else None for loss, keep in zip(losses, here, strict=True)]


def assert_near(actual, expected, rtol, step):
    """Dictionaries of tensors or None, each entry by its norm."""
    names = [name for name, tensor in actual.items() if tensor is not None]
    assert names == [name for name, tensor in expected.items() if tensor is not None], step
    pairs = [(actual[name].detach().double(), expected[name].detach().double()) for name in names]
    errors = torch.stack(torch._foreach_norm([one - other for one, other in pairs]))
    sizes = torch.stack(torch._foreach_norm([other for _, other in pairs]))
    # A bias whose terms cancel has rounding errors of the size of the terms.
    wrong = (errors > rtol * (sizes + 0.01 * sizes.max())).tolist()
    assert not any(wrong), f"step {step}: {list(itertools.compress(names, wrong))}, {errors}"


def assert_balance(balance, oracle, rtol):
    found = (balance.losses, balance.norms, balance.weights)
    for one, expected in zip(found, oracle.balance(range(TASKS)), strict=True):
        np.testing.assert_allclose(array(one.double()), expected, rtol=rtol)


def assert_separate(parameters):
    """No two gradients lie on the same memory."""
    spans = sorted((p.grad.data_ptr(), p.grad.data_ptr() + p.grad.nbytes) for p in parameters if p.grad is not None)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


# ------------------------------------------------- the oracle

SETTINGS = [
    {},
    {"beta": 0.0},
    {"beta": 0.5, "beta_decay": 0.0},
    {"max_weight": 1.0},
    {"beta": 0.0, "max_weight": 1.5},
    {"task_weights": [1.0, 0.25, 3.0]},
    {"norm_target": "mean", "max_weight": 2.0},
    {"norm_target": "median"},
    {"norm_target": "min", "beta": 0.0},
    {"norm_target": None, "task_weights": [0.5, 2.0, 0.0]},
    {"log_transform": False},
    {"log_transform": False, "norm_target": None, "beta": 0.0},
    {"eps": 0.1, "beta_decay": 1.0},
    {"eps": 0.1, "fade_solved": True},
]
SUBSETS = {
    "last layer": lambda net: list(net.upper.parameters()),
    "all": lambda net: net.shared,
    "several": lambda net: [net.upper.bias, net.lower.weight, *net.middle.parameters()],
}
# Every subset with every period; the bases take turns.
CASES = [
    (setting, (1, 3, 8)[i % 3], list(SUBSETS)[i // 3 % 3], list(BASES)[i % 2], torch.float64)
    for i, setting in enumerate(SETTINGS)
]
# Heads of a task of weight 0 train all the same, where norms are reused too.
CASES += [({"task_weights": [0.5, 2.0, 0.0]}, 3, "last layer", "adam", torch.float64)]
CASES += [(*case[:4], torch.float32) for case in CASES[1::3]]


@pytest.mark.parametrize(("setting", "every", "subset", "base", "dtype"), CASES)
def test_fifty_steps_agree_with_the_oracle(setting, every, subset, base, dtype):
    """float64 runs are independent of each other; float32 ones are compared step by step from equal parameters."""
    rtol = 1e-8 if dtype is torch.float64 else 1e-4
    lr = 0.01 if setting.get("log_transform", True) else 1e-3
    net = Graph(dtype=dtype)
    slow = copy.deepcopy(net).double()
    optimizer = wrap(net, base, SUBSETS[subset](net), lr=lr, refresh_every=every, **setting)
    oracle = textbook(slow, SUBSETS[subset](slow), base, lr, every, **setting)
    for seed in range(50):
        optimizer.zero_grad()
        oracle.zero_grad()
        if dtype is torch.float32:  # the same numbers, rounded, for both
            slow.load_state_dict(net.state_dict())
        optimizer.backward(some(net.losses(seed), seed))
        oracle.backward(dict(enumerate(some(slow.losses(seed), seed))))
        assert_balance(optimizer.last_balance, oracle, rtol)
        assert_near(net.grads(), slow.grads(), rtol, seed)
        optimizer.step()
        oracle.step()
    if dtype is torch.float64:
        assert_near(net.state_dict(), slow.state_dict(), rtol, "last")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("setting", [{}, {"max_weight": 1.5}, {"norm_target": "mean", "task_weights": [1.0, 2.0, 3.0]}])
def test_without_average_and_on_all_shared_parameters_it_is_the_exact_form(setting, base):
    net, exact = Graph(), Graph()
    one = wrap(net, base, net.shared, beta=0.0, **setting)
    many = DualBalancedOptimizer(BASES[base](exact.trained, 0.01), exact.shared, beta=0.0, **setting)
    for seed in range(20):
        train(net, one, [seed], some)
        train(exact, many, [seed], some)
        assert_near(net.state_dict(), exact.state_dict(), 1e-10, seed)
        assert_near(net.grads(), exact.grads(), 1e-10, seed)


@pytest.mark.parametrize("empty", range(1, 7))
def test_an_empty_batch_does_not_put_off_the_next_measurement(empty):
    """Norms are never older than `refresh_every` steps, apart from steps that brought nothing to measure."""
    net, optimizer = build(refresh_every=3)
    slow = copy.deepcopy(net)
    oracle = textbook(slow, refresh_every=3)
    for seed in range(9):  # gradients only: the parameters stay
        optimizer.backward(net.losses(seed) if seed != empty else [None] * TASKS)
        oracle.backward(dict(enumerate(slow.losses(seed))) if seed != empty else {})
        assert_balance(optimizer.last_balance, oracle, 1e-8)
    assert_near(net.grads(), slow.grads(), 1e-9, "last")


# ------------------------------------------------- any graph

KINDS = [
    "plain",
    "several inputs",
    "partly shared",
    "head of two tasks",
    "routed",
    "outside",
    "tied",
    "batch norm",
    "dropout",
    "recurrent",
    "non-reentrant",
]


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_any_graph_agrees_with_the_oracle(kind, every):
    """Gradients are added to those there before: `.grad` is cleared in every other step only.

    SGD, since Adam makes steps of rounding errors (the gradient of a bias before batch norm).
    """
    net, optimizer = build(kind, base="sgd", refresh_every=every)
    slow = copy.deepcopy(net)
    slow.kind = "plain" if kind == "non-reentrant" else kind
    oracle = textbook(slow, refresh_every=every)
    for seed in range(6):
        if seed % 2 == 0:
            optimizer.zero_grad()
            oracle.zero_grad()  # leaves outside keep theirs
        # The partly shared layer is reached by tasks 1 and 2 only, which the last steps lack.
        absent = seed == 3 or (kind == "partly shared" and seed > 3)
        form = (lambda losses: [losses[0], None, None]) if absent else (lambda losses: losses)
        optimizer.backward(form(net.losses(seed)))
        oracle.backward(dict(enumerate(form(slow.losses(seed)))))
        assert_balance(optimizer.last_balance, oracle, 1e-8)
        assert_near(net.grads(), slow.grads(), 1e-9, seed)
        assert_separate(net.parameters())
        optimizer.step()
        oracle.step()
    assert_near(net.state_dict(), slow.state_dict(), 1e-9, "last")
    assert net.batch_norm.num_batches_tracked == (6 if kind == "batch norm" else 0)
    assert (net.outside.grad is not None) == (kind == "outside")
    paired = kind in ("head of two tasks", "routed")
    assert all((p.grad is not None) == paired for p in net.pair.parameters())


@pytest.mark.parametrize("done", [0, 2, 3], ids=["first", "reuse", "refresh"])
def test_reentrant_checkpoints_are_refused_and_nothing_changes(done):
    net, optimizer = build("plain", refresh_every=3)
    train(net, optimizer, range(done))
    net.kind = "reentrant"
    before = untouched(net, optimizer)
    losses = net.losses(9)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step(losses)
    assert_same(untouched(net, optimizer), before)
    net.kind = "non-reentrant"
    train(net, optimizer, [10])
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def untouched(net, optimizer):
    """What no refused batch may change. Averages may have taken in part of it and are looked at by themselves."""
    seen = snapshot(net, optimizer)
    for entry in seen["state"]["state"].values():
        for name in [name for name in entry if name.startswith("task_ema_")]:
            assert entry.pop(name).isfinite().all()
    del seen["balance"]
    return seen


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("before", [False, True])
def test_gradients_never_share_memory(before, every):
    """Parameters that are added elementwise get one and the same gradient from autograd."""
    torch.manual_seed(0)
    trunk = nn.ParameterList([torch.randn(3, 5), torch.randn(5), torch.randn(5)])
    heads = nn.ParameterList([torch.randn(5), torch.randn(5), torch.zeros(()), torch.zeros(())])
    outside = nn.Parameter(torch.zeros(()))
    base = torch.optim.SGD([*trunk, *heads], lr=0.1)
    optimizer = DualBalancedOptimizer(base, trunk, norm_params=trunk[1:], refresh_every=every)
    parameters = [*trunk, *heads, outside]
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) if before else None
        z = torch.tanh(torch.randn(4, 3) @ trunk[0] + (trunk[1] + trunk[2]))
        common = (z * (heads[0] + heads[1])).square().mean()
        optimizer.backward([common + heads[2] + heads[3] + outside + 5, 7 * z.square().sum() + outside + 5])
        assert_separate(parameters)
        assert torch.equal(trunk[1].grad, trunk[2].grad)
        assert torch.equal(heads[2].grad, heads[3].grad)
        gradients = [parameter.grad.clone() for parameter in parameters]
        total = torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient * 0.01 / (total + 1e-6))
        optimizer.step()


def test_every_trunk_layer_that_trains_gets_a_gradient_or_an_error_where_norm_params_are_frozen():
    net, optimizer = build()
    net.upper.requires_grad_(False)
    try:
        optimizer.backward(net.losses())
    except ValueError as error:
        assert "norm_params" in str(error)
        assert all(gradient is None for gradient in net.grads().values())
    else:
        assert net.middle.weight.grad.norm() > 0


# ------------------------------------------------- cost, in backward passes


@pytest.mark.parametrize("every", [None, 1, 3])
def test_a_layer_below_the_subset_is_passed_once_a_step(every):
    """None: the exact form. The layer on which norms are measured is passed T + 1 times, or once on reuse."""
    net = Graph()
    if every is None:
        optimizer = DualBalancedOptimizer(BASES["adam"](net.trained, 0.01), net.shared)
    else:
        optimizer = wrap(net, refresh_every=every)
    for seed in range(7):
        losses, passes = net.losses(seed), {"below": 0, "subset": 0}

        def count(tensor, where, passes=passes):
            tensor.register_hook(lambda gradient: passes.update({where: passes[where] + 1}))

        count(net.seen_below, "below")
        count(net.seen, "subset")
        optimizer.step(losses)
        if every is None:
            assert passes == {"below": TASKS, "subset": TASKS}
        else:
            assert passes == {"below": 1, "subset": TASKS + 1 if seed % every == 0 else 1}


@pytest.mark.parametrize(
    ("kind", "options", "form", "expected"),
    [
        ("plain", {}, list, 1),
        ("plain", {}, torch.stack, 1),
        ("plain", {}, lambda losses: torch.stack([loss[None] for loss in losses]).unbind(), 1),
        ("plain", {"task_weights": [1.0, 0.0, 2.0]}, list, 2),
        ("head of two tasks", {}, list, 2),
    ],
)
def test_a_reused_norm_needs_one_pass_where_every_head_has_a_task_of_its_own(kind, options, form, expected):
    """Else a short one before it, for the heads of several tasks, or of one whose weight is 0."""
    net, optimizer = build(kind, refresh_every=4, **options)
    counts = []
    for seed in range(5):
        passes = []
        losses = net.losses(seed)
        losses[1].register_hook(passes.append)
        optimizer.zero_grad()
        optimizer.step(form(losses))
        counts.append(len(passes))
    measured = TASKS + 1 if form is torch.stack or isinstance(form(net.losses()), tuple) else 2
    assert counts == [measured, expected, expected, expected, measured]


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_head_sees_the_same_gradient_where_norms_are_reused(hook):
    net, optimizer = build(refresh_every=3)
    head, seen = net.heads[1].weight, []
    getattr(head, hook)(lambda it: seen.append((head.grad if it is head else it).clone()) or None)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(net.losses(0))
        found.append(head.grad)
    torch.testing.assert_close(found[1:], found[:2])
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("priority", [1e-5, 1e-6])
def test_a_small_weight_takes_nothing_from_the_head_of_a_float16_loss(priority):
    net = Graph(dtype=torch.float16)
    optimizer = wrap(net, "sgd", refresh_every=3, task_weights=[1.0, priority, 1.0], beta=0.0)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(net.losses(0))
        found.append(net.heads[1].weight.grad)
    assert found[0].norm() > 0
    assert_same(found[1:], found[:2])


@pytest.mark.parametrize("every", [1, 3])
def test_a_bad_micro_batch_is_left_out_on_a_device_as_on_a_cpu(every, monkeypatch):
    ends = []
    for device in (False, True):
        with monkeypatch.context() as patch:
            if device:
                patch.setattr("balanced_optim._numbers.ON_DEVICE", lambda where: True)
            net, optimizer = build(refresh_every=every, nonfinite="ignore", base="sgd")
            for seed in range(3):
                optimizer.zero_grad()
                first = net.losses(seed)
                if seed:
                    first[1] = first[1] + math.nan
                optimizer.accumulate(first)
                optimizer.backward(net.losses(seed + 10))
            ends.append(net.grads())
    there = [name for name, gradient in ends[0].items() if gradient is not None]
    assert_near(*({name: end[name] for name in there} for end in reversed(ends)), 1e-9, 2)
    assert not any(gradient.any() for name, gradient in ends[1].items() if name not in there and gradient is not None)


def test_a_new_task_makes_the_step_a_measured_one():
    net, optimizer = build(refresh_every=10)
    counts = []
    for seed, absent in enumerate((2, 2, None, 1, None)):
        optimizer.step([None if task == absent else loss for task, loss in enumerate(net.losses(seed))])
        counts.append(header_of(optimizer)["counts"])
    assert counts == [[1, 1, 0], [1, 1, 0], [2, 2, 1], [2, 2, 1], [2, 2, 1]]


# ------------------------------------------------- batches that are not usable

PHASES = pytest.mark.parametrize("done", [0, 1, 2, 3], ids=["first", "reuse", "last reuse", "refresh"])


def spoil(losses, value):
    """The second loss gets this very value."""
    return [losses[0], losses[1] - losses[1].detach() + value, losses[2]]


@PHASES
@pytest.mark.parametrize("value", [math.nan, -1.0])
@pytest.mark.parametrize("mode", ["raise", "skip", "ignore"])
@pytest.mark.filterwarnings("ignore:the loss of task .* below -eps")
def test_a_bad_loss_leaves_no_trace(mode, value, done):
    """What follows is what follows without the batch, or without the task ("ignore"), bit for bit."""
    net, optimizer = build(nonfinite=mode, refresh_every=3)
    train(net, optimizer, range(done))
    twin_net, twin = copy.deepcopy((net, optimizer))
    before = snapshot(net, optimizer)
    optimizer.zero_grad()
    bad = spoil(net.losses(50), value)
    if mode == "raise":
        with pytest.raises(ValueError, match="task '1'"):
            optimizer.step(bad)
    else:
        optimizer.step(bad)
    if mode == "ignore":
        train(twin_net, twin, [50], lambda losses, seed: [losses[0], None, losses[2]])
        assert optimizer.last_balance.weights[1] == 0
    else:
        after = snapshot(net, optimizer)
        assert_same([after["state"], after["parameters"]], [before["state"], before["parameters"]])
    assert (mode == "skip") == bool(optimizer.last_balance and optimizer.last_balance.skipped)
    train(net, optimizer, range(60, 65))
    train(twin_net, twin, range(60, 65))
    assert_same(snapshot(net, optimizer), snapshot(twin_net, twin))


@PHASES
@pytest.mark.parametrize("place", ["below", "trunk", "head"])
@pytest.mark.parametrize("mode", ["raise", "skip", "ignore"])
def test_a_bad_gradient_behind_a_finite_loss_changes_no_parameter(mode, place, done):
    net, optimizer = build(nonfinite=mode, refresh_every=3)
    train(net, optimizer, range(done))
    before = untouched(net, optimizer)
    net.poison = place
    losses = net.losses(50)
    net.poison = None
    if mode == "raise":
        with pytest.raises(RuntimeError, match="must be finite"):
            optimizer.step(losses)
    else:
        optimizer.step(losses)
    after = untouched(net, optimizer)
    if mode != "ignore":
        assert_same(after, before)
    assert (mode == "skip") == bool(optimizer.last_balance and optimizer.last_balance.skipped)
    train(net, optimizer, range(60, 64))
    assert not optimizer.last_balance.skipped
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    assert all(gradient.isfinite().all() for gradient in net.grads().values() if gradient is not None)


def test_ignore_keeps_the_other_tasks_of_a_measured_step_with_a_bad_head():
    (net, optimizer), (twin_net, twin) = build(nonfinite="ignore"), build(nonfinite="ignore")
    train(net, optimizer, range(2))
    train(twin_net, twin, range(2))
    net.poison = "head"
    train(net, optimizer, [2])
    train(twin_net, twin, [2], lambda losses, seed: [losses[0], None, losses[2]])
    for parameter, expected in zip(net.upper.parameters(), twin_net.upper.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-12, atol=0)
    assert optimizer.last_balance.weights[1] == 0


# ------------------------------------------------- state


def resumed(net, optimizer, **options):
    """A new network and wrapper that go on from what was saved."""
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, fresh = build(net.kind, **options)
    other.load_state_dict(saved["net"])
    fresh.load_state_dict(saved["optimizer"])
    return other, fresh


def assert_same_future(one, other, steps=range(30, 36), form=some):
    for seed in steps:
        train(*one, [seed], form)
        train(*other, [seed], form)
        assert_same(list(one[0].parameters()), list(other[0].parameters()), f"parameters at {seed}")
    assert_same(snapshot(*one), snapshot(*other))


OPTIONS = [{"refresh_every": 4}, {"refresh_every": 4, "beta": 0.0, "max_weight": 2.0}, {"ema_dtype": torch.bfloat16}]


@pytest.mark.parametrize("done", range(9))
@pytest.mark.parametrize("options", OPTIONS)
def test_resume_is_exact_from_every_phase(options, done):
    net, optimizer = build(**options)
    train(net, optimizer, range(done), some)
    assert_same_future((net, optimizer), resumed(net, optimizer, **options))


@pytest.mark.parametrize("done", range(1, 6))
@pytest.mark.parametrize("place", ["below", "head"])
def test_resume_is_exact_after_a_refused_batch(place, done):
    """The refused batch brings a task for the first time, so it is measured in the middle of a cycle."""
    options = {"refresh_every": 4, "nonfinite": "skip"}
    net, optimizer = build(**options)
    train(net, optimizer, range(done), lambda losses, seed: [*losses[:2], None])
    net.poison = place
    optimizer.step(net.losses(50))
    net.poison = None
    assert optimizer.last_balance.skipped
    restored = resumed(net, optimizer, **options)
    assert_same_future((net, optimizer), restored, form=lambda losses, seed: [*losses[:2], None])


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("done", [0, 2, 4, 5])
def test_copies_go_on_identically(done, way):
    net, optimizer = build(refresh_every=4)
    train(net, optimizer, range(done), some)
    optimizer.zero_grad()
    pair = (net, optimizer)
    twins = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert_same_future(pair, twins)
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twins[0].parameters()}


def test_asking_for_the_state_does_not_change_the_run():
    asked, quiet = build(refresh_every=3), build(refresh_every=3)
    for seed in range(12):
        for pair in (asked, quiet):
            pair[1].zero_grad()
            losses = some(pair[0].losses(seed), seed)
            if pair is asked:
                pair[1].state_dict()
            pair[1].backward(losses)
            if pair is asked:
                pair[1].state_dict()
            pair[1].step()
        assert_same(list(asked[0].parameters()), list(quiet[0].parameters()))
        assert_same(asked[1].last_balance.norms, quiet[1].last_balance.norms)
    assert_same(snapshot(*asked), snapshot(*quiet))


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("other", ["middle", "bias", "all", "exact", "from exact"])
def test_a_state_of_other_norm_params_is_refused(other, beta):
    def make(which):
        net = Graph()
        subset = {
            "middle": net.middle.parameters(),
            "bias": [net.upper.bias],
            "all": net.shared,
            "upper": net.upper.parameters(),
        }
        # With a cap the exact form holds averages at beta = 0 too.
        plain = BASES["adam"](net.trained, 0.01)
        return net, DualBalancedOptimizer(plain, net.shared, beta=beta, max_weight=9.0, norm_params=subset.get(which))

    (source_net, source), (net, optimizer) = (
        (make("exact"), make("upper"))
        if other == "from exact"
        else (
            make("upper"),
            make(other),
        )
    )
    train(source_net, source, range(3))
    train(net, optimizer, range(20, 22))
    before = snapshot(net, optimizer)
    with pytest.raises(ValueError, match="norm_params"):
        optimizer.load_state_dict(source.state_dict())
    assert_same(snapshot(net, optimizer), before)
    train(net, optimizer, [22])


def test_last_balance_tells_of_this_step_where_norms_are_reused():
    net, optimizer = build(refresh_every=4, max_weight=50.0, task_weights={"a": 1.0, "b": 2.0, "c": 1.0})
    optimizer.step(dict(zip("abc", net.losses(0), strict=True)))
    norms = optimizer.last_balance.norms
    assert norms.isfinite().all()
    for seed, absent in ((1, 0), (2, 1), (3, 2)):
        losses = [None if task == absent else loss for task, loss in enumerate(net.losses(seed))]
        optimizer.zero_grad()
        optimizer.step({name: loss for name, loss in zip("abc", losses, strict=True) if loss is not None})
        balance = optimizer.last_balance
        here = torch.arange(TASKS) != absent
        alpha = norms[here].max()
        expected = torch.where(here, (alpha / norms).clamp(max=50.0) * norms.new_tensor([1.0, 2.0, 1.0]), 0.0)
        assert_same(balance.norms, torch.where(here, norms, math.nan))
        torch.testing.assert_close(balance.weights, expected)
        values = [math.nan if loss is None else loss.item() for loss in losses]
        torch.testing.assert_close(balance.losses, norms.new_tensor(values), equal_nan=True)
        assert balance.tasks == ("a", "b", "c")
        assert not balance.skipped
        assert not balance.weights.requires_grad


# ------------------------------------------------- errors

WRONG = [
    (ValueError, "norm_params must be a subset of shared_params", lambda net: {"norm_params": net.heads}),
    (ValueError, "norm_params must be a subset", lambda net: {"norm_params": [net.upper.bias, net.pair.bias]}),
    (ValueError, "norm_params must all be in base_optim", lambda net: {"norm_params": [net.outside]}),
    (ValueError, "norm_params must hold at least one parameter", lambda net: {"norm_params": []}),
    (ValueError, "norm_params must hold at least one parameter", lambda net: {"norm_params": nn.Tanh()}),
    (TypeError, "norm_params must be an iterable", lambda net: {"norm_params": net.upper.weight}),
    (TypeError, "norm_params must hold parameters", lambda net: {"norm_params": ["upper"]}),
    (ValueError, "refresh_every needs norm_params", lambda net: {"refresh_every": 2}),
    *(
        (ValueError, "refresh_every must be a whole number >= 1", lambda net, m=m, n=n: {"refresh_every": m, **n(net)})
        for m in (0, -1, 1.5, True, "2")
        for n in (lambda net: {}, lambda net: {"norm_params": net.upper})
    ),
]


@pytest.mark.parametrize(("kind", "match", "options"), WRONG)
def test_wrong_arguments_are_named(kind, match, options):
    net = Graph()
    with pytest.raises(kind, match=match):
        DualBalancedOptimizer(BASES["adam"](net.trained, 0.01), net.shared, **options(net))


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_task_that_does_not_reach_norm_params_is_named(done):
    net, optimizer = build(refresh_every=4)
    form = lambda losses, seed: {"a": losses[0], "b": losses[1], "c": None}  # noqa: E731
    train(net, optimizer, range(done), form)
    before = untouched(net, optimizer)
    losses = form(net.losses(9), 9)
    with pytest.raises(ValueError, match="task 'c' reaches none of norm_params"):
        optimizer.step({**losses, "c": net.seen_below.square().mean()})
    assert_same(untouched(net, optimizer), before)
    train(net, optimizer, [10], form)


@pytest.mark.parametrize("done", [1, 3], ids=["reuse", "refresh"])
def test_a_used_graph_is_named(done):
    net, optimizer = build(refresh_every=3)
    train(net, optimizer, range(done - 1))
    losses = net.losses(9)
    optimizer.step(losses)
    before = untouched(net, optimizer)
    with pytest.raises(RuntimeError, match="is gone"):
        optimizer.step(losses)
    assert_same(untouched(net, optimizer), before)


# ------------------------------------------------- callers


def no_grad(optimizer, make):
    losses = make()
    with torch.no_grad():
        optimizer.step(losses)


CALLERS = {
    "no_grad": no_grad,
    "closure": lambda optimizer, make: optimizer.step(make),
    "closure by name": lambda optimizer, make: optimizer.step(closure=make),
    "backward and step": lambda optimizer, make: (optimizer.backward(make()), optimizer.step()),
    "tuple": lambda optimizer, make: optimizer.step(tuple(make())),
    "1-D tensor": lambda optimizer, make: optimizer.step(torch.stack(make())),
    "1-D losses": lambda optimizer, make: optimizer.step([loss.reshape(1) for loss in make()]),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_every_way_to_call_gives_the_same_run(caller):
    (net, optimizer), (plain_net, plain) = build(refresh_every=3), build(refresh_every=3)
    for seed in range(7):
        optimizer.zero_grad()
        CALLERS[caller](optimizer, lambda seed=seed: net.losses(seed))
        train(plain_net, plain, [seed])
        assert_near(net.state_dict(), plain_net.state_dict(), 1e-12, seed)
        torch.testing.assert_close(optimizer.last_balance.weights, plain.last_balance.weights)


def test_a_task_that_is_only_in_every_other_batch_is_measured_all_the_same():
    net, optimizer = build(refresh_every=2)
    for step in range(12):
        losses = net.losses(step)
        optimizer.zero_grad()
        optimizer.step([losses[0], None, None] if step % 2 else [None, *losses[1:]])
    counts = header_of(optimizer)["counts"]
    assert min(counts) >= 5
