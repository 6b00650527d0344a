"""Shared trunks with T linear heads, for measuring what a step costs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """What a residual block adds to its body: the input, in the body's shape."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a widening 1x1 convolution with batch norm and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, 4 width, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Transformer(nn.Module):
    """A pre-norm encoder over token ids, averaged over positions."""

    def __init__(self, width: int, layers: int, heads: int = 8, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        # A pre-norm encoder ends in a norm of its own, as GPT-2 does.
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, positions) ids -> (N, width)."""
        states: Tensor = self.encoder(self.embedding(tokens))
        return states.mean(1)


class MultiTaskModel(nn.Module):
    """A trunk and T linear heads; task t's loss is the cross-entropy of head t against random labels."""

    def __init__(self, trunk: nn.Module, width: int, tasks: int, bf16: bool = False, classes: int = 10) -> None:
        super().__init__()
        self.trunk, self.bf16 = trunk, bf16
        self.heads = nn.ModuleList([nn.Linear(width, classes) for _ in range(tasks)])

    def features(self, x: Tensor) -> Tensor:
        """The trunk's output."""
        with self._precision(x):
            features: Tensor = self.trunk(x)
        return features

    def losses(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        """T scalar losses; `labels` of shape (T, N)."""
        return self.head_losses(self.features(x), labels)

    def head_losses(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        """The losses from the trunk's output."""
        with self._precision(features):
            outputs = [head(features) for head in self.heads]
        pairs = zip(outputs, labels, strict=True)
        return [nn.functional.cross_entropy(output.float(), label) for output, label in pairs]

    def last_shared_layer(self) -> list[nn.Parameter]:
        """The parameters of the trunk's last linear layer or convolution."""
        layers = [module for module in self.trunk.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        return list(layers[-1].parameters())

    def _precision(self, tensor: Tensor) -> AbstractContextManager[object]:
        return torch.autocast(tensor.device.type, torch.bfloat16) if self.bf16 else nullcontext()


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


def resnet50(width: int) -> nn.Module:
    """ResNet-50 without its classifier; width 64 is the 23.5 M original."""
    blocks: list[nn.Module] = []
    inputs = width
    for stage, depth in enumerate([3, 4, 6, 3]):
        for block in range(depth):
            inner = width * 2**stage
            blocks.append(Bottleneck(inputs, inner, 2 if stage > 0 and block == 0 else 1))
            inputs = 4 * inner
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _images(batch: int, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size)


def _tokens(batch: int, positions: int = 64) -> Tensor:
    return torch.randint(0, 256, (batch, positions))


@dataclass(frozen=True)
class Trunk:
    """What is trained.

    Attributes:
        make: makes the trunk.
        width: of its output.
        inputs: makes a batch.
        bf16: whether forward passes run under bfloat16 autocast.
    """

    make: Callable[[], nn.Module]
    width: int
    inputs: Callable[[], Tensor]
    bf16: bool = False


TRUNKS: dict[str, Trunk] = {
    "small_mlp": Trunk(lambda: mlp(256, 256, 3), 256, lambda: torch.randn(256, 256)),
    "wide_mlp": Trunk(lambda: mlp(2048, 2048, 3), 2048, lambda: torch.randn(32, 2048)),
    "resnet18": Trunk(lambda: resnet18(32), 256, lambda: _images(16)),
    "transformer": Trunk(lambda: Transformer(256, 4), 256, lambda: _tokens(8)),
    "many_small": Trunk(lambda: many_small(100, 64), 64, lambda: torch.randn(64, 64)),
    # Of the size that a GPU is for.
    "wide_mlp_67m": Trunk(lambda: mlp(4096, 4096, 4), 4096, lambda: torch.randn(256, 4096)),
    "resnet50": Trunk(lambda: resnet50(64), 2048, lambda: _images(64, 224), bf16=True),
    "transformer_85m": Trunk(lambda: Transformer(768, 12, heads=12), 768, lambda: _tokens(16, 512), bf16=True),
}

TINY: dict[str, Trunk] = {
    "small_mlp": Trunk(lambda: mlp(8, 8, 3), 8, lambda: torch.randn(4, 8)),
    "many_small": Trunk(lambda: many_small(4, 8), 8, lambda: torch.randn(4, 8)),
    "wide_mlp_67m": Trunk(lambda: mlp(16, 16, 4), 16, lambda: torch.randn(4, 16)),
    "resnet50": Trunk(lambda: resnet50(4), 128, lambda: _images(2), bf16=True),
    "transformer_85m": Trunk(lambda: Transformer(16, 2), 16, lambda: _tokens(2, 8), bf16=True),
}
"""The same kinds so small that a test can run them on a CPU."""


def named(name: str) -> Trunk:
    """A trunk of `TRUNKS`; "mlp1000" is two layers of width 1000 at batch 32, "tiny_NAME" one of `TINY`."""
    if name.startswith("tiny_"):
        return TINY[name.removeprefix("tiny_")]
    if name in TRUNKS:
        return TRUNKS[name]
    width = int(name.removeprefix("mlp"))
    return Trunk(lambda: mlp(width, width, 2), width, lambda: torch.randn(32, width))


def build(name: str, tasks: int, device: torch.device, seed: int = 0) -> tuple[MultiTaskModel, Tensor, Tensor]:
    """A model of the named trunk with its inputs and labels of shape (T, N), on `device`.

    Args:
        name: as `named` takes it.
        tasks: T.
        device: where everything lives.
        seed: of the weights and the batch.
    """
    torch.manual_seed(seed)
    trunk = named(name)
    with device:
        model = MultiTaskModel(trunk.make(), trunk.width, tasks, trunk.bf16)
        x = trunk.inputs()
        return model, x, torch.randint(0, 10, (tasks, len(x)))
