"""A physics-informed network (PINN): u'' = -(2 pi)^2 sin(2 pi x) on [-1, 1] from residual, boundary and data losses.

The residual begins some hundred times larger than the others, and a fixed weighting has to be guessed. Copy `losses`
for second derivatives by autograd.grad(create_graph=True), and `train` for the loop: all parameters are shared. Every
loss goes to zero here: `eps` is the loss below which a term counts as solved. With the default the noise of terms that
are solved is blown up to full size, and training may end in it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from balanced_optim import DualBalancedOptimizer

FREQUENCY = 2 * math.pi


def losses(network: nn.Module, inside: Tensor, measured: Tensor) -> dict[str, Tensor]:
    """Mean squares of the equation inside, of u(-1) and u(1), and of u where it is known."""
    x = inside.requires_grad_()
    u = network(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    residual = curvature + FREQUENCY**2 * torch.sin(FREQUENCY * x)
    ends = network(torch.tensor([[-1.0], [1.0]]))
    misfit = network(measured) - torch.sin(FREQUENCY * measured)
    return {"residual": residual.square().mean(), "boundary": ends.square().mean(), "data": misfit.square().mean()}


def train(steps: int, weights: Mapping[str, float] | None = None, seed: int = 0) -> float:
    """Return the largest error of u after so many steps; `weights`: a fixed weighting in place of the balance."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    base = torch.optim.Adam(network.parameters(), lr=1e-2)
    optimizer = DualBalancedOptimizer(base, network, eps=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base if weights else optimizer, steps)
    for _ in range(steps):
        found = losses(network, 2 * torch.rand(64, 1) - 1, 2 * torch.rand(8, 1) - 1)
        base.zero_grad()
        if weights:
            torch.stack([weights[name] * loss for name, loss in found.items()]).sum().backward()
            base.step()
        else:
            optimizer.step(found)
        schedule.step()
    x = torch.linspace(-1, 1, 201)[:, None]
    with torch.no_grad():
        return (network(x) - torch.sin(FREQUENCY * x)).abs().max().item()
