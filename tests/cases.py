"""Hard gradient matrices and small models for the tests."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from balanced_optim import DualBalancedOptimizer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread only waits on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------- gradient matrices, one row a task


def _random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def _scaled(*scales):
    return _random(len(scales), 5) * np.array(scales)[:, None]


def _with_zero_rows(*rows):
    matrix = _random(4, 5)
    matrix[list(rows)] = 0
    return matrix


MATRICES = {
    "random": _random(3, 5),
    "first row zero": _with_zero_rows(0),
    "last row zero": _with_zero_rows(3),
    "one row left": _with_zero_rows(0, 1, 3),
    "all zero": np.zeros((3, 4)),
    "rank one": np.outer([1.0, -2.0, 3.0, 0.5], _random(6)),
    "rank two": _random(5, 2) @ _random(2, 7),
    "duplicate rows": np.repeat(_random(2, 5), 3, axis=0),
    "opposite rows": np.stack([_random(5), -_random(5)]),
    "opposite and zero": np.stack([_random(5), np.zeros(5), -_random(5)]),
    "tiny": _scaled(1e-10, 1e-10, 1e-10),
    "huge": _scaled(1e15, 1e15, 1e15),
    "tiny to huge": _scaled(1e-10, 1.0, 1e15),
    "huge to tiny": _scaled(1e15, 1.0, 1e-10),
    "single task": _random(1, 5),
    "single zero task": np.zeros((1, 5)),
    "single column": _random(4, 1),
    "many tasks": _random(60, 3),
}


@st.composite
def matrices(draw, min_tasks=1, max_tasks=6):
    """Random matrices whose rows differ in length by up to 1e6, none of them zero."""
    tasks, columns = draw(st.integers(min_tasks, max_tasks)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.standard_normal((tasks, columns)) * 10.0 ** rng.uniform(-3, 3, (tasks, 1))


def matrix_losses(matrix, parameter, log_transform=True):
    """Losses whose (log) gradients at ``parameter = 0`` are the rows of `matrix`; under the log each loss is 1."""
    rows = torch.as_tensor(matrix, dtype=parameter.dtype) @ parameter
    return list(torch.exp(rows) if log_transform else rows)


def matrix_optimizer(matrix, dtype=torch.float64, **keywords):
    parameter = nn.Parameter(torch.zeros(np.shape(matrix)[1], dtype=dtype))
    return parameter, DualBalancedOptimizer(SGD([parameter], lr=1.0), [parameter], **keywords)


def combine(*batches, dtype=torch.float64, log_transform=True, **keywords):
    """The combined gradient after some batches given as gradient matrices, and the balance."""
    parameter, optimizer = matrix_optimizer(batches[0], dtype, log_transform=log_transform, **keywords)
    for matrix in batches:
        parameter.grad = None
        optimizer.backward(matrix_losses(matrix, parameter, log_transform))
    return parameter.grad, optimizer.last_balance


# ------------------------------------------------- losses that are not usable


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, values, bad):
        ctx.bad = bad
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, ctx.bad), None


def with_value(loss, value):
    """A loss of this very value that keeps its graph."""
    return loss - loss.detach() + value


# ------------------------------------------------- models


class MultiTask(nn.Module):
    """A trunk, a head a task and losses of very different scales.

    `trunk(x)` gives the features, or a tuple of them with one entry a head. `data` draws the input.
    """

    def __init__(self, trunk, heads, data, use_reentrant=None):
        super().__init__()
        self.trunk, self.heads, self.data, self.use_reentrant = trunk, nn.ModuleList(heads), data, use_reentrant

    def forward(self, x):
        if self.use_reentrant is None:
            features = self.trunk(x)
        else:
            features = checkpoint(self.trunk, x, use_reentrant=self.use_reentrant)
        losses = {}
        for index, head in enumerate(self.heads):
            out = head(features[index] if isinstance(features, tuple) else features)
            losses[f"t{index}"] = 10.0 ** (3 * index - 3) * ((out - 0.5).square().mean() + 0.1)
        return losses

    def losses(self, seed, absent=()):
        """Draw a batch and the dropout masks from `seed`; None for the tasks in `absent`."""
        torch.manual_seed(seed)
        x = self.data()
        losses = self(x.to(next(self.heads.parameters()).dtype) if x.is_floating_point() else x)
        return {name: None if name in absent else loss for name, loss in losses.items()}

    def optimizer(self, kind=torch.optim.SGD, **keywords):
        return kind(self.parameters(), **keywords)


class Partly(nn.Module):
    """Task 1 alone goes through `side`."""

    def __init__(self):
        super().__init__()
        self.common, self.side = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x):
        common = self.common(x).tanh()
        return common, self.side(common).tanh(), common


class Unused(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.Tanh())
        self.spare = nn.Parameter(torch.ones(3, 2))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(4, 6, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.out = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.3), nn.Linear(4, 6))

    def forward(self, x):
        return self.out(x + self.attention(x, x, x)[0]).mean(1)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, dtype=torch.complex128), nn.Linear(3, 3, dtype=torch.complex128)
        self.real = nn.Linear(6, 6)

    def forward(self, x):
        out = self.second(self.first(torch.complex(x, x.flip(1))))
        return self.real(torch.view_as_real(out).flatten(1)).tanh()


class Tied(nn.Module):
    """One weight in two modules and used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh()).tanh()


class Mixed(nn.Module):
    """Parts of four dtypes in turn, twice, so that no dtype's parameters lie side by side."""

    def __init__(self):
        super().__init__()
        kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16] * 2
        self.parts = nn.ModuleList([nn.Linear(4, 6).to(kind) for kind in kinds])

    def forward(self, x):
        return sum(part(x.to(part.weight.dtype)).double() for part in self.parts).tanh()

    def _apply(self, fn, recurse=True):
        return self  # `.double()` leaves the parts alone


def rows(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


def three_heads(width=6):
    return [nn.Linear(width, 2) for _ in range(3)]


def mlp(**keywords):
    return MultiTask(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6)), three_heads(), rows(8, 4), **keywords)


def partly():
    return MultiTask(Partly(), three_heads(), rows(8, 4))


def unused():
    return MultiTask(Unused(), three_heads(), rows(8, 4))


def frozen():
    model = mlp()
    model.trunk[0].weight.requires_grad_(False)
    return model


def conv():
    trunk = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return MultiTask(trunk, three_heads(3), rows(4, 2, 7, 7))


def conv_channels_last():
    model = conv().to(memory_format=torch.channels_last)
    model.data = lambda: rows(4, 2, 7, 7)().to(memory_format=torch.channels_last)
    return model


def gru():
    return MultiTask(Recurrent(nn.GRU), three_heads(), rows(5, 3, 4))


def lstm():
    return MultiTask(Recurrent(nn.LSTM), three_heads(), rows(5, 3, 4))


def attention():
    return MultiTask(Attention(), three_heads(), rows(5, 3, 4))


def embedding():
    trunk = nn.Sequential(nn.Embedding(20, 6, sparse=True), nn.Linear(6, 6), nn.Tanh())
    return MultiTask(trunk, three_heads(), lambda: torch.randint(20, (8,)))


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 2, sparse=True)

    def forward(self, features):
        return features[:, :2] * self.table(torch.tensor([1, 1, 2, 3, 5, 7, 7, 7]))


def sparse_heads():
    """One table a task, and one that two tasks look into."""
    both = Lookup()
    return MultiTask(nn.Linear(4, 6), [both, both, Lookup()], rows(8, 4))


def complex_numbers():
    return MultiTask(Complex(), three_heads(), rows(8, 4))


def tied():
    return MultiTask(Tied(), three_heads(), rows(8, 6))


def tied_to_a_head():
    model = MultiTask(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), [*three_heads()[:2], nn.Linear(6, 6)], rows(8, 6))
    model.heads[2].weight = model.trunk[0].weight
    return model


def mixed():
    return MultiTask(Mixed(), three_heads(), rows(8, 4))


def with_checkpoint(use_reentrant):
    def build():
        trunk = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 6))
        data = lambda: rows(8, 4)().requires_grad_()  # noqa: E731  reentrant checkpoints want an input with a gradient
        return MultiTask(trunk, three_heads(), data, use_reentrant)

    return build


MODELS = {
    "mlp": mlp,
    "partly shared": partly,
    "frozen": frozen,
    "conv": conv,
    "channels_last": conv_channels_last,
    "gru": gru,
    "lstm": lstm,
    "attention": attention,
    "sparse embedding": embedding,
    "sparse heads": sparse_heads,
    "complex": complex_numbers,
    "tied": tied,
    "tied to a head": tied_to_a_head,
    "mixed dtypes": mixed,
    "checkpoint": with_checkpoint(False),
    "reentrant checkpoint": with_checkpoint(True),
}


def build(name, seed=0):
    """A model of `MODELS` (or `unused`) in float64, always with the same parameters."""
    torch.manual_seed(seed)
    builder = MODELS[name] if isinstance(name, str) else name
    return builder().double()
