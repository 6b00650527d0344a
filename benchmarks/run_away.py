"""What `max_weight`, `eps` and `fade_solved` do when one of two tasks is solved: a constructed case, in a few minutes.

Run from the root of the repository with `python -m benchmarks.run_away`. A hard task (fit a random teacher network)
shares its trunk with a task that needs no more training, in two ways: a hinge loss that reaches zero on most batches,
and a loss of nothing but noise that is scaled down to 1e-9, below eps. It prints a table and writes `run_away.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from balanced_optim import DualBalancedOptimizer
from benchmarks.compare import RESULTS, positive_int
from benchmarks.environment import describe_environment

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "max_weight=3": {"max_weight": 3.0},
    "eps=1e-2": {"eps": 1e-2},
    "eps=1e-2, max_weight=3": {"eps": 1e-2, "max_weight": 3.0},
    "fade_solved": {"fade_solved": True},
    "eps=1e-2, fade_solved": {"eps": 1e-2, "fade_solved": True},
}


def hinge(output: Tensor, x: Tensor) -> Tensor:
    """Which sign the first input has: separable, so that the loss reaches zero."""
    return torch.relu(1 - output * x[:, :1].sign()).square().mean()


def noise(output: Tensor, x: Tensor) -> Tensor:
    """Targets that have nothing to do with the input, in a unit that makes the loss tiny."""
    return 1e-9 * (output - torch.randn(len(x), 1)).square().mean()


SOLVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge at zero": hinge, "noise below eps": noise}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        solved, setting, seed: what was run.
        hard_error: mean squared error of the hard task on fresh inputs.
        largest_weight: over the second half of the steps.
    """

    solved: str
    setting: str
    seed: int
    hard_error: float
    largest_weight: float


def train(solved: str, setting: str, seed: int, steps: int) -> Run:
    """Train both tasks for `steps` batches of 64."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    heads = nn.ModuleList([nn.Linear(64, 1) for _ in range(2)])
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.mul_(2)
    base = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=1e-3)
    optimizer = DualBalancedOptimizer(base, trunk, **SETTINGS[setting])
    largest = 0.0
    for step in range(steps):
        x = torch.randn(64, 16)
        features = trunk(x)
        optimizer.zero_grad()
        hard = (heads[1](features) - teacher(x)).square().mean()
        optimizer.step({"solved": SOLVED[solved](heads[0](features), x), "hard": hard})
        balance = optimizer.last_balance
        if balance is not None and step >= steps // 2:
            largest = max(largest, balance.weights.max().item())
    x = torch.randn(4096, 16)
    with torch.no_grad():
        error = (heads[1](trunk(x)) - teacher(x)).square().mean().item()
    return Run(solved, setting, seed, error, largest)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_away", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=positive_int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=positive_int, default=2000, help="batches a run (default: 2000)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=RESULTS / "run_away")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = [(solved, setting, seed) for solved in SOLVED for setting in SETTINGS for seed in range(options.seeds)]
    console = Console()
    runs = [train(*item, options.steps) for item in track(plan, "run-away", console=console)]
    table = Table(title="A hard task beside a solved one")
    for column in ("solved task", "setting", "error of the hard task", "largest weight"):
        table.add_column(column)
    for solved in SOLVED:
        for setting in SETTINGS:
            chosen = [run for run in runs if (run.solved, run.setting) == (solved, setting)]
            error = mean(run.hard_error for run in chosen)
            table.add_row(solved, setting, f"{error:.4f}", f"{max(run.largest_weight for run in chosen):.3g}")
    console.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": describe_environment(), "steps": options.steps, "runs": [asdict(run) for run in runs]}
    (options.out / "run_away.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
