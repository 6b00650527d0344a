"""Long runs: memory does not grow, and no graph outlives its step.

BALANCED_OPTIM_SOAK_STEPS=20000 makes the runs that long.
"""

import gc
import math
import os
import random
import tracemalloc
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import header_of, named
from devices import generator, grad_scaler
from networks import Net

from balanced_optim import DualBalancedOptimizer

STEPS = int(os.environ.get("BALANCED_OPTIM_SOAK_STEPS", "400"))
TASKS = 3
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
FORMS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "refresh": {"norm_params": "weight", "refresh_every": 3},
}
every_form = pytest.mark.parametrize("form", FORMS)


def make(form, **options):
    net = Net(tasks=TASKS)
    options = FORMS[form] | options
    if "norm_params" in options:
        options["norm_params"] = [net.trunk[0].weight]
    base = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return net, DualBalancedOptimizer(base, net.trunk, **options)


# ------------------------------------------------- memory


def resident():
    """Bytes of this process that are in memory, 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * PAGE if status.exists() else 0


def some(net, seed, rng):
    """The losses of a batch, each task in about three of four and one of them NaN now and then."""
    losses = [loss if rng.random() < 0.75 else None for loss in net.losses(seed % 50)]
    return [loss if loss is None or rng.random() < 0.98 else loss * math.nan for loss in losses]


def use(net, optimizer, scaler, steps, rng, form):
    """Steps of every kind in random order."""
    for step in steps:
        optimizer.zero_grad()
        if rng.random() < 0.3:
            for part in range(rng.randint(1, 3)):
                optimizer.accumulate(form(some(net, step + part, rng)), samples=part + 1)
        losses = some(net, step, rng)
        if rng.random() < 0.5:
            optimizer.step(form(losses))
        elif losses[0] is not None:
            optimizer.zero_grad()
            optimizer.backward(form(losses), scaler)
            scaler.step(optimizer)
            scaler.update()
        if step % 50 == 0:
            optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("form", ["exact", "refresh"])
def test_memory_does_not_grow(form):
    rng, names = random.Random(0), named if form == "refresh" else list
    net, optimizer = make(form, nonfinite="skip")
    scaler = grad_scaler(1024.0)
    optimizer.step(names(net.losses()))
    sizes = []
    tracemalloc.start()
    try:
        for first, last in ((0, STEPS // 4), (STEPS // 4, STEPS)):
            use(net, optimizer, scaler, range(first, last), rng, names)
            gc.collect()
            sizes.append((tracemalloc.get_traced_memory()[0], resident()))
    finally:
        tracemalloc.stop()
    traced, in_memory = (after - before for before, after in zip(*sizes, strict=True))
    print(f"{form}: {STEPS} steps, traced {traced:+} bytes, resident {in_memory:+} bytes")
    assert traced < 100_000
    assert in_memory < 16_000_000
    assert min(header_of(optimizer)["counts"]) > STEPS / 20
    assert all(parameter.isfinite().all() for parameter in net.parameters())


# ------------------------------------------------- graphs


class Saved:
    """A tensor that a graph saved for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


class Node(torch.autograd.Function):
    """The identity; its node in the graph holds a `Saved` for as long as it lives itself."""

    @staticmethod
    def forward(ctx, values, alive):
        ctx.sentinel = Saved(None)
        alive.add(ctx.sentinel)
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.sentinel is not None), None


@contextmanager
def reference_counts_only():
    """Without the collector of cycles: what is still alive then is held by someone, or by a cycle."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def watched_losses(net, seed=0):
    """Losses, all nodes of a function in their graphs, and the tensors that trunk and heads saved."""
    nodes, in_trunk, in_heads = weakref.WeakSet(), weakref.WeakSet(), weakref.WeakSet()

    def pack_into(alive):
        def pack(tensor):
            saved = Saved(tensor.detach())
            alive.add(saved)
            return saved

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)

    with pack_into(in_trunk):
        features = Node.apply(net.trunk(torch.randn(8, 4, generator=generator(seed))), nodes)
    with pack_into(in_heads):
        losses = [Node.apply((head(features) - 1).square().mean(), nodes) for head in net.heads]
    assert len(nodes) == TASKS + 1
    assert len(in_trunk) > 0 < len(in_heads)
    return losses, nodes, in_trunk, in_heads


WAYS = {
    "step": lambda optimizer, losses: optimizer.step(losses),
    "scaler": lambda optimizer, losses: optimizer.backward(losses, grad_scaler()),
    "accumulate": lambda optimizer, losses: optimizer.accumulate(losses),
}
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
@every_form
@pytest.mark.parametrize("done", [0, 1])
def test_a_step_frees_the_saved_tensors_of_the_trunk_and_without_losses_the_graph(form, way, done):
    """The last task's pass frees the trunk, while the caller still holds the losses; the rest goes with them."""
    net, optimizer = make(form)
    for seed in range(done):
        optimizer.step(net.losses(seed))
    with reference_counts_only():
        losses, nodes, in_trunk, in_heads = watched_losses(net)
        WAYS[way](optimizer, losses)
        assert len(in_trunk) == 0
        del losses
        assert (len(nodes), len(in_heads)) == (0, 0)


def poisoned(losses, fault):
    """A batch that is refused: by a loss, by a gradient, or by an exception in a hook."""
    if fault == "loss":
        losses[1] = losses[1] * math.nan
    elif fault == "gradient":
        losses[1] = losses[1] + (losses[1].detach() - losses[1]).sqrt()
    else:
        losses[1].register_hook(lambda gradient: {}["from a hook"])
    return losses


@every_way
@every_form
@pytest.mark.parametrize("mode", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("fault", ["loss", "gradient", "hook"])
def test_a_refused_batch_keeps_no_graph_alive(form, way, mode, fault):
    net, optimizer = make(form, nonfinite=mode)
    optimizer.step(net.losses())
    with reference_counts_only():
        losses, nodes, in_trunk, in_heads = watched_losses(net)
        with suppress(ValueError, RuntimeError, KeyError):
            WAYS[way](optimizer, poisoned(losses, fault))
        del losses
        # What an exception in a hook left in torch's own queue goes with the next pass, whatever that is.
        torch.ones(1, requires_grad=True).sum().backward()
        assert (len(nodes), len(in_trunk), len(in_heads)) == (0, 0, 0)


@every_form
def test_micro_batches_that_await_completion_hold_gradients_but_no_graph(form):
    net, optimizer = make(form)
    with reference_counts_only():
        alive = weakref.WeakSet()
        for seed in range(3):
            losses, nodes, in_trunk, in_heads = watched_losses(net, seed)
            optimizer.accumulate(losses)
            alive |= nodes | in_trunk | in_heads
            del losses
        assert len(alive) == 0
        optimizer.step()
    assert header_of(optimizer)["counts"] == [1] * TASKS


@every_form
def test_an_optimizer_that_is_dropped_is_freed_at_once(form):
    with reference_counts_only():
        net, optimizer = make(form)
        for seed in range(2):
            optimizer.step(net.losses(seed))
        seen = [weakref.ref(each) for each in (optimizer, net.trunk[0].weight, optimizer.last_balance.norms)]
        del net, optimizer
        assert [reference() for reference in seen] == [None] * 3
