"""FSDP2 (fully_shard): a step on sharded parameters is the step of one process on the whole batch."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import Blocks as Net
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_map

from balanced_optim import DualBalancedOptimizer

pytestmark = pytest.mark.cpu  # processes talk over gloo

TASKS, ROWS, STEPS = 3, 12, 4


# ------------------------------------------------- a network, its batches, one process


def batch(step):
    """Inputs (12, 5), and targets (12, 3)."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 5 + TASKS, generator=generator, dtype=torch.float64)
    return x[:, :5], x[:, 5:]


def rows_of(rank, size, uneven=False):
    """The rows of the batch that a rank has."""
    if not uneven:
        return torch.arange(ROWS).chunk(size)[rank]
    return torch.arange(ROWS).split({2: [3, 9], 4: [1, 2, 4, 5]}[size])[rank]


def losses_on(net, step, rows=slice(None)):
    """The task losses on some rows of batch number `step`, each task on a scale of its own."""
    x, y = batch(step)
    # Reentrant checkpoints want an input that needs a gradient.
    outputs = net(x[rows].requires_grad_())
    return [10.0**task * (output[:, 0] - y[rows, task]).square().mean() for task, output in enumerate(outputs)]


@dataclass(frozen=True)
class Case:
    """What a test varies."""

    parts: str = "blocks"
    reshard_after_forward: bool | None = None
    as_module: bool = False
    reentrant: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)
    absent: tuple[tuple[int, int], ...] = ()
    uneven: bool = False

    def has(self, step, losses):
        """The losses, without those of tasks that batch number `step` lacks."""
        return [None if (step, task) in self.absent else loss for task, loss in enumerate(losses)]


def balanced(net, case, **keywords):
    """A balanced Adam on all parameters of the network."""
    options = dict(case.options)
    if "norm_params" in options:
        options["norm_params"] = net.trunk[1]
    base = torch.optim.Adam(net.parameters(), lr=0.01)
    return DualBalancedOptimizer(base, net.trunk if case.as_module else net.trunk.parameters(), **options, **keywords)


def train_alone(case, steps=STEPS):
    """What one process makes of the whole batches."""
    net = Net(case.reentrant)
    optimizer = balanced(net, case)
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.step(case.has(step, losses_on(net, step)))
    return facts(net, optimizer)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def facts(net, optimizer):
    """Everything that training changes, whole: parameters, the averages and other state, the record of the step."""
    state = optimizer.state_dict()["state"]
    balance = optimizer.last_balance
    # Not the network's: those are plain tensors while they are gathered.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [name for name, _ in net.named_parameters()]
    return {
        **{name: whole(parameter) for name, parameter in zip(names, parameters, strict=True)},
        **{f"{key} {name}": whole(v) for key, e in state.items() for name, v in e.items() if torch.is_tensor(v)},
        **{name: getattr(balance, name).clone() for name in ("losses", "norms", "weights") if balance is not None},
    }


def assert_near(actual, expected, tolerance=1e-10):
    """Equal up to `tolerance` relative to the largest element of each tensor; NaN equals NaN."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        size = tensor.double().nan_to_num().abs().max().item() if tensor.numel() else 0.0
        torch.testing.assert_close(
            actual[name], tensor, rtol=0, atol=tolerance * size, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


# ------------------------------------------------- several processes


def shard(net, case, mesh=None, **options):
    """Wrap the network as `case.parts` says."""
    options |= {} if case.reshard_after_forward is None else {"reshard_after_forward": case.reshard_after_forward}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    if case.parts in ("blocks", "blocks and heads"):
        for block in net.trunk:
            fully_shard(block, mesh=mesh, **options)
    if case.parts == "trunk":
        fully_shard(net.trunk, mesh=mesh, **options)
    if case.parts == "blocks and heads":
        for head in net.heads:
            fully_shard(head, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def sharded(case, group=None, mesh=None):
    """The network, sharded, and its optimizer."""
    net = shard(Net(case.reentrant), case, mesh)
    return net, balanced(net, case, process_group=group or dist.group.WORLD)


def train(rank, size, case, steps=STEPS):
    """What `train_alone` does, by parameters that are sharded and on this rank's rows of the batches."""
    net, optimizer = sharded(case)
    return train_on(net, optimizer, rank, size, case, range(steps))


def train_on(net, optimizer, rank, size, case, steps):
    rows = rows_of(rank, size, case.uneven)
    for step in steps:
        optimizer.zero_grad()
        samples = {"samples": len(rows)} if case.uneven else {}
        losses = case.has(step, losses_on(net, step, rows))
        optimizer.step(losses, **samples)
        if any(loss is not None for loss in losses):
            assert is_sharded(net), "the step must leave the parameters sharded"
    return facts(net, optimizer)


def is_sharded(net):
    """Whether no parameter is gathered; FSDP2 shows gathered ones as plain tensors."""
    return all(isinstance(parameter, DTensor) for parameter in net.parameters())


def assert_same_as_alone(pool, case, job=train, tolerance=1e-10):
    """Every rank ends where one process ends."""
    expected = train_alone(case)
    for result in pool.run(job, case):
        assert_near(result, expected, tolerance)


@pytest.mark.parametrize(
    ("parts", "reshard", "as_module"),
    [
        ("blocks", True, True),
        ("blocks", False, True),
        ("blocks", None, False),
        ("trunk", None, True),
        ("trunk", False, False),
        ("blocks and heads", None, True),
        ("root", None, True),
        ("root", True, False),
    ],
)
def test_however_modules_are_wrapped_two_ranks_do_what_one_process_does(processes, parts, reshard, as_module):
    assert_same_as_alone(processes(2), Case(parts, reshard, as_module))


OPTIONS = {
    "beta-0": {"beta": 0.0},
    "constant beta": {"beta": 0.5, "beta_decay": 0.0},
    "max_weight": {"max_weight": 1.5},
    "max_weight, beta-0": {"max_weight": 1.5, "beta": 0.0},
    "fade_solved": {"fade_solved": True, "eps": 0.5},
    "no log, mean": {"log_transform": False, "norm_target": "mean"},
    "task_weights": {"task_weights": [1.0, 0.0, 3.0]},
    "bfloat16": {"ema_dtype": torch.bfloat16},
    "norm_params": {"norm_params": True},
    "refresh_every": {"norm_params": True, "refresh_every": 3},
    "refresh_every, beta-0, max_weight": {"norm_params": True, "refresh_every": 2, "beta": 0.0, "max_weight": 2.0},
}
SOME_ABSENT = ((1, 1), (2, 0), (2, 1), (2, 2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_form_of_the_method_is_the_same_on_two_ranks(processes, options):
    # Norms of averages in half precision are float32 numbers.
    tolerance = 1e-6 if "ema_dtype" in options else 1e-10
    # The first batch has all tasks, the second lacks one, and no rank has any for the third.
    case = Case(as_module="norm_params" in options, options=options, absent=SOME_ABSENT)
    assert_same_as_alone(processes(2), case, tolerance=tolerance)


@pytest.mark.parametrize("options", [{}, {"norm_params": True}], ids=["exact", "norm_params"])
def test_shards_of_uneven_size_on_four_ranks(processes, options):
    assert_same_as_alone(processes(4), Case(as_module=True, options=options, absent=SOME_ABSENT))


# ------------------------------------------------- batches, forms of FSDP2


def test_rows_that_are_split_unevenly_are_weighted_by_samples(processes):
    assert_same_as_alone(processes(2), Case(uneven=True))


def train_with_a_forward_pass_for_each_task(net, optimizer, rows):
    """As where every task has data of its own."""
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.step([losses_on(net, step + 10 * task, rows)[task] for task in range(TASKS)])
    return facts(net, optimizer)


def train_sharded_with_a_forward_pass_for_each_task(rank, size, case):
    net, optimizer = sharded(case)
    return train_with_a_forward_pass_for_each_task(net, optimizer, rows_of(rank, size))


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "parameters"])
def test_every_task_may_have_a_forward_pass_of_its_own(processes, as_module):
    case = Case(as_module=as_module)
    net = Net()
    expected = train_with_a_forward_pass_for_each_task(net, balanced(net, case), slice(None))
    for result in processes(2).run(train_sharded_with_a_forward_pass_for_each_task, case):
        assert_near(result, expected)


def labels(step):
    """Which rows have a label of each task (12, 3); task 1 in the first half only, task 2 in as few as none."""
    labelled = torch.ones(ROWS, TASKS, dtype=torch.bool)
    labelled[ROWS // 2 :, 1] = False
    labelled[step:, 2] = False
    return labelled


def losses_of_labels(net, step, rows, without_labels):
    """The losses over the rows that have labels, and how many these are."""
    x, y = batch(step)
    outputs, here, losses = net(x[rows]), labels(step)[rows], []
    for task, output in enumerate(outputs):
        errors = 10.0**task * (output[:, 0] - y[rows, task]).square()
        some = here[:, task].any() or without_labels == "the mean of nothing"
        losses.append(errors[here[:, task]].mean() if some else errors.mean())
    return losses, here.sum(0).tolist()


def train_on_labels(rank, size, without_labels):
    net, optimizer = sharded(Case(as_module=True))
    for step in range(STEPS):
        optimizer.zero_grad()
        losses, samples = losses_of_labels(net, step, rows_of(rank, size), without_labels)
        optimizer.step(losses, samples=samples)
    return facts(net, optimizer)


def train_alone_on_labels():
    net = Net()
    optimizer = balanced(net, Case())
    for step in range(STEPS):
        optimizer.zero_grad()
        losses, samples = losses_of_labels(net, step, torch.arange(ROWS), "the mean of all rows")
        optimizer.step([loss if count else None for loss, count in zip(losses, samples, strict=True)])
    return facts(net, optimizer)


every_lack_of_labels = pytest.mark.parametrize("without_labels", ["the mean of all rows", "the mean of nothing"])


@every_lack_of_labels
def test_a_rank_without_a_task_joins_with_zero_samples(processes, without_labels):
    expected = train_alone_on_labels()
    for result in processes(2).run(train_on_labels, without_labels):
        assert_near(result, expected)


@pytest.mark.parametrize(
    ("reentrant", "as_module", "options"),
    [(True, True, {}), (True, False, {"norm_params": True}), (False, True, {}), (False, False, {"norm_params": True})],
)
def test_activation_checkpoints(processes, reentrant, as_module, options):
    # Full passes are made in both forms, which reentrant checkpoints want; alone they could not be measured in part.
    expected = train_alone(Case(reentrant=False, options=options))
    case = Case(as_module=as_module, reentrant=reentrant, options=options)
    for result in processes(2).run(train, case):
        assert_near(result, expected)


def train_hybrid(rank, size, case):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net, optimizer = sharded(case, mesh=mesh)
    return train_on(net, optimizer, rank, size, case, range(STEPS))


@pytest.mark.parametrize("options", [{}, {"norm_params": True}], ids=["exact", "norm_params"])
def test_hybrid_sharding_on_a_mesh_of_two_by_two(processes, options):
    assert_same_as_alone(processes(4), Case(as_module=True, options=options, uneven=True), train_hybrid)


def tensor_parallel(case, group, **keywords):
    """The blocks' layers cut over pairs of ranks, and all parameters sharded over the other dimension of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = Net(**keywords)
    parallelize_module(net.trunk, mesh["tp"], {"0.linear": ColwiseParallel(), "1.linear": RowwiseParallel()})
    shard(net, case, mesh["dp"])
    return net, balanced(net, case, process_group=mesh["dp"].get_group() if group == "dp" else dist.group.WORLD)


def train_tensor_parallel(rank, size, case, group):
    net, optimizer = tensor_parallel(case, group)
    return train_on(net, optimizer, rank // 2, 2, case, range(STEPS))


@pytest.mark.parametrize(
    ("group", "options"),
    [("dp", {}), ("world", {}), ("world", {"beta": 0.0}), ("world", {"norm_params": True})],
    ids=["dp, exact", "world, exact", "world, beta-0", "world, norm_params"],
)
def test_tensor_parallel_layers_that_are_sharded_too(processes, options, group):
    case = Case(as_module=True, options=options, uneven=True)
    expected = train_alone(case)
    for result in processes(4).run(train_tensor_parallel, case, group):
        assert_near(result, expected)


def train_in_micro_batches(rank, size, without_labels):
    net, optimizer = sharded(Case(as_module=True))
    parts = [[1, 3, 2], [2, 1, 3]][rank]
    for step in range(STEPS):
        optimizer.zero_grad()
        *first, last = rows_of(rank, size).split(parts)
        for rows in first:
            losses, samples = losses_of_labels(net, step, rows, without_labels)
            optimizer.accumulate(losses, samples=samples)
        losses, samples = losses_of_labels(net, step, last, without_labels)
        optimizer.step(losses, samples=samples)
        assert is_sharded(net)
    return facts(net, optimizer)


@every_lack_of_labels
def test_micro_batches_of_uneven_size(processes, without_labels):
    expected = train_alone_on_labels()
    for result in processes(2).run(train_in_micro_batches, without_labels):
        assert_near(result, expected)


def train_without_reduction(rank, size, call):
    net, optimizer = sharded(Case())
    net.set_requires_gradient_sync(False)
    return attempt(getattr(optimizer, call), losses_on(net, 0, rows_of(rank, size)))


@pytest.mark.parametrize("call", ["accumulate", "step"])
def test_passes_that_fsdp_does_not_reduce_are_refused(processes, call):
    """FSDP2 keeps their gradients, and adds those of all tasks to the first task that it reduces."""
    for raised in processes(2).run(train_without_reduction, call):
        assert raised is not None
        assert "set_requires_gradient_sync" in raised


class Spoil(torch.autograd.Function):
    """The same number with a gradient that is not finite."""

    @staticmethod
    def forward(context, x):  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(context, gradient):  # noqa: ARG004
        return gradient * torch.inf


def train_scaled(net, optimizer, rows, spoilt):
    """Training with a scaler that halves its scale at the overflow in step 1 and raises it elsewhere."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = losses_on(net, step, rows)
        if step == 1 and spoilt:
            losses[1] = Spoil.apply(losses[1])
        optimizer.backward(losses, scaler=scaler)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return facts(net, optimizer) | {"scales": torch.tensor(scales)}


def train_sharded_and_scaled(rank, size, case):
    net, optimizer = sharded(case)
    return train_scaled(net, optimizer, rows_of(rank, size), spoilt=rank == 1)


@pytest.mark.parametrize("options", [{}, {"norm_params": True}], ids=["exact", "norm_params"])
def test_an_overflow_on_one_rank_lowers_the_scale_on_all(processes, options):
    case = Case(as_module=True, options=options)
    net = Net()
    expected = train_scaled(net, balanced(net, case), slice(None), spoilt=True)
    assert expected["scales"].tolist() == [1024, 512, 512, 1024]
    for result in processes(2).run(train_sharded_and_scaled, case):
        assert_near(result, expected)


def cosines(rank, size, case):
    net, optimizer = sharded(case)
    train_on(net, optimizer, rank, size, case, range(2))
    return optimizer.gradient_cosines()


def test_gradient_cosines_are_of_whole_gradients(processes):
    net = Net()
    optimizer = balanced(net, Case())
    for step in range(2):
        optimizer.zero_grad()
        optimizer.step(losses_on(net, step))
    for result in processes(2).run(cosines, Case()):
        torch.testing.assert_close(result, optimizer.gradient_cosines(), rtol=1e-10, atol=1e-10)


HALF = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True)


def train_in_half_precision(rank, size, by_hand):
    """bfloat16 parameters in the passes, float32 gradients: by the optimizer, or in the plainest way."""
    case = Case(as_module=True)
    net = shard(Net().float(), case, mp_policy=MixedPrecisionPolicy(**HALF))
    optimizer = balanced(net, case, process_group=dist.group.WORLD)
    averages = [[torch.zeros_like(p.to_local()) for p in net.trunk.parameters()] for _ in range(TASKS)]
    trunk, heads = list(net.trunk.parameters()), list(net.heads.parameters())
    kinds = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = [loss.float() for loss in losses_on(net, step, rows_of(rank, size))]
        if by_hand:
            step_by_hand(optimizer.base_optim, losses, trunk, heads, averages, 0.9 / (step + 1) ** 0.5)
        else:
            optimizer.step(losses)
        kinds |= {parameter.grad.dtype for parameter in trunk + heads}
    return {name: whole(parameter) for name, parameter in net.named_parameters()}, kinds


def step_by_hand(base, losses, trunk, heads, averages, beta):
    """The method on sharded parameters, for batches that every rank has as many rows of."""
    means = torch.stack(losses).detach().double()
    dist.all_reduce(means)
    means /= dist.get_world_size()
    squares, head_gradients = torch.zeros(TASKS, dtype=torch.float64), [None] * len(heads)
    for task, loss in enumerate(losses):
        (loss / (means[task] + 1e-8)).backward(retain_graph=True)
        for average, parameter in zip(averages[task], trunk, strict=True):
            average.mul_(beta).add_(parameter.grad.to_local(), alpha=1 - beta)
            squares[task] += average.double().square().sum()
            parameter.grad = None
        for index, parameter in enumerate(heads):
            head_gradients[index] = head_gradients[index] if parameter.grad is None else parameter.grad
            parameter.grad = None
    dist.all_reduce(squares)
    weights = (squares.max() / squares).sqrt()
    for index, parameter in enumerate(trunk):
        combined = sum(weights[task] * averages[task][index] for task in range(TASKS)).float()
        parameter.grad = DTensor.from_local(
            combined, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    for parameter, gradient in zip(heads, head_gradients, strict=True):
        parameter.grad = gradient
    base.step()


def test_mixed_precision_keeps_gradients_in_float32(processes):
    by_hand = processes(2).run(train_in_half_precision, True)
    for (parameters, kinds), (expected, _) in zip(
        processes(2).run(train_in_half_precision, False), by_hand, strict=True
    ):
        assert kinds == {torch.float32}
        assert_near(parameters, expected, 1e-5)


# ------------------------------------------------- what FSDP2 sends


def messages(rank, size, case):
    """How often the last of some steps gathers parameters and scatters gradients: in the forward pass, in the step."""
    net, optimizer = sharded(case)
    for step in range(2):
        optimizer.zero_grad()
        with CommDebugMode() as forward:
            losses = losses_on(net, step, rows_of(rank, size))
        with CommDebugMode() as passes:
            optimizer.step(losses)
    return [
        sum(number for name, number in mode.get_comm_counts().items() if kind in str(name))
        for mode, kind in ((forward, "allgather_base"), (passes, "allgather_base"), (passes, "reduce_scatter_base"))
    ]


# `trunk` parts of the trunk are wrapped, and the root, which holds the heads: every pass gathers it but the first, to
# which the forward pass leaves it.
@pytest.mark.parametrize(
    ("parts", "options", "trunk", "passes"),
    [("blocks", {}, 2, 3), ("trunk", {"norm_params": True}, 1, 4)],
    ids=["exact", "norm_params"],
)
def test_a_trunk_given_as_a_module_stays_gathered_between_passes(processes, parts, options, trunk, passes):
    def count(**keywords):
        first, *others = processes(2).run(messages, Case(parts, options=options, **keywords))
        assert others == [first]
        return first

    assert count(as_module=False) == [trunk + 1, trunk * passes + passes - 1, (trunk + 1) * passes]
    assert count(as_module=True) == [trunk + 1, trunk + passes - 1, (trunk + 1) * passes]
    assert count(as_module=True, reshard_after_forward=False) == [trunk + 1, passes - 1, (trunk + 1) * passes]


# ------------------------------------------------- failures


def attempt(call, *arguments, **keywords):
    """What `call` raises, as text; None if it raises nothing."""
    try:
        call(*arguments, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def spoil(losses, how):
    """Make task 1 unusable."""
    losses[1] = Spoil.apply(losses[1]) if how == "gradient" else losses[1] * torch.nan


def train_with_a_bad_batch(net, optimizer, rows, how, spoilt=True):
    """Batch 1 is bad.

    Returns what was raised for it, whether it was skipped, whether it left a `.grad`, what it changed, whether the
    trunk was sharded after it, and the facts at the end.
    """
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = losses_on(net, step, rows)
        if step == 1:
            before = facts(net, optimizer)
            if spoilt:
                spoil(losses, how)
            raised = attempt(optimizer.step, losses)
            after = facts(net, optimizer)
            skipped = optimizer.last_balance.skipped
            filled = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
            changed = [name for name in after if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())]
            trunk_is_sharded = is_sharded(net.trunk)
        else:
            optimizer.step(losses)
    return raised, skipped, filled, changed, trunk_is_sharded, facts(net, optimizer)


def train_sharded_with_a_bad_batch(rank, size, case, how):
    net, optimizer = sharded(case)
    return train_with_a_bad_batch(net, optimizer, rows_of(rank, size), how, spoilt=rank == 1)


@pytest.mark.parametrize(
    ("how", "options"),
    [("loss", {}), ("gradient", {}), ("loss", {"beta": 0.0}), ("gradient", {"norm_params": True})],
    ids=["loss", "gradient", "loss, beta-0", "gradient, norm_params"],
)
def test_a_bad_batch_on_one_rank_is_refused_on_all(processes, how, options):
    case = Case(as_module=True, reshard_after_forward=False, options=options)
    net = Net()
    *_, expected = train_with_a_bad_batch(net, balanced(net, case), slice(None), how)
    results = processes(2).run(train_sharded_with_a_bad_batch, case, how)
    for raised, _, filled, changed, trunk_is_sharded, result in results:
        if how == "loss":
            assert raised.startswith(
                "ValueError: loss of task '1' must be finite, got nan on rank 1; nothing was changed"
            )
        else:
            assert raised.startswith("RuntimeError: gradient of task '1' must be finite")
        assert not filled
        assert trunk_is_sharded
        # Behind a finite loss only task 1 is refused: task 0 has taken its gradient in by then.
        assert all("task_ema_0" in name for name in changed)
        assert not changed or how == "gradient"
        assert_near(result, expected)


@pytest.mark.parametrize(("how", "mode"), [("loss", "skip"), ("loss", "ignore"), ("gradient", "ignore")])
def test_a_bad_batch_on_one_rank_is_left_out_on_all(processes, how, mode):
    case = Case(as_module=True, options={"nonfinite": mode})
    net = Net()
    *_, expected = train_with_a_bad_batch(net, balanced(net, case), slice(None), how)
    for raised, skipped, *_, trunk_is_sharded, result in processes(2).run(train_sharded_with_a_bad_batch, case, how):
        assert raised is None
        assert skipped == (mode == "skip")
        assert trunk_is_sharded
        assert_near(result, expected)


class Fails(Exception):
    pass


def train_with_a_hook_that_fails(net, optimizer, rows, where):
    """In the pass of task 1 of batch 1 a hook raises: at the start, or between the two blocks."""
    for step in range(STEPS):
        optimizer.zero_grad()
        handle, calls = None, []

        def fail_at_the_second_call(_, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise Fails("a hook of the user")

        def watch(module, given, output, hook=fail_at_the_second_call):
            output.register_hook(hook)

        if step == 1 and where == "between the blocks":
            handle = net.trunk[0].register_forward_hook(watch)
        losses = losses_on(net, step, rows)
        if step == 1 and where == "at the start":
            losses[0].register_hook(fail_at_the_second_call)
            losses[1].register_hook(fail_at_the_second_call)
        raised = attempt(optimizer.step, losses)
        assert raised == ("Fails: a hook of the user" if step == 1 else None), raised
        if handle is not None:
            handle.remove()
        if step == 1 and hasattr(net, "reset_iter_state"):
            net.reset_iter_state()
    return facts(net, optimizer)


def train_sharded_with_a_hook_that_fails(rank, size, case, where):
    net, optimizer = sharded(case)
    return train_with_a_hook_that_fails(net, optimizer, rows_of(rank, size), where)


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="this FSDP2 cannot go on after a failed pass")
@pytest.mark.parametrize(("where", "as_module"), [("at the start", False), ("between the blocks", True)])
def test_training_goes_on_after_a_hook_failed_on_every_rank(processes, where, as_module):
    # With heads in the root's part FSDP2 itself would add what they got in the failed pass to the next one.
    case = Case("blocks and heads", as_module=as_module)
    net = Net()
    expected = train_with_a_hook_that_fails(net, balanced(net, case), slice(None), where)
    for result in processes(2).run(train_sharded_with_a_hook_that_fails, case, where):
        assert_near(result, expected)


def train_with_a_task_on_one_rank(rank, size, case):
    net, optimizer = sharded(case)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = losses_on(net, step, rows_of(rank, size))
        if step == 1:
            before = facts(net, optimizer)
            raised = attempt(optimizer.step, losses if rank == 0 else [losses[0], None, losses[2]])
            kept = all(torch.equal(before[name], value) for name, value in facts(net, optimizer).items())
            trunk_is_sharded = is_sharded(net.trunk)
        else:
            optimizer.step(losses)
    return raised, kept, trunk_is_sharded, facts(net, optimizer)


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_a_task_that_one_rank_lacks_is_refused_on_all_with_advice(processes, reshard):
    case = Case(as_module=True, reshard_after_forward=reshard)
    net = Net()
    optimizer = balanced(net, case)
    for step in (0, *range(2, STEPS)):
        optimizer.zero_grad()
        optimizer.step(losses_on(net, step))
    for raised, kept, trunk_is_sharded, result in processes(2).run(train_with_a_task_on_one_rank, case):
        assert raised.startswith("ValueError: loss of task '1' must be on every rank or on none")
        assert "got it on [0] but not on rank 1" in raised
        assert "samples=0" in raised
        assert kept
        assert trunk_is_sharded
        assert_near(result, facts(net, optimizer))


# ------------------------------------------------- what cannot work says so


def no_group(net):
    return shard(net, Case()), {"process_group": None}


def plain_heads(net):
    fully_shard(net.trunk)
    return net, {}


def a_plain_block(net):
    fully_shard(net.trunk[1])
    return net, {}


def plain_trunk(net):
    for head in net.heads:
        fully_shard(head)
    return net, {}


def tensor_parallel_trunk(net):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(net.trunk, mesh, {"0.linear": ColwiseParallel(), "1.linear": RowwiseParallel()})
    return net, {}


def tensor_parallel_without_a_group(net):
    return tensor_parallel_trunk(net)[0], {"process_group": None}


def first_step(rank, size, prepare, as_module):
    """The error of the first step, and whether a parameter changed."""
    net, options = prepare(Net())
    optimizer = balanced(net, Case(as_module=as_module), **{"process_group": dist.group.WORLD} | options)
    before = facts(net, optimizer)
    raised = attempt(optimizer.step, losses_on(net, 0, rows_of(rank, size)))
    return raised, all(torch.equal(before[name], value) for name, value in facts(net, optimizer).items())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (no_group, "process_group is needed where parameters are DTensors, got None"),
        (plain_heads, "must all be sharded or all be plain"),
        (a_plain_block, "must all be sharded or all be plain"),
        (plain_trunk, "must all be sharded or all be plain"),
        (tensor_parallel_trunk, "must all be sharded or all be plain"),
        (tensor_parallel_without_a_group, "process_group is needed where parameters are DTensors, got None"),
    ],
)
def test_the_first_step_refuses(processes, prepare, message):
    for raised, kept in processes(2).run(first_step, prepare, True):
        assert raised is not None
        assert raised.startswith("ValueError: ")
        assert message in raised
        assert kept


def step_of_an_early_optimizer(rank, size, as_module, grouped):
    net = Net()
    optimizer = balanced(net, Case(as_module=as_module), process_group=dist.group.WORLD if grouped else None)
    shard(net, Case())
    return attempt(optimizer.step, losses_on(net, 0, rows_of(rank, size)))


def balance_an_early_optimizer(rank, size):
    net = Net()
    base = torch.optim.Adam(net.parameters())
    shard(net, Case())
    return attempt(DualBalancedOptimizer, base, net.trunk, process_group=dist.group.WORLD)


@pytest.mark.parametrize(("as_module", "grouped"), [(True, True), (False, True), (True, False)])
def test_an_optimizer_from_before_fully_shard_says_so(processes, as_module, grouped):
    for raised in processes(2).run(step_of_an_early_optimizer, as_module, grouped):
        assert raised is not None
        assert "fully_shard" in raised


def test_a_base_optimizer_from_before_fully_shard_says_so(processes):
    for raised in processes(2).run(balance_an_early_optimizer):
        assert raised is not None
        assert "fully_shard" in raised


def step_with_part_of_the_mesh(rank, size, part):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net, optimizer = sharded(Case(), group=mesh[part].get_group(), mesh=mesh)
    return attempt(optimizer.step, losses_on(net, 0, rows_of(rank, size)))


@pytest.mark.parametrize("part", ["replicate", "shard"])
def test_a_group_that_is_a_part_of_the_mesh_is_refused(processes, part):
    for raised in processes(4).run(step_with_part_of_the_mesh, part):
        assert raised is not None
        assert "process_group must hold the ranks that the batch is split over" in raised


# ------------------------------------------------- checkpoints


SAVED_AFTER = 2
# From the weights a fresh optimizer knows how many tasks there are, and makes room for their averages.
CHECKPOINTED = Case(options={"task_weights": [1.0, 2.0, 3.0]})
REFRESHED = Case(as_module=True, options={"task_weights": [1.0, 2.0, 3.0], "norm_params": True, "refresh_every": 3})


def make(kind, case, seed=0):
    """The module to call and to save, its network, and the optimizer."""
    net = Net(seed=seed)
    if kind == "alone":
        return net, net, balanced(net, case)
    if kind == "fully_shard":
        return shard(net, case), net, balanced(net, case, process_group=dist.group.WORLD)
    ddp = nn.parallel.DistributedDataParallel(net)
    return ddp, net, balanced(net, case, process_group=dist.group.WORLD)


def go_on(module, net, optimizer, rank, size, steps):
    for step in steps:
        optimizer.zero_grad()
        optimizer.step(losses_on(module, step, rows_of(rank, size)))
    return facts(net, optimizer)


def train_and_save(rank, size, kind, case, folder):
    """Save in the middle of a training of which everything at the end is returned."""
    module, net, optimizer = make(kind, case)
    go_on(module, net, optimizer, rank, size, range(SAVED_AFTER))
    model, state = get_state_dict(module, optimizer)
    distributed_checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    return go_on(module, net, optimizer, rank, size, range(SAVED_AFTER, STEPS))


def load_and_train(rank, size, kind, case, folder):
    """The second half of the training, from the files and a network of other numbers."""
    module, net, optimizer = make(kind, case, seed=1)
    model, state = get_state_dict(module, optimizer)
    saved = {"model": model, "optimizer": state}
    distributed_checkpoint.load(saved, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return go_on(module, net, optimizer, rank, size, range(SAVED_AFTER, STEPS))


def on_each_rank(processes, job, kind, size, case, folder):
    return [job(0, 1, kind, case, folder)] if kind == "alone" else processes(size).run(job, kind, case, folder)


@pytest.fixture(scope="module")
def saved(processes, tmp_path_factory):
    """``saved(kind, size, case)``: the folder of a checkpoint, and the end of the training that wrote it."""
    known = []

    def of(kind, size, case):
        for key, folder, ends in known:
            if key == (kind, size, case):
                return folder, ends
        folder = str(tmp_path_factory.mktemp("checkpoint"))
        known.append(((kind, size, case), folder, on_each_rank(processes, train_and_save, kind, size, case, folder)))
        return known[-1][1:]

    return of


@pytest.mark.parametrize(
    ("case", "writer", "reader"),
    [
        (CHECKPOINTED, ("fully_shard", 2), ("fully_shard", 2)),
        (CHECKPOINTED, ("fully_shard", 2), ("fully_shard", 4)),
        (CHECKPOINTED, ("fully_shard", 4), ("fully_shard", 2)),
        (CHECKPOINTED, ("fully_shard", 2), ("alone", 1)),
        (CHECKPOINTED, ("alone", 1), ("fully_shard", 2)),
        (CHECKPOINTED, ("data parallel", 2), ("fully_shard", 2)),
        (CHECKPOINTED, ("fully_shard", 2), ("data parallel", 2)),
        (REFRESHED, ("fully_shard", 2), ("fully_shard", 2)),
        (REFRESHED, ("fully_shard", 2), ("fully_shard", 4)),
    ],
    ids=lambda what: f"{what[0]} on {what[1]}" if isinstance(what, tuple) else ", ".join(what.options),
)
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_a_checkpoint_moves_between_numbers_of_processes(processes, saved, case, writer, reader):
    folder, ends = saved(*writer, case)
    expected = train_alone(case)
    for result in on_each_rank(processes, load_and_train, *reader, case, folder):
        assert_near(result, expected)
        if reader == writer:
            assert_near(result, ends[0], 0.0)


def copies(state):
    """A state dict in memory of its own: torch.optim takes loaded tensors over, and here two optimizers go on."""
    return tree_map(lambda value: value.clone() if torch.is_tensor(value) else value, state)


def hand_over(rank, size, case, form):
    """The second half of a training by another optimizer, and the same by the one that began."""
    module, net, optimizer = make("fully_shard", case)
    go_on(module, net, optimizer, rank, size, range(SAVED_AFTER))
    other, other_net, resumed = make("fully_shard", case, seed=1)
    full, offloaded = form in ("full", "offloaded"), form == "offloaded"
    saving = StateDictOptions(full_state_dict=full, cpu_offload=offloaded)
    loading = StateDictOptions(full_state_dict=full, broadcast_from_rank0=offloaded)
    if form == "both at once":
        model, state = copies(get_state_dict(module, optimizer))
        set_state_dict(other, resumed, model_state_dict=model, optim_state_dict=state)
    else:
        set_model_state_dict(other, get_model_state_dict(module, options=saving), options=loading)
        state = copies(get_optimizer_state_dict(module, optimizer, options=saving))
        in_parts = any(isinstance(v, DTensor) for entry in state.get("state", {}).values() for v in entry.values())
        assert in_parts == (not full)
        assert (state == {}) == (offloaded and rank > 0), "with both options rank 0 alone has the state"
        set_optimizer_state_dict(other, resumed, state, options=loading)
    steps = range(SAVED_AFTER, STEPS)
    return go_on(other, other_net, resumed, rank, size, steps), go_on(module, net, optimizer, rank, size, steps)


@pytest.mark.parametrize("form", ["in parts", "both at once", "full", "offloaded"])
def test_a_state_dict_is_handed_to_a_fresh_optimizer(processes, form):
    for result, expected in processes(2).run(hand_over, CHECKPOINTED, form):
        assert_near(result, expected, 0.0)


def hand_over_tensor_parallel(rank, size, form):
    """As `hand_over`. A full state dict is cut by torch itself, which wants even pieces of these layers."""
    net, optimizer = tensor_parallel(CHECKPOINTED, "world", width=32)
    train_on(net, optimizer, rank // 2, 2, CHECKPOINTED, range(SAVED_AFTER))
    options = StateDictOptions(full_state_dict=form == "full")
    model, state = copies(get_state_dict(net, optimizer, options=options))
    other, resumed = tensor_parallel(CHECKPOINTED, "world", width=32, seed=1)
    set_state_dict(other, resumed, model_state_dict=model, optim_state_dict=state, options=options)
    steps = range(SAVED_AFTER, STEPS)
    return (
        train_on(other, resumed, rank // 2, 2, CHECKPOINTED, steps),
        train_on(net, optimizer, rank // 2, 2, CHECKPOINTED, steps),
    )


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_a_state_dict_of_tensor_parallel_layers_is_handed_over(processes, form):
    for result, expected in processes(4).run(hand_over_tensor_parallel, form):
        assert_near(result, expected, 0.0)
