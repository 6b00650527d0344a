"""How the pictures look."""

from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "figure.constrained_layout.wspace": 0.06,
    "legend.frameon": False,
    "savefig.dpi": 100,
    "savefig.bbox": "tight",
}
