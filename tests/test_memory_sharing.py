"""Gradients that share memory with each other, a cotangent or what a hook keeps are not overwritten for them."""

import copy
import pickle

import pytest
import torch
from conftest import assert_same
from devices import grad_scaler
from networks import Embeddings
from torch import nn

from balanced_optim import DualBalancedOptimizer

SIZES = {"small": (3, 4), "medium": (160, 128), "large": (1100, 128)}
FORMS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "one backward": {"norm_params": True},
    "refreshed": {"norm_params": True, "refresh_every": 2},
}


def end(form, size, shared, views, way):
    """Parameters, gradients and state after three steps."""
    net, options = Embeddings(SIZES[size], shared, views), dict(FORMS[form])
    if "norm_params" in options:
        options["norm_params"] = [net.last]
    optimizer = DualBalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), net.trunk, **options)
    scaler = grad_scaler(256.0) if way == "scaler" else None
    for step in range(3):
        optimizer.zero_grad()
        if way == "micro-batches":
            optimizer.accumulate(net.losses(step + 1.0))
            optimizer.accumulate(net.losses(step + 2.0))
        optimizer.backward(net.losses(step + 1.5), scaler)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
    state = optimizer.state_dict()["state"]
    return [*net.parameters(), *[p.grad for p in net.parameters()], *[v for e in state.values() for v in e.values()]]


@pytest.mark.parametrize("way", ["plain", "scaler", "micro-batches"])
@pytest.mark.parametrize("shared", [False, True], ids=["heads", "shared"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_parameters_whose_gradients_are_one_tensor(form, size, shared, way):
    for actual, expected in zip(*(end(form, size, shared, views, way) for views in (True, False)), strict=True):
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_what_a_hook_keeps_is_not_the_average(size):
    net, kept = Embeddings(SIZES[size], True, False), []
    view = net.position.view(-1)
    view.register_hook(kept.append)
    optimizer = DualBalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), net.trunk[:2])
    features = (view.view(SIZES[size]) @ net.last).sin()
    optimizer.step([features.mean().exp(), features.square().mean()])
    before = optimizer.state_dict()["state"][0]
    copies = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    for gradient in kept:
        gradient.zero_()
    assert_same({name: before[name] for name in copies}, copies)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_shared_parameter_that_is_frozen_in_mid_training_stays_where_it_is(base, form):
    net, options = Embeddings(SIZES["small"], True, False), dict(FORMS[form])
    if "norm_params" in options:
        options["norm_params"] = [net.last]
    optimizer = DualBalancedOptimizer(base(net.parameters(), lr=0.05), net.trunk, **options)
    for step in range(5):
        if step == 2:
            net.position.requires_grad_(False)
            frozen = net.position.clone()
        optimizer.zero_grad()
        optimizer.step(net.losses(step + 1.0))
    assert_same(net.position.data, frozen)


# ------------------------------------------------- memory that comes back


HOLDERS = {
    "nothing": lambda p: None,
    "the gradient": lambda p: p.grad,
    "a view": lambda p: p.grad.view(-1)[1:],
    "a detached alias": lambda p: p.grad.detach(),
    "an array": lambda p: p.grad.numpy() if p.is_cpu else None,
    "its storage": lambda p: p.grad.untyped_storage(),
}


COPIES = {
    "original": lambda pair: pair,
    "copy": copy.deepcopy,
    "pickled": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("form", [{}, {"beta": 0.0}, {"max_weight": 2.0, "beta": 0.0}], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_combined_gradient_that_someone_keeps_is_not_written_to(size, form, holder, way):
    net = Embeddings(SIZES[size], True, False)
    optimizer = DualBalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), net.trunk, **form)
    optimizer.step(net.losses(0.5))
    net, optimizer = COPIES[way]((net, optimizer))
    kept = []
    for step in range(4):
        optimizer.zero_grad()
        optimizer.step(net.losses(step + 1.0))
        kept += [(held, contents(held).clone()) for p in net.trunk if (held := HOLDERS[holder](p)) is not None]
        assert all(torch.equal(contents(held), copied) for held, copied in kept)


def contents(held):
    if isinstance(held, torch.UntypedStorage):
        return torch.empty(0, dtype=torch.float64).set_(held)
    return torch.as_tensor(held)


@pytest.mark.parametrize("form", [{}, {"beta": 0.0}], ids=str)
def test_a_combined_gradient_whose_memory_was_given_back(form):
    net = Embeddings(SIZES["large"], True, False)
    optimizer = DualBalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.05), net.trunk, **form)
    for step in range(4):
        optimizer.zero_grad()
        optimizer.step(net.losses(step + 1.0))
        assert all(p.grad.isfinite().all() for p in net.trunk)
        net.position.grad.untyped_storage().resize_(0)


@pytest.mark.parametrize("form", [{}, {"beta": 0.0}], ids=str)
def test_gradients_that_stay_are_added_to(form):
    """Without zero_grad `.grad` holds the old gradient and the new one, as after two `.backward()`."""
    grads = []
    for clear in (True, False):
        net = Embeddings(SIZES["large"], True, False)
        optimizer = DualBalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), net.trunk, **form)
        total = 0.0
        for step in range(3):
            if clear:
                optimizer.zero_grad()
            optimizer.backward(net.losses(step + 1.0))
            total = total + net.position.grad if clear else net.position.grad
        grads.append(total)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("way", ["scaler", "micro-batches"])
@pytest.mark.parametrize("form", ["single passes", "group"])
def test_one_gradient_of_two_terms_is_not_changed_twice(form, way, request):
    """`autograd.grad` gives the terms of a sum one tensor: unscaling it for both would divide twice."""
    ends = []
    for plain in (False, True):
        torch.manual_seed(0)
        trunk = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        terms = [nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2)]
        options = {"process_group": request.getfixturevalue("group")} if form == "group" and not plain else {}
        base = torch.optim.SGD([trunk, *terms], lr=0.1)
        optimizer = DualBalancedOptimizer(base, [trunk], **options)
        scaler = grad_scaler(256.0) if way == "scaler" and not plain else None
        features = torch.tanh(torch.randn(5, 3, dtype=torch.float64) @ trunk)
        losses = [(features @ (terms[0] + terms[1]) - 1).square().mean(), features.square().mean()]
        again = torch.tanh(torch.randn(5, 3, dtype=torch.float64) @ trunk)
        if way == "micro-batches":
            optimizer.accumulate([(again @ (terms[0] + terms[1]) - 1).square().mean(), again.square().mean()])
        optimizer.backward(losses, scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        ends.append([p.grad for p in (trunk, *terms)])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs)
