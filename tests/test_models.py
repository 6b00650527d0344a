"""Gradients of many kinds of models against the oracle, and what a step leaves in `.grad`."""

import copy
import warnings

import cases
import pytest
import torch
from cases import one_thread  # noqa: F401
from oracle import Oracle
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from balanced_optim import DualBalancedOptimizer

METHODS = {
    "averaged": {"beta": 0.9},
    "no average": {"beta": 0.0},
    "capped": {"beta": 0.0, "max_weight": 2.0},
    "sum": {"beta": 0.0, "norm_target": None, "log_transform": False},
}


def assert_near(actual, expected, rtol=1e-9):
    assert (actual is None) == (expected is None)
    if actual is None:
        return
    actual, expected = (t.detach().to_dense() if t.is_sparse else t.detach() for t in (actual, expected))
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    actual, expected = actual.double(), expected.double()
    # A gradient that is zero up to rounding (a bias before batch norm) has no relative error.
    assert (actual - expected).norm() <= rtol * expected.norm() + 1e-13


def optimizer_of(model, lr=0.01, **keywords):
    return DualBalancedOptimizer(model.optimizer(SGD, lr=lr), model.trunk, **keywords)


def tolerance(parameter, mixed=False):
    """One rounding of the parameter's dtype; float64 beside narrow dtypes feels their norms, taken in float32."""
    return max(1e-5 if mixed else 1e-9, 4 * torch.finfo(parameter.dtype).eps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", cases.MODELS)
def test_gradients_and_steps_agree_with_the_oracle(name, method):
    """.grad, parameters and running statistics over four batches, one of them without task t1."""
    model, slow = cases.build(name), cases.build(name)
    slow.use_reentrant = None  # the oracle needs no checkpoints
    settings = METHODS[method]
    lr = 0.01 if settings.get("log_transform", True) else 1e-6
    optimizer = optimizer_of(model, lr, **settings)
    oracle = Oracle(slow.optimizer(SGD, lr=lr), slow.trunk.parameters(), rule=settings)
    for step in range(4):
        optimizer.zero_grad()
        oracle.base.zero_grad()
        absent = ("t1",) if step == 2 else ()
        optimizer.backward(model.losses(step, absent))
        oracle.backward(slow.losses(step, absent))
        for mine, theirs in zip(model.parameters(), slow.parameters(), strict=True):
            assert_near(mine.grad, theirs.grad, tolerance(mine, name == "mixed dtypes"))
        optimizer.step()
        oracle.base.step()
        # Low precision parameters drift apart by one rounding a step: each batch is compared on its own.
        for mine, theirs in zip(model.parameters(), slow.parameters(), strict=True):
            assert_near(mine, theirs, tolerance(mine, name == "mixed dtypes"))
            theirs.data.copy_(mine.data)
        for mine, theirs in zip(model.buffers(), slow.buffers(), strict=True):
            assert_near(mine, theirs)
    for parameter in model.parameters():
        assert (parameter.grad is None) != parameter.requires_grad
        if parameter.grad is not None and not parameter.grad.is_sparse:
            assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "checkpoint"])
def test_one_forward_a_step(name):
    model = cases.build(name)
    calls = []
    model.trunk.register_forward_pre_hook(lambda *_: calls.append(1))
    optimizer = optimizer_of(model)
    for step in range(3):
        losses = model.losses(step)
        calls.clear()
        statistics = [buffer.clone() for buffer in model.buffers()]
        optimizer.step(losses)
        # Checkpoints run the forward again, once a task; nothing else does.
        assert len(calls) == (3 if name == "checkpoint" else 0)
        for before, after in zip(statistics, model.buffers(), strict=True):
            assert torch.equal(before, after)
    if name == "conv":
        assert model.trunk[1].num_batches_tracked == 3


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_all_tasks_see_one_dropout_mask(beta, use_reentrant):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 20, dtype=torch.float64))
    optimizer = DualBalancedOptimizer(SGD([weight], lr=0.1), [weight], beta=beta)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    trunk = lambda x: nn.functional.dropout(x @ weight, 0.5)  # noqa: E731
    features = trunk(x) if use_reentrant is None else checkpoint(trunk, x, use_reentrant=use_reentrant)
    kept = features.detach() != 0
    optimizer.backward([features.square().mean() for _ in range(3)])
    assert optimizer.last_balance.norms.unique().numel() == 1
    dense = x.detach() @ weight.detach()
    single = x.detach().t() @ (2 * dense * kept) / (dense.square() * kept).sum()
    assert_near(weight.grad, 3 * (1 - beta) * single, 1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("name", ["partly shared", "channels_last", "sparse embedding", "sparse heads", "complex"])
def test_gradients_are_added_to_those_that_are_there(name, beta):
    model, fresh = cases.build(name), cases.build(name)
    torch.manual_seed(9)
    before = {}
    for key, parameter in model.named_parameters():
        before[key] = torch.randn_like(parameter)
        parameter.grad = before[key].clone(memory_format=torch.preserve_format)
    for each in (model, fresh):
        optimizer_of(each, beta=beta).backward(each.losses(0))
    for (key, parameter), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert_near(parameter.grad, before[key] + other.grad)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_sparse_gradient_that_is_there_is_added_to(beta):
    model, fresh = cases.build("sparse embedding"), cases.build("sparse embedding")
    table = model.trunk[0].weight
    nn.functional.embedding(torch.tensor([1, 1, 4]), table, sparse=True).sum().backward()
    assert table.grad.is_sparse
    old = table.grad.to_dense()
    for each in (model, fresh):
        optimizer_of(each, beta=beta).backward(each.losses(0))
    assert_near(table.grad, old + fresh.trunk[0].weight.grad)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_zero_grad_either_way(set_to_none, beta):
    models = [cases.build("mlp") for _ in range(2)]
    for model, to_none in zip(models, (True, set_to_none), strict=True):
        optimizer = optimizer_of(model, beta=beta)
        for step in range(5):
            optimizer.zero_grad(set_to_none=to_none)
            optimizer.step(model.losses(step))
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_two_batches_without_zero_grad_accumulate(beta):
    """As with two `.backward()`: the sum of what each batch brings."""
    model, apart = cases.build("mlp"), cases.build("mlp")
    optimizer, other = optimizer_of(model, beta=beta), optimizer_of(apart, beta=beta)
    total = [torch.zeros_like(p) for p in apart.parameters()]
    for step in range(3):
        optimizer.backward(model.losses(step))
        other.zero_grad()
        other.backward(apart.losses(step))
        total = [old + p.grad for old, p in zip(total, apart.parameters(), strict=True)]
    for parameter, expected in zip(model.parameters(), total, strict=True):
        assert_near(parameter.grad, expected)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_parameters_outside_the_base_optimizer_accumulate_like_backward(beta):
    model = cases.build("mlp")
    outside = [*model.heads[1].parameters(), model.trunk[0].bias]
    inside = [p for p in model.parameters() if not any(p is other for other in outside)]
    shared = [p for p in model.trunk.parameters() if p is not model.trunk[0].bias]
    optimizer = DualBalancedOptimizer(SGD(inside, lr=0.01), shared, beta=beta)
    expected = [torch.zeros_like(p) for p in outside]
    start = [p.clone() for p in outside]
    for step in range(2):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        sum(torch.log(loss + 1e-8) for loss in twin.losses(step).values()).backward()
        found = [*twin.heads[1].parameters(), twin.trunk[0].bias]
        expected = [old + p.grad for old, p in zip(expected, found, strict=True)]
        optimizer.zero_grad()
        optimizer.step(model.losses(step))
        for parameter, total, value in zip(outside, expected, start, strict=True):
            assert_near(parameter.grad, total)
            assert torch.equal(parameter, value)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_parameter_that_only_some_tasks_reach(beta):
    """No `.grad` before a task reached it, zeros in a batch without that task."""
    model = cases.build("partly shared")
    optimizer = optimizer_of(model, beta=beta)
    side = list(model.trunk.side.parameters())
    optimizer.step(model.losses(0, absent=("t1",)))
    assert [p.grad for p in side] == [None, None]
    optimizer.zero_grad()
    optimizer.step(model.losses(1))
    assert all(p.grad.norm() > 0 for p in side)
    optimizer.zero_grad()
    optimizer.step(model.losses(2, absent=("t1",)))
    assert all(p.grad.count_nonzero() == 0 for p in side)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_parameter_that_no_task_reaches_is_named_once(beta):
    model = cases.build(cases.unused)
    optimizer = optimizer_of(model, beta=beta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(model.losses(0, absent=("t2",)))
    with pytest.warns(UserWarning, match=r"no task reaches 1 of the shared parameters .* shape \(3, 2\)"):
        optimizer.step(model.losses(1))
    optimizer.step(model.losses(2))
    assert model.trunk.spare.grad is None
    assert model.trunk.spare.eq(1).all()


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("position", [0, 1])
def test_a_task_that_reaches_no_shared_parameter_is_an_error(position, beta):
    model = cases.build("mlp")
    optimizer = optimizer_of(model, beta=beta)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = list(model.losses(0).items())
    losses.insert(position, ("alone", model.heads[0](torch.ones(2, 6, dtype=torch.float64)).square().mean()))
    with pytest.raises(ValueError, match="task 'alone' reaches no shared parameter"):
        optimizer.step(dict(losses))
    for (key, old), new in zip(before[0].items(), model.state_dict().values(), strict=True):
        assert torch.equal(old, new), key
    assert optimizer.state_dict()["param_groups"] == before[1]["param_groups"]
    assert all(parameter.grad.eq(1).all() for parameter in model.parameters())
    optimizer.zero_grad()
    optimizer.step(model.losses(0))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_frozen_trunk_trains_its_heads(beta):
    model = cases.build("mlp").requires_grad_(False)
    model.heads.requires_grad_(True)
    optimizer = optimizer_of(model, beta=beta)
    losses = model.losses(0)
    expected = torch.autograd.grad(
        sum(torch.log(loss + 1e-8) for loss in losses.values()), list(model.heads.parameters()), retain_graph=True
    )
    optimizer.step(losses)
    for parameter, gradient in zip(model.heads.parameters(), expected, strict=True):
        assert_near(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in model.trunk.parameters())


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_trunk_thawed_later_joins_in(beta):
    model = cases.build("frozen")
    optimizer = optimizer_of(model, beta=beta)
    optimizer.step(model.losses(0))
    assert model.trunk[0].weight.grad is None
    model.trunk[0].weight.requires_grad_(True)
    optimizer.zero_grad()
    optimizer.backward(model.losses(1))
    assert model.trunk[0].weight.grad.norm() > 0


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("shared", ["module", "list", "reversed", "iterator"])
def test_shared_parameters_in_any_form_and_order(shared, beta):
    model, slow = cases.build("partly shared"), cases.build("partly shared")
    parameters = list(model.trunk.parameters())
    given = {"module": model.trunk, "list": parameters, "reversed": parameters[::-1], "iterator": iter(parameters)}
    groups = [{"params": model.heads.parameters(), "lr": 0.5}, {"params": parameters}]
    slow_groups = [{"params": slow.heads.parameters(), "lr": 0.5}, {"params": list(slow.trunk.parameters())}]
    optimizer = DualBalancedOptimizer(SGD(groups, lr=0.01), given[shared], beta=beta)
    oracle = Oracle(SGD(slow_groups, lr=0.01), slow.trunk.parameters(), rule={"beta": beta})
    for step in range(3):
        optimizer.zero_grad()
        oracle.base.zero_grad()
        optimizer.step(model.losses(step))
        oracle.step(slow.losses(step))
    for mine, theirs in zip(model.parameters(), slow.parameters(), strict=True):
        assert_near(mine, theirs)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_large_parameters_agree_with_the_oracle(beta):
    """Parameters above 2**17 elements beside small ones take paths of their own."""

    def build():
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 50_000), nn.Tanh(), nn.Linear(50_000, 3), nn.Linear(3, 6))
        return cases.MultiTask(trunk, cases.three_heads(), cases.rows(4, 3)).double()

    model, slow = build(), build()
    optimizer = optimizer_of(model, beta=beta)
    oracle = Oracle(slow.optimizer(SGD, lr=0.01), slow.trunk.parameters(), rule={"beta": beta})
    for step in range(4):
        optimizer.zero_grad()
        oracle.base.zero_grad()
        absent = ("t2",) if step == 2 else ()
        optimizer.step(model.losses(step, absent))
        oracle.step(slow.losses(step, absent))
    for mine, theirs in zip(model.parameters(), slow.parameters(), strict=True):
        assert_near(mine.grad, theirs.grad)
        assert_near(mine, theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tail", [0, 5])
def test_shared_parameters_that_are_all_large(tail, method):
    settings = METHODS[method]
    torch.manual_seed(0)
    start, x = torch.randn(2**17 + tail, dtype=torch.float64), torch.randn(2**17 + tail, dtype=torch.float64)
    parameters = [nn.Parameter(start.clone()) for _ in range(2)]
    bases = [SGD([parameter], lr=1e-3) for parameter in parameters]
    optimizer = DualBalancedOptimizer(bases[0], parameters[:1], **settings)
    oracle = Oracle(bases[1], parameters[1:], rule=settings)
    for each, parameter in zip((optimizer, oracle), parameters, strict=True):
        for _ in range(3):
            losses = {"a": (parameter - x).square().mean(), "b": 100 * parameter.square().mean()}
            each.backward(losses)
    assert_near(parameters[0].grad, parameters[1].grad)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", [True, False])
def test_models_on_a_device_or_over_two(split, method):
    settings = METHODS[method]
    lr = 0.01 if settings.get("log_transform", True) else 1e-6
    model, slow = cases.build("mlp"), cases.build("mlp")
    (model.trunk[0] if split else model).cuda()
    optimizer = optimizer_of(model, lr, **settings)
    oracle = Oracle(slow.optimizer(SGD, lr=lr), slow.trunk.parameters(), rule=settings)
    last = model.heads[0].weight.device
    for step in range(4):
        torch.manual_seed(step)
        x = model.data()
        optimizer.zero_grad()
        oracle.base.zero_grad()
        features = model.trunk[1:](model.trunk[0](x.cuda()).to(last))
        losses = {
            f"t{i}": 10.0 ** (3 * i - 3) * ((head(features) - 0.5).square().mean() + 0.1)
            for i, head in enumerate(model.heads)
        }
        optimizer.step(losses)
        oracle.step(slow.losses(step))
    for mine, theirs in zip(model.parameters(), slow.parameters(), strict=True):
        assert_near(mine.cpu(), theirs)
        assert mine.grad.device == mine.device


@pytest.mark.parametrize("width", [5, 400])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_parameter_used_in_two_checkpointed_segments_is_averaged_once(width, reentrant):
    """A reentrant checkpoint hands a parameter's gradient over in two parts; both belong to one average."""
    torch.manual_seed(0)
    trunk = torch.nn.Linear(width, width).double()
    start = [parameter.detach().clone() for parameter in trunk.parameters()]
    x = torch.randn(4, width, dtype=torch.float64, requires_grad=True)

    def losses(checkpointed):
        def layer(inputs):
            if checkpointed:
                return torch.utils.checkpoint.checkpoint(trunk, inputs, use_reentrant=reentrant).tanh()
            return trunk(inputs).tanh()

        features = layer(layer(x))
        return [features.square().mean(), (features - 1).abs().mean()]

    ends = []
    for checkpointed in (False, True):
        with torch.no_grad():
            for parameter, value in zip(trunk.parameters(), start, strict=True):
                parameter.copy_(value)
        optimizer = DualBalancedOptimizer(torch.optim.SGD(trunk.parameters(), lr=0.1), trunk)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(losses(checkpointed))
        ends.append([parameter.detach().clone() for parameter in trunk.parameters()])
    for plain, checkpointed in zip(*ends, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-14)
