"""The type of a command line argument."""

import argparse
from collections.abc import Collection

from benchmarks.cost.trunks import TINY, TRUNKS


def trunk_name(text: str, more: Collection[str] = ()) -> str:
    """Check the name of a trunk, or one of `more`; an argparse type."""
    known = {*more, *TRUNKS, *(f"tiny_{name}" for name in TINY)}
    if text not in known and not (text.startswith("mlp") and text[3:].isdecimal()):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join([*more, *TRUNKS])} or mlpWIDTH, got {text!r}")
    return text
