"""QM9: eleven properties of small organic molecules, each a regression (mean squared error, mean absolute error).

`load` takes one of two sources; nothing is downloaded.

A csv with a `smiles` column and the eleven properties. There is no geometry in it, so what a network sees of a
molecule is counted from its SMILES text:

- how often each character of `ALPHABET` occurs: atoms by element and by whether they are aromatic, written-out
  hydrogens, charges, bonds that are not single, branches and the digits of ring closures. The hydrogens that SMILES
  leaves out are, but for aromatic and charged atoms, a linear function of these counts.
- how often each run of two to four characters occurs, by its hash modulo `HASHES`: who is bound to whom. A hash with
  the sign bit set counts down, so that runs which share a place cancel on average.

The trunk is a plain network of three layers. Errors are NOT comparable with published ones, which need geometry.

A directory that `torch_geometric.datasets.QM9` has filled. The trunk is the message-passing network of the paper:
NNConv and GRU over the complete graph of the atoms, with their distances, then Set2Set, width 64. This branch has been
run with torch_geometric 2.8.1 on a CPU on 200 made-up molecules that its QM9 class had processed, never on the real
data and never on a GPU; without one a step takes a second or more. That package has energies in electronvolts where csv
files usually have hartree and kcal/mol.
"""

import csv
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer
from torch import Tensor, nn

from benchmarks.data.problem import Batch, DataSet, MakeProblem, Metric, MultiTaskNet, Problem, Task, only_hard_sharing
from benchmarks.data.qm9_graphs import PYG_WIDTH, MessagePassing

PROPERTIES = (
    "mu",
    "alpha",
    "homo",
    "lumo",
    "r2",
    "zpve",
    "u0_atom",
    "u298_atom",
    "h298_atom",
    "g298_atom",
    "cv",
)

ALPHABET = "CNOFHcno+-=#()[]123456"
HASHES = 512
WIDTH = 256

PYG_COLUMNS = [0, 1, 2, 3, 5, 6, 12, 13, 14, 15, 11]
"""Where torch_geometric's QM9 has the properties, in the order of `PROPERTIES`."""
PYG_FILES = "processed/data_v*.pt"

MIN_MOLECULES = 10

EXPECTED = (
    f"a csv with the columns smiles and {', '.join(PROPERTIES)} and at least {MIN_MOLECULES} molecules, as "
    "MoleculeNet's (https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/qm9.csv); or, with the package "
    f"torch_geometric installed, a directory with {PYG_FILES}, which torch_geometric.datasets.QM9(directory) makes "
    "once it may download. "
    "The original data: Ramakrishnan et al. (2014), https://doi.org/10.6084/m9.figshare.c.978904"
)


def mean_absolute_error(outputs: Tensor, targets: Tensor, unit: float = 1.0) -> Tensor:
    """Return the mean absolute error times `unit`, what a difference of 1 stands for."""
    return unit * F.l1_loss(outputs, targets)


def make_tasks(units: Sequence[float]) -> tuple[Task, ...]:
    """Return the tasks where a target's difference of 1 is so much of the property, in the order of `PROPERTIES`."""
    return tuple(
        Task(name, F.mse_loss, (Metric("MAE", False, partial(mean_absolute_error, unit=unit)),))
        for name, unit in zip(PROPERTIES, units, strict=True)
    )


RAW_TASKS = make_tasks([1.0] * len(PROPERTIES))


@dataclass(frozen=True)
class Molecules:
    """What the problem of any seed is made from.

    Attributes:
        inputs: What identifies each molecule to the trunk, shape (N, ...).
        targets: The properties, shape (N, 11).
        build_trunk: Makes the trunk and the number of its features from the inputs of the training part.
    """

    inputs: Tensor
    targets: Tensor
    build_trunk: Callable[[Tensor], tuple[nn.Module, int]]


def featurise(smiles: Sequence[str]) -> Tensor:
    """Return counts of characters and of hashed runs of characters, shape (N, len(ALPHABET) + HASHES)."""
    characters = CountVectorizer(analyzer="char", lowercase=False, vocabulary=list(ALPHABET), dtype=np.float32)
    runs = HashingVectorizer(
        analyzer="char", lowercase=False, ngram_range=(2, 4), n_features=HASHES, norm=None, dtype=np.float32
    )
    counts = np.hstack([characters.transform(smiles).toarray(), runs.transform(smiles).toarray()])
    return torch.from_numpy(counts)


class StandardiseCounts(nn.Module):
    """Z-scores the counts of characters; the counts of runs, mostly 0, stay as they are."""

    mean: Tensor
    std: Tensor

    def __init__(self, inputs: Tensor) -> None:
        """Take the statistics from these inputs, shape (N, features)."""
        super().__init__()
        characters = torch.arange(inputs.shape[1]) < len(ALPHABET)
        std = inputs.std(dim=0, unbiased=False)
        self.register_buffer("mean", torch.where(characters, inputs.mean(dim=0), 0.0))
        self.register_buffer("std", torch.where(characters & (std > 0), std, 1.0))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the same shape."""
        return (inputs - self.mean) / self.std


def build_perceptron(train_inputs: Tensor) -> tuple[nn.Module, int]:
    """Make three layers of `WIDTH` for the features of `featurise`."""
    layers: list[nn.Module] = [StandardiseCounts(train_inputs)]
    for inputs in (train_inputs.shape[1], WIDTH, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers), WIDTH


def read_csv(path: Path) -> Molecules:
    """Read SMILES and properties; see the module for what becomes of them.

    Raises:
        ValueError: The file cannot be read or is not as in `EXPECTED`, which the message repeats.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            smiles, targets = _read_rows(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise _unusable(path, error) from error
    return Molecules(featurise(smiles), torch.tensor(targets), build_perceptron)


def _read_rows(rows: Iterator[list[str]]) -> tuple[list[str], list[list[float]]]:
    header = [name.strip().lower() for name in next(rows, [])]
    missing = [name for name in ("smiles", *PROPERTIES) if name not in header]
    if missing:
        raise ValueError(f"it lacks the columns {', '.join(missing)}")
    text = header.index("smiles")
    columns = [header.index(name) for name in PROPERTIES]
    smiles, targets = [], []
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(header) or not row[text]:
            raise ValueError(f"row {number} has {len(row)} fields and must have a SMILES among {len(header)}")
        values = [float(row[column]) for column in columns]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"row {number} has a property that is not finite")
        smiles.append(row[text])
        targets.append(values)
    _check_number(len(smiles))
    return smiles, targets


def _check_number(molecules: int) -> None:
    if molecules < MIN_MOLECULES:
        raise ValueError(f"it has {molecules} molecules")


def _unusable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"cannot use {path}: {str(error) or type(error).__name__}. Expected is {EXPECTED}")


def read_graphs(path: Path) -> Molecules:
    """Read what torch_geometric has processed; the inputs are the numbers of the molecules.

    Raises:
        ValueError: The package is missing, or the directory is not as in `EXPECTED`, which the message repeats.
    """
    try:
        # The reader of any processed data set: unlike the class QM9 it has nothing to download or to process.
        graphs = importlib.import_module("torch_geometric.data").InMemoryDataset()
    except ImportError as error:
        raise ValueError(f"{path} is a directory, which needs the package torch_geometric: {error}") from error
    try:
        files = sorted(path.glob(PYG_FILES))
        if not files:
            raise ValueError(f"it has no {PYG_FILES}")
        graphs.load(str(files[-1]))
        _check_number(len(graphs))
        targets = graphs.y[:, PYG_COLUMNS].float()
    # What a broken file makes the two packages raise is not documented.
    except Exception as error:
        raise _unusable(path, error) from error

    def build_trunk(train_inputs: Tensor) -> tuple[nn.Module, int]:  # noqa: ARG001
        return MessagePassing(graphs), PYG_WIDTH

    return Molecules(torch.arange(len(graphs)), targets, build_trunk)


def eleven_properties(molecules: Molecules, z_scored: bool, seed: int, batch_size: int = 128) -> Problem:
    """Make the problem of one seed: a tenth of the molecules each for validation and test.

    Args:
        molecules: All molecules.
        z_scored: Whether the targets are z-scored by the mean and the standard deviation of the training part. The
            metric is in the property's own unit either way.
        seed: Fixes the split and the training batches.
        batch_size: Molecules in a training batch, drawn with replacement.

    Raises:
        ValueError: A property is the same for all training molecules.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(molecules.inputs), generator=generator)
    tenth = len(order) // 10
    test, validation, train = order[:tenth], order[tenth : 2 * tenth], order[2 * tenth :]
    train_inputs, targets = molecules.inputs[train], molecules.targets
    mean, std = targets[train].mean(dim=0), targets[train].std(dim=0, unbiased=False)
    if z_scored:
        same = [name for name, spread in zip(PROPERTIES, std.tolist(), strict=True) if spread == 0]
        if same:
            raise ValueError(f"cannot z-score {', '.join(same)}: all {len(train)} training molecules have the same")
        targets, mean = (targets - mean) / std, torch.zeros_like(mean)
    batch_state = generator.get_state()

    def build_model() -> MultiTaskNet:
        trunk, features = molecules.build_trunk(train_inputs)
        heads = zip(PROPERTIES, mean.tolist(), strict=True)
        return MultiTaskNet(trunk, {name: _head(features, centre) for name, centre in heads})

    def pick(rows: Tensor) -> Batch:
        columns = zip(PROPERTIES, targets[rows].unbind(dim=1), strict=True)
        return Batch(molecules.inputs[rows], dict(columns))

    def train_batches() -> Iterator[Batch]:
        rows = torch.Generator()
        rows.set_state(batch_state)
        while True:
            yield pick(train[torch.randint(len(train), (batch_size,), generator=rows)])

    tasks = make_tasks(std.tolist()) if z_scored else RAW_TASKS
    return Problem(tasks, only_hard_sharing(build_model), train_batches, pick(validation), pick(test))


def _head(features: int, centre: float) -> nn.Module:
    """Make a linear layer with outputs of shape (N,) that start around the centre of the targets.

    From 0, Adam would spend thousands of steps on reaching raw energies of -1,700.
    """
    layer = nn.Linear(features, 1)
    nn.init.constant_(layer.bias, centre)
    return nn.Sequential(layer, nn.Flatten(0))


def load(path: Path | None, *, z_scored: bool) -> MakeProblem:
    """Read a csv or a directory and return what makes the problem of a seed.

    Raises:
        ValueError: No path is given, or see `read_csv` and `read_graphs`.
    """
    if path is None:
        raise ValueError(f"qm9 needs {EXPECTED}")
    return partial(eleven_properties, read_graphs(path) if path.is_dir() else read_csv(path), z_scored)


QM9 = DataSet(
    "QM9, z-scored targets (a csv has no geometry: errors not comparable with published ones)",
    RAW_TASKS,
    partial(load, z_scored=True),
    batch_size=128,
    steps=1000,
)
"""A problem's own tasks turn errors of z-scored outputs back into the property's unit; those here take raw outputs."""

QM9_RAW = DataSet(
    "QM9, raw targets (a csv has no geometry: errors not comparable with published ones)",
    RAW_TASKS,
    partial(load, z_scored=False),
    batch_size=128,
    steps=1000,
)
"""As `QM9` without z-scoring: the variances of the targets, and so the losses, differ 1.6e8-fold."""
