"""Priorities that change over time, as in KL annealing of a variational autoencoder. Copy the loop.

Scaling a loss does nothing under the log, so an annealed factor goes into `task_weights`, which multiplies what the
balance has found. It may be set between any two steps, and a checkpoint holds it.
"""

from collections.abc import Iterable
from typing import Any

import torch

from balanced_optim import DualBalancedOptimizer


def train(network: torch.nn.Module, batches: Iterable[Any], annealed_over: int) -> DualBalancedOptimizer:
    """Let the KL term's priority grow from 0 to 1; `network(batch)` gives the losses of both terms by name.

    The shared part is the encoder, which both terms reach; the decoder belongs to the reconstruction alone.
    """
    base = torch.optim.Adam(network.parameters(), lr=1e-3)
    optimizer = DualBalancedOptimizer(base, network.encoder, task_weights={"reconstruction": 1.0, "kl": 0.0})
    for step, batch in enumerate(batches):
        optimizer.task_weights = {"reconstruction": 1.0, "kl": min(1.0, step / annealed_over)}
        optimizer.zero_grad()
        optimizer.step(network(batch))
    return optimizer
