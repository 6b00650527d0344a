"""All fields of the rule from norms to weights: against the oracle, by their identities, and what is refused."""

import io
import itertools
import math
from contextlib import nullcontext

import cases
import numpy as np
import pytest
import torch
from cases import combine, one_thread  # noqa: F401
from conftest import assert_same
from devices import array
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net
from oracle import Oracle, common_length
from torch.optim import SGD, Adam

from balanced_optim import DualBalancedOptimizer

NAMES = ("a", "b", "c")
TARGETS = ["max", "rms", "mean", "median", "min", 0.25, 3]
properties = settings(derandomize=True, deadline=None, max_examples=20, database=None)
powers, targets = st.floats(0, 1), st.sampled_from(TARGETS)


def network(**options):
    return Net(3, (4, 6, 5), side=True, dtype=torch.float64, **options)


def losses_of(net, seed, absent=(), log_transform=True):
    """By name; a loss that has no log is below zero."""
    losses = dict(zip(NAMES, net.losses(seed), strict=True))
    if isinstance(log_transform, dict):
        losses = {name: loss if log_transform.get(name, True) else loss - 50 for name, loss in losses.items()}
    return {name: None if name in absent else loss for name, loss in losses.items()}


def pair(base=Adam, form="exact", nonfinite="raise", **rule):
    """A network with its optimizer, and one with the oracle."""
    nets = network(), network()
    bases = [base(net.parameters(), lr=3e-3) for net in nets]
    options, textbook = {}, {}
    if form != "exact":
        last = [list(net.trunk[2].parameters()) for net in nets]
        options = {"norm_params": last[0], "refresh_every": 3}
        textbook = {"norm_params": last[1], "refresh_every": 3, "form": "one backward"}
    optimizer = DualBalancedOptimizer(bases[0], nets[0].trunk, nonfinite=nonfinite, **options, **rule)
    oracle = Oracle(bases[1], nets[1].trunk.parameters(), nonfinite=nonfinite, rule=rule, **textbook)
    return nets, optimizer, oracle


def assert_agree(nets, optimizer, oracle, rtol=1e-8):
    balance = optimizer.last_balance
    for found, expected in zip((balance.losses, balance.norms, balance.weights), oracle.balance(NAMES), strict=True):
        np.testing.assert_allclose(array(found), expected, rtol=rtol)
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-12)


# ------------------------------------------------- the oracle

FIELDS = {
    "rms": {"norm_target": "rms"},
    "median": {"norm_target": "median"},
    "a number": {"norm_target": 2.5},
    "no rescale": {"norm_target": None},
    "power": {"norm_power": 0.5},
    "no power": {"norm_power": 0.0},
    "warm-up": {"warmup_steps": 20},
    "cap": {"max_weight": 1.5},
    "fade": {"fade_solved": True, "eps": 0.1},
    "priorities": {"task_weights": {"a": 1.0, "b": 0.5, "c": 3.0}},
    "log by task": {"log_transform": {"a": False, "c": True}},
    "beta 0": {"beta": 0.0},
    "constant beta": {"beta": 0.5, "beta_decay": 0.0},
}
RESCALED = {"norm_power", "warmup_steps", "fade_solved"}


def _pairs():
    for one, other in itertools.combinations(FIELDS, 2):
        both = FIELDS[one] | FIELDS[other]
        apart = not FIELDS[one].keys() & FIELDS[other].keys()
        if apart and not (both.get("norm_target", "max") is None and RESCALED & both.keys()):
            yield pytest.param(both, id=f"{one}, {other}")


@pytest.mark.parametrize("rule", [*(pytest.param(rule, id=name) for name, rule in FIELDS.items()), *_pairs()])
def test_fifty_steps_agree_with_the_oracle(rule):
    """The exact form and the one with one backward take turns."""
    form = ["exact", "one backward"][len(str(rule)) % 2]
    nets, optimizer, oracle = pair(form=form, **rule)
    rng = np.random.default_rng(3)
    for step in range(50):
        absent = [name for name in NAMES if step > 0 and rng.random() < 0.2]
        optimizer.zero_grad()
        oracle.zero_grad()
        mine, theirs = (losses_of(net, step, absent, rule.get("log_transform", True)) for net in nets)
        optimizer.step(mine)
        oracle.step(theirs)
        if len(absent) < 3:
            assert_agree(nets, optimizer, oracle)


@pytest.mark.parametrize("form", ["exact", "one backward"])
def test_k_counts_batches_that_have_a_task_and_are_taken_in(form):
    """Refreshed steps too; neither empty batches nor those that are left out. One counter for all tasks."""
    nets, optimizer, oracle = pair(SGD, form, "skip", warmup_steps=8, norm_power=0.9)
    seen = []
    for step, what in enumerate(["good", "empty", "bad", "good", "a", "bad", "c", "good", "good", "empty", "good"]):
        absent = {"empty": NAMES, "a": "bc", "c": "ab"}.get(what, ())
        optimizer.zero_grad()
        oracle.zero_grad()
        batches = [losses_of(net, step, absent) for net in nets]
        if what == "bad":
            batches = [losses | {"b": losses["b"] * math.nan} for losses in batches]
        optimizer.step(batches[0])
        oracle.step(batches[1])
        if what != "empty":
            assert_agree(nets, optimizer, oracle)
        seen.append(oracle.k)
    assert seen == [1, 1, 1, 2, 3, 3, 4, 5, 6, 6, 7]


@pytest.mark.parametrize("saved_at", range(5))
def test_the_counter_is_saved_and_restored(saved_at):
    def make(seed=0):
        net = network(seed=seed)
        options = {"warmup_steps": 6, "norm_params": net.trunk[2].parameters(), "refresh_every": 2}
        return net, DualBalancedOptimizer(Adam(net.parameters(), lr=0.01), net.trunk, **options)

    def go_on(net, optimizer):
        for step in range(saved_at, 8):
            optimizer.zero_grad()
            optimizer.step(losses_of(net, step))
        return list(net.parameters()), optimizer.last_balance.weights

    net, optimizer = make()
    for step in range(saved_at):
        optimizer.zero_grad()
        # Tasks that come in turn: k is more than any task's own count.
        optimizer.step(losses_of(net, step, NAMES[step % 3] if step else ()))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    other, resumed = make(seed=1)
    for part, state in zip((other, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert_same(go_on(other, resumed), go_on(net, optimizer))


# ------------------------------------------------- identities


@properties
@given(matrix=cases.matrices(), beta=st.sampled_from([0.0, 0.5]), target=targets, power=powers)
def test_rescaled_norms_lie_between_alpha_and_their_own(matrix, beta, target, power):
    _, balance = combine(matrix, beta=beta, norm_target=target, norm_power=power)
    alpha = common_length(balance.norms.tolist(), target)
    torch.testing.assert_close(balance.weights * balance.norms, alpha**power * balance.norms ** (1 - power))


@properties
@given(factors=st.lists(st.floats(-6, 6), min_size=3, max_size=3), beta=st.sampled_from([0.0, 0.9]), power=powers)
def test_the_scale_of_a_loss_changes_nothing_at_any_power(factors, beta, power):
    ends = []
    for scales in ([1.0] * 3, [10.0**factor for factor in factors]):
        net = network()
        optimizer = DualBalancedOptimizer(
            Adam(net.parameters(), lr=0.01), net.trunk, beta=beta, norm_power=power, warmup_steps=2, eps=1e-30
        )
        for step in range(3):
            optimizer.zero_grad()
            optimizer.step([scale * loss for scale, loss in zip(scales, net.losses(step), strict=True)])
        ends.append(list(net.parameters()))
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@properties
@given(matrix=cases.matrices(), beta=st.sampled_from([0.0, 0.9]), length=st.floats(1e-3, 1e3))
def test_a_number_gives_every_task_that_norm(matrix, beta, length):
    _, balance = combine(matrix, matrix, beta=beta, norm_target=length)
    torch.testing.assert_close(balance.weights * balance.norms, torch.full_like(balance.norms, length))


@properties
@given(matrix=cases.matrices(), beta=st.sampled_from([0.0, 0.9]), target=targets)
def test_power_zero_is_the_log_alone(matrix, beta, target):
    combined, balance = combine(matrix, matrix, beta=beta, norm_target=target, norm_power=0)
    plain, _ = combine(matrix, matrix, beta=beta, norm_target=None)
    assert balance.weights.eq(1).all()
    torch.testing.assert_close(combined, plain, rtol=1e-12, atol=1e-12 * float(balance.norms.sum()))


@properties
@given(matrix=cases.matrices(), beta=st.sampled_from([0.0, 0.9]), power=powers)
def test_a_cap_of_one_is_the_log_alone_at_any_power(matrix, beta, power):
    _, balance = combine(matrix, matrix, beta=beta, max_weight=1, norm_power=power)
    assert balance.weights.eq(1).all()


@properties
@given(matrix=cases.matrices(max_tasks=1), target=st.sampled_from(TARGETS[:5]), power=powers)
def test_a_single_task_has_weight_one(matrix, target, power):
    _, balance = combine(matrix, norm_target=target, norm_power=power)
    torch.testing.assert_close(balance.weights, torch.ones_like(balance.weights))


@properties
@given(matrix=cases.matrices(), seed=st.integers(0, 1000), target=targets, power=powers)
def test_permuted_tasks_permute_the_weights(matrix, seed, target, power):
    order = np.random.default_rng(seed).permutation(len(matrix))
    _, balance = combine(matrix, norm_target=target, norm_power=power)
    _, permuted = combine(matrix[order], norm_target=target, norm_power=power)
    torch.testing.assert_close(permuted.weights, balance.weights[order])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", cases.MATRICES)
def test_hard_matrices_give_finite_weights(name, power, target):
    matrix = cases.MATRICES[name]
    combined, balance = combine(matrix, norm_target=target, norm_power=power, dtype=torch.float32, log_transform=False)
    assert combined.isfinite().all() and balance.weights.isfinite().all()
    assert balance.weights[~torch.as_tensor(matrix.any(1))].eq(0).all()


# ------------------------------------------------- a norm of zero where norms are measured


@pytest.mark.parametrize("extra", [{}, {"max_weight": 0.5}, {"task_weights": [1.0, 4.0]}, {"norm_target": "min"}])
def test_a_task_without_a_norm_on_norm_params_trains_by_its_log(extra):
    """Such as a residual branch that begins at zero: a weight of 0 would leave the trunk where it is for good."""
    nets = [torch.nn.ParameterList([torch.randn(4), torch.zeros(4)]).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    rule = {**extra, "task_weights": dict(enumerate(extra["task_weights"]))} if "task_weights" in extra else extra
    optimizer = DualBalancedOptimizer(SGD(nets[0], lr=0.1), nets[0], norm_params=[nets[0][1]], **extra)
    oracle = Oracle(SGD(nets[1], lr=0.1), nets[1], form="one backward", norm_params=[nets[1][1]], rule=rule)
    for _ in range(3):
        batches = []
        for trunk, gate in nets:
            first = (trunk.square().sum() + 1) * (1 + (gate * 0).sum())
            batches.append([first, (trunk - 1).square().sum() + (gate - 1).square().sum() + 1])
        optimizer.zero_grad()
        oracle.zero_grad()
        optimizer.step(batches[0])
        oracle.step(dict(enumerate(batches[1])))
        balance = optimizer.last_balance
        assert balance.norms[0] == 0
        assert balance.weights[0] == min(1.0, extra.get("max_weight", 1.0))
        np.testing.assert_allclose(array(balance.weights), oracle.balance(range(2))[2], rtol=1e-10)
        for mine, theirs in zip(*nets, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


# ------------------------------------------------- the log by task


@pytest.mark.parametrize("form", ["sequence", "mapping"])
def test_a_task_without_the_log_may_be_negative_and_is_rescaled_like_any_other(form):
    net = network()
    logs = [True, False, True] if form == "sequence" else {"b": False}
    optimizer = DualBalancedOptimizer(SGD(net.parameters(), lr=0.01), net.trunk, beta=0.0, log_transform=logs)
    losses = losses_of(net, 0, log_transform={"b": False})
    expected = torch.autograd.grad(losses["b"], list(net.heads[1].parameters()), retain_graph=True)
    optimizer.backward(list(losses.values()) if form == "sequence" else losses)
    balance = optimizer.last_balance
    assert balance.losses[1] < 0
    torch.testing.assert_close(balance.weights * balance.norms, balance.norms.max().expand(3))
    for parameter, gradient in zip(net.heads[1].parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_rule_for_losses_below_minus_eps_holds_for_logged_tasks_only():
    net = network()
    optimizer = DualBalancedOptimizer(SGD(net.parameters(), lr=0.01), net.trunk, log_transform={"b": False})
    losses = losses_of(net, 0, log_transform={"b": False})
    with pytest.raises(ValueError, match="loss of task 'c' must be greater than -eps"):
        optimizer.step(losses | {"c": losses["c"] - 1e6})
    with pytest.raises(ValueError, match="loss of task 'b' must be finite"):
        optimizer.step(losses | {"b": losses["b"] * math.nan})
    optimizer.step(losses)


def test_a_loss_that_has_no_log_is_told_of_once_where_batches_are_skipped():
    net = network()
    optimizer = DualBalancedOptimizer(SGD(net.parameters(), lr=0.01), net.trunk, nonfinite="skip")
    optimizer.step(losses_of(net, 0))
    for seed in (1, 2):
        losses = losses_of(net, seed)
        told = pytest.warns(UserWarning, match="'b'.*log_transform") if seed == 1 else nullcontext()
        with told:
            optimizer.step(losses | {"b": losses["b"] - 1e6})
        assert optimizer.last_balance.skipped


def test_a_mapping_may_name_unlogged_tasks_only_since_others_fade():
    net = network()
    options = {"log_transform": {"b": False}, "fade_solved": True}
    DualBalancedOptimizer(SGD(net.parameters(), lr=0.01), net.trunk, **options).step(losses_of(net, 0))


def test_only_logged_tasks_fade():
    net = network()
    options = {"log_transform": [True, False, True], "fade_solved": True, "eps": 1e3, "beta": 0.0}
    optimizer = DualBalancedOptimizer(SGD(net.parameters(), lr=0.01), net.trunk, **options)
    optimizer.backward(net.losses(0))
    balance = optimizer.last_balance
    share = balance.losses / (balance.losses + 1e3)
    share[1] = 1
    torch.testing.assert_close(balance.weights * balance.norms, balance.norms.max() * share)


# ------------------------------------------------- what is refused

ADD = {"aggregator": lambda matrix: matrix.sum(0)}
WRONG = [
    *[("norm_target must be", {"norm_target": value}) for value in ("norm", 0, -1.0, math.nan, math.inf, True, "RMS")],
    *[("norm_power must be", {"norm_power": value}) for value in (-0.1, 1.01, math.nan, "1", True, None)],
    *[("warmup_steps must be", {"warmup_steps": value}) for value in (-1, 1.5, True, "2", None)],
    *[("log_transform must be", {"log_transform": value}) for value in (1, "yes", [True, 1], {"a": 1}, None)],
    ("norm_power.*norm_target", {"norm_power": 0.5, "norm_target": None}),
    ("warmup_steps.*norm_target", {"warmup_steps": 3, "norm_target": None}),
    ("aggregator.*norm_power", {"norm_power": 0.5, **ADD}),
    ("aggregator.*warmup_steps", {"warmup_steps": 3, **ADD}),
    ("aggregator.*fade_solved", {"fade_solved": True, **ADD}),
    ("fade_solved.*norm_target", {"fade_solved": True, "norm_target": None}),
    ("fade_solved.*log_transform", {"fade_solved": True, "log_transform": False}),
    ("fade_solved.*log_transform", {"fade_solved": True, "log_transform": [False, False, False]}),
    *[("max_weight must be", {"max_weight": value}) for value in (0, -1.0, math.nan, True, "2")],
    *[("eps must be", {"eps": value}) for value in (0, -1e-8, math.nan, math.inf, True)],
]


@pytest.mark.parametrize(("match", "options"), WRONG, ids=str)
def test_a_wrong_value_is_named(match, options):
    net = network()
    with pytest.raises(ValueError, match=match):
        DualBalancedOptimizer(SGD(net.parameters(), lr=0.01), net.trunk, **options)


@pytest.mark.parametrize(
    ("match", "logs", "by_name"),
    [
        ("log_transform must have 3", [True, False], False),
        ("log_transform must have 3", [True] * 4, True),
        ("log_transform names the unknown task 'z'", {"z": False}, True),
    ],
)
def test_logs_of_other_tasks_are_refused_with_the_first_losses(match, logs, by_name):
    net = network()
    optimizer = DualBalancedOptimizer(SGD(net.parameters(), lr=0.01), net.trunk, log_transform=logs)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    losses = losses_of(net, 0)
    with pytest.raises(ValueError, match=match):
        optimizer.step(losses if by_name else list(losses.values()))
    assert_same([parameter.detach() for parameter in net.parameters()], before)
    assert all(parameter.grad is None for parameter in net.parameters())
