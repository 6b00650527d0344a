"""One process of test_compiled.py: trains a compiled network and prints how far it is from the eager one.

Usage: python compiled_program.py PART,WHEN,FORM... Prints a JSON object for each: the largest relative error of a
parameter after three steps, or the error that was raised and whether anything was changed by then.
"""

import json
import sys

import torch
import torch._functorch.config
from networks import Normed
from torch import nn

from balanced_optim import DualBalancedOptimizer


def remedy():
    torch._functorch.config.donated_buffer = False
    torch.compiler.config.cache_key_tag = "retained graphs"


def compiled(net, part, dynamic):
    """A function from inputs to losses of which `part` is compiled."""
    if part == "trunk":
        trunk = torch.compile(net.trunk, dynamic=dynamic)
        return lambda x: net.from_features(trunk(x))
    if part == "blocks":
        blocks = [torch.compile(block, dynamic=dynamic) for block in net.trunk]
        return lambda x: net.from_features(nn.Sequential(*blocks)(x))
    return torch.compile(net.losses, dynamic=dynamic)


def train(net, function, form, sizes):
    last = net.trunk[-1][1].parameters()
    options = {"exact": {}, "one_backward": {"norm_params": last}, "accumulate": {}}[form]
    optimizer = DualBalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.trunk, **options)
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        optimizer.zero_grad()
        if form == "accumulate":
            optimizer.accumulate(function(torch.randn(size, 16)))
        optimizer.step(function(torch.randn(size, 16)))


def outcome(part, when, form):
    net, eager = Normed(), Normed()
    dynamic = when == "remedy"
    if when == "remedy":
        remedy()
    if when == "half a remedy":
        torch._functorch.config.donated_buffer = False
    sizes = [8, 12, 20] if dynamic else [8, 8, 8]
    function = compiled(net, part, dynamic or None)
    if when in ("ordinary", "late", "reset"):
        sum(function(torch.randn(8, 16))).backward()
        net.zero_grad()
    if when == "late":
        torch._functorch.config.donated_buffer = False
    if when == "reset":
        remedy()
        torch.compiler.reset()
    try:
        train(net, function, form, sizes)
    except RuntimeError as error:
        pairs = zip(net.parameters(), eager.parameters(), strict=True)
        same = all(torch.equal(a, b) and a.grad is None for a, b in pairs)
        return {"error": str(error), "unchanged": same}
    train(eager, eager.losses, form, sizes)
    pairs = zip(net.parameters(), eager.parameters(), strict=True)
    return {"distance": max(((a - b).norm() / b.norm()).item() for a, b in pairs)}


def main(*cases):
    print(json.dumps([outcome(*case.split(",")) for case in cases]))


if __name__ == "__main__":
    main(*sys.argv[1:])
