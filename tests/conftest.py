"""What several test files share: a small network, its losses, the base optimizers, and exact comparison."""

import copy
import dataclasses
import json

import pytest
import torch
from networks import Net
from processes import processes  # noqa: F401

from balanced_optim import DualBalancedOptimizer

# The tensors here are tiny: threads would only wait for each other.
torch.set_num_threads(1)

BASES = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    BASES["muon"] = lambda parameters: torch.optim.Muon(parameters, lr=0.05)

every_base = pytest.mark.parametrize("base", BASES)


def header_of(state):
    """The method's numbers (tasks, counts, schedule) in a state dict, or in that of an optimizer."""
    state = state.state_dict() if isinstance(state, torch.optim.Optimizer) else state
    return json.loads(state["param_groups"][0]["balanced_optim"])


def build_plain(base="adam", **net_options):
    """A network and an unwrapped optimizer of all its parameters."""
    net = Net(bias=base != "muon", **net_options)
    return net, BASES[base](net.parameters())


def build(base="adam", *, tasks=2, side=False, seed=0, **options):
    """A network and a balanced optimizer of all its parameters."""
    net, plain = build_plain(base, tasks=tasks, side=side, seed=seed)
    return net, DualBalancedOptimizer(plain, net.trunk, **options)


def train(net, optimizer, steps, start=0, form=lambda losses, seed: losses):
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        optimizer.step(form(net.losses(seed), seed))


def named(losses, seed=0):
    """The losses as a mapping a, b, ..."""
    return dict(zip("abcdefgh", losses, strict=False))


def snapshot(net, optimizer):
    """Copies of everything a step may change."""
    balance = getattr(optimizer, "last_balance", None)
    return copy.deepcopy(
        {
            "parameters": dict(net.state_dict()),
            "gradients": [parameter.grad for parameter in net.parameters()],
            "state": optimizer.state_dict(),
            "balance": balance and {f.name: getattr(balance, f.name) for f in dataclasses.fields(balance)},
        }
    )


def assert_same(actual, expected, where="value"):
    """Equal bit for bit: nested containers, tensors (NaN equals NaN) and plain values."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert actual == expected, where


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where networks, data and the oracle are, such as cuda")


def pytest_collection_modifyitems(items):
    """Benchmarks choose their device themselves."""
    for item in items:
        names = [
            str(getattr(value, "__module__", "")) for value in vars(getattr(item, "module", None) or item).values()
        ]
        if any(name.startswith("benchmarks") for name in names):
            item.add_marker(pytest.mark.cpu)


@pytest.fixture
def device(request):
    """The device's name; that of a CPU for tests that are marked as being about CPUs."""
    return "cpu" if request.node.get_closest_marker("cpu") else request.config.getoption("--device")


@pytest.fixture(autouse=True)
def default_device(device):
    """Networks and data are made there."""
    if device == "cpu":
        yield
        return
    before = torch.get_default_device()
    torch.set_default_device(device)
    yield
    torch.set_default_device(before)


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
