"""What a result file says about where it was made: versions and settings, no names or paths."""

import platform
import subprocess
from pathlib import Path

import torch


def describe_environment() -> dict[str, str | int]:
    """Return versions, platform and threads, and the commit where git knows one."""
    environment: dict[str, str | int] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    commit = _commit()
    if commit:
        environment["commit"] = commit
    return environment


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, and the kind of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _commit() -> str:
    """Return the short commit hash, marked where files differ from it; empty without git."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
