"""What the commands have in common."""

import argparse
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def with_capital(text: str) -> str:
    """Return the text with a capital first letter, the others as they are."""
    return text[:1].upper() + text[1:]


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1; an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def usable_device(text: str) -> torch.device:
    """Parse a device that tensors can be made on; an argparse type."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # The first line: a wrong build's message has many.
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
