"""NYUv2 and Cityscapes as prepared by Liu et al. for MTAN (2019), which LibMTL and most papers since then use.

The layout, as the loaders of MTAN, LibMTL and FAMO read it: `train` and `val`, in each a folder for the images and for
every target with files 0.npy, 1.npy, ...: `image` (H, W, 3), RGB from 0 to 1; `label` (H, W), classes as floats;
`depth` (H, W, 1); NYUv2 only: `normal` (H, W, 3), unit vectors. Label -1, depth 0 and a normal of zeros mean no ground
truth. NYUv2 has 795 and 654 images of 288x384, 13 classes, depth in metres. Cityscapes has 2975 and 500 of 128x256,
7 classes in `label` (LibMTL) or `label_7` (FAMO); its depth is inverse: the disparity, scaled to less than 1. All
this is from those loaders and their authors' words; the files themselves were not at hand.

`val` is the test set, as for those loaders. There is no validation set: the last tenth of the training images is one
here, so training has that much less than in the papers. Images are not augmented, as in the MTAN paper. Training images
are read from the disk batch by batch. Validation and test sets are in memory once, from the first problem on: 2.9 GB
for NYUv2, 0.6 GB for Cityscapes; a network's outputs on the test set of NYUv2 are 4.9 GB more. The `limit` of
`load_folders` makes them smaller.

Batch sizes, learning rates and 200 epochs are those of Lin et al. Their network is a dilated ResNet-50 with ASPP
heads; here it is that of `architectures`, wider and deeper than for small scenes. Without a GPU a run takes days.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.data.architectures import ARCHITECTURES, STRIDE, build_dense
from benchmarks.data.dense import DEPTH, NO_LABEL, NORMAL, SEGMENTATION
from benchmarks.data.problem import Batch, DataSet, MakeProblem, MultiTaskModel, Problem, Task

WIDTH = 64
DILATIONS = (2, 4, 8, 16)
VALIDATION_SHARE = 10
"""One of so many training images is for validation."""


@dataclass(frozen=True)
class Layout:
    """What a data set has in its folders.

    Attributes:
        title: Its name.
        tasks: Its tasks.
        classes: Number of classes of the segmentation.
        label_folders: Names that the folder of these classes may have; the first one there is read.
        source: Where the files and the originals come from.
    """

    title: str
    tasks: tuple[Task, ...]
    classes: int
    label_folders: tuple[str, ...]
    source: str

    @property
    def channels(self) -> dict[str, int]:
        """Output channels by task name."""
        return {task.name: self.classes if task.name == "segmentation" else CHANNELS[task.name] for task in self.tasks}

    @property
    def expected(self) -> str:
        """What a path must hold, for messages."""
        shapes = [f"image (H, W, {CHANNELS['image']})", f"{' or '.join(self.label_folders)} (H, W)"]
        shapes += [f"{task.name} (H, W, {CHANNELS[task.name]})" for task in self.tasks if task.name in CHANNELS]
        return (
            f"a folder with train and val, in each the folders {', '.join(shapes)}, in each of these the files 0.npy, "
            f"1.npy, ... with an array of this shape; H and W are the same for all and divisible by {STRIDE}, labels "
            f"are from {NO_LABEL} to {self.classes - 1}. {self.source}"
        )


CHANNELS = {"image": 3, "depth": 1, "normal": 3}
"""Of the files, by name of the folder; labels have none."""

MTAN = "The prepared files are linked at https://github.com/lorenmt/mtan, the original is at"
NYUV2_LAYOUT = Layout(
    "NYUv2",
    (SEGMENTATION, DEPTH, NORMAL),
    13,
    ("label",),
    f"{MTAN} https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html",
)
CITYSCAPES_LAYOUT = Layout(
    "Cityscapes",
    (SEGMENTATION, DEPTH),
    7,
    ("label_7", "label"),
    f"{MTAN} https://www.cityscapes-dataset.com",
)


class Images(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images and their targets, read from the disk one by one."""

    def __init__(self, layout: Layout, folders: Mapping[str, Path], numbers: list[int], size: tuple[int, int]) -> None:
        """Say what to read.

        Args:
            layout: What the files hold.
            folders: Of "image" and of every task's targets, by task name.
            numbers: Of the files, in the order of the data set.
            size: Height and width of all images.
        """
        self.layout = layout
        self.folders = folders
        self.numbers = numbers
        self.size = size

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.numbers)

    def part(self, rows: slice) -> "Images":
        """Return the images in these places."""
        return Images(self.layout, self.folders, self.numbers[rows], self.size)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image, shape (3, H, W), and its targets by task name: labels (H, W), others (channels, H, W).

        Raises:
            ValueError: A file is missing or does not hold what it should.
        """
        arrays = {name: self._read(name, self.numbers[index]) for name in self.folders}
        return arrays.pop("image"), arrays

    def _read(self, name: str, number: int) -> Tensor:
        path = self.folders[name] / f"{number}.npy"
        try:
            if name == "segmentation":
                return torch.from_numpy(_load(path, self.size, NO_LABEL, self.layout.classes - 1)).long()
            array = _load(path, (*self.size, CHANNELS[name]), -math.inf, math.inf)
            return torch.from_numpy(np.moveaxis(array, -1, 0)).float()
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"cannot use {path}: {error}. Expected is {self.layout.expected}") from error

    def whole(self) -> Batch:
        """Return all of them as one batch."""
        image, first = self[0]
        images = image.new_empty(len(self), *image.shape)
        targets = {name: target.new_empty(len(self), *target.shape) for name, target in first.items()}
        for index in range(len(self)):
            images[index], read = self[index]
            for name, target in read.items():
                targets[name][index] = target
        return Batch(images, targets)


def _load(path: Path, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Return the array in a file, which must have this shape and finite values in these bounds."""
    array = _read_array(path)
    if array.shape != shape:
        raise ValueError(f"its shape is {array.shape} and not {shape}, which the first image asks for")
    # A comparison with NaN is False.
    if not (low <= array.min() and array.max() <= high and np.isfinite(array).all()):
        raise ValueError(f"its values go from {array.min()} to {array.max()}")
    return array


def _read_array(path: Path) -> np.ndarray:
    # NumPy leaves a file that it opens by its path, and cannot read, open.
    with path.open("rb") as file:
        array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.number):
        raise ValueError("it does not hold one array of numbers")
    return array


def _open(split: Path, layout: Layout) -> Images:
    """Return the images of `train` or `val` in the order of their numbers."""
    folders = {"image": split / "image"} | {task.name: split / task.name for task in layout.tasks}
    names = layout.label_folders
    folders["segmentation"] = next((split / name for name in names if (split / name).is_dir()), split / names[0])
    numbers = {name: _numbers(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        missing = numbers["image"] - numbers[name]
        if missing:
            raise ValueError(f"{folder} lacks {min(missing)}.npy")
    order = sorted(numbers["image"])
    return Images(layout, folders, order, _size(folders["image"] / f"{order[0]}.npy"))


def _size(image: Path) -> tuple[int, int]:
    try:
        shape = _read_array(image).shape
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{image}: {error}") from error
    if len(shape) != 3 or shape[0] % STRIDE or shape[1] % STRIDE:
        raise ValueError(f"{image} has shape {shape}")
    return shape[0], shape[1]


def _numbers(folder: Path) -> set[int]:
    numbers = {int(path.stem) for path in folder.glob("*.npy") if path.stem.isdecimal()}
    if not numbers:
        raise ValueError(f"{folder} has no such files")
    return numbers


def load_folders(layout: Layout, path: Path | None, limit: int | None = None) -> MakeProblem:
    """Look through the folders and return what makes the problem of a seed.

    Args:
        layout: What the folders hold.
        path: The folder with `train` and `val`.
        limit: At most so many images of the validation and of the test set are used, the first ones; None for all.

    Raises:
        ValueError: No path is given, or files are missing or not as expected; the message says what is.
    """
    if path is None:
        raise ValueError(f"{layout.title} needs a path: {layout.expected}")
    try:
        train, test = _open(path / "train", layout), _open(path / "val", layout)
        if len(train) < 2:
            raise ValueError("train has a single image")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot use {path}: {error}. Expected is {layout.expected}") from error
    kept = len(train) - max(len(train) // VALIDATION_SHARE, 1)
    validation = train.part(slice(kept, None)).part(slice(limit))
    return partial(_problem, train.part(slice(kept)), cache(validation.whole), cache(test.part(slice(limit)).whole))


def _problem(
    train: Images, validation: Callable[[], Batch], test: Callable[[], Batch], seed: int, batch_size: int
) -> Problem:
    """Make the problem of one seed, which fixes the order of the training images; all seeds have the same sets."""
    if batch_size > len(train):
        raise ValueError(f"batch_size must be at most {len(train)}, the number of training images, got {batch_size}")
    layout = train.layout

    def train_batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(train, batch_size, shuffle=True, drop_last=True, generator=generator)
        while True:
            for images, targets in loader:
                yield Batch(images, targets)

    def build_model(architecture: str) -> MultiTaskModel:
        return build_dense(architecture, layout.channels, width=WIDTH, dilations=DILATIONS)

    return Problem(layout.tasks, build_model, train_batches, validation(), test())


NYUV2 = DataSet(
    NYUV2_LAYOUT.title,
    NYUV2_LAYOUT.tasks,
    partial(load_folders, NYUV2_LAYOUT),
    ARCHITECTURES,
    batch_size=8,
    learning_rate=1e-4,
    steps=17_800,
)
CITYSCAPES = DataSet(
    CITYSCAPES_LAYOUT.title,
    CITYSCAPES_LAYOUT.tasks,
    partial(load_folders, CITYSCAPES_LAYOUT),
    ARCHITECTURES,
    batch_size=64,
    learning_rate=1e-4,
    steps=8_200,
)
