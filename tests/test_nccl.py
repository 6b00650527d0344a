"""Ranks on GPUs: the step of one process on the whole batch, through nccl; on a CPU the same program runs over gloo."""

import copy

import pytest
import torch
import torch.distributed as dist
from networks import Net
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from balanced_optim import DualBalancedOptimizer

pytestmark = pytest.mark.cpu  # it chooses its devices itself

RANKS = 2
STEPS = 4
FORMS = {
    "whole": {},
    "beta 0": {"beta": 0.0},
    "one backward": {"norm_params": True},
    "ignore": {"nonfinite": "ignore"},
}
gpus = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs a GPU for each rank")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, gpus])])
def test_ranks_take_the_step_of_one_process(device, tmp_path):
    arguments = (device, f"file://{tmp_path}/store")
    context = torch.multiprocessing.spawn(follow, arguments, nprocs=RANKS, join=False)
    # False while some rank has not ended; a rank that fails raises here.
    assert any(context.join(timeout=30) for _ in range(4)), "the ranks did not end in time"


def follow(rank, device, store):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=store, rank=rank, world_size=RANKS)
    start = Net(tasks=3).to(device, torch.float64)
    for options in FORMS.values():
        alone = train(copy.deepcopy(start), None, rank, options)
        replicas = copy.deepcopy(start)
        compare(train(replicas, DistributedDataParallel(replicas), rank, options), alone)
        shards = copy.deepcopy(start)
        mesh = dist.device_mesh.init_device_mesh(device, (RANKS,))
        for module in (shards.trunk[0], shards):
            fully_shard(module, mesh=mesh)
        compare(train(shards, shards, rank, options), alone)
    dist.destroy_process_group()


def train(net, call, rank, options):
    """A few steps on this rank's rows of each batch, or, without `call`, alone on all of them."""
    options = dict(options)
    if "norm_params" in options:
        options["norm_params"] = net.trunk[0]
    if call is not None:
        options["process_group"] = dist.group.WORLD
    optimizer = DualBalancedOptimizer(torch.optim.Adam(net.parameters(), lr=0.01), net.trunk, **options)
    for step in range(STEPS):
        rows = torch.randn(4 * RANKS, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        rows = rows if call is None else rows[4 * rank : 4 * rank + 4]
        outputs = (net if call is None else call)(rows.to(next(net.parameters()).device))
        optimizer.zero_grad()
        optimizer.step([10.0**task * (output - 1).square().mean() for task, output in enumerate(outputs)])
    return net


def compare(net, alone):
    for (name, parameter), expected in zip(net.named_parameters(), alone.parameters(), strict=True):
        found = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-10, atol=1e-12, msg=name)
