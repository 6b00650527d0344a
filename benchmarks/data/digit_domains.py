"""Handwritten digits from three places, a task each: MNIST, USPS and optdigits, ten classes.

Every task has images of its own, so a step runs the shared trunk once per task. The images are read
from a NumPy archive on this machine, see `EXPECTED`; nothing is downloaded.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data.problem import (
    Batch,
    DataSet,
    MakeProblem,
    MultiTaskNet,
    Problem,
    classification,
    only_hard_sharing,
)

SIZE = 16
CLASSES = 10
FEATURES = 64
MAX_PIXEL = 255.0
TEST_EVERY = 5
"""MNIST's part is its 10,000 test images, which have no split of their own: every fifth is a test image here."""
VALIDATION_EVERY = 10
"""Of the training images every tenth is a validation image."""

DOMAINS = ("mnist", "usps", "optdigits")
OFFICIAL_SPLIT = ("usps", "optdigits")
"""Domains whose first `<domain>_ntrain` images are the training set."""

TASKS = tuple(classification(name) for name in DOMAINS)

KEYS = [f"{name}_{part}" for name in DOMAINS for part in ("x", "y")] + [f"{name}_ntrain" for name in OFFICIAL_SPLIT]

EXPECTED = (
    f"a NumPy archive (.npz) with the keys {', '.join(KEYS)}: _x holds images, uint8, shape (N, {SIZE}, {SIZE}), "
    "_y their digits, _ntrain how many of them come first and are for training (USPS 7291, optdigits 2999). "
    "The original data are MNIST's 10,000 test images (http://yann.lecun.com/exdb/mnist/), "
    "USPS (https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass.html#usps) and "
    "optdigits at the UCI repository (https://archive.ics.uci.edu/dataset/80)"
)


@dataclass(frozen=True)
class Images:
    """Images, shape (N, 1, 16, 16), values 0 to 1, and their digits, shape (N,)."""

    pixels: Tensor
    digits: Tensor

    def __getitem__(self, rows: Tensor) -> "Images":
        """Return the images at these positions, or those that a mask picks."""
        return Images(self.pixels[rows], self.digits[rows])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.digits)


@dataclass(frozen=True)
class Domain:
    """The training, the validation and the test images of one domain."""

    train: Images
    validation: Images
    test: Images


def read_domains(path: Path) -> dict[str, Domain]:
    """Read and split the images of every domain, by name in the order of `DOMAINS`.

    Raises:
        ValueError: The file is missing or is not as in `EXPECTED`, which the message repeats.
    """
    try:
        arrays = _read_arrays(path)
        return {name: _split(name, arrays) for name in DOMAINS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot use {path}: {error}. Expected is {EXPECTED}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    # NumPy leaves a file that it opens by its path, and cannot read, open.
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        missing = [key for key in KEYS if key not in archive]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return {key: archive[key] for key in KEYS}


def _split(name: str, arrays: Mapping[str, np.ndarray]) -> Domain:
    pixels, digits = arrays[f"{name}_x"], arrays[f"{name}_y"]
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (SIZE, SIZE):
        raise ValueError(f"{name}_x is {pixels.dtype} of shape {pixels.shape}")
    if digits.shape != pixels.shape[:1] or not np.isin(digits, range(CLASSES)).all():
        raise ValueError(f"{name}_y must be a digit for each of the {len(pixels)} images")
    images = Images(torch.from_numpy(pixels).unsqueeze(1) / MAX_PIXEL, torch.from_numpy(digits).long())
    rows = torch.arange(len(images))
    is_test = rows >= _train_size(name, arrays) if name in OFFICIAL_SPLIT else rows % TEST_EVERY == TEST_EVERY - 1
    rest, test = rows[~is_test], rows[is_test]
    if len(rest) < 2 or not len(test):
        raise ValueError(f"{name} has {len(rest)} training and {len(test)} test images")
    # The first image of every ten, so that ten are not needed.
    is_validation = torch.arange(len(rest)) % VALIDATION_EVERY == 0
    return Domain(images[rest[~is_validation]], images[rest[is_validation]], images[test])


def _train_size(name: str, arrays: Mapping[str, np.ndarray]) -> int:
    size = arrays[f"{name}_ntrain"]
    if size.shape != () or not np.issubdtype(size.dtype, np.integer):
        raise ValueError(f"{name}_ntrain must be a whole number")
    return int(size)


def build_model() -> MultiTaskNet:
    """Make the untrained network: two convolutions and a layer of 64 features, a linear head per domain."""
    trunk = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIZE // 4) ** 2, FEATURES),
        nn.ReLU(),
    )
    return MultiTaskNet(trunk, {name: nn.Linear(FEATURES, CLASSES) for name in DOMAINS})


def three_domains(domains: Mapping[str, Domain], seed: int, batch_size: int = 64) -> Problem:
    """Make the problem of one seed; all seeds have the same training, validation and test images.

    Args:
        domains: Every domain's images, by name.
        seed: Fixes the training batches.
        batch_size: Images of each domain in a training batch, drawn with replacement.
    """

    def train_batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield _batch(
                {
                    name: domain.train[torch.randint(len(domain.train), (batch_size,), generator=generator)]
                    for name, domain in domains.items()
                }
            )

    validation = _batch({name: domain.validation for name, domain in domains.items()})
    test = _batch({name: domain.test for name, domain in domains.items()})
    return Problem(TASKS, only_hard_sharing(build_model), train_batches, validation, test)


def _batch(images: Mapping[str, Images]) -> Batch:
    return Batch(
        {name: part.pixels for name, part in images.items()}, {name: part.digits for name, part in images.items()}
    )


def load(path: Path | None) -> MakeProblem:
    """Read the file and return what makes the problem of a seed.

    Raises:
        ValueError: No file is named, or see `read_domains`.
    """
    if path is None:
        raise ValueError(f"digit_domains needs a file: {EXPECTED}")
    return partial(three_domains, read_domains(path))


DIGIT_DOMAINS = DataSet("three digit domains", TASKS, load)
