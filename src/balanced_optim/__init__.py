"""Dual-balanced multi-task learning (DB-MTL) around any PyTorch optimizer.

>>> import torch
>>> from balanced_optim import DualBalancedOptimizer
>>> trunk, head_a, head_b = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1), torch.nn.Linear(8, 1)
>>> parameters = [*trunk.parameters(), *head_a.parameters(), *head_b.parameters()]
>>> optimizer = DualBalancedOptimizer(torch.optim.Adam(parameters), trunk)
>>> features = trunk(torch.randn(16, 4))
>>> losses = {"a": head_a(features).square().mean(), "b": 1000 * head_b(features).abs().mean()}
>>> optimizer.zero_grad()
>>> optimizer.step(losses)
>>> optimizer.last_balance.tasks
('a', 'b')

Source: Lin et al., "Dual-Balancing for Multi-Task Learning", arXiv 2308.12029, Neural Networks 195 (2026).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ._rule import Balance
from .optimizer import DualBalancedOptimizer

__all__ = ["RECOMMENDED", "Balance", "DualBalancedOptimizer"]

RECOMMENDED: Mapping[str, Any] = MappingProxyType({"norm_target": "rms", "beta": 0})
"""The arguments to try first: ``DualBalancedOptimizer(base, trunk, **RECOMMENDED)``.

NTKMTL's rule (arXiv 2510.18258) under the log, without averages: T backward passes, memory for n scalars. Of all that
were compared it is the setting whose worst distance to the best of equal weighting, the log alone and the paper's
defaults is least (`benchmarks/README.md`). Later versions may recommend another one: write the arguments out where
results must be had again.
"""

__version__ = "0.2.0"
