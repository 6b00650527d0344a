"""What the last balanced step saw, written to TensorBoard. Copy the function.

It costs no backward pass. On a GPU reading values waits for the device, so call it every hundred steps or so.
"""

from itertools import combinations
from typing import Any

from balanced_optim import DualBalancedOptimizer


def write_balance(writer: Any, optimizer: DualBalancedOptimizer, step: int, cosines: bool = True) -> None:
    """Write losses, norms, weights by task name, and the cosine of every pair of averages (none at beta = 0)."""
    balance = optimizer.last_balance
    for kind in ("losses", "norms", "weights"):
        for task, value in zip(balance.tasks, getattr(balance, kind).tolist(), strict=True):
            writer.add_scalar(f"{kind}/{task}", value, step)
    if cosines:
        matrix = optimizer.gradient_cosines().tolist()
        for (row, one), (column, other) in combinations(enumerate(balance.tasks), 2):
            writer.add_scalar(f"cosines/{one}-{other}", matrix[row][column], step)
