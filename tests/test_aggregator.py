"""Another rule in place of the max-norm one: any callable from the matrix of task gradients to one vector.

Gradients are compared with `Oracle`, which differentiates the logarithm of each loss by torch.autograd.grad and keeps
averages as float64 vectors. Rules of this file exist twice: in torch, as a user would write them, and in numpy.
"""

import copy
import io
import math
import pickle
import re
from datetime import timedelta

import cases
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import BadGradient, matrix_losses, with_value
from conftest import assert_same, build, header_of, snapshot, train
from devices import array, device, generator, grad_scaler
from networks import Net
from oracle import Oracle, to_vector
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import SGD, Adagrad, Adam, AdamW

from balanced_optim import DualBalancedOptimizer

TASKS = 3
SHARED = 30  # scalars in the trunk of conftest's network

# ------------------------------------------------- rules, in torch and in numpy


def add(matrix):
    return matrix.sum(0)


def by_column(matrix):
    """Every column has a factor of its own, so that no two columns can be mistaken for each other."""
    return matrix.sum(0) * torch.linspace(1, 2, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)


def max_norm(matrix):
    norms = matrix.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, norms.max() / norms * matrix, 0.0).sum(0)


def project(matrix):
    """PCGrad with the other tasks in their own order, all rows at once."""
    rows = matrix.clone()
    for other in matrix:
        overlap = torch.minimum(rows @ other, torch.zeros(()))
        # A row overlaps with itself by its square, which is not negative, unless it was changed before.
        overlap = torch.where((matrix == other).all(1), 0.0, overlap)
        rows -= torch.where(other.square().sum() > 0, overlap / other.square().sum(), 0.0)[:, None] * other
    return rows.sum(0)


def _max_norm(matrix):
    lengths = [math.sqrt(math.fsum(row * row)) for row in matrix]
    return sum(max(lengths) / length * row for length, row in zip(lengths, matrix, strict=True) if length > 0)


def _project(matrix):
    total = np.zeros(matrix.shape[1])
    for task, row in enumerate(matrix):
        changed = row.copy()
        for other, against in enumerate(matrix):
            if other != task and changed @ against < 0:
                changed -= (changed @ against) / (against @ against) * against
        total += changed
    return total


RULES = {
    "sum": (add, lambda matrix: sum(matrix)),
    "mean": (lambda matrix: matrix.mean(0), lambda matrix: sum(matrix) / len(matrix)),
    "by column": (by_column, lambda matrix: sum(matrix) * np.linspace(1, 2, matrix.shape[1])),
    "max norm": (max_norm, _max_norm),
    "project": (project, _project),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def textbook(model, rule, shared=None, **settings):
    """What `.grad` must hold: `rule` on the averaged gradients of the tasks that are there, heads by themselves."""
    shared = model.trunk.parameters() if shared is None else shared
    return Oracle(SGD(model.parameters(), lr=0.0), shared, form="aggregator", aggregator=rule, rule=settings)


def assert_near(actual, expected, rtol=1e-10):
    assert (actual is None) == (expected is None)
    if actual is None:
        return
    actual, expected = (t.detach().to_dense() if t.is_sparse else t.detach() for t in (actual, expected))
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    actual, expected = (to_vector(t, t) for t in (actual, expected))
    assert (actual - expected).norm() <= rtol * expected.norm() + 1e-13


def rounding(parameter, narrow=False):
    """One rounding of the parameter's own dtype; rows of a trunk with narrow parameters feel their roundings too."""
    return max(1e-2 if narrow else 1e-10, 4 * torch.finfo(parameter.dtype).eps)


def balanced(model, aggregator, lr=0.01, **options):
    return DualBalancedOptimizer(SGD(model.parameters(), lr=lr), model.trunk, aggregator=aggregator, **options)


def follow(model, optimizer, oracle, batches, narrow=False):
    """Train on `batches` of losses; each step's `.grad` must be the oracle's, taken from the same graph."""
    for losses in batches:
        expected = gradients_of(oracle, losses)
        optimizer.backward(losses)
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert_near(parameter.grad, gradient, rounding(parameter, narrow))
        optimizer.step()


def gradients_of(oracle, losses):
    """What the oracle leaves in `.grad`, which is empty before and after."""
    parameters = [parameter for group in oracle.base.param_groups for parameter in group["params"]]
    oracle.zero_grad()
    oracle.backward(losses)
    found = [parameter.grad for parameter in parameters]
    oracle.zero_grad()
    return found


def batches_of(model, number=4, absent=()):
    """Batches as they come; in batch k the tasks that `absent[k]` names are not there."""
    for seed in range(number):
        yield model.losses(seed, absent[seed] if seed < len(absent) else ())


class Recording:
    """A rule that notes what it was given."""

    def __init__(self, rule=add):
        self.rule, self.seen = rule, []

    def __call__(self, matrix):
        self.seen.append(matrix.clone())
        return self.rule(matrix)


# ------------------------------------------------- plain functions


@every_rule
@pytest.mark.parametrize("log_transform", [True, False], ids=["log", "no log"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_rule_gives_the_gradients_of_the_oracle(rule, beta, log_transform):
    model = cases.build("mlp")
    ours, theirs = RULES[rule]
    settings = {"beta": beta, "log_transform": log_transform}
    optimizer = balanced(model, ours, lr=0.01 if log_transform else 1e-6, **settings)
    follow(model, optimizer, textbook(model, theirs, **settings), batches_of(model))


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"beta": 0.5, "beta_decay": 0.0}, {"log_transform": False}])
@pytest.mark.parametrize(("rule", "target"), [("sum", None), ("max norm", "max")])
def test_a_rule_written_by_hand_is_the_built_in_one(rule, target, options):
    model, other = cases.build("mlp"), cases.build("mlp")
    lr = 1e-6 if options else 0.01
    mine = balanced(model, RULES[rule][0], lr, **options)
    theirs = DualBalancedOptimizer(other.optimizer(SGD, lr=lr), other.trunk, norm_target=target, **options)
    for seed in range(5):
        absent = ("t1",) if seed == 2 else ()
        for net, optimizer in ((model, mine), (other, theirs)):
            optimizer.zero_grad()
            optimizer.step(net.losses(seed, absent))
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert_near(one.grad, two.grad)
            assert_near(one, two)
        torch.testing.assert_close(mine.last_balance.norms, theirs.last_balance.norms, equal_nan=True)


@pytest.mark.parametrize("name", cases.MATRICES)
def test_the_max_norm_rule_on_hard_matrices(name):
    matrix = cases.MATRICES[name]
    found = []
    for options in ({"aggregator": max_norm}, {}):
        parameter = nn.Parameter(torch.zeros(matrix.shape[1], dtype=torch.float64))
        optimizer = DualBalancedOptimizer(SGD([parameter], lr=0.1), [parameter], beta=0.0, **options)
        optimizer.backward(matrix_losses(matrix, parameter))
        found.append(parameter.grad)
    assert_near(*found)


# ------------------------------------------------- two tasks, whose answer is known

PAIRS = {
    "in conflict": [[3.0, 1.0, 0.0], [-1.0, 0.5, 0.2]],
    "aligned": [[3.0, 1.0, 0.0], [1.0, 0.5, 0.2]],
    "opposite": [[1.0, 2.0, -1.0], [-2.0, -4.0, 2.0]],
    "one inside the other": [[1.0, 0.0, 0.0], [5.0, 1.0, 0.0]],
    "orthogonal": [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]],
}
every_pair = pytest.mark.parametrize("pair", PAIRS)


def combined_by(aggregator, rows, log_transform):
    rows = np.array(rows)
    parameter = nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    optimizer = DualBalancedOptimizer(
        SGD([parameter], lr=0.1), [parameter], beta=0.0, aggregator=aggregator, log_transform=log_transform
    )
    optimizer.backward(matrix_losses(rows, parameter, log_transform))
    return array(parameter.grad)


def two_projections(matrix):
    first, second = matrix
    overlap = torch.clamp(first @ second, max=0)
    return first + second - overlap * (second / (second @ second) + first / (first @ first))


def shortest_between(matrix):
    first, second = matrix
    apart = first - second
    share = torch.clamp(apart @ -second / (apart @ apart), 0, 1)
    return share * first + (1 - share) * second


# NashMTL's solver warns of what it is, and of what it does not reach.
solver_warnings = pytest.mark.filterwarnings("ignore:You are solving", "ignore:Solution may")


def torchjd(name):
    """One of TorchJD's aggregators; the test is skipped where it cannot be made."""
    module = pytest.importorskip("torchjd.aggregation")
    try:
        return getattr(module, name)(**TORCHJD[name])
    except (AttributeError, ImportError) as reason:
        pytest.skip(str(reason))


TORCHJD = {
    "PCGrad": {},
    "GradVac": {},
    "IMTLG": {},
    "AlignedMTL": {},
    "MGDA": {"epsilon": 1e-12, "max_iters": 1000},
    "UPGrad": {},
    "CAGrad": {"c": 0.5},
    "FairGrad": {"alpha": 1.0},
    "NashMTL": {"n_tasks": TASKS, "optim_niter": 2},
}


@every_pair
@pytest.mark.parametrize("log_transform", [True, False], ids=["log", "no log"])
@pytest.mark.parametrize("by", ["hand", "torchjd"])
def test_surgery_on_two_gradients_leaves_what_is_orthogonal_to_the_other(pair, log_transform, by):
    first, second = (np.array(row) for row in PAIRS[pair])
    expected = first + second
    if first @ second < 0:
        without = [np.eye(3) - np.outer(row, row) / (row @ row) for row in (first, second)]
        expected = without[1] @ first + without[0] @ second
    combined = combined_by(two_projections if by == "hand" else torchjd("PCGrad"), [first, second], log_transform)
    np.testing.assert_allclose(combined, expected, rtol=1e-7, atol=1e-7)


@every_pair
@pytest.mark.parametrize("log_transform", [True, False], ids=["log", "no log"])
@pytest.mark.parametrize("by", ["hand", "torchjd"])
def test_the_shortest_combination_of_two_gradients(pair, log_transform, by):
    """It lies between the two, and neither way along the line between them is downhill."""
    rows = np.array(PAIRS[pair])
    combined = combined_by(shortest_between if by == "hand" else torchjd("MGDA"), rows, log_transform)
    apart = rows[0] - rows[1]
    share = np.clip((combined - rows[1]) @ apart / (apart @ apart), 0, 1)
    np.testing.assert_allclose(combined, share * rows[0] + (1 - share) * rows[1], atol=1e-6)
    assert (rows @ combined >= combined @ combined - 1e-6).all()


# ------------------------------------------------- TorchJD


@solver_warnings
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {"beta": 0.0}) for name in TORCHJD],
        ("PCGrad", {"beta": 0.9}),
        ("GradVac", {"beta": 0.9, "log_transform": False}),
        ("MGDA", {"beta": 0.0, "log_transform": False}),
    ],
    ids=str,
)
def test_aggregators_of_torchjd_get_the_matrix_of_the_oracle(name, options):
    model = cases.build("mlp")
    aggregator, alone = torchjd(name), torchjd(name)
    seen = []
    aggregator.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    optimizer = balanced(model, aggregator, lr=1e-6, **options)
    oracle = textbook(model, lambda matrix: matrix[0], **options)
    shared = list(model.trunk.parameters())
    for seed, losses in enumerate(batches_of(model, 3)):
        gradients_of(oracle, losses)
        torch.manual_seed(seed)
        optimizer.step(losses)
        np.testing.assert_allclose(array(seen[-1]), oracle.matrix, rtol=1e-9, atol=1e-15 * abs(oracle.matrix).max())
        torch.manual_seed(seed)
        combined = alone(seen[-1]).detach()
        assert torch.equal(torch.cat([parameter.grad.reshape(-1) for parameter in shared]), combined)
    assert len(seen) == 3


# ------------------------------------------------- kinds of parameters

# The oracle's torch.autograd.grad refuses reentrant checkpoints.
TRUNKS = sorted(cases.MODELS.keys() - {"reentrant checkpoint"})


@pytest.mark.parametrize(("rule", "beta"), [("by column", 0.0), ("project", 0.9)])
@pytest.mark.parametrize("name", TRUNKS)
def test_every_kind_of_trunk(name, rule, beta):
    model = cases.build(name)
    # Whether a frozen parameter has columns of zeros is not said anywhere.
    ours, theirs = RULES["sum" if name == "frozen" else rule]
    narrow = name == "mixed dtypes"
    optimizer = balanced(model, ours, beta=beta)
    absent = [(), (), ("t1",)]
    follow(model, optimizer, textbook(model, theirs, beta=beta), batches_of(model, 3, absent), narrow)


def test_parameters_that_no_task_reaches_get_no_gradient():
    model = cases.build(cases.unused)
    optimizer = balanced(model, lambda matrix: torch.ones_like(matrix[0]), beta=0.0)
    with pytest.warns(UserWarning, match="no task reaches 1 of the shared parameters"):
        optimizer.backward(model.losses(0))
    assert model.trunk.spare.grad is None
    assert torch.equal(model.trunk[0].weight.grad, torch.ones_like(model.trunk[0].weight))


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Adagrad])
def test_fused_optimizers_step_parameters_in_channels_last(kind):
    """They take it that a gradient lies in memory as its parameter does."""
    models = []
    for fused in (True, False):
        model = cases.build("channels_last")
        base = kind(model.parameters(), lr=0.01, fused=fused)
        optimizer = DualBalancedOptimizer(base, model.trunk, beta=0.0, aggregator=by_column)
        for losses in batches_of(model, 2):
            optimizer.zero_grad()
            optimizer.step(losses)
        models.append(model)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert_near(one, two)


class Odd(nn.Module):
    """Parameters of no dimension, of no element, complex, of bfloat16, and two that lie in rows of their own."""

    def __init__(self):
        super().__init__()
        source = generator(0)
        draw = lambda *shape, dtype=torch.float64: nn.Parameter(  # noqa: E731
            torch.randn(shape, generator=source, dtype=dtype)
        )
        self.small = draw(4, 3)
        self.large = draw(64, 256)
        self.scalar = draw()
        self.empty = draw(0, 5)
        self.narrow = draw(7, dtype=torch.bfloat16)
        self.complex = draw(5, 2, dtype=torch.complex128)
        self.permuted = nn.Parameter(torch.randn(3, 2, 5, 4, generator=source).permute(0, 3, 1, 2).double())
        self.larger = nn.Parameter(torch.randn(130, 130, generator=source).double().t())
        self.last = draw(6)
        self.heads = nn.ParameterList([draw(3) for _ in range(TASKS)])

    def trunk_in(self, order):
        names = ["small", "large", "scalar", "empty", "narrow", "complex", "permuted", "larger", "last"]
        return [getattr(self, names[place]) for place in order]

    def losses(self, seed):
        source = generator(seed)
        losses = []
        for task, head in enumerate(self.heads):
            total = head.square().sum() + 1
            for parameter in self.trunk_in(range(9)):
                point = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                values = torch.view_as_real(parameter) * point[..., None] if parameter.is_complex() else parameter
                total = total + (values.double() - (0 if parameter.is_complex() else point)).square().sum()
            losses.append(10.0 ** (task - 1) * total)
        return losses


ORDERS = {"up": range(9), "down": range(8, -1, -1), "mixed": (4, 7, 0, 8, 1, 3, 6, 2, 5)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_columns_come_in_the_order_of_the_shared_parameters(order, beta):
    model = Odd()
    shared = model.trunk_in(order)
    recording = Recording(by_column)
    optimizer = DualBalancedOptimizer(SGD(model.parameters(), lr=0.01), shared, beta=beta, aggregator=recording)
    oracle = textbook(model, RULES["by column"][1], shared, beta=beta)
    for seed in range(2):
        losses = model.losses(seed)
        expected = gradients_of(oracle, dict(enumerate(losses)))
        optimizer.step(losses)
        assert recording.seen[-1].dtype == torch.float64
        # One parameter is of bfloat16, so its columns are rounded.
        np.testing.assert_allclose(array(recording.seen[-1]), oracle.matrix, rtol=1e-2, atol=1e-9)
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            assert_near(parameter.grad, gradient, rounding(parameter))


def test_a_gradient_lies_in_memory_as_its_parameter_does():
    model = Odd()
    shared = model.trunk_in(range(9))
    optimizer = DualBalancedOptimizer(SGD(model.parameters(), lr=0.01), shared, beta=0.0, aggregator=add)
    optimizer.backward(model.losses(0))
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize(
    ("dtype", "ema_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
    ],
)
def test_the_matrix_is_of_float32_or_wider(dtype, ema_dtype, expected):
    recording = Recording()
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = DualBalancedOptimizer(
        SGD([parameter], lr=0.1), [parameter], ema_dtype=ema_dtype, beta=0.0, aggregator=recording
    )
    optimizer.backward([parameter.sum(), parameter.square().sum()])
    matrix = recording.seen[0]
    assert matrix.dtype == expected
    assert matrix.shape == (2, 3)
    torch.testing.assert_close(matrix, torch.full_like(matrix, 1 / 3) * torch.tensor([[1.0], [2.0]]), rtol=1e-2, atol=0)
    assert parameter.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_a_vector_of_any_dtype_is_taken(dtype):
    net, optimizer = build(tasks=2, beta=0.0, aggregator=lambda matrix: torch.full((SHARED,), 3, dtype=dtype))
    optimizer.backward(net.losses())
    for parameter in net.trunk.parameters():
        assert torch.equal(parameter.grad, torch.full_like(parameter, 3))


# ------------------------------------------------- tasks and batches


def test_a_single_task_has_a_matrix_of_one_row():
    model = cases.build("mlp")
    recording = Recording()
    optimizer = balanced(model, recording, beta=0.0)
    oracle = textbook(model, sum, beta=0.0)
    follow(model, optimizer, oracle, ({"t0": model.losses(seed)["t0"]} for seed in range(3)))
    assert [matrix.shape for matrix in recording.seen] == [oracle.matrix.shape] * 3
    assert oracle.matrix.shape[0] == 1


@pytest.mark.parametrize("name", sorted(TORCHJD.keys() - {"NashMTL"}))
def test_aggregators_of_torchjd_take_a_single_task(name):
    aggregator, alone = torchjd(name), torchjd(name)
    net, optimizer = build(tasks=1, beta=0.0, aggregator=aggregator)
    seen = []
    aggregator.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    optimizer.backward(net.losses())
    combined = torch.cat([parameter.grad.reshape(-1) for parameter in net.trunk.parameters()])
    assert torch.equal(combined, alone(seen[0]).detach())


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_only_tasks_that_are_there_are_rows_in_their_order(beta):
    model = cases.build("mlp")
    recording = Recording(by_column)
    optimizer = balanced(model, recording, beta=beta)
    oracle = textbook(model, RULES["by column"][1], beta=beta)
    absent = [(), ("t0",), ("t0", "t2"), ("t1",), ("t0", "t1", "t2"), ()]
    follow(model, optimizer, oracle, batches_of(model, 6, absent))
    # A batch without any task has no matrix.
    assert [len(matrix) for matrix in recording.seen] == [3, 2, 1, 2, 3]
    assert header_of(optimizer)["counts"] == [3, 4, 4]


def test_rows_keep_the_order_of_the_first_batch_whatever_the_mapping_says():
    model = cases.build("mlp")
    recordings = [Recording(), Recording()]
    for recording, flipped in zip(recordings, (False, True), strict=True):
        optimizer = balanced(model, recording, beta=0.0)
        optimizer.backward(model.losses(0))
        losses = model.losses(1)
        optimizer.backward(dict(reversed(losses.items())) if flipped else losses)
    assert torch.equal(recordings[0].seen[1], recordings[1].seen[1])


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_task_weights_multiply_the_rows(beta):
    model = cases.build("mlp")
    weights = {"t0": 0.5, "t1": 0.0, "t2": 3.0}
    settings = {"beta": beta, "task_weights": weights}
    optimizer = balanced(model, project, **settings)
    absent = [(), ("t0",)]
    follow(model, optimizer, textbook(model, _project, **settings), batches_of(model, absent=absent))


def test_weights_are_unknown_for_tasks_that_count_and_zero_for_others():
    net, optimizer = build(tasks=3, aggregator=add)
    optimizer.step(net.losses())
    assert optimizer.last_balance.weights.isnan().all()
    first, _, last = net.losses(1)
    optimizer.step([first, None, last])
    assert_same(optimizer.last_balance.weights, torch.tensor([math.nan, 0.0, math.nan]))
    assert optimizer.last_balance.norms.isnan().tolist() == [False, True, False]
    optimizer.step([None] * 3)
    assert_same(optimizer.last_balance.weights, torch.zeros(3))


def losses_on(net, x):
    return [10.0**task * (out - 1).square().mean() for task, out in enumerate(net(x))]


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_micro_batches_equal_one_batch(beta):
    (whole, together), (parts, apart) = (build("sgd", tasks=3, beta=beta, aggregator=by_column) for _ in range(2))
    whole.double()
    parts.double()
    for step in range(3):
        x = torch.randn(12, 4, generator=generator(step), dtype=torch.float64)
        together.zero_grad()
        apart.zero_grad()
        together.step(losses_on(whole, x))
        apart.accumulate(losses_on(parts, x[:2]), samples=2)
        apart.accumulate(losses_on(parts, x[2:5]), samples=3)
        apart.step(losses_on(parts, x[5:]), samples=7)
        for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
            assert_near(one.grad, two.grad)
            assert_near(one, two)


def test_a_micro_batch_completed_by_none_has_all_its_rows():
    net, optimizer = build(tasks=3, beta=0.0, aggregator=(recording := Recording()))
    first, second, _ = net.losses(0)
    optimizer.accumulate([first, None, None])
    optimizer.accumulate([None, net.losses(0)[1], None])
    assert recording.seen == []
    optimizer.step()
    assert recording.seen[0].shape == (2, SHARED)


# ------------------------------------------------- a scaler


def through_half(loss):
    """The same loss, whose gradient passes through float16."""
    loss = loss.clone()
    loss.register_hook(lambda gradient: gradient.half().to(gradient.dtype))
    return loss


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_an_overflow_changes_nothing_and_the_next_steps_are_those_without_it(beta):
    runs = []
    for high in (True, False):
        recording = Recording(by_column)
        net, optimizer = build(tasks=3, beta=beta, aggregator=recording)
        scaler = grad_scaler(2.0**30 if high else 2.0**4, backoff_factor=2.0**-26)
        for seed in range(0 if high else 1, 4):
            before = snapshot(net, optimizer)
            optimizer.backward([through_half(loss) for loss in net.losses(seed)], scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if seed == 0:
                assert optimizer.last_balance.skipped
                assert recording.seen == []
                assert_same(snapshot(net, optimizer)["parameters"], before["parameters"])
                assert_same(header_of(optimizer)["counts"], [])
        runs.append((snapshot(net, optimizer), recording.seen))
    assert_same(runs[0], runs[1])


def test_under_a_scaler_gradients_come_out_scaled():
    scaler = grad_scaler(1024.0)
    (net, optimizer), (plain, other) = (build("sgd", tasks=3, aggregator=by_column) for _ in range(2))
    for seed in range(3):
        optimizer.zero_grad()
        other.zero_grad()
        optimizer.backward(net.losses(seed), scaler)
        other.backward(plain.losses(seed))
        for one, two in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad * 1024)
        scaler.unscale_(optimizer)
        for one, two in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)
        scaler.step(optimizer)
        scaler.update()
        other.step()


def test_a_combined_gradient_too_large_for_its_scale_is_an_overflow():
    scaler = grad_scaler(2.0**20)
    net, optimizer = build(tasks=2, beta=0.0, aggregator=lambda matrix: torch.full((SHARED,), 2.0**110))
    before = copy.deepcopy(net.state_dict())
    optimizer.backward(net.losses(), scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**19
    assert_same(dict(net.state_dict()), dict(before))


def test_a_vector_that_the_aggregator_keeps_is_not_written_to():
    kept = torch.ones(SHARED)
    scaler = grad_scaler(8.0)
    net, optimizer = build(tasks=2, aggregator=lambda matrix: kept)
    for seed in range(2):
        optimizer.backward(net.losses(seed), scaler)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(kept, torch.ones(SHARED))


# ------------------------------------------------- faults


class Faulty:
    """The sum, until something else is asked for; functions keep no memory, so it is hidden in a closure."""

    def __init__(self):
        self.returns = None
        self.calls = 0

    def function(self):
        def combine(matrix):
            self.calls += 1
            return matrix.sum(0) if self.returns is None else self.returns(matrix)

        return combine


def fail_with(error):
    def fail(matrix):
        raise error

    return fail


def poisoned(value):
    def combine(matrix):
        vector = matrix.sum(0)
        vector[7] = value
        return vector

    return combine


REFUSED = {
    "nan": (poisoned(math.nan), RuntimeError, "gradient of all tasks together, as the aggregator combines them"),
    "inf": (poisoned(-math.inf), RuntimeError, "gradient of all tasks together, as the aggregator combines them"),
}
MISTAKES = {
    "an error": (fail_with(ZeroDivisionError("no step")), ZeroDivisionError, "no step"),
    "an interrupt": (fail_with(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
    "one column more": (lambda m: torch.zeros(SHARED + 1), ValueError, r"shape \(30,\).*\(3, 30\).*got shape \(31,\)"),
    "a row": (lambda m: m.sum(0, keepdim=True), ValueError, r"vector of shape \(30,\).*got shape \(1, 30\)"),
    "the matrix": (lambda m: m, ValueError, r"got shape \(3, 30\)"),
    "a number": (lambda m: m.sum(), ValueError, r"got shape \(\)"),
    "weights": (lambda m: torch.ones(3), ValueError, r"got shape \(3,\)"),
    "None": (lambda m: None, TypeError, "aggregator must return a tensor, got NoneType"),
    "an array": (lambda m: np.zeros(SHARED), TypeError, "aggregator must return a tensor, got ndarray"),
    "a list": (lambda m: [0.0], TypeError, "aggregator must return a tensor, got list"),
}


def prepared(steps, **options):
    """An optimizer after some steps, with something in `.grad` of some parameters."""
    faulty = Faulty()
    net, optimizer = build(tasks=3, aggregator=faulty.function(), **options)
    train(net, optimizer, steps)
    for index, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5) if index % 2 else None
    return faulty, net, optimizer


@pytest.mark.parametrize(("steps", "beta"), [(0, 0.9), (2, 0.9), (2, 0.0)])
@pytest.mark.parametrize("what", REFUSED | MISTAKES)
def test_a_refused_vector_leaves_everything_as_it_was(what, steps, beta):
    faulty, net, optimizer = prepared(steps, beta=beta)
    faulty.returns, kind, message = (REFUSED | MISTAKES)[what]
    before = snapshot(net, optimizer)
    for call in (optimizer.backward, optimizer.step):
        with pytest.raises(kind, match=message):
            call(net.losses(5))
        assert_same(snapshot(net, optimizer), before)
    faulty.returns = None
    twin, other = prepared(steps, beta=beta)[1:]
    optimizer.step(net.losses(6))
    other.step(twin.losses(6))
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("mode", ["skip", "ignore"])
@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_an_error_in_every_mode(what, mode):
    faulty, net, optimizer = prepared(1, nonfinite=mode)
    faulty.returns, kind, message = MISTAKES[what]
    before = snapshot(net, optimizer)
    with pytest.raises(kind, match=message):
        optimizer.step(net.losses(5))
    assert_same(snapshot(net, optimizer), before)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("what", REFUSED)
def test_a_vector_that_is_not_finite_skips_the_batch(what, steps):
    faulty, net, optimizer = prepared(steps, nonfinite="skip")
    faulty.returns = REFUSED[what][0]
    before = snapshot(net, optimizer)
    optimizer.step(net.losses(5))
    assert optimizer.last_balance.skipped
    assert_same({**snapshot(net, optimizer), "balance": None}, {**before, "balance": None})


@pytest.mark.parametrize("what", REFUSED)
def test_a_vector_that_is_not_finite_is_ignored_on_the_shared_parameters_only(what):
    faulty, net, optimizer = prepared(2, nonfinite="ignore", base="sgd")
    twin, other = prepared(2, base="sgd")[1:]
    optimizer.zero_grad()
    other.zero_grad()
    faulty.returns = REFUSED[what][0]
    optimizer.backward(net.losses(5))
    other.backward(twin.losses(5))
    for parameter in net.trunk.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    for one, two in zip(net.heads.parameters(), twin.heads.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    assert header_of(optimizer)["counts"] == [3, 3, 3]
    assert_same(optimizer.gradient_cosines(), other.gradient_cosines())


@pytest.mark.parametrize("mode", ["raise", "skip", "ignore"])
def test_under_a_scaler_a_vector_that_is_not_finite_moves_nothing_shared(mode):
    faulty, net, optimizer = prepared(2, base="sgd", nonfinite=mode)
    optimizer.zero_grad()
    before = copy.deepcopy(net.trunk.state_dict())
    scaler = grad_scaler(16.0)
    faulty.returns = REFUSED["nan"][0]
    if mode == "raise":
        with pytest.raises(RuntimeError, match="aggregator"):
            optimizer.backward(net.losses(5), scaler)
        assert all(parameter.grad is None for parameter in net.parameters())
        return
    optimizer.backward(net.losses(5), scaler)
    assert not any(p.grad is not None and p.grad.isnan().any() for p in net.parameters())
    if mode == "skip":
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.last_balance.skipped
        assert_same(dict(net.trunk.state_dict()), dict(before))


def spoiled(net, seed, value, task=1):
    """Losses on batch `seed`; the gradient of `task` on its features is `value`."""

    def bad(place, number, values):
        return BadGradient.apply(values, value) if (place, number) == ("trunk", task) else values

    return net.losses(seed, bad)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("mode", ["raise", "skip"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_task_that_is_not_finite_never_gets_to_the_aggregator(what, mode, beta):
    faulty, net, optimizer = prepared(2, nonfinite=mode, beta=beta)
    calls = faulty.calls
    losses = net.losses(5)
    losses = [losses[0], with_value(losses[1], math.nan), losses[2]] if what == "loss" else spoiled(net, 5, math.inf)
    before = snapshot(net, optimizer)
    if mode == "raise":
        with pytest.raises((ValueError, RuntimeError), match="task '1'"):
            optimizer.step(losses)
    else:
        optimizer.step(losses)
        assert optimizer.last_balance.skipped
    after = snapshot(net, optimizer)
    for part in ("parameters", "gradients", "state"):
        assert_same(after[part], before[part])
    assert faulty.calls == calls


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_task_that_is_ignored_is_as_if_absent(what, beta, steps):
    """Its average too: the next batches are those of an optimizer that never saw it."""
    runs = []
    for way in ("bad", "absent"):
        recording = Recording(by_column)
        net, optimizer = build("sgd", tasks=3, nonfinite="ignore", beta=beta, aggregator=recording.__call__)
        train(net, optimizer, steps)
        optimizer.zero_grad()
        losses = net.losses(5) if what == "loss" or way == "absent" else spoiled(net, 5, math.nan)
        if way == "absent":
            losses[1] = None
        elif what == "loss":
            losses[1] = with_value(losses[1], math.nan)
        optimizer.step(losses)
        train(net, optimizer, 2, start=6)
        runs.append((recording.seen, dict(net.state_dict()), optimizer.state_dict()))
    assert [len(matrix) for matrix in runs[0][0]] == [3] * steps + [2, 3, 3]
    assert_same(runs[0], runs[1])


# ------------------------------------------------- arguments


NOT_CALLED = {
    "text": "PCGrad",
    "number": 3.0,
    "list": [add],
    "tensor": torch.ones(2),
    "module class": nn.Identity,
    "class": dict,
}


@pytest.mark.parametrize("what", NOT_CALLED)
def test_what_is_no_aggregator_is_refused(what):
    with pytest.raises(TypeError, match="aggregator must be a callable"):
        build(aggregator=NOT_CALLED[what])


@pytest.mark.parametrize("aggregator", [add, nn.Module()], ids=["function", "module"])
@pytest.mark.parametrize("name", ["norm_params", "max_weight", "refresh_every"])
def test_what_an_aggregator_takes_the_place_of_cannot_be_given_with_it(name, aggregator):
    net = Net()
    plain = SGD(net.parameters(), lr=0.1)
    options = {
        "norm_params": {"norm_params": net.trunk},
        "max_weight": {"max_weight": 2.0},
        "refresh_every": {"norm_params": net.trunk.parameters(), "refresh_every": 2},
    }[name]
    with pytest.raises(ValueError, match="aggregator cannot be used with (norm_params|max_weight)"):
        DualBalancedOptimizer(plain, net.trunk, aggregator=aggregator, **options)


# ------------------------------------------------- surroundings of the call


def test_the_aggregator_runs_outside_of_autocast_and_without_gradients():
    seen = {}

    def combine(matrix):
        seen.update(
            autocast=torch.is_autocast_enabled(device().type),
            product=(matrix @ matrix.t()).dtype,
            gradients=torch.is_grad_enabled(),
            graph=matrix.requires_grad,
        )
        return matrix.sum(0)

    net, optimizer = build(aggregator=combine)
    losses = net.losses()
    with torch.autocast(device().type, dtype=torch.bfloat16):
        optimizer.backward(losses)
        assert torch.is_autocast_enabled(device().type)
    assert torch.is_grad_enabled()
    assert seen == {"autocast": False, "product": torch.float32, "gradients": False, "graph": False}


def test_a_vector_with_a_graph_gives_gradients_without_one():
    scale = torch.ones((), requires_grad=True)

    def combine(matrix):
        with torch.enable_grad():
            return matrix.sum(0) * scale

    net, optimizer = build(aggregator=combine)
    optimizer.backward(net.losses())
    assert not any(parameter.grad.requires_grad for parameter in net.parameters())
    assert scale.grad is None


@pytest.mark.parametrize("way", ["matrix", "vector"])
def test_an_aggregator_may_write_to_its_matrix(way):
    """And what it returns may be a part of it."""

    def in_place(matrix):
        if way == "matrix":
            return matrix.mul_(2).sum(0)
        return matrix[0].add_(matrix[1:].sum(0)).mul_(2)

    net, optimizer = build("sgd", tasks=3, aggregator=in_place)
    twin, other = build("sgd", tasks=3, aggregator=lambda matrix: 2 * add(matrix))
    train(net, optimizer, 4)
    train(twin, other, 4)
    for one, two in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(optimizer.gradient_cosines(), other.gradient_cosines())


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_cosines_are_those_of_the_rows(beta):
    recording = Recording()
    net, optimizer = build(tasks=3, beta=beta, aggregator=recording)
    train(net, optimizer, 3)
    rows = nn.functional.normalize(recording.seen[-1])
    torch.testing.assert_close(optimizer.gradient_cosines(), rows @ rows.t(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------- aggregators that remember


class Remembering(nn.Module):
    """Numbers, an array and a buffer all play a part in what it returns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("velocity", torch.zeros(SHARED))
        self.calls, self.lengths = 0, np.ones(TASKS)

    def forward(self, matrix):
        self.calls += 1
        self.lengths = 0.9 * self.lengths + 0.1 * array(matrix.norm(dim=1).double())
        self.velocity.mul_(0.5).add_(torch.from_numpy(1 / self.lengths).to(matrix) @ matrix)
        return self.velocity + matrix.sum(0) / self.calls

    def get_extra_state(self):
        return {"calls": self.calls, "lengths": self.lengths.tolist()}

    def set_extra_state(self, state):
        self.calls, self.lengths = state["calls"], np.array(state["lengths"])


def remembering(memory):
    return torchjd(memory) if memory in TORCHJD else Remembering()


def reload(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def go_on(net, optimizer, steps, start):
    torch.manual_seed(7)
    train(net, optimizer, steps, start=start)
    return snapshot(net, optimizer), torch.get_rng_state()


def test_a_memory_is_saved_beside_the_optimizer_and_resumes_bit_for_bit():
    """As a scaler's is: what the aggregator keeps is its own."""
    aggregator, fresh = Remembering(), Remembering()
    net, optimizer = build(tasks=TASKS, aggregator=aggregator)
    other, resumed = build(tasks=TASKS, seed=1, aggregator=fresh)
    train(net, optimizer, 3)
    saved = reload([part.state_dict() for part in (net, optimizer, aggregator)])
    for part, state in zip((other, resumed, fresh), saved, strict=True):
        part.load_state_dict(state)
    assert_same(go_on(other, resumed, 3, 3), go_on(net, optimizer, 3, 3))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_taking_and_loading_its_own_state_changes_nothing(beta):
    runs = [build(tasks=TASKS, beta=beta, aggregator=Remembering()) for _ in range(2)]
    for net, optimizer in runs:
        train(net, optimizer, 2)
    runs[0][1].load_state_dict(runs[0][1].state_dict())
    one, two = (go_on(net, optimizer, 2, 2) for net, optimizer in runs)
    assert_same({**one[0], "balance": None}, {**two[0], "balance": None})


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("way", ["to", "from"])
def test_checkpoints_with_and_without_an_aggregator_load_into_each_other(way, beta):
    with_it, without = {"beta": beta, "aggregator": Remembering()}, {"beta": beta}
    mine, theirs = (with_it, without) if way == "to" else (without, with_it)
    (net, optimizer), (other, resumed) = build(tasks=TASKS, **mine), build(tasks=TASKS, **theirs)
    train(net, optimizer, 3)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(reload(optimizer.state_dict()))
    assert header_of(resumed)["counts"] == [3] * TASKS
    if beta:
        torch.testing.assert_close(resumed.gradient_cosines(), optimizer.gradient_cosines())
    train(other, resumed, 2, start=3)
    assert header_of(resumed)["counts"] == [5] * TASKS
    assert all(parameter.isfinite().all() for parameter in other.parameters())


# ------------------------------------------------- copies


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("memory", ["PCGrad", "GradVac", "ours"])
def test_a_copy_goes_on_by_itself(memory, way):
    runs = [build(tasks=TASKS, aggregator=remembering(memory)) for _ in range(2)]
    for net, optimizer in runs:
        torch.manual_seed(0)
        train(net, optimizer, 2)
    (net, optimizer), (twin, other) = runs
    copied = way((net, optimizer))
    expected = go_on(twin, other, 3, 2)
    assert_same(go_on(*copied, 3, 2), expected)
    # The copy's steps left the original alone.
    assert_same(go_on(net, optimizer, 3, 2), expected)


# ------------------------------------------------- several processes


def surgery_in_any_order(matrix):
    """PCGrad as published: each row meets the others in an order drawn at random. Centred, so that all pull apart."""
    matrix = matrix - matrix.mean(0)
    total = torch.zeros_like(matrix[0])
    for row in matrix:
        changed = row.clone()
        for other in torch.randperm(len(matrix)).tolist():
            changed -= torch.clamp(changed @ matrix[other], max=0) / matrix[other].square().sum() * matrix[other]
        total += changed
    return total


def train_parts(rank, size, aggregator, steps=4, **options):
    """Train on this rank's part of every batch, or on all of it; return the network, and the optimizer."""
    net = Net(tasks=TASKS).double()
    group = dist.group.WORLD if size > 1 else None
    base = Adam(net.parameters(), lr=0.01)
    optimizer = DualBalancedOptimizer(base, net.trunk, process_group=group, aggregator=aggregator, **options)
    for seed in range(steps):
        optimizer.zero_grad()
        optimizer.step(losses_of_part(net, rank, size, seed))
    return net, optimizer


def losses_of_part(net, rank, size, seed):
    x = torch.randn(12, 4, generator=generator(seed), dtype=torch.float64)
    return [10.0**task * (out - 1).square().mean() for task, out in enumerate(net(x.chunk(size)[rank]))]


def parameters_of(net):
    return [parameter.detach().numpy() for parameter in net.parameters()]


def train_together_and_alone(rank, size, beta):
    return [parameters_of(train_parts(*place, project, beta=beta)[0]) for place in ((rank, size), (0, 1))]


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_two_processes_train_as_one(processes, beta):
    for together, alone in processes(2).run(train_together_and_alone, beta):
        for one, two in zip(together, alone, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-11)


def train_by_chance(rank, size):
    torch.manual_seed(rank)
    recording = Recording(surgery_in_any_order)
    net, _ = train_parts(rank, size, recording)
    torch.manual_seed(rank)
    vectors = [surgery_in_any_order(matrix).numpy() for matrix in recording.seen]
    return parameters_of(net), [matrix.numpy() for matrix in recording.seen], vectors


def test_chance_keeps_no_two_ranks_apart(processes):
    (parameters, matrices, vectors), (theirs, same, others) = processes(2).run(train_by_chance)
    for one, two in zip(matrices + parameters, same + theirs, strict=True):
        np.testing.assert_array_equal(one, two)
    # Each rank by itself would have gone another way.
    assert not all(np.allclose(one, two) for one, two in zip(vectors, others, strict=True))


def fail_on_one_rank(rank, size, what):
    faulty = Faulty()
    net, optimizer = train_parts(rank, size, faulty.function(), steps=1)
    before = snapshot(net, optimizer)
    if rank == 1 or what == "nan":
        faulty.returns = (REFUSED | MISTAKES)[what][0]
    try:
        optimizer.step(losses_of_part(net, rank, size, 1))
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    assert_same(snapshot(net, optimizer), before)
    faulty.returns = None
    optimizer.zero_grad()
    optimizer.step(losses_of_part(net, rank, size, 2))
    return failure, parameters_of(net)


@pytest.mark.parametrize("what", ["an error", "nan"])
def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(processes, what):
    (first, parameters), (second, theirs) = processes(2).run(fail_on_one_rank, what)
    _, kind, message = (REFUSED | MISTAKES)[what]
    assert second.startswith(kind.__name__)
    assert re.search(message, second)
    if what != "nan":
        assert "rank 1" in first
    for one, two in zip(parameters, theirs, strict=True):
        np.testing.assert_array_equal(one, two)


def differ_in_the_aggregator(rank, size):
    group = dist.new_group(timeout=timedelta(seconds=5))
    net = Net(tasks=TASKS).double()
    base = SGD(net.parameters(), lr=0.01)
    optimizer = DualBalancedOptimizer(base, net.trunk, process_group=group, aggregator=add if rank else None)
    for seed in range(3):
        optimizer.step(losses_of_part(net, rank, size, seed))


def test_ranks_must_agree_on_whether_there_is_an_aggregator(processes):
    for kind, name, message in processes(2).run(differ_in_the_aggregator, timeout=20, errors=True):
        assert (kind, name) == ("error", "RuntimeError")
        assert "all ranks must agree on" in message


def refuse_parts(rank, size):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    net = Net(tasks=TASKS).double()
    mesh = init_device_mesh("cpu", (size,))
    fsdp.fully_shard(net.trunk[0], mesh=mesh)
    fsdp.fully_shard(net, mesh=mesh)
    optimizer = DualBalancedOptimizer(
        SGD(net.parameters(), lr=0.1), net.trunk, process_group=mesh.get_group(), aggregator=add
    )
    parameters = list(net.parameters())
    before = [parameter.to_local().clone() for parameter in parameters]
    with pytest.raises(ValueError, match="aggregator cannot be used with fully_shard"):
        optimizer.step(losses_of_part(net, rank, size, 0))
    return all(torch.equal(old, new.to_local()) for old, new in zip(before, parameters, strict=True))


def test_averages_in_parts_are_refused(processes):
    assert processes(2).run(refuse_parts) == [True, True]
