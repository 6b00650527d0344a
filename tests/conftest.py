"""What several test files share: a small network, its losses, the base optimizers, and exact comparison."""

import copy
import dataclasses
import json

import pytest
import torch
from processes import processes  # noqa: F401
from torch import nn

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


class Net(nn.Module):
    """A trunk and one linear head a task; `extra` belongs to the trunk and is used by the last task only."""

    def __init__(self, tasks=2, bias=True, extra=False, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh())
            self.heads = nn.ModuleList(nn.Linear(6, 1, bias=bias) for _ in range(tasks))
            if extra:
                self.trunk.register_parameter("extra", nn.Parameter(torch.randn(6)))

    def forward(self, x):
        features = self.trunk[1](self.trunk[0](x))
        last = features * self.trunk.extra if hasattr(self.trunk, "extra") else features
        inputs = [features] * (len(self.heads) - 1) + [last]
        return [head(given) for head, given in zip(self.heads, inputs, strict=True)]

    def losses(self, seed=0):
        """Task losses on the batch number `seed`, each on a scale of its own."""
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        return [10.0**task * (output - 1).square().mean() for task, output in enumerate(self(x))]


def header_of(state):
    """The method's numbers (tasks, counts, schedule) in a state dict, or in that of an optimizer."""
    state = state.state_dict() if isinstance(state, torch.optim.Optimizer) else state
    return json.loads(state["param_groups"][0]["balanced_optim"])


def build_plain(base="adam", **net_options):
    """A network and an unwrapped optimizer of all its parameters."""
    net = Net(bias=base != "muon", **net_options)
    return net, BASES[base](net.parameters())


def build(base="adam", *, tasks=2, extra=False, seed=0, **options):
    """A network and a balanced optimizer of all its parameters."""
    net, plain = build_plain(base, tasks=tasks, extra=extra, seed=seed)
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


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
