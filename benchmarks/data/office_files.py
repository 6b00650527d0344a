"""Reading Office objects: folders of images, a NumPy archive of them, or MATLAB files of features."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor

SIZE = 64
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
ARCHIVE = "images64.npz"
ARCHIVE_KEYS = ("x", "y", "domain", "domain_names")


@dataclass(frozen=True)
class Examples:
    """Images, uint8 of shape (N, 3, H, W), or features, shape (N, features); and their classes, shape (N,)."""

    inputs: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> "Examples":
        """Return the examples at these positions."""
        return Examples(self.inputs[rows], self.labels[rows])

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)


def read_folders(path: Path, domains: Sequence[str], classes: int, size: int = SIZE) -> dict[str, Examples]:
    """Read `path/DOMAIN/CLASS/*.jpg` or, as in Office-31, `path/DOMAIN/images/CLASS/*.jpg`.

    Args:
        path: The folder of the domains. A domain's folder may have spaces where its name has underscores.
        domains: Names of the domains.
        classes: How many classes every domain has, all the same.
        size: Height and width that images are resized to, whatever their shape.

    Raises:
        ValueError: A domain or a class is missing, or an image cannot be read.
    """
    folders = {name: _class_folders(path, name) for name in domains}
    names = sorted({folder.name for of_domain in folders.values() for folder in of_domain})
    if len(names) != classes:
        raise ValueError(f"the domains have {len(names)} classes and must have {classes}")
    examples = {}
    for domain, of_domain in folders.items():
        missing = sorted({*names} - {folder.name for folder in of_domain})
        if missing:
            raise ValueError(f"{domain} lacks {', '.join(missing)}")
        files = [(file, names.index(folder.name)) for folder in of_domain for file in _image_files(folder)]
        pixels = np.stack([_read_image(file, size) for file, _ in files])
        examples[domain] = _examples(pixels, np.array([label for _, label in files]))
    return examples


def _class_folders(path: Path, domain: str) -> list[Path]:
    for name in (domain, domain.replace("_", " ")):
        for folder in (path / name / "images", path / name):
            if folder.is_dir():
                return sorted(entry for entry in folder.iterdir() if entry.is_dir())
    raise ValueError(f"there is no folder {domain}")


def _image_files(folder: Path) -> list[Path]:
    files = sorted(
        file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{folder} has no images")
    return files


def _read_image(file: Path, size: int) -> np.ndarray:
    try:
        with Image.open(file) as image:
            # A JPEG file can be decoded at a fraction of its size, no smaller than asked for, which is much faster.
            image.draft("RGB", (size, size))
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file} is no image that can be read: {error}") from error


def read_archive(path: Path, domains: Sequence[str], classes: int) -> dict[str, Examples]:
    """Read a NumPy archive of the images of all domains.

    Args:
        path: The file, with the keys `ARCHIVE_KEYS`: x holds images, uint8, shape (N, H, W, 3), y their classes, domain
            which of domain_names each is from.
        domains: Names of the domains.
        classes: How many classes there are.

    Raises:
        OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError: The file cannot be read or is something else.
    """
    # NumPy leaves a file that it opens by its path, and cannot read, open.
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        missing = [key for key in ARCHIVE_KEYS if key not in archive]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        pixels, labels, domain, names = (archive[key] for key in ARCHIVE_KEYS)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"x is {pixels.dtype} of shape {pixels.shape}")
    if labels.shape != pixels.shape[:1] or not np.isin(labels, range(classes)).all():
        raise ValueError(f"y must be one of {classes} classes for each of the {len(pixels)} images")
    if sorted(names.tolist()) != sorted(domains) or domain.shape != labels.shape:
        raise ValueError(f"domain must be one of {', '.join(domains)} for each of the {len(pixels)} images")
    rows = {name: domain == names.tolist().index(name) for name in domains}
    return {name: _examples(pixels[of_domain], labels[of_domain]) for name, of_domain in rows.items()}


def _examples(pixels: np.ndarray, labels: np.ndarray) -> Examples:
    return Examples(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))
    )


def read_images(path: Path, domains: Sequence[str], classes: int) -> dict[str, Examples]:
    """Read an archive, a folder with one, or folders of images."""
    if path.is_file():
        return read_archive(path, domains, classes)
    if (path / ARCHIVE).is_file():
        return read_archive(path / ARCHIVE, domains, classes)
    return read_folders(path, domains, classes)


def read_features(
    path: Path, domains: Sequence[str], classes: int, folder: str, width: int, log: bool
) -> dict[str, Examples]:
    """Read a MATLAB file for each domain, in `path`, `path/folder` or `path/features/folder`.

    Args:
        path: Where they are. A file's name must begin with the domain's, in any case.
        domains: Names of the domains.
        classes: How many classes there are; the files count them from 1.
        folder: What the kind of features is called.
        width: Number of features, `fts` in the files.
        log: Whether features are counts, to be taken as log(1 + count).

    Raises:
        ValueError: A file is missing or is something else.
    """
    places = [place for place in (path / folder, path / "features" / folder, path) if place.is_dir()]
    if not places:
        raise ValueError("it is no folder")
    return {name: _read_features(_matlab_file(places[0], name), classes, width, log) for name in domains}


def _matlab_file(folder: Path, domain: str) -> Path:
    files = [file for file in sorted(folder.glob("*.mat")) if file.name.lower().startswith(domain)]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{folder} must have one {domain}*.mat and has {found}")
    return files[0]


def _read_features(file: Path, classes: int, width: int, log: bool) -> Examples:
    try:
        arrays = loadmat(file, variable_names=["fts", "labels"])
    # MATLAB 7.3 files are refused by NotImplementedError.
    except (OSError, ValueError, TypeError, MatReadError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{file} is no MATLAB file that can be read: {error}") from error
    missing = [key for key in ("fts", "labels") if key not in arrays]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    features, labels = arrays["fts"].astype(np.float32), arrays["labels"].ravel()
    if features.shape != (len(labels), width) or not np.isfinite(features).all():
        raise ValueError(
            f"fts of {file}, shape {features.shape}, must be {width} finite features for each of {len(labels)} labels"
        )
    if not np.isin(labels, range(1, classes + 1)).all():
        raise ValueError(f"labels of {file} must be 1 to {classes}")
    if log:
        features = np.log1p(features)
    return Examples(torch.from_numpy(features), torch.from_numpy(labels.astype(np.int64) - 1))
