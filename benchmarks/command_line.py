"""What the commands have in common."""

import argparse
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def with_capital(text: str) -> str:
    """Return the text with a capital first letter, the others as they are."""
    return text[:1].upper() + text[1:]


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1; an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
