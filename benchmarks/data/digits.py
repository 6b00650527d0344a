"""Two overlaid handwritten digits: which is left, which is right, and what the image looks like.

The images are scikit-learn's bundled 8x8 digits (1797 scans, pixel values 0 to 16), so nothing is
downloaded. The cross-entropies of the two digits start near 2.3, the reconstruction error near 50:
loss scales more than an order of magnitude apart.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.data.problem import (
    Batch,
    DataSet,
    MakeProblem,
    Metric,
    MultiTaskNet,
    Problem,
    Task,
    classification,
    only_hard_sharing,
)

MAX_PIXEL = 16.0
SHIFT = 4
"""Columns by which the right digit is moved: half of its eight columns lie on the left digit."""
HEIGHT, WIDTH = 8, 8 + SHIFT
CLASSES = 10
FEATURES = 64
TEST_DIGITS, VALIDATION_DIGITS = 500, 200
TEST_PAIRS, VALIDATION_PAIRS = 2000, 1000

TASKS = (
    classification("left"),
    classification("right"),
    Task("reconstruction", F.mse_loss, (Metric("MSE", False, F.mse_loss),)),
)


def load_images() -> tuple[Tensor, Tensor]:
    """Return the images, shape (1797, 8, 8), values 0 to 16, and the labels, shape (1797,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()
    return images, torch.from_numpy(digits.target).long()


def overlay(left: Tensor, right: Tensor) -> Tensor:
    """Lay two digits over each other on a wider canvas, the brighter pixel on top.

    Args:
        left: Images of the left digit, shape (B, 8, 8), values 0 to 16.
        right: Images of the right digit, moved by `SHIFT` columns; same shape and values.

    Returns:
        Shape (B, 1, 8, 8 + SHIFT), values 0 to 16.
    """
    canvas = torch.maximum(F.pad(left, (0, SHIFT)), F.pad(right, (SHIFT, 0)))
    return canvas.unsqueeze(1)


def sample_pairs(images: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> Batch:
    """Draw `size` random pairs; inputs are scaled to 0..1, the image to rebuild stays at 0..16."""
    left, right = torch.randint(len(images), (2, size), generator=generator)
    canvas = overlay(images[left], images[right])
    targets = {"left": labels[left], "right": labels[right], "reconstruction": canvas}
    return Batch(canvas / MAX_PIXEL, targets)


class _ToPixels(nn.Module):
    """Turns values of order one, shape (B, HEIGHT * WIDTH), into an image of 0 to 16.

    Without the factor an untrained head is far below the targets, and every method spends its
    first steps on growing the last layer.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Return shape (B, 1, HEIGHT, WIDTH)."""
        return MAX_PIXEL * values.view(-1, 1, HEIGHT, WIDTH)


def build_model() -> MultiTaskNet:
    """Make the untrained network: two convolutions and a layer of 64 features, three heads."""
    trunk = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (HEIGHT // 2) * (WIDTH // 2), FEATURES),
        nn.ReLU(),
    )
    heads = {
        "left": _head(CLASSES),
        "right": _head(CLASSES),
        "reconstruction": nn.Sequential(_head(HEIGHT * WIDTH), _ToPixels()),
    }
    return MultiTaskNet(trunk, heads)


def _head(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, outputs))


def two_digits(seed: int, batch_size: int = 64) -> Problem:
    """Make the problem of one seed.

    The digits are split before they are paired, so no scan in a test or validation pair was ever trained on.

    Args:
        seed: Fixes the split, the test and validation pairs and the training pairs.
        batch_size: Pairs in a training batch; every batch is drawn afresh.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_images()
    order = torch.randperm(len(images), generator=generator)
    test, validation, train = order.tensor_split([TEST_DIGITS, TEST_DIGITS + VALIDATION_DIGITS])
    test_pairs = sample_pairs(images[test], labels[test], TEST_PAIRS, generator)
    validation_pairs = sample_pairs(images[validation], labels[validation], VALIDATION_PAIRS, generator)
    pair_state = generator.get_state()

    def train_batches() -> Iterator[Batch]:
        pairs = torch.Generator()
        pairs.set_state(pair_state)
        while True:
            yield sample_pairs(images[train], labels[train], batch_size, pairs)

    return Problem(TASKS, only_hard_sharing(build_model), train_batches, validation_pairs, test_pairs)


def load(path: Path | None) -> MakeProblem:
    """Return what makes the problem of a seed.

    Raises:
        ValueError: A path is given.
    """
    if path is not None:
        raise ValueError(f"digits comes with scikit-learn and takes no file, got {path}")
    return two_digits


DIGITS = DataSet("two digits", TASKS, load)
