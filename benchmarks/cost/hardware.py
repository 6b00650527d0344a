"""What a result file of this folder says about where it was made."""

from importlib.metadata import PackageNotFoundError, version

import torch

import balanced_optim
from benchmarks.environment import describe_environment


def describe_hardware(device: torch.device) -> dict[str, str | int]:
    """Versions, commit and platform, and on a GPU its name."""
    environment = describe_environment() | {"device": str(device), "balanced_optim": balanced_optim.__version__}
    if device.type == "cuda":
        environment |= {
            "device_name": torch.cuda.get_device_name(device),
            "cuda": str(torch.version.cuda or torch.version.hip),
            "triton": _version("triton"),
        }
    return environment


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
