"""Dense prediction: the losses and metrics of segmentation, depth and surface normals, a value for every pixel.

Outputs and targets have shape (B, channels, H, W), labels (B, H, W). Pixels without ground truth count in no loss and
no metric: label -1, depth 0, a normal of three zeros, as in the data sets that Liu et al. (2019) prepared. A mean
over no pixel at all is NaN. Metrics are over the pixels of the whole set, as in LibMTL, and not averages over images.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data.problem import Metric, Task

NO_LABEL = -1
SMALLEST_SQUARE = 1e-12
"""Keeps the cosine of a vector of zeros, and its gradient, finite."""


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over labelled pixels.

    Args:
        logits: Shape (B, classes, H, W).
        labels: Class indices or `NO_LABEL`, shape (B, H, W).
    """
    return F.cross_entropy(logits, labels, ignore_index=NO_LABEL)


def depth_loss(depth: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error over pixels with a depth; both shapes are (B, 1, H, W)."""
    return _mean((depth - target).abs(), target != 0)


def normal_loss(normals: Tensor, target: Tensor) -> Tensor:
    """Return 1 - the mean cosine over pixels with a normal; vectors of any length, both shapes are (B, 3, H, W)."""
    return 1 - _mean(_cosines(normals, target), _has_normal(target))


def mean_iou(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over classes of intersection over union, 0 to 1.

    A class that neither labels nor predictions have is left out.
    """
    classes = logits.shape[1]
    labelled = labels != NO_LABEL
    pairs = labels[labelled] * classes + logits.argmax(dim=1)[labelled]
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()
    intersection = confusion.diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return (intersection / union).nanmean()


def pixel_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of labelled pixels with the right class, 0 to 1."""
    labelled = labels != NO_LABEL
    return (logits.argmax(dim=1) == labels)[labelled].double().mean()


def relative_depth_error(depth: Tensor, target: Tensor) -> Tensor:
    """Return the mean of the absolute error over the true depth."""
    return _mean((depth - target).abs() / target, target != 0)


def angles(normals: Tensor, target: Tensor) -> Tensor:
    """Return the angle between output and true normal in degrees, for every pixel that has one, shape (N,)."""
    return _cosines(normals, target)[_has_normal(target)].clamp(-1, 1).acos().rad2deg()


def mean_angle(normals: Tensor, target: Tensor) -> Tensor:
    """Return the mean angle in degrees."""
    return angles(normals, target).mean()


def median_angle(normals: Tensor, target: Tensor) -> Tensor:
    """Return the median angle in degrees; of an even number of pixels the lower of the middle two."""
    return angles(normals, target).median()


def share_within(normals: Tensor, target: Tensor, degrees: float) -> Tensor:
    """Return the share of pixels whose angle is below `degrees`, 0 to 1."""
    return (angles(normals, target) < degrees).double().mean()


def _has_normal(target: Tensor) -> Tensor:
    return (target != 0).any(dim=1)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum() / counted.sum()


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosines between vectors along dim 1; 0 for a vector of zeros.

    As `F.cosine_similarity`, which takes longer than a small network here.
    """
    lengths = one.square().sum(dim=1) * other.square().sum(dim=1)
    return (one * other).sum(dim=1) * lengths.clamp(min=SMALLEST_SQUARE).rsqrt()


SEGMENTATION = Task(
    "segmentation",
    segmentation_loss,
    (Metric("mIoU", True, mean_iou), Metric("pixel accuracy", True, pixel_accuracy)),
    natural_unit=True,
)
DEPTH = Task(
    "depth",
    depth_loss,
    (Metric("absolute error", False, depth_loss), Metric("relative error", False, relative_depth_error)),
)
NORMAL = Task(
    "normal",
    normal_loss,
    (
        Metric("mean angle", False, mean_angle),
        Metric("median angle", False, median_angle),
        Metric("within 11.25", True, partial(share_within, degrees=11.25)),
        Metric("within 22.5", True, partial(share_within, degrees=22.5)),
        Metric("within 30", True, partial(share_within, degrees=30)),
    ),
)
