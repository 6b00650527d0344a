"""The method against the float64 oracle, its identities, the rules that the paper leaves open, and the buffer."""

import copy
import itertools
import math

import cases
import numpy as np
import pytest
import torch
from cases import combine, matrix_optimizer, one_thread  # noqa: F401
from conftest import header_of
from devices import array, generator
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, Rule, weights_of
from torch import nn
from torch.optim import SGD, Adam

from balanced_optim import DualBalancedOptimizer

NORM_TARGETS = ["max", "mean", "median", "min", None]
NAMES = ("t0", "t1", "t2")
properties = settings(derandomize=True, deadline=None, max_examples=25, database=None)


def assert_near(actual, expected, rtol=1e-8):
    """||actual - expected|| <= rtol * ||expected||, for tensors or lists of them."""
    if not isinstance(actual, torch.Tensor):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_near(*pair, rtol)
        return
    actual, expected = actual.detach().double(), torch.as_tensor(expected).detach().double()
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert (actual - expected).norm() <= rtol * expected.norm()


def same(a, b):
    """Bit for bit equality of nested containers of tensors and numbers."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def snapshot(optimizer):
    """A copy of everything that a step may change: state dict (base state, averages, counts), parameters, .grad."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((optimizer.state_dict(), [p.detach() for p in parameters], [p.grad for p in parameters]))


def averages(optimizer, task):
    """ema of one task as one vector, and its count."""
    state = optimizer.state_dict()
    name = f"task_ema_{task}"
    rows = [entry[name].reshape(-1) for entry in state["state"].values() if name in entry]
    return torch.cat(rows).clone(), header_of(state)["counts"][task]


# ------------------------------------------------- the oracle


def _settings():
    rng = np.random.default_rng(0)
    schedules = [(0.0, 0.5), (0.5, 0.0), (0.5, 1.0), (0.9, 0.0), (0.9, 0.5), (0.9, 1.0)]
    forms = itertools.cycle(["mapping", "list", "tensor", "tuple"])
    bases = itertools.cycle(["sgd", "adam", "adam"])
    for (beta, beta_decay), norm_target in itertools.product(schedules, NORM_TARGETS):
        method = {
            "beta": beta,
            "beta_decay": beta_decay,
            "norm_target": norm_target,
            "max_weight": [None, None, 1.0, 1.5, 0.7][rng.integers(5)],
            "task_weights": [None, None, (1.0, 2.0, 0.5), (3.0, 0.0, 1.0)][rng.integers(4)],
            "log_transform": bool(rng.random() < 0.7),
            "eps": [1e-8, 1e-2][rng.integers(2)],
        }
        method["fade_solved"] = method["log_transform"] and norm_target is not None and bool(rng.random() < 0.5)
        yield method, next(bases), next(forms)


SETTINGS = list(_settings())


def _base(kind, model, log_transform):
    if kind == "adam":
        return model.optimizer(Adam, lr=3e-3)
    return model.optimizer(SGD, lr=1e-2 if log_transform else 1e-5, momentum=0.9)


def in_form(losses, form, first):
    """Losses of a dictionary in one of the forms that a caller may use."""
    if form == "mapping":
        return losses if first else {name: loss for name, loss in losses.items() if loss is not None}
    values = list(losses.values())
    return {"list": list, "tuple": tuple, "tensor": torch.stack}[form](values)


def run_against_the_oracle(method, base, form, dtype, rtol, steps=50):
    slow = cases.build("partly shared")
    fast = copy.deepcopy(slow).to(dtype)
    slow.load_state_dict(fast.state_dict())
    priorities = method["task_weights"]
    by_name = None if priorities is None else dict(zip(NAMES, priorities, strict=True))
    optimizer = DualBalancedOptimizer(
        _base(base, fast, method["log_transform"]),
        fast.trunk,
        **{**method, "task_weights": by_name if form == "mapping" else priorities},
    )
    oracle = Oracle(
        _base(base, slow, method["log_transform"]), slow.trunk.parameters(), rule=method | {"task_weights": by_name}
    )
    rng = np.random.default_rng(7)
    for step in range(steps):
        absent = [] if form == "tensor" else [name for name in NAMES if step == 14 or rng.random() < 0.25]
        optimizer.zero_grad()
        oracle.base.zero_grad()
        losses = slow.losses(step, absent)
        optimizer.step(in_form(fast.losses(step, absent), form, step == 0))
        oracle.step(losses)
        balance = optimizer.last_balance
        if dtype == torch.float64 and step % 5 == 4:
            for found, expected in zip(
                (balance.losses, balance.norms, balance.weights), oracle.balance(NAMES), strict=True
            ):
                np.testing.assert_allclose(array(found), expected, rtol=1e-7)
    assert balance.tasks == (NAMES if form == "mapping" else ("0", "1", "2"))
    assert_near(list(fast.parameters()), list(slow.parameters()), rtol)


@pytest.mark.parametrize(("method", "base", "form"), SETTINGS)
def test_fifty_steps_agree_with_the_oracle_in_float64(method, base, form):
    run_against_the_oracle(method, base, form, torch.float64, 1e-8)


@pytest.mark.parametrize(("method", "base", "form"), SETTINGS[::5])
def test_fifty_steps_agree_with_the_oracle_in_float32(method, base, form):
    run_against_the_oracle(method, base, form, torch.float32, 1e-4)


# ------------------------------------------------- hard gradient matrices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("norm_target", NORM_TARGETS)
@pytest.mark.parametrize("name", cases.MATRICES)
def test_hard_matrices(name, norm_target, beta, dtype):
    matrix = cases.MATRICES[name]
    combined, balance = combine(matrix, matrix, beta=beta, norm_target=norm_target, dtype=dtype, log_transform=False)
    betas = [beta, beta / math.sqrt(2)]
    ema = (betas[1] * (1 - betas[0]) + 1 - betas[1]) * matrix
    norms = dict(enumerate(np.linalg.norm(ema, axis=1)))
    weights = torch.tensor(list(weights_of(norms, Rule(norm_target=norm_target)).values()), dtype=torch.float64)
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(balance.weights.double(), weights, rtol=rtol, atol=0)
    assert balance.weights[~matrix.any(1)].eq(0).all()
    lengths = weights * torch.tensor(list(norms.values()))
    # Opposite rows cancel: the error is measured against what was added up.
    assert combined.isfinite().all()
    assert (combined.double() - weights @ torch.as_tensor(ema)).norm() <= rtol * lengths.sum()


@pytest.mark.parametrize("name", cases.MATRICES)
def test_hard_matrices_under_the_log_are_finite(name):
    """Weights, norms and the sum stay finite; the sum is no longer than T * alpha."""
    combined, balance = combine(*[cases.MATRICES[name]] * 3, dtype=torch.float32)
    for tensor in (combined, balance.norms, balance.weights):
        assert tensor.isfinite().all()
    assert combined.norm() <= len(balance.tasks) * balance.norms.max() * (1 + 1e-5)


# ------------------------------------------------- identities


@properties
@given(factors=st.lists(st.floats(-6, 6), min_size=3, max_size=3), beta=st.sampled_from([0.0, 0.9]))
def test_rescaled_losses_change_no_parameter(factors, beta):
    models = [cases.build("partly shared") for _ in range(2)]
    for model, scales in zip(models, ([1.0] * 3, [10.0**factor for factor in factors]), strict=True):
        base = model.optimizer(Adam, lr=0.01)
        optimizer = DualBalancedOptimizer(base, model.trunk, beta=beta, eps=1e-30)
        for step in range(3):
            optimizer.zero_grad()
            optimizer.step([c * loss for c, loss in zip(scales, model.losses(step).values(), strict=True)])
    assert_near(list(models[0].parameters()), list(models[1].parameters()))


@properties
@given(matrix=cases.matrices(), seed=st.integers(0, 1000), beta=st.sampled_from([0.0, 0.9]))
def test_permuted_tasks_permute_norms_and_weights(matrix, seed, beta):
    order = np.random.default_rng(seed).permutation(len(matrix))
    combined, balance = combine(matrix, 2 * matrix, beta=beta, norm_target="median")
    permuted, permuted_balance = combine(matrix[order], 2 * matrix[order], beta=beta, norm_target="median")
    torch.testing.assert_close(permuted_balance.norms, balance.norms[order])
    torch.testing.assert_close(permuted_balance.weights, balance.weights[order])
    scale = float(balance.norms @ balance.weights)
    torch.testing.assert_close(permuted, combined, rtol=0, atol=1e-12 * scale)


@properties
@given(matrix=cases.matrices(), beta=st.sampled_from([0.0, 0.5]), target=st.sampled_from(NORM_TARGETS[:4]))
def test_rescaled_gradients_have_the_same_norm(matrix, beta, target):
    _, balance = combine(matrix, beta=beta, norm_target=target)
    norms = balance.norms
    middle = (norms.quantile(0.5, interpolation="lower") + norms.quantile(0.5, interpolation="higher")) / 2
    alpha = {"max": norms.max(), "mean": norms.mean(), "min": norms.min(), "median": middle}[target]
    torch.testing.assert_close(balance.weights * norms, alpha.expand(len(norms)))


@properties
@given(matrix=cases.matrices(), beta=st.sampled_from([0.0, 0.9]))
def test_max_weight_one_is_the_log_alone(matrix, beta):
    combined, balance = combine(matrix, matrix, beta=beta, max_weight=1.0)
    plain, plain_balance = combine(matrix, matrix, beta=beta, norm_target=None)
    assert balance.weights.eq(1).all()
    assert plain_balance.weights.eq(1).all()
    torch.testing.assert_close(combined, plain, rtol=1e-12, atol=1e-12 * float(balance.norms.sum()))


@properties
@given(matrix=cases.matrices(min_tasks=2), cap=st.floats(0.1, 1e4))
def test_no_weight_exceeds_its_cap(matrix, cap):
    _, free = combine(matrix)
    _, capped = combine(matrix, max_weight=cap)
    torch.testing.assert_close(capped.weights, free.weights.clamp(max=cap))


@pytest.mark.parametrize("max_weight", [None, 5.0])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_one_task_without_average_is_the_wrapped_optimizer_bit_for_bit(kind, dtype, eps, max_weight):
    plain, model = (cases.build("mlp").to(dtype) for _ in range(2))
    base = plain.optimizer(kind, lr=0.01)
    optimizer = DualBalancedOptimizer(
        model.optimizer(kind, lr=0.01), model.trunk, beta=0, eps=eps, max_weight=max_weight
    )
    for step in range(10):
        base.zero_grad()
        torch.log(plain.losses(step)["t1"] + eps).backward()
        base.step()
        optimizer.zero_grad()
        optimizer.step([model.losses(step)["t1"]])
        assert optimizer.last_balance.weights.item() == 1
    assert same(list(model.parameters()), list(plain.parameters()))
    assert same(optimizer.base_optim.state_dict(), base.state_dict())


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_everything_off_is_the_sum_of_the_losses(kind):
    plain, model = cases.build("partly shared"), cases.build("partly shared")
    base = plain.optimizer(kind, lr=1e-5)
    optimizer = DualBalancedOptimizer(
        model.optimizer(kind, lr=1e-5), model.trunk, beta=0, log_transform=False, norm_target=None
    )
    for step in range(10):
        base.zero_grad()
        sum(plain.losses(step).values()).backward()
        base.step()
        optimizer.zero_grad()
        optimizer.step(model.losses(step))
    assert_near(list(model.parameters()), list(plain.parameters()), 1e-12)


@properties
@given(matrix=cases.matrices())
def test_without_average_the_sum_is_alpha_times_the_sum_of_unit_vectors(matrix):
    rows = torch.as_tensor(matrix)
    norms = rows.norm(dim=1)
    expected = norms.max() * (rows / norms[:, None]).sum(0)
    scale = float(norms.max()) * len(rows)
    for log_transform in (True, False):
        combined, _ = combine(matrix, beta=0, log_transform=log_transform)
        torch.testing.assert_close(combined, expected, rtol=0, atol=1e-7 * scale)
        assert combined.norm() <= scale * (1 + 1e-12)


@properties
@given(seed=st.integers(0, 10**6))
def test_without_average_the_log_leaves_the_shared_direction(seed):
    grads = []
    for log_transform in (True, False):
        model = cases.build("mlp")
        optimizer = DualBalancedOptimizer(
            model.optimizer(lr=0.1), model.trunk, beta=0, log_transform=log_transform, eps=1e-30
        )
        optimizer.backward(model.losses(seed))
        grads.append(torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters()]))
    torch.testing.assert_close(grads[0] / grads[0].norm(), grads[1] / grads[1].norm(), rtol=0, atol=1e-12)


@properties
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_the_log_of_a_mean_loss_is_not_the_mean_of_logs(seed, sizes):
    """grad log(mean loss) = sum(grad loss_m) / sum(loss_m) over parts m of a batch."""
    model = cases.build("mlp")
    parts = [model.losses(seed + part)["t2"] * size for part, size in enumerate(sizes)]
    parameters = list(model.parameters())
    found = [torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True) for part in parts]
    total = sum(parts).detach()
    optimizer = DualBalancedOptimizer(model.optimizer(lr=0.1), model.trunk, beta=0, eps=1e-30)
    optimizer.backward([sum(parts) / sum(sizes)])
    for parameter, gradients in zip(parameters, zip(*found, strict=True), strict=True):
        if gradients[0] is None:
            assert parameter.grad is None
        else:
            assert_near(parameter.grad, sum(gradients) / total)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_average_starts_at_zero_without_bias_correction(decay):
    matrix = np.array([[1.0, -2.0, 3.0]])
    parameter, optimizer = matrix_optimizer(matrix, beta=0.9, beta_decay=decay, log_transform=False)
    ema = np.zeros(3)
    for k in range(1, 6):
        optimizer.backward(cases.matrix_losses(k * matrix, parameter, False))
        ema = 0.9 / k**decay * ema + (1 - 0.9 / k**decay) * k * matrix[0]
        row, count = averages(optimizer, 0)
        assert count == k
        assert_near(row, ema, 1e-14)


# ------------------------------------------------- what the paper leaves open: refused losses


class Toy:
    """Trunk, heads and base optimizer as plain tensors; one of the tasks can be made to fail."""

    def __init__(self, kind=Adam, width=5, **keywords):
        source = generator(3)
        rand = lambda *shape: nn.Parameter(torch.randn(*shape, generator=source, dtype=torch.float64))  # noqa: E731
        self.trunk, self.heads = [rand(4, width), rand(width)], [rand(width) for _ in range(3)]
        self.base = kind([*self.heads, *self.trunk], lr=0.01)
        self.optimizer = DualBalancedOptimizer(self.base, self.trunk, **keywords)

    def losses(self, seed, bad_task=None, where="loss", value=math.nan):
        """Losses of a seeded batch. `where`: what is not usable of `bad_task`: its loss, its trunk or head gradient."""
        x = torch.randn(6, 4, generator=generator(seed), dtype=torch.float64)
        features = torch.tanh(x @ self.trunk[0] + self.trunk[1])
        losses = {}
        for task, head in enumerate(self.heads):
            bad = cases.BadGradient.apply
            mine = bad(features, value) if task == bad_task and where == "trunk" else features
            head = bad(head, value) if task == bad_task and where == "head" else head
            loss = 10.0**task * ((mine @ head - 1).square().mean() + 0.1)
            losses[f"t{task}"] = cases.with_value(loss, value) if task == bad_task and where == "loss" else loss
        return losses

    def train(self, seeds):
        for seed in seeds:
            self.optimizer.zero_grad()
            self.optimizer.step(self.losses(seed))

    def refuse(self, losses, mode, error, match):
        """Hand in a batch that must be refused; `.grad` holds something before it."""
        for parameter in [*self.trunk, *self.heads]:
            parameter.grad = torch.full_like(parameter, 0.25)
        before = snapshot(self.optimizer)
        if mode == "raise":
            with pytest.raises(error, match=match):
                self.optimizer.step(losses)
        else:
            self.optimizer.step(losses)
            balance = self.optimizer.last_balance
            assert balance.skipped
            assert balance.weights.eq(0).all()
            assert balance.norms.isnan().all()
        return before, snapshot(self.optimizer)


BAD_LOSSES = [(True, v) for v in (math.nan, math.inf, -math.inf, -1e-8, -1.0)] + [(False, math.nan), (False, math.inf)]


@pytest.mark.parametrize("mode", ["raise", "skip"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("good_steps", [0, 3])
@pytest.mark.parametrize("task", [0, 2])
@pytest.mark.parametrize(("log_transform", "value"), BAD_LOSSES)
@pytest.mark.filterwarnings("ignore:the loss of task .* below -eps")
def test_a_bad_loss_changes_nothing(log_transform, value, task, good_steps, beta, mode):
    toy, twin = (Toy(beta=beta, log_transform=log_transform, nonfinite=mode) for _ in range(2))
    toy.train(range(good_steps))
    twin.train(range(good_steps))
    before, after = toy.refuse(toy.losses(50, task, "loss", value), mode, ValueError, rf"loss of task 't{task}' .* got")
    assert same(before, after)
    toy.train(range(10, 12))
    twin.train(range(10, 12))
    assert_near([*toy.trunk, *toy.heads], [*twin.trunk, *twin.heads], 1e-13)
    assert not toy.optimizer.last_balance.skipped


@pytest.mark.parametrize("value", [0.0, -0.9e-8])
def test_a_loss_just_above_minus_eps_is_taken(value):
    toy = Toy()
    toy.optimizer.step(toy.losses(0, 1, "loss", value))
    assert toy.optimizer.last_balance.norms.isfinite().all()


def test_negative_losses_are_fine_without_the_log():
    toy = Toy(log_transform=False)
    toy.optimizer.step(toy.losses(0, 1, "loss", -5.0))
    assert toy.optimizer.last_balance.losses[1] == -5


def test_a_refused_first_batch_fixes_no_tasks():
    toy = Toy()
    with pytest.raises(ValueError, match="'t1'"):
        toy.optimizer.step(toy.losses(0, 1))
    toy.optimizer.step(list(toy.losses(0).values())[:2])
    assert toy.optimizer.last_balance.tasks == ("0", "1")


def test_a_skipped_backward_leaves_out_the_step_that_follows():
    toy = Toy(nonfinite="skip")
    toy.train(range(2))
    toy.optimizer.backward(toy.losses(5, 0))
    before = snapshot(toy.optimizer)
    toy.optimizer.step()
    assert same(before, snapshot(toy.optimizer))
    toy.optimizer.step()
    assert not same(before, snapshot(toy.optimizer))


# ------------------------------------------------- what the paper leaves open: gradients that are not finite


@pytest.mark.parametrize("mode", ["raise", "skip"])
@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("good_steps", [0, 3])
@pytest.mark.parametrize(("task", "value"), [(0, math.nan), (1, math.inf), (2, -math.inf)])
def test_a_bad_gradient_is_refused(task, value, good_steps, beta, where, mode):
    toy, twin = (Toy(beta=beta, nonfinite=mode) for _ in range(2))
    toy.train(range(good_steps))
    twin.train(range(good_steps))
    row = averages(toy.optimizer, task) if good_steps and beta else None
    match = rf"gradient of task 't{task}' must be finite"
    before, after = toy.refuse(toy.losses(50, task, where, value), mode, RuntimeError, match)
    assert same(before[1:], after[1:])
    assert same(before[0]["param_groups"], after[0]["param_groups"])
    if row is not None:
        assert same(row, averages(toy.optimizer, task))
    toy.train(range(10, 12))
    assert all(tensor.isfinite().all() for tensor in (*toy.trunk, *toy.heads, toy.optimizer.last_balance.weights))
    assert not toy.optimizer.last_balance.skipped
    if task == 0 or beta == 0 or not good_steps:
        # No average has taken in any part of the batch.
        assert same(before, after)
        twin.train(range(10, 12))
        assert_near([*toy.trunk, *toy.heads], [*twin.trunk, *twin.heads], 1e-13)


def test_a_refused_batch_starts_no_average():
    """Task t1 comes for the first time, before the gradient that is not finite."""
    toy, twin = Toy(), Toy()
    for each in (toy, twin):
        each.optimizer.step({**each.losses(0), "t1": None})
    before = averages(toy.optimizer, 1)
    assert before[1] == before[0].norm() == 0
    with pytest.raises(RuntimeError, match="gradient of task 't2'"):
        toy.optimizer.step({**toy.losses(1, 2, "trunk"), "t0": None})
    assert same(averages(toy.optimizer, 1), before)
    toy.train([2])
    twin.train([2])
    assert_near([*toy.trunk, *toy.heads], [*twin.trunk, *twin.heads], 1e-13)


def test_sqrt_at_zero_is_refused():
    parameter = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = DualBalancedOptimizer(SGD([parameter], lr=1.0), [parameter])
    with pytest.raises(RuntimeError, match="gradient of task '1' must be finite"):
        optimizer.step([parameter.square().sum(), 1 + parameter.square().sqrt().sum()])
    assert parameter.tolist() == [0, 1]
    assert parameter.grad is None


@pytest.mark.parametrize("width", [5, 40_000])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("where", ["loss", "trunk", "head"])
def test_ignored_tasks_are_like_absent_tasks(where, beta, width):
    """Up to a `.grad` of zeros instead of None, which SGD without momentum does not see."""
    toy, slow = Toy(SGD, width, beta=beta, nonfinite="ignore"), Toy(SGD, width)
    oracle = Oracle(slow.base, slow.trunk, rule={"beta": beta})
    rng = np.random.default_rng(5)
    for step in range(12 if width < 100 else 4):
        bad = [2, 0, 1, None][step % 4]
        value = [math.nan, math.inf, -math.inf][rng.integers(3)]
        toy.optimizer.zero_grad()
        oracle.base.zero_grad()
        losses = slow.losses(step)
        if bad is not None:
            losses[f"t{bad}"] = None
        toy.optimizer.step(toy.losses(step, bad, where, value))
        oracle.step(losses)
        balance = toy.optimizer.last_balance
        assert [name for name, weight in zip(NAMES, balance.weights, strict=True) if weight == 0] == (
            [] if bad is None else [f"t{bad}"]
        )
        assert not balance.skipped
    assert_near([*toy.trunk, *toy.heads], [*slow.trunk, *slow.heads])
    counts = header_of(toy.optimizer)["counts"]
    assert counts == [oracle.count[name] for name in NAMES]


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("where", ["loss", "trunk", "head"])
def test_a_head_of_an_ignored_task_stays_where_it_is(where, beta):
    """As with an absent task: momentum must not carry it on."""
    toy = Toy(lambda parameters, lr: SGD(parameters, lr=lr, momentum=0.9), beta=beta, nonfinite="ignore")
    toy.train(range(3))
    before = toy.heads[1].clone()
    toy.optimizer.zero_grad()
    toy.optimizer.step(toy.losses(5, 1, where))
    assert torch.equal(toy.heads[1], before)


# ------------------------------------------------- what the paper leaves open: small, zero, absent, preferred


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_solved_task_is_blown_up_and_max_weight_caps_it(dtype):
    direction = torch.tensor([[1e-13, 0.0], [0.0, 1.0]], dtype=dtype)

    def weights(**keywords):
        parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
        optimizer = DualBalancedOptimizer(SGD([parameter], lr=1.0), [parameter], beta=0, **keywords)
        solved, hard = direction @ parameter
        optimizer.backward([solved, hard + 1])
        return optimizer.last_balance

    assert weights().norms[0].item() == pytest.approx(1e-5, rel=1e-3)
    assert weights().weights.tolist() == pytest.approx([1e5, 1], rel=1e-3)
    assert weights(max_weight=10).weights.tolist() == [10, 1]
    assert weights(eps=1e-2).norms[0].item() == pytest.approx(1e-11, rel=1e-3)


@pytest.mark.parametrize("keywords", [{}, {"beta": 0.0}, {"beta": 0.0, "max_weight": 4.0}, {"norm_params": True}])
def test_a_solved_task_fades(keywords):
    """Losses 1, 1e-8 and 0 at eps = 1e-8: all, half and nothing of alpha, whatever the gradients."""
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    if "norm_params" in keywords:
        keywords = {"norm_params": [parameter], "beta": 0.0}
    optimizer = DualBalancedOptimizer(SGD([parameter], lr=1.0), [parameter], fade_solved=True, **keywords)
    slopes = torch.tensor([1.0, 1e-8, 0.25e-8], dtype=torch.float64)
    values = torch.tensor([1.0, 1e-8, 0.0], dtype=torch.float64)
    optimizer.backward(list(parameter * slopes + values))
    balance = optimizer.last_balance
    alpha = balance.norms.max()
    torch.testing.assert_close(balance.norms * balance.weights, alpha * torch.tensor([1, 0.5, 0]).double())
    torch.testing.assert_close(parameter.grad, balance.weights * balance.norms)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_loss_just_below_zero_has_faded(beta):
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DualBalancedOptimizer(SGD([parameter], lr=1.0), [parameter], beta=beta, eps=0.1, fade_solved=True)
    optimizer.backward(list(parameter + torch.tensor([-0.05, 1.0], dtype=torch.float64)))
    assert optimizer.last_balance.weights[0] == 0
    assert parameter.grad[0] == 0
    assert parameter.grad[1] > 0


def test_scales_far_apart_leave_the_sum_exact():
    """A solved task's factor may be denormal in float32."""
    for solved in (1e-38, 1e-40, 3e-42):
        parameter = nn.Parameter(torch.zeros(2))
        optimizer = DualBalancedOptimizer(SGD([parameter], lr=1.0), [parameter], beta=0, fade_solved=True)
        optimizer.backward([1 + 1e-3 * parameter[0], parameter[1] + solved])
        assert parameter.grad[0].item() == pytest.approx(1e8, rel=1e-5)


def test_fading_changes_nothing_far_above_eps():
    plain, faded = (run_of_steps({"eps": 1e-30, "fade_solved": fade_solved}) for fade_solved in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, faded, strict=True))


def run_of_steps(options, steps=5):
    model = cases.build("partly shared")
    optimizer = DualBalancedOptimizer(model.optimizer(SGD, lr=1e-2), model.trunk, **options)
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.step(model.losses(step, []))
    return list(model.parameters())


@pytest.mark.parametrize("norm_target", NORM_TARGETS[:4])
def test_a_zero_gradient_does_not_count(norm_target):
    matrix = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 5.0], [0.0, 0.0], [4.0, 0.0]])
    kwargs = {"norm_target": norm_target, "log_transform": False, "beta": 0.5}
    combined, balance = combine(matrix, **kwargs)
    without, _ = combine(matrix[[0, 2, 4]], **kwargs)
    assert balance.weights[[1, 3]].eq(0).all()
    assert_near(combined, without, 1e-15)


def test_every_gradient_zero_gives_zeros():
    combined, balance = combine(np.zeros((3, 4)))
    assert combined.tolist() == [0] * 4
    assert balance.weights.tolist() == balance.norms.tolist() == [0] * 3


def test_a_zero_gradient_still_counts_through_its_average():
    parameter, optimizer = matrix_optimizer(np.eye(2), beta=0.5, beta_decay=0, log_transform=False)
    optimizer.backward(cases.matrix_losses(np.eye(2), parameter, False))
    optimizer.backward(cases.matrix_losses(np.diag([0.0, 1.0]), parameter, False))
    assert optimizer.last_balance.norms.tolist() == [0.25, 0.75]
    assert optimizer.last_balance.weights.tolist() == [3, 1]


@pytest.mark.parametrize("form", ["mapping", "list"])
def test_an_absent_task_keeps_average_and_count(form):
    toy = Toy(beta=0.9)
    for step in range(3):
        toy.optimizer.step(in_form(toy.losses(step), form, step == 0))
    row, count = averages(toy.optimizer, 1)
    toy.optimizer.zero_grad()
    toy.optimizer.step(in_form({**toy.losses(9), "t1": None}, form, False))
    assert same(averages(toy.optimizer, 1), (row, count))
    assert toy.heads[1].grad is None
    balance = toy.optimizer.last_balance
    assert balance.norms.isnan().tolist() == balance.losses.isnan().tolist() == [False, True, False]
    assert balance.weights[1] == 0
    assert balance.weights.min() == 0 and balance.weights[[0, 2]].min() == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_without_tasks_touches_no_grad(first):
    toy = Toy(SGD)
    if not first:
        toy.train(range(2))
    toy.optimizer.zero_grad()
    toy.trunk[0].grad = torch.ones_like(toy.trunk[0])
    before = toy.trunk[0].clone()
    toy.optimizer.step(dict.fromkeys(NAMES))
    assert toy.trunk[0].grad.eq(1).all()
    assert all(parameter.grad is None for parameter in [toy.trunk[1], *toy.heads])
    assert_near(toy.trunk[0], before - 0.01, 1e-14)
    assert toy.optimizer.last_balance.weights.tolist() == [0] * 3


@properties
@given(
    matrix=cases.matrices(min_tasks=3, max_tasks=3),
    priorities=st.lists(st.floats(0, 10), min_size=3, max_size=3),
    beta=st.sampled_from([0.0, 0.9]),
)
def test_priorities_multiply_after_the_rescale(matrix, priorities, beta):
    _, plain = combine(matrix, beta=beta, max_weight=100)
    combined, balance = combine(matrix, beta=beta, max_weight=100, task_weights=priorities)
    torch.testing.assert_close(balance.weights, plain.weights * torch.tensor(priorities).double())
    rows = torch.as_tensor(matrix) * (1 - beta) / (1 + 1e-8)
    scale = float(balance.norms @ balance.weights)
    torch.testing.assert_close(combined, balance.weights @ rows, rtol=0, atol=1e-12 * scale)


def test_a_priority_of_zero_keeps_the_head_alive():
    toy = Toy(beta=0, task_weights={"t0": 1, "t1": 0, "t2": 2})
    toy.optimizer.backward(toy.losses(0))
    assert toy.optimizer.last_balance.weights[1] == 0
    assert toy.heads[1].grad.norm() > 0


# ------------------------------------------------- the dtype of the averages


@pytest.mark.parametrize("cap", [None, 3.0])
def test_bfloat16_averages_are_close_to_float32(cap):
    models = [cases.build("conv").float() for _ in range(2)]
    for model, ema_dtype in zip(models, (torch.float32, torch.bfloat16), strict=True):
        optimizer = DualBalancedOptimizer(model.optimizer(lr=0.01), model.trunk, ema_dtype=ema_dtype, max_weight=cap)
        for step in range(20):
            optimizer.zero_grad()
            optimizer.step(model.losses(step))
        entries = optimizer.state_dict()["state"].values()
        rows = [row for entry in entries for name, row in entry.items() if name.startswith("task_ema_")]
        assert {row.dtype for row in rows} == {ema_dtype}
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    starts = list(cases.build("conv").parameters())
    moved, apart = (
        torch.stack([(a - b.float()).norm() for a, b in zip(models[0].parameters(), others, strict=True)]).norm()
        for others in (starts, list(models[1].parameters()))
    )
    assert 0 < apart <= 0.01 * moved
