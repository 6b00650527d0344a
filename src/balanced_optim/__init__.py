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

from ._rule import Balance
from .optimizer import DualBalancedOptimizer

__all__ = ["Balance", "DualBalancedOptimizer"]

__version__ = "0.2.0"
