"""Office objects as seen in several places (domains), a task each: cross entropy, accuracy.

Every task has inputs of its own, so a step runs the shared trunk once per task. Of each class of each domain 60% are
for training, 20% for validation and 20% for testing, drawn by the seed. Nothing is downloaded; `load` of every data set
says what it expects.

- `OFFICE_31`, `OFFICE_HOME`: the folders of images as distributed.
- `OFFICE_CALTECH10`: such folders, or a NumPy archive of images of 64x64.
- `OFFICE_CALTECH10_SURF`, `OFFICE_CALTECH10_GOOGLENET`: features that others took from these images.

Images are 64x64 and the network is a small one that starts from random weights; the paper has 224x224 and a ResNet-18
trained on ImageNet, so accuracies are NOT comparable with published ones. `OFFICE_31` and `OFFICE_HOME` have been run
on made images in the same layout, never on the real ones.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.data.office_files import ARCHIVE, ARCHIVE_KEYS, SIZE, Examples, read_features, read_folders, read_images
from benchmarks.data.problem import (
    Batch,
    DataSet,
    MakeProblem,
    MultiTaskNet,
    Problem,
    Task,
    classification,
    only_hard_sharing,
)

MIN_IMAGES = 5
"""Of a class in a domain: fewer do not reach all three parts."""
HELD_OUT = 0.4

OFFICE_31_DOMAINS = ("amazon", "dslr", "webcam")
OFFICE_HOME_DOMAINS = ("Art", "Clipart", "Product", "Real_World")
CALTECH10_DOMAINS = ("amazon", "caltech10", "dslr", "webcam")
CALTECH10_CLASSES = 10
CALTECH10_SOURCE = (
    "Office-Caltech10 (Gong et al., 2012), for instance https://github.com/ZhangJUJU/OfficeCaltechDomainAdaptation"
)

WIDTH = 16
"""Channels of the first layer for images."""
HIDDEN = 256
"""Features of both layers for features."""


# ------------------------------------------------------------------ networks


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    """Make a convolution and a group norm of 8 groups (Wu and He, 2018).

    Batch norm would normalise by the batch of one domain in training and by a mean over all domains in a test.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.GroupNorm(8, outputs)
    )


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(inputs, outputs, 3, stride), nn.ReLU(), _convolution(outputs, outputs, 3, 1)
        )
        self.shortcut = nn.Identity() if inputs == outputs else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


def build_residual() -> tuple[nn.Module, int]:
    """Make a ResNet with one block a stage for images of any size, and return it with the number of its features."""
    trunk = nn.Sequential(
        _convolution(3, WIDTH, 5, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        _ResidualBlock(WIDTH, WIDTH, 1),
        _ResidualBlock(WIDTH, 2 * WIDTH, 2),
        _ResidualBlock(2 * WIDTH, 4 * WIDTH, 2),
        _ResidualBlock(4 * WIDTH, 8 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return trunk, 8 * WIDTH


def build_perceptron(width: int) -> tuple[nn.Module, int]:
    """Make two layers for that many features, and return them with the number of theirs."""
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()), HIDDEN


# ------------------------------------------------------------------ problems


def split(examples: Examples, seed: int) -> tuple[Examples, Examples, Examples]:
    """Return 60% for training, 20% for validation and 20% for testing, of every class as far as it divides."""
    labels = examples.labels.numpy()
    draw = partial(train_test_split, random_state=seed)
    train, held_out = draw(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels)
    validation, test = draw(held_out, test_size=0.5, stratify=labels[held_out])
    train, validation, test = (examples[torch.from_numpy(rows)] for rows in (train, validation, test))
    return train, validation, test


def one_domain_a_task(
    domains: Mapping[str, Examples],
    tasks: tuple[Task, ...],
    classes: int,
    build_trunk: Callable[[], tuple[nn.Module, int]],
    seed: int,
    batch_size: int = 16,
) -> Problem:
    """Make the problem of one seed.

    Args:
        domains: All examples of every domain, by name.
        tasks: A task for every domain.
        classes: How many classes there are.
        build_trunk: Makes the trunk and the number of its features.
        seed: Fixes the split and the training batches.
        batch_size: Examples of each domain in a training batch, drawn with replacement. Half the images are mirrored.
    """
    parts = {name: split(examples, seed) for name, examples in domains.items()}

    def build_model() -> MultiTaskNet:
        trunk, features = build_trunk()
        return MultiTaskNet(trunk, {name: nn.Linear(features, classes) for name in domains})

    def train_batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield _batch({name: _sample(train, batch_size, generator) for name, (train, _, _) in parts.items()})

    validation = _batch({name: part for name, (_, part, _) in parts.items()})
    test = _batch({name: part for name, (_, _, part) in parts.items()})
    return Problem(tasks, only_hard_sharing(build_model), train_batches, validation, test)


def _sample(examples: Examples, size: int, generator: torch.Generator) -> Examples:
    drawn = examples[torch.randint(len(examples), (size,), generator=generator)]
    if drawn.inputs.ndim == 2:
        return drawn
    mirrored = torch.rand(size, 1, 1, 1, generator=generator) < 0.5
    return Examples(torch.where(mirrored, drawn.inputs.flip(3), drawn.inputs), drawn.labels)


def _batch(examples: Mapping[str, Examples]) -> Batch:
    return Batch(
        {name: _scaled(part.inputs) for name, part in examples.items()},
        {name: part.labels for name, part in examples.items()},
    )


def _scaled(inputs: Tensor) -> Tensor:
    """Map pixels of 0 to 255 to -2 to 2, and leave features as they are."""
    return inputs / 63.75 - 2 if inputs.dtype == torch.uint8 else inputs


# ------------------------------------------------------------------ data sets

Read = Callable[[Path, Sequence[str], int], dict[str, Examples]]


def load(
    path: Path | None,
    *,
    tasks: tuple[Task, ...],
    classes: int,
    read: Read,
    build_trunk: Callable[[], tuple[nn.Module, int]],
    expected: str,
) -> MakeProblem:
    """Read all domains and return what makes the problem of a seed.

    Raises:
        ValueError: No path is given, or what is there is not as in `expected`, which the message repeats.
    """
    if path is None:
        raise ValueError(f"a path is needed: {expected}")
    try:
        domains = read(path, [task.name for task in tasks], classes)
        for name, examples in domains.items():
            fewest = int(torch.bincount(examples.labels, minlength=classes).min())
            if fewest < MIN_IMAGES:
                raise ValueError(f"{name} has a class with {fewest} examples and must have {MIN_IMAGES}")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot use {path}: {error}. Expected is {expected}") from error
    return partial(one_domain_a_task, domains, tasks, classes, build_trunk)


def _data_set(
    title: str,
    domains: Sequence[str],
    classes: int,
    read: Read,
    build_trunk: Callable[[], tuple[nn.Module, int]],
    expected: str,
    *,
    batch_size: int,
    steps: int,
) -> DataSet:
    tasks = tuple(classification(name) for name in domains)
    load_these = partial(load, tasks=tasks, classes=classes, read=read, build_trunk=build_trunk, expected=expected)
    return DataSet(title, tasks, load_these, batch_size=batch_size, steps=steps)


OFFICE_31 = _data_set(
    "Office-31 (64x64, not pre-trained)",
    OFFICE_31_DOMAINS,
    31,
    read_folders,
    build_residual,
    f"a folder with {', '.join(f'{name}/images/CLASS/*.jpg' for name in OFFICE_31_DOMAINS)}, 31 classes: Office-31 "
    "(Saenko et al., 2010), https://faculty.cc.gatech.edu/~judy/domainadapt/",
    batch_size=16,
    steps=1000,
)

OFFICE_HOME = _data_set(
    "Office-Home (64x64, not pre-trained)",
    OFFICE_HOME_DOMAINS,
    65,
    read_folders,
    build_residual,
    f"a folder with {', '.join(f'{name}/CLASS/*.jpg' for name in OFFICE_HOME_DOMAINS)} (or Real World), 65 classes: "
    "Office-Home (Venkateswara et al., 2017), https://www.hemanthdv.org/officeHomeDataset.html",
    batch_size=16,
    steps=1000,
)

OFFICE_CALTECH10 = _data_set(
    "Office-Caltech10 (64x64, not pre-trained)",
    CALTECH10_DOMAINS,
    CALTECH10_CLASSES,
    read_images,
    build_residual,
    f"a folder with {', '.join(f'{name}/CLASS/*.jpg' for name in CALTECH10_DOMAINS)}, {CALTECH10_CLASSES} classes; or "
    f"a NumPy archive (.npz, {ARCHIVE} in a folder) with the keys {', '.join(ARCHIVE_KEYS)}: x holds images, uint8, "
    f"shape (N, {SIZE}, {SIZE}, 3), y their classes from 0, domain which of domain_names each is from. The original "
    "data are "
    f"{CALTECH10_SOURCE}",
    batch_size=16,
    steps=300,
)


def _features_data_set(title: str, folder: str, domains: Sequence[str], width: int, log: bool) -> DataSet:
    return _data_set(
        title,
        domains,
        CALTECH10_CLASSES,
        partial(read_features, folder=folder, width=width, log=log),
        partial(build_perceptron, width),
        f"a folder with {', '.join(f'{name}*.mat' for name in domains)} (or with {folder} or features/{folder}, which "
        f"have them): fts, shape (N, {width}), labels, 1 to {CALTECH10_CLASSES}. The original data are "
        f"{CALTECH10_SOURCE}",
        batch_size=32,
        steps=300,
    )


OFFICE_CALTECH10_SURF = _features_data_set(
    "Office-Caltech10, SURF features", "surf", CALTECH10_DOMAINS, width=800, log=True
)
"""Bags of 800 visual words: how often each occurs in an image."""

OFFICE_CALTECH10_GOOGLENET = _features_data_set(
    "Office-Caltech10, GoogLeNet features", "GoogleNet1024", OFFICE_31_DOMAINS, width=1024, log=False
)
"""Features of a network that was trained on ImageNet, of the three domains of Office-31: nearly solved."""
