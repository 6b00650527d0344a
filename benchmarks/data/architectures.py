"""Networks for dense prediction by name: hard sharing, Cross-stitch and MTAN, all on the same small encoder.

Height and width of the images must be divisible by `STRIDE`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.data.problem import MultiTaskModel, MultiTaskNet

ARCHITECTURES = ("hard", "cross_stitch", "mtan")
STRIDE = 4
OWN_SHARE = 0.9
"""What a fresh cross-stitch passes on of a task's own features; the rest comes from the other tasks' in equal parts."""


def build_dense(
    architecture: str, channels: Mapping[str, int], *, width: int, dilations: Sequence[int] = (2, 4)
) -> MultiTaskModel:
    """Make an untrained network from torch's global random state.

    Args:
        architecture: "hard": one encoder, a head for every task; "cross_stitch": `CrossStitch`; "mtan":
            `AttentionNet`.
        channels: Output channels by task name.
        width: See `Encoder`.
        dilations: See `Encoder`.

    Raises:
        ValueError: There is no such architecture.
    """

    def heads(encoder: Encoder) -> dict[str, nn.Module]:
        return {name: _head(encoder.channels[-1], outputs) for name, outputs in channels.items()}

    match architecture:
        case "hard":
            encoder = Encoder(width, dilations)
            return MultiTaskNet(encoder, heads(encoder))
        case "cross_stitch":
            encoders = [Encoder(width, dilations) for _ in channels]
            return CrossStitch(encoders, heads(encoders[0]))
        case "mtan":
            encoder = Encoder(width, dilations)
            return AttentionNet(encoder, heads(encoder))
        case _:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")


def _convolution(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Stage(nn.Module):
    """Two convolutions in a row, each with batch norm and ReLU; the first may shrink the image."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, dilation: int) -> None:
        """Make a stage with these numbers of channels."""
        super().__init__()
        self.first = _convolution(inputs, outputs, stride=stride, dilation=dilation)
        self.second = _convolution(outputs, outputs, dilation=dilation)

    def forward(self, features: Tensor) -> Tensor:
        """Return the features after both convolutions."""
        return self.second(self.first(features))  # type: ignore[no-any-return]


class Encoder(nn.Sequential):
    """A stage at half the size of the image, one at a quarter, then dilated ones at a quarter.

    Attributes:
        channels: Of every stage's output.
        strides: By which every stage shrinks its input.
    """

    def __init__(self, width: int, dilations: Sequence[int]) -> None:
        """Build the stages.

        Args:
            width: Channels of the first stage; the others have twice as many.
            dilations: Of the stages after the first two, one each. More of them see more of a larger image.
        """
        self.channels = [width, *[2 * width] * (1 + len(dilations))]
        self.strides = [2, 2, *[1] * len(dilations)]
        shapes = zip([3, *self.channels], self.channels, self.strides, [1, 1, *dilations], strict=False)
        super().__init__(*(Stage(i, o, stride=stride, dilation=dilation) for i, o, stride, dilation in shapes))

    @property
    def stages(self) -> list[Stage]:
        """The stages, from the image on."""
        return cast(list[Stage], list(self))

    def last_convolution(self) -> list[nn.Parameter]:
        """Return the parameters of the last convolution."""
        return list(self.stages[-1].second[0].parameters())


def _head(inputs: int, outputs: int) -> nn.Sequential:
    """Make a head: every feature vector gives the output of the `STRIDE` x `STRIDE` pixels it stands for."""
    return nn.Sequential(
        _convolution(inputs, inputs),
        nn.Conv2d(inputs, outputs * STRIDE**2, 1),
        nn.PixelShuffle(STRIDE),
    )


class CrossStitch(MultiTaskModel):
    """Cross-stitch network (Misra et al., 2016): an encoder for every task, mixed after every stage.

    Task t goes on from a stage with the sum over tasks s of `stitch[t, s] *` the features of encoder s, with numbers
    of its own for every channel. Through the stitches every task reaches every encoder, so all encoders and stitches
    are shared parameters. Of the last stitch a task reaches its own row alone; its gradient on the others is zero.

    All encoders run, however few tasks are named.
    """

    def __init__(self, encoders: Sequence[Encoder], heads: Mapping[str, nn.Module]) -> None:
        """Join encoders and heads by stitches.

        Args:
            encoders: One for each head in the order of the heads, all of one shape.
            heads: Task name to the module that maps features to that task's output.
        """
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.stitches = nn.ParameterList(_near_identity(len(encoders), channels) for channels in encoders[0].channels)
        self.heads = nn.ModuleDict(heads)

    def forward(self, inputs: Tensor | Mapping[str, Tensor], task_names: Iterable[str]) -> dict[str, Tensor]:
        """Return the outputs of the named tasks only; the other heads do not run."""
        features = [_only(inputs)] * len(self.encoders)
        for stages, stitch in zip(zip(*self.encoders, strict=True), self.stitches, strict=True):
            unmixed = torch.stack([stage(feature) for stage, feature in zip(stages, features, strict=True)])
            features = list(torch.einsum("tsc,sbchw->tbchw", stitch, unmixed))
        of_task = dict(zip(self.heads, features, strict=True))
        return {name: self.heads[name](of_task[name]) for name in task_names}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all encoders and stitches."""
        return [*self.encoders.parameters(), *self.stitches.parameters()]

    def norm_parameters(self) -> list[nn.Parameter]:
        """Return the last convolution of every encoder: every task reaches each of them through the last stitch.

        The last stitch itself would not do, as no two tasks reach the same of its rows.
        """
        encoders = cast(Iterable[Encoder], self.encoders)
        return [parameter for encoder in encoders for parameter in encoder.last_convolution()]


def _near_identity(tasks: int, channels: int) -> nn.Parameter:
    """Make a stitch, shape (tasks, tasks, channels): rows sum to 1, most of it on the diagonal."""
    others = (1 - OWN_SHARE) / max(tasks - 1, 1)
    mixing = torch.full((tasks, tasks), others).fill_diagonal_(OWN_SHARE if tasks > 1 else 1.0)
    return nn.Parameter(mixing.unsqueeze(-1).repeat(1, 1, channels))


class AttentionNet(MultiTaskModel):
    """Multi-task attention network (MTAN, Liu et al., 2019): one encoder, and soft attention for every task.

    In every stage a task masks the shared features with numbers from 0 to 1 for every channel and pixel. It computes
    them from the stage's first convolution and from what it attended to in the stage before. The encoder is shared;
    attention belongs to the task, as do the convolutions that carry it to the next stage, which in the authors' code
    all tasks share: with batch norm each task needs its own statistics.
    """

    def __init__(self, encoder: Encoder, heads: Mapping[str, nn.Module]) -> None:
        """Give each task of the heads its attention to the encoder.

        Args:
            encoder: The shared encoder.
            heads: Task name to the module that maps features to that task's output.
        """
        super().__init__()
        self.encoder = encoder
        self.attentions = nn.ModuleDict({name: _Attention(encoder) for name in heads})
        self.heads = nn.ModuleDict(heads)

    def forward(self, inputs: Tensor | Mapping[str, Tensor], task_names: Iterable[str]) -> dict[str, Tensor]:
        """Return the outputs of the named tasks only; attention and heads of the others do not run."""
        features, halves = _only(inputs), []
        for stage in self.encoder.stages:
            first = stage.first(features)
            features = stage.second(first)
            halves.append((first, features))
        return {name: self.heads[name](self.attentions[name](halves)) for name in task_names}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the encoder's parameters."""
        return list(self.encoder.parameters())

    def norm_parameters(self) -> list[nn.Parameter]:
        """Return the encoder's last convolution, which every task sees through its last mask."""
        return self.encoder.last_convolution()


class _Attention(nn.Module):
    """What one task attends to, stage after stage."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        channels, strides = encoder.channels, encoder.strides
        from_before = [0, *channels[1:]]
        self.masks = nn.ModuleList(
            _mask(number + before, number) for number, before in zip(channels, from_before, strict=True)
        )
        self.carries = nn.ModuleList(
            _convolution(before, after, stride=stride)
            for before, after, stride in zip(channels, channels[1:], strides[1:], strict=False)
        )

    def forward(self, halves: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the attended features of the last stage.

        Args:
            halves: The features after the first and after the second convolution of every stage.
        """
        (first, second), *later = halves
        attended: Tensor = self.masks[0](first) * second
        for (first, second), mask, carry in zip(later, self.masks[1:], self.carries, strict=True):
            attended = mask(torch.cat([first, carry(attended)], dim=1)) * second
        return attended


def _mask(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    )


def _only(inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return the images, the same for all tasks.

    Raises:
        TypeError: Tasks have images of their own.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be one tensor for all tasks, got those of {', '.join(inputs)}")
    return inputs
