"""Shared trunks with T linear heads, for measuring what a step costs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Transformer(nn.Module):
    """A pre-norm encoder over token ids, averaged over positions."""

    def __init__(self, width: int, layers: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 8, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        # A pre-norm encoder ends in a norm of its own, as GPT-2 does.
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, positions) ids -> (N, width)."""
        return self.encoder(self.embedding(tokens)).mean(1)


class MultiTaskModel(nn.Module):
    """A trunk and T linear heads; task t's loss is the cross-entropy of head t against random labels."""

    def __init__(self, trunk: nn.Module, width: int, tasks: int, classes: int = 10) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList([nn.Linear(width, classes) for _ in range(tasks)])

    def losses(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        """T scalar losses; `labels` of shape (T, N)."""
        return self.head_losses(self.trunk(x), labels)

    def head_losses(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        """The losses from the trunk's output."""
        return [
            nn.functional.cross_entropy(head(features), label) for head, label in zip(self.heads, labels, strict=True)
        ]

    def last_shared_layer(self) -> list[nn.Parameter]:
        """The parameters of the trunk's last module that has any."""
        with_parameters = [m for m in self.trunk.modules() if list(m.parameters(recurse=False))]
        return list(with_parameters[-1].parameters(recurse=False))


def mlp(inputs: int, width: int, layers: int) -> nn.Module:
    """`layers` linear layers of one width with ReLU."""
    sizes = [inputs] + [width] * layers
    return nn.Sequential(*[m for a, b in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(a, b), nn.ReLU())])


def many_small(layers: int, width: int) -> nn.Module:
    """Hundreds of small parameters: linear layers with layer norm, to show the cost of each parameter."""
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())])


def resnet18(width: int) -> nn.Module:
    """ResNet-18 for small images; width 64 is the 11 M original, 32 has 2.8 M parameters."""
    blocks: list[nn.Module] = []
    inputs = width
    for stage, outputs in enumerate([width, 2 * width, 4 * width, 8 * width]):
        blocks += [
            ResidualBlock(inputs, outputs, 1 if stage == 0 else 2),
            ResidualBlock(outputs, outputs, 1),
        ]
        inputs = outputs
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def _tokens(batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, 64))


# name -> (trunk, width of its output, a batch of inputs)
TRUNKS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[], Tensor]]] = {
    "small_mlp": (lambda: mlp(256, 256, 3), 256, lambda: torch.randn(256, 256)),
    "wide_mlp": (lambda: mlp(2048, 2048, 3), 2048, lambda: torch.randn(32, 2048)),
    "resnet18": (lambda: resnet18(32), 256, lambda: _images(16)),
    "transformer": (lambda: Transformer(256, 4), 256, lambda: _tokens(8)),
    "many_small": (lambda: many_small(100, 64), 64, lambda: torch.randn(64, 64)),
}


def build(name: str, tasks: int, device: torch.device, seed: int = 0) -> tuple[MultiTaskModel, Tensor, Tensor]:
    """A model of the named trunk with its inputs and labels of shape (T, N), on `device`.

    Args:
        name: one of `TRUNKS`, or "mlp1000" for two layers of width 1000 at batch 32.
        tasks: T.
        device: where everything lives.
        seed: of the weights and the batch.
    """
    torch.manual_seed(seed)
    if name in TRUNKS:
        make, width, inputs = TRUNKS[name]
    else:
        width = int(name.removeprefix("mlp"))
        make, inputs = lambda: mlp(width, width, 2), lambda: torch.randn(32, width)
    model = MultiTaskModel(make(), width, tasks)
    x = inputs()
    labels = torch.randint(0, 10, (tasks, len(x)))
    return model.to(device), x.to(device), labels.to(device)
