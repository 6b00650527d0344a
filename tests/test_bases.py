"""A balanced step is that of the bare base on the same gradients, bit for bit, also after a resume."""

import copy

import pytest
import torch
from conftest import assert_same
from networks import Net

from balanced_optim import DualBalancedOptimizer

# fmt: off
PLAIN = [
    "ADOPT", "AdEMAMix", "AdaBelief", "AdaBound", "AdaHessian", "AdaMod", "AdaNorm", "AdaPNM", "Adalite", "AdamP",
    "AdamS", "Adan", "AggMo", "Amos", "CAME", "DAdaptAdam", "DiffGrad", "FTRL", "Fromage", "Gravity", "Grams",
    "Kate", "Lamb", "LARS", "Lion", "MADGRAD", "MARS", "MSVAG", "NovoGrad", "PID", "PNM", "Prodigy", "QHAdam",
    "Ranger", "SGDP", "SGDW", "SM3", "SOAP", "SRMM", "ScheduleFreeAdamW", "SignSGD", "SophiaH", "StableAdamW",
    "Tiger", "Yogi",
]
# fmt: on
# Class names by module, with options beside the learning rate. Packages that are not installed are skipped.
BASES = {
    "torch.optim": [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("SGD", {"momentum": 0.9, "foreach": True}),
        ("SGD", {"fused": True}),
        ("ASGD", {}),
        ("Adadelta", {}),
        ("Adafactor", {}),
        ("Adagrad", {}),
        ("Adagrad", {"fused": True}),
        ("Adam", {}),
        ("Adam", {"amsgrad": True, "maximize": True}),
        ("Adam", {"fused": True}),
        ("AdamW", {"foreach": True}),
        ("Adamax", {}),
        ("Muon", {}),
        ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
        ("RAdam", {}),
        ("RMSprop", {"centered": True, "momentum": 0.9}),
        ("Rprop", {}),
    ],
    "schedulefree": [("SGDScheduleFree", {}), ("AdamWScheduleFree", {"warmup_steps": 2}), ("RAdamScheduleFree", {})],
    "lion_pytorch": [("Lion", {"weight_decay": 0.1})],
    "pytorch_optimizer": [(name, {}) for name in PLAIN],
}
# They differentiate gradients again.
REFUSED = {"AdaHessian", "SophiaH"}


def base_of(module, name, options, parameters):
    package = pytest.importorskip(module)
    if not hasattr(package, name):
        pytest.skip(f"{module} has no {name} in this version")
    return getattr(package, name)(parameters, lr=0.01, **options)


def build(module, name, options):
    # Muon takes matrices only, and some bases treat vectors apart.
    net = Net(sizes=(4, 6, 6), bias=name != "Muon")
    return net, base_of(module, name, options, net.parameters())


def start(base):
    if callable(getattr(base, "train", None)):
        base.train()


def follow(balanced, bare, seeds):
    """Train both, the second by the gradients of the first."""
    (net, optimizer), (other, base) = balanced, bare
    start(optimizer)
    start(base)
    for seed in seeds:
        optimizer.zero_grad()
        optimizer.backward(net.losses(seed))
        for parameter, twin in zip(net.parameters(), other.parameters(), strict=True):
            twin.grad = parameter.grad.clone()
        # Some bases draw numbers.
        torch.manual_seed(seed)
        optimizer.step()
        torch.manual_seed(seed)
        base.step()
        assert_same(dict(net.state_dict()), dict(other.state_dict()), f"after step {seed}")


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        pytest.param(module, name, options, id="-".join([module, name, *options]))
        for module, bases in BASES.items()
        for name, options in bases
        if name not in REFUSED
    ],
)
def test_a_balanced_step_is_that_of_the_bare_base_on_the_same_gradients(module, name, options):
    def balanced():
        net, base = build(module, name, options)
        return net, DualBalancedOptimizer(base, net.trunk)

    here, bare = balanced(), build(module, name, options)
    follow(here, bare, range(4))
    saved = copy.deepcopy([part.state_dict() for part in (*here, *bare)])
    resumed = *balanced(), *build(module, name, options)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    follow(resumed[:2], resumed[2:], range(4, 7))
    follow(here, bare, range(4, 7))
    assert_same(dict(resumed[0].state_dict()), dict(here[0].state_dict()), "after a resume")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_base_that_differentiates_gradients_again_is_refused(name):
    net, base = build("pytorch_optimizer", name, {})
    with pytest.raises((TypeError, RuntimeError, ValueError), match="first-order"):
        DualBalancedOptimizer(base, net.trunk).step(net.losses())
