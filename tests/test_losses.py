"""What `step` takes as losses, and what `last_balance` says about them."""

import dataclasses
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Mapping
from types import MappingProxyType

import pytest
import torch
from conftest import assert_same, build, header_of, named, snapshot, train
from devices import generator
from networks import Net

from balanced_optim import Balance, DualBalancedOptimizer


class Losses(Mapping):
    """A mapping of a user's own, without anything of dict."""

    def __init__(self, losses):
        self._losses = losses

    def __getitem__(self, name):
        return self._losses[name]

    def __iter__(self):
        return iter(self._losses)

    def __len__(self):
        return len(self._losses)


FORMS = {
    "tuple": tuple,
    "tensor": torch.stack,
    "deque": deque,
    "user-list": UserList,
    "dict": named,
    "ordered": lambda losses: OrderedDict(named(losses)),
    "proxy": lambda losses: MappingProxyType(named(losses)),
    "user-dict": lambda losses: UserDict(named(losses)),
    "mapping": lambda losses: Losses(named(losses)),
    "shape-1": lambda losses: [loss.reshape(1) for loss in losses],
    "shape-1-1": lambda losses: [loss.reshape(1, 1) for loss in losses],
    "shape-1-by-name": lambda losses: {name: loss.reshape(1) for name, loss in named(losses).items()},
}


def comparable(net, optimizer):
    """A snapshot without the names of the tasks."""
    seen = snapshot(net, optimizer)
    seen["header"] = header_of(seen["state"])
    del seen["header"]["tasks"], seen["header"]["named"], seen["balance"]["tasks"]
    del seen["state"]["param_groups"][0]["balanced_optim"]
    return seen


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"max_weight": 1.5}], ids=["default", "beta-0", "cap"])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_step(form, options):
    (net, optimizer), (twin, other) = build(tasks=3, **options), build(tasks=3, **options)
    train(net, optimizer, 3, form=lambda losses, seed: FORMS[form](losses))
    train(twin, other, 3)
    assert_same(comparable(net, optimizer), comparable(twin, other))
    by_name = isinstance(FORMS[form](net.losses()), Mapping)
    assert optimizer.last_balance.tasks == (("a", "b", "c") if by_name else ("0", "1", "2"))


def test_a_tensor_straight_from_the_network():
    """Losses that never were single tensors: one row of a batch reduced per task."""
    (net, optimizer), (twin, other) = build(), build()
    x = torch.randn(8, 4, generator=generator(0))
    optimizer.step(torch.cat(net(x), dim=1).square().mean(dim=0))
    other.step(list(torch.cat(twin(x), dim=1).square().mean(dim=0)))
    assert_same(comparable(net, optimizer), comparable(twin, other))


@pytest.mark.parametrize("use", ["backward", "closure"])
@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_forms_in_backward_and_closure(form, use):
    (net, optimizer), (twin, other) = build(), build()
    if use == "backward":
        optimizer.backward(FORMS[form](net.losses()))
        optimizer.step()
    else:
        optimizer.step(lambda: FORMS[form](net.losses()))
    other.step(twin.losses())
    assert_same(comparable(net, optimizer), comparable(twin, other))


# ------------------------------------------------- absent tasks


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_none_and_a_missing_key_are_the_same(gone, beta):
    runs = []
    for form in ("list", "none", "missing"):
        net, optimizer = build(tasks=3, beta=beta)
        for seed in range(4):
            losses = net.losses(seed)
            if seed % 2:
                losses[gone] = None
            given = {name: loss for name, loss in named(losses).items() if form == "none" or loss is not None}
            optimizer.zero_grad()
            optimizer.step(losses if form == "list" else given)
        runs.append(comparable(net, optimizer))
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])
    assert runs[0]["header"]["counts"] == [2 if t == gone else 4 for t in range(3)]


def test_an_absent_task_keeps_its_average_and_contributes_nothing():
    net, optimizer = build(tasks=3)
    train(net, optimizer, 2)
    before = snapshot(net, optimizer)["state"]["state"]
    optimizer.zero_grad()
    first, _, last = net.losses(2)
    optimizer.step([first, None, last])
    after = snapshot(net, optimizer)["state"]["state"]
    for position in (0, 1):
        old, new = before[position], after[position]
        assert_same(new["task_ema_1"], old["task_ema_1"])
        assert not torch.equal(new["task_ema_0"], old["task_ema_0"])
    balance = optimizer.last_balance
    assert balance.losses.isnan().tolist() == balance.norms.isnan().tolist() == [False, True, False]
    assert balance.weights[1] == 0
    assert balance.weights[[0, 2]].min() > 0
    assert net.heads[1].weight.grad is None


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_batch_without_any_task_changes_nothing_but_the_record(steps, beta):
    net, optimizer = build("sgd", beta=beta)
    train(net, optimizer, steps)
    optimizer.zero_grad()
    before = snapshot(net, optimizer)
    optimizer.step([None, None])
    after = snapshot(net, optimizer)
    assert_same(after["parameters"], before["parameters"])
    assert_same(after["gradients"], before["gradients"])
    for position, entry in before["state"]["state"].items():
        now = after["state"]["state"][position]
        assert_same({name: now[name] for name in entry}, entry)
        # Where the tasks were not known before, there are averages of zeros now.
        assert all(not now[name].any() for name in now.keys() - entry.keys())
    assert optimizer.last_balance.losses.isnan().all()
    assert optimizer.last_balance.weights.tolist() == [0, 0]
    train(net, optimizer, 1)


# ------------------------------------------------- names and their order


def test_names_are_fixed_on_first_sight_and_their_order_too():
    (net, optimizer), (twin, other) = build(tasks=3), build(tasks=3)
    for seed in range(4):
        first, second, third = net.losses(seed)
        given = {"x": first, "y": second, "z": third}
        order = ["xyz", "zyx", "yzx", "zxy"][seed]
        optimizer.zero_grad()
        optimizer.step({name: given[name] for name in order})
        assert optimizer.last_balance.tasks == ("x", "y", "z")
    train(twin, other, 4)
    assert_same(comparable(net, optimizer), comparable(twin, other))


def test_names_given_by_weights_fix_the_order():
    net, optimizer = build(task_weights={"b": 1.0, "a": 2.0})
    losses = net.losses()
    optimizer.step({"a": losses[0], "b": losses[1]})
    assert optimizer.last_balance.tasks == ("b", "a")
    assert_same(optimizer.last_balance.losses, torch.stack([losses[1], losses[0]]).detach())


def test_the_first_batch_may_name_a_task_that_it_lacks():
    net, optimizer = build()
    first, second = net.losses()
    optimizer.step({"a": None, "b": second})
    optimizer.zero_grad()
    optimizer.step({"a": net.losses(1)[0]})
    assert optimizer.last_balance.tasks == ("a", "b")
    assert optimizer.last_balance.weights.tolist() == [1, 0]


def test_one_tensor_for_two_tasks():
    (net, optimizer), (twin, other) = build(beta=0.0, tasks=1), build(beta=0.0, tasks=1)
    loss = net.losses()[0]
    optimizer.backward([loss, loss])
    other.backward(twin.losses())
    assert optimizer.last_balance.weights.tolist() == [1, 1]
    for parameter, once in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once.grad, rtol=0, atol=0)


# ------------------------------------------------- dtypes


@pytest.mark.parametrize("log_transform", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_losses_of_several_dtypes(beta, log_transform):
    """A loss keeps its dtype in its own pass; the record has the widest."""
    net, optimizer = build(tasks=3, beta=beta, beta_decay=0.0, log_transform=log_transform)
    first, second, third = net.losses()
    shared = list(net.trunk.parameters())
    losses = [first, second.double() * 1.5, third.bfloat16()]
    norms = []
    for loss in losses:
        target = loss.double().log() if log_transform else loss.double()
        gradients = torch.autograd.grad(target, shared, retain_graph=True)
        norms.append((1 - beta) * torch.cat([g.flatten() for g in gradients]).norm())
    optimizer.step(losses)
    balance = optimizer.last_balance
    assert balance.losses.dtype == torch.float64
    assert_same(balance.losses, torch.stack([loss.detach().double() for loss in losses]))
    assert torch.isfinite(balance.weights).all()
    torch.testing.assert_close(balance.norms[:2].float(), torch.stack(norms[:2]), rtol=1e-5, atol=0)
    torch.testing.assert_close(balance.norms[2].float(), norms[2], rtol=1e-2, atol=0)
    assert {parameter.grad.dtype for parameter in net.parameters()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "kept"), [("float64", "float64"), ("bfloat16", "float32")])
def test_the_record_has_the_dtype_of_the_sums(dtype, kept):
    dtype, kept = getattr(torch, dtype), getattr(torch, kept)
    net = Net().to(dtype)
    optimizer = DualBalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.trunk)
    x = torch.randn(8, 4, generator=generator(0)).to(dtype)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step([output.square().mean() for output in net(x)])
    balance = optimizer.last_balance
    assert [balance.losses.dtype, balance.norms.dtype, balance.weights.dtype] == [kept] * 3
    assert {parameter.grad.dtype for parameter in net.parameters()} == {dtype}


# ------------------------------------------------- last_balance


def test_last_balance():
    net, optimizer = build(tasks=3, beta=0.0)
    assert optimizer.last_balance is None
    losses = net.losses()
    shared = list(net.trunk.parameters())
    expected = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss.log(), shared, retain_graph=True)]).norm()
            for loss in losses
        ]
    )
    optimizer.step(named(losses))
    balance = optimizer.last_balance
    assert isinstance(balance, Balance)
    assert balance.tasks == ("a", "b", "c")
    assert balance.skipped is False
    assert_same(balance.losses, torch.stack(losses).detach())
    torch.testing.assert_close(balance.norms, expected)
    torch.testing.assert_close(balance.weights, expected.max() / expected)
    for values in (balance.losses, balance.norms, balance.weights):
        assert (values.shape, values.requires_grad, values.grad_fn) == ((3,), False, None)
        assert values.device == shared[0].device
    with pytest.raises(dataclasses.FrozenInstanceError):
        balance.skipped = True
    kept = [values.clone() for values in (balance.losses, balance.norms, balance.weights)]
    train(net, optimizer, 2, start=1, form=named)
    assert optimizer.last_balance is not balance
    assert_same([balance.losses, balance.norms, balance.weights], kept)


def test_a_plain_step_leaves_the_record():
    net, optimizer = build()
    optimizer.step(net.losses())
    balance = optimizer.last_balance
    optimizer.step()
    assert optimizer.last_balance is balance


@pytest.mark.filterwarnings("ignore:the loss of task '1' is .* below -eps")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0], ids=["nan", "inf", "negative"])
def test_a_skipped_batch_is_recorded(bad):
    net, optimizer = build(nonfinite="skip")
    train(net, optimizer, 1)
    before = snapshot(net, optimizer)
    first, second = net.losses(1)
    optimizer.step([first, second * bad])
    after = snapshot(net, optimizer)
    balance = after.pop("balance")
    before.pop("balance")
    assert_same(after, before)
    assert balance["skipped"] is True
    assert_same(balance["losses"], torch.stack([first, second * bad]).detach())
    assert balance["norms"].isnan().all()
    assert balance["weights"].tolist() == [0, 0]
    train(net, optimizer, 1, start=2)
    assert optimizer.last_balance.skipped is False


def test_the_callers_losses_stay_as_they_are():
    net, optimizer = build()
    losses = net.losses()
    given = named(losses)
    values = [loss.item() for loss in losses]
    optimizer.step(given)
    assert list(given) == ["a", "b"]
    assert all(given[name] is loss for name, loss in zip("ab", losses, strict=True))
    assert [loss.item() for loss in losses] == values
