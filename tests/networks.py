"""The networks of the tests: a trunk of layers, a head a task, and losses on scales of their own."""

import math

import torch
from devices import generator
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def unchanged(place, task, values):
    return values


class Net(nn.Module):
    """Linear layers, a tanh after each, and one linear head a task; `trunk.side` is used by the last task only.

    Args:
        tasks: how many.
        sizes: the input's size, and that of the features after each layer.
        bias: whether layers have one.
        side: whether there is a `trunk.side`, by which the last task's features are multiplied.
        seed: of the parameters.
        lowest: the power of ten that is the first task's scale.
    """

    def __init__(self, tasks=2, sizes=(4, 6), *, bias=True, side=False, seed=0, lowest=0, dtype=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(*self.layers(sizes, bias))
            self.heads = nn.ModuleList(nn.Linear(sizes[-1], 1, bias=bias) for _ in range(tasks))
            if side:
                self.trunk.register_parameter("side", nn.Parameter(torch.randn(sizes[-1])))
        self.size, self.lowest = sizes[0], lowest
        self.to(dtype)

    def layers(self, sizes, bias):
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            yield nn.Linear(before, after, bias=bias)
            yield nn.Tanh()

    def forward(self, x, at=unchanged):
        """Outputs by task. `at(place, task, tensor)` may replace "below", "trunk" (features) and "head" (its weight).

        "below" is what the last layer gets: with one layer its bias, since data need no gradient.
        """
        outputs = []
        plain = self.trunk(x) if at is unchanged else None
        for task, head in enumerate(self.heads):
            features = self.features(x, at, task) if plain is None else plain
            if task == len(self.heads) - 1 and hasattr(self.trunk, "side"):
                features = features * self.trunk.side
            weight = at("head", task, head.weight)
            outputs.append(head(features) if weight is head.weight else functional.linear(features, weight, head.bias))
        return outputs

    def features(self, x, at, task):
        """The trunk once more for a task of its own."""
        *early, last, tanh = self.trunk
        hidden = nn.Sequential(*early)(x)
        if hidden.requires_grad:
            values = last(at("below", task, hidden))
        else:
            values = functional.linear(hidden, last.weight, at("below", task, last.bias))
        return at("trunk", task, tanh(values))

    def data(self, seed, rows=8):
        return torch.randn(rows, self.size, generator=generator(seed)).to(self.heads[0].weight)

    def losses(self, seed=0, at=unchanged, x=None):
        """Task losses on the batch number `seed`, or on `x`."""
        outputs = self(self.data(seed) if x is None else x, at)
        return [10.0 ** (task + self.lowest) * (out - 1).square().mean() for task, out in enumerate(outputs)]


class Block(nn.Module):
    """A layer of the trunk, with or without an activation checkpoint in it."""

    def __init__(self, before, after, reentrant):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(before, after), reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self._layer(x)
        return checkpoint(self._layer, x, use_reentrant=self.reentrant)

    def _layer(self, x):
        return self.linear(x).tanh()


class Blocks(Net):
    """Modules that can be sharded. Four ranks divide none of the dimensions 30, 7 and 1, two only the first."""

    def __init__(self, reentrant=None, seed=0, width=30):
        self.reentrant = reentrant
        super().__init__(3, (5, width, 7), seed=seed, dtype=torch.float64)

    def layers(self, sizes, bias):
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            yield Block(before, after, self.__dict__["reentrant"])

    def forward(self, x):
        features = self.trunk(x)
        return [head(features) for head in self.heads]


class Branches(nn.Module):
    """Tasks 0 and 1 go through `first`, task 2 through `second`, all through `last`; tasks 0 and 1 share a head."""

    def __init__(self, large=False):
        super().__init__()
        torch.manual_seed(0)
        self.copies = {"first": 4096, "second": 512} if large else {"first": 1, "second": 1}  # 2^17, 2^14 weights
        self.trunk = nn.ModuleDict({name: nn.Linear(4 * copies, 8) for name, copies in self.copies.items()})
        self.trunk["last"] = nn.Linear(8, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))
        self.double()

    def forward(self, x):
        """For each task the losses of the samples."""
        inputs = [(self.trunk[name], x.repeat(1, copies) / copies**0.5) for name, copies in self.copies.items()]
        first, second = [self.trunk["last"](layer(wide).tanh()).tanh() for layer, wide in inputs]
        outputs = [self.heads[0](first), self.heads[0](first.sin()) + self.heads[1](first), self.heads[2](second)]
        return [10.0 ** (task - 1) * (output - 0.5).square().sum(1) for task, output in enumerate(outputs)]


class Embeddings(nn.Module):
    """Position and type embeddings, added: with `views` their gradients are views of one tensor."""

    def __init__(self, size, shared, views):
        super().__init__()
        torch.manual_seed(0)
        self.position, self.kind = (nn.Parameter(torch.randn(size, dtype=torch.float64)) for _ in range(2))
        self.last = nn.Parameter(torch.randn(size[-1], 5, dtype=torch.float64))
        self.log_variance = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)])
        self.trunk = [self.last, self.position, self.kind] if shared else [self.last]
        self.views = views

    def losses(self, scale):
        if self.views:
            x = (self.position.unsqueeze(0) + self.kind.unsqueeze(0))[0]
            extra = [s.squeeze() for s in self.log_variance]
        else:
            x = self.position * 1.0 + self.kind * 1.0
            extra = [s.sum() * 1.0 for s in self.log_variance]
        features = (x @ self.last).sin()
        return [(features - 1).square().mean() * scale + extra[0], features.square().mean() + 0.1 * scale + extra[1]]


class Normed(nn.Module):
    """A layer norm and a GELU, whose backward passes want what the forward passes saved; small, for compilers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU())
        self.trunk = nn.Sequential(nn.Linear(16, 32), block)
        self.heads = nn.ModuleList([nn.Linear(32, 1) for _ in range(3)])

    def from_features(self, features):
        return [(head(features) - 1).square().mean() for head in self.heads]

    def losses(self, x):
        return self.from_features(self.trunk(x))


def batch(seed, dtype):
    source = generator(seed)
    return (torch.randn(8, size, generator=source).to(dtype) for size in (4, 3))


class Graph(nn.Module):
    """A trunk `lower`, `upper` and three heads, with one peculiarity, `kind`; norms are measured on `upper`."""

    def __init__(self, kind="plain", dtype=torch.float64):
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng():
            torch.manual_seed(len(kind))
            self.lower = nn.GRU(4, 6, batch_first=True) if kind == "recurrent" else nn.Linear(4, 6)
            self.side = nn.Linear(6, 6)
            self.batch_norm = nn.BatchNorm1d(6)
            self.middle = nn.Linear(6, 6)
            self.upper = nn.Linear(6, 6)
            self.pair = nn.Linear(6, 6)
            self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
            self.outside = nn.Parameter(torch.ones(6))
        self.poison = None
        self.to(dtype)

    @property
    def shared(self):
        layers = [self.lower, self.middle, self.upper]
        layers += {"partly shared": [self.side], "batch norm": [self.batch_norm]}.get(self.kind, [])
        return [parameter for layer in layers for parameter in layer.parameters()]

    @property
    def others(self):
        shared = {id(parameter) for parameter in self.shared}
        return [parameter for parameter in self.parameters() if id(parameter) not in shared]

    @property
    def trained(self):
        return [parameter for parameter in self.parameters() if parameter is not self.outside]

    def bad(self, tensor, where):
        """The tensor, with a gradient of NaN where that is the poisoned place."""
        if self.poison == where:
            tensor = tensor * 1
            tensor.register_hook(lambda gradient: gradient * math.nan)
        return tensor

    def bottom(self, x):
        hidden = self.lower(x.unflatten(1, (1, 4)))[0][:, 0] if self.kind == "recurrent" else self.lower(x)
        hidden = self.batch_norm(hidden) if self.kind == "batch norm" else hidden
        return self.bad(self.middle(torch.tanh(hidden)), "below")

    def features(self, x):
        if self.kind.endswith("reentrant"):
            hidden = checkpoint(self.bottom, x.requires_grad_(), use_reentrant=self.kind == "reentrant")
        else:
            hidden = self.bottom(x)
        if self.kind == "dropout":
            hidden = functional.dropout(hidden, 0.4)
        self.seen_below, self.seen = hidden, self.bad(torch.tanh(self.upper(torch.tanh(hidden))), "trunk")
        return self.seen

    def losses(self, seed=0):
        x, y = batch(seed, self.upper.weight.dtype)
        if self.kind == "dropout":
            torch.manual_seed(seed)
        if self.kind == "several inputs":
            inputs = [self.features(x + task) for task in range(3)]
        else:
            inputs = [self.features(x)] * 3
        if self.kind == "partly shared":
            inputs[1:] = [each + torch.tanh(self.side(each)) for each in inputs[1:]]
        if self.kind == "head of two tasks":
            inputs[:2] = [self.pair(inputs[0])] * 2
        if self.kind == "routed":  # by another task or two in every batch
            inputs = [self.pair(e) if (3 * seed + 5 * task) % 4 < 2 else e for task, e in enumerate(inputs)]
        if self.kind == "outside":
            inputs[1:] = [each * self.outside for each in inputs[1:]]
        outputs = [head(each)[:, 0] for head, each in zip(self.heads, inputs, strict=True)]
        outputs[1] = self.bad(outputs[1], "head")
        losses = [8.0 ** (task - 1) * (output - y[:, task]).square().mean() for task, output in enumerate(outputs)]
        if self.kind == "tied":
            losses[2] = (functional.linear(inputs[2], self.lower.weight.t()) - x).square().mean()
        return losses

    def __getstate__(self):
        return {**super().__getstate__(), "seen": None, "seen_below": None}  # graphs are not copied

    def grads(self):
        return {name: parameter.grad for name, parameter in self.named_parameters()}
