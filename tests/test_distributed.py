"""Several processes with replicated parameters: the step of one process on the whole batch, and no rank left waiting.

Jobs run on every rank of a pool (see processes.py). What they compare with is trained in the same process: the
optimizer without a process group, or the textbook oracle, on the batches of all ranks together.
"""

import copy
import hashlib
import json
import pickle
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import networks
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import assert_same, header_of, named
from modes import journal
from oracle import Oracle
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from balanced_optim import DualBalancedOptimizer

pytestmark = pytest.mark.cpu  # processes talk over gloo

TASKS = 3
STEPS = 6
EXACT = 1e-10
FEATURES = 8

# ------------------------------------------------- networks


class Net(networks.Net):
    """Two shared layers and a head a task; `side` belongs to the trunk and is used by the last task only."""

    def __init__(self, tasks=TASKS, dtype=torch.float64):
        super().__init__(tasks, (FEATURES, 7, 6), side=True, dtype=dtype)


class Odd(nn.Module):
    """A trunk of parameters hard to cut into parts: no dimension, one row, complex, channels_last, bfloat16."""

    def __init__(self, narrow):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.trunk = nn.Module()
            self.trunk.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
            self.trunk.row = nn.Parameter(torch.randn(1, 6, dtype=torch.float64))
            self.trunk.spectrum = nn.Parameter(torch.randn(5, 6, dtype=torch.complex128))
            kernel = torch.randn(6, 2, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last)
            self.trunk.kernel = nn.Parameter(kernel)
            self.trunk.phase = nn.Parameter(torch.tensor(0.3 + 0.2j, dtype=torch.complex128))
            if narrow:
                self.trunk.narrow = nn.Parameter(torch.randn(6, FEATURES).bfloat16())
            self.heads = nn.ModuleList(nn.Linear(6, 1, dtype=torch.float64) for _ in range(TASKS))

    def forward(self, x):
        trunk = self.trunk
        waves = (x[:, :5].to(torch.complex128) @ trunk.spectrum * trunk.phase).abs()
        image = nn.functional.conv2d(x.reshape(-1, 2, 2, 2), trunk.kernel).flatten(1)
        features = trunk.scale * (waves + image) + trunk.row
        if hasattr(trunk, "narrow"):
            features = features + x @ trunk.narrow.double().t()
        return [head(torch.tanh(features)) for head in self.heads]


class Normalised(Net):
    """With batch normalisation, whose buffers each forward pass changes; `seen` holds them as each pass found them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES, dtype=torch.float64)
        self.seen = []

    def forward(self, x):
        self.seen.append(self.norm.running_mean.tolist())
        return super().forward(self.norm(x))


# ------------------------------------------------- batches
# A layout says which rows of a step's data every rank has for every task, in one or more micro-batches:
# layout(step, size, tasks)[micro_batch][rank][task] is a list of row numbers, empty where the rank lacks the task.

ROWS = 16
CUTS = {1: [16], 2: [5, 11], 3: [2, 5, 9], 4: [1, 3, 5, 7]}


def cut(sizes):
    ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
    return [list(range(end - length, end)) for end, length in zip(ends, sizes, strict=True)]


def even(step, size, tasks):
    """As many rows on every rank."""
    return [[[rows] * tasks for rows in cut([12 // size] * size)]]


def uneven(step, size, tasks):
    return [[[rows] * tasks for rows in cut(CUTS[size])]]


def labelled(step, size, tasks):
    """Not every row has a label for every task."""
    return [[[rows[task % 2 :] or rows for task in range(tasks)] for rows in cut(CUTS[size])]]


def gaps(step, size, tasks):
    """Tasks that are absent on some ranks, on all, and ranks that have none."""
    [batch] = uneven(step, size, tasks)
    lacks = [
        lambda rank, task: task == 2,
        lambda rank, task: False,
        lambda rank, task: task == 1 and rank == 0,
        lambda rank, task: task == 0 or (task == 1 and rank > 0),
        lambda rank, task: rank == size - 1,
        lambda rank, task: rank % tasks != task,
    ][step % 6]
    return [[[[] if lacks(rank, task) else rows for task, rows in enumerate(own)] for rank, own in enumerate(batch)]]


def even_gaps(step, size, tasks):
    """The same gaps with as many rows wherever a task is."""
    [batch], [full] = gaps(step, size, tasks), even(step, size, tasks)
    return [[[full[r][t] if batch[r][t] else [] for t in range(tasks)] for r in range(size)]]


def micro(step, size, tasks):
    """Three micro-batches with other numbers of rows on each rank, some without a task, the last without rank 1."""
    first, second, third = [], [], []
    for rank, rows in enumerate(cut(CUTS[size])):
        middle = len(rows) // 2
        first.append([rows[:middle] if (step + rank + task) % 3 else [] for task in range(tasks)])
        second.append([rows[middle:]] * tasks)
        third.append([rows[:1] if rank != 1 and task != 1 else [] for task in range(tasks)])
    return [first, second, third]


def halves(step, size, tasks):
    """Two micro-batches, everything in both."""
    parts = [(rows[: len(rows) // 2], rows[len(rows) // 2 :]) for rows in cut(CUTS[size])]
    return [[[part[half]] * tasks for part in parts] for half in range(2)]


def as_they_are(values):
    return values


UNEQUAL = {uneven, labelled, gaps, micro, halves}


def data(step, dtype=torch.float64):
    """The rows of a step."""
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def loss_of(task, outputs):
    """A mean over rows, on a scale of each task's own."""
    return 10.0 ** (task % 4) * (outputs - 1 - task % 5).square().mean()


# ------------------------------------------------- training, on one rank or alone


def unchanged(values, run):
    return values


@dataclass(frozen=True)
class Spoil:
    """What goes wrong in a step: functions of the network's outputs, or of the losses, and of the run."""

    outputs: Any = unchanged
    losses: Any = unchanged


NOTHING = Spoil()
BASES = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


@dataclass
class Run:
    """A network in training on one rank's rows, or, with no rank, on those of all ranks together.

    Args:
        layout: what rows each rank has.
        size: the number of ranks.
        rank: this one, None for a run without a process group.
        options: of the optimizer; `norm_params` as "last" (layer) or "all" (of the trunk).
        group: the process group, by default that of all ranks.
        wrapper: options of DistributedDataParallel, None for none; `no_sync` is ours.
        form: what to make of the list of losses.
        scaled: train under a GradScaler.
    """

    layout: Any
    size: int
    rank: int | None = None
    options: dict = field(default_factory=dict)
    net: Any = Net
    base: str = "adam"
    group: Any = None
    wrapper: dict | None = None
    form: Any = as_they_are
    scaled: bool = False
    dtype: torch.dtype = torch.float64

    def __post_init__(self):
        self.net, options, wrapper = self.net(), dict(self.options), dict(self.wrapper or {})
        if "norm_params" in options:
            options["norm_params"] = {"last": self.net.trunk[2], "all": self.net.trunk}[options["norm_params"]]
        self.tasks = len(self.net.heads)
        self.together = nullcontext
        self.call = self.net
        if self.rank is not None:
            options |= {"process_group": self.group or dist.group.WORLD}
            if self.wrapper is not None:
                no_sync = wrapper.pop("no_sync", False)
                self.call = DistributedDataParallel(self.net, **wrapper)
                self.together = self.call.no_sync if no_sync else nullcontext
        self.optimizer = DualBalancedOptimizer(BASES[self.base](self.net.parameters()), self.net.trunk, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2) if self.scaled else None

    def rows(self, step):
        """For each micro-batch this rank's rows of every task; alone there is one batch of all rows."""
        batches = self.layout(step, self.size, self.tasks)
        if self.rank is not None:
            return [batch[self.rank] for batch in batches]
        return [[[row for batch in batches for own in batch for row in own[task]] for task in range(self.tasks)]]

    @property
    def share(self):
        """What part of the rows here comes from rank 1's last micro-batch, if that rank is not this one."""
        if self.rank is not None:
            return 1.0
        batches = self.layout(0, self.size, 1)
        return len(batches[-1][1][0]) / sum(len(own[0]) for batch in batches for own in batch)

    def losses(self, step, rows, spoil=NOTHING):
        known = sorted({row for own in rows for row in own})
        if not known:
            return spoil.losses([None] * self.tasks, self)
        outputs = spoil.outputs(self.call(data(step, self.dtype)[known]), self)
        places = [[known.index(row) for row in own] for own in rows]
        losses = [loss_of(task, outputs[task][own]) if own else None for task, own in enumerate(places)]
        return spoil.losses(losses, self)

    def step(self, step):
        """Everything that one step takes, as a training loop writes it."""
        self.optimizer.zero_grad()
        self.take(step)

    def take(self, step, early=NOTHING, late=NOTHING):
        """A step that may go wrong: in every micro-batch but the last, or in the last."""
        with self.together():
            *earlier, last = self.rows(step)
            for rows in earlier:
                losses = self.losses(step, rows, early)
                self.optimizer.accumulate(self.form(losses), self.scaler, **self.samples(rows))
            losses = self.losses(step, last, late)
            if self.scaler is None:
                self.optimizer.step(self.form(losses), **self.samples(last))
                return
            self.optimizer.backward(self.form(losses), self.scaler, **self.samples(last))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def samples(self, rows):
        """Given only where it matters."""
        return (
            {"samples": self.form([len(own) for own in rows])}
            if self.rank is not None and self.layout in UNEQUAL
            else {}
        )


# ------------------------------------------------- comparing


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def here(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_close(actual, expected, tolerance, where):
    """Equal to within `tolerance` of the largest entry; NaN equals NaN."""
    assert (actual is None) == (expected is None), f"{where}: {actual} against {expected}"
    if expected is None:
        return
    actual, expected = whole(actual).detach(), expected.detach()
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), where
    wide = torch.promote_types(expected.dtype, torch.float64)
    assert torch.equal(actual.isnan(), expected.isnan()), f"{where}: {actual} against {expected}"
    difference = (actual.to(wide) - expected.to(wide)).nan_to_num().abs().max().item()
    limit = tolerance * expected.to(wide).nan_to_num().abs().max().item()
    assert difference <= limit, f"{where}: differs by {difference}, allowed are {limit}"


def averages_in(state):
    """The averages in a state dict by parameter and name."""
    state = state["state"]
    return {
        (position, name): entry[name]
        for position, entry in state.items()
        for name in entry
        if name.startswith("task_ema")
    }


def assert_equal(ours, alone, tolerance, where):
    """Parameters, gradients and record of two runs."""
    pairs = zip(ours.net.named_parameters(), alone.net.parameters(), strict=True)
    for (name, parameter), expected in pairs:
        assert_close(parameter, expected, tolerance, f"{where}, {name}")
        assert_close(parameter.grad, expected.grad, tolerance, f"{where}, gradient of {name}")
        if expected.grad is not None:
            assert parameter.grad.stride() == expected.grad.stride(), f"{where}, gradient of {name}"
    balance, expected = ours.optimizer.last_balance, alone.optimizer.last_balance
    assert (balance is None) == (expected is None), where
    if expected is not None:
        assert (balance.tasks, balance.skipped) == (expected.tasks, expected.skipped), where
        for name in ("losses", "norms", "weights"):
            assert_close(getattr(balance, name), getattr(expected, name), tolerance, f"{where}, {name}")


def assert_equal_states(ours, alone, tolerance, where):
    """Counts, names and averages of two runs."""
    saved, expected = ours.optimizer.state_dict(), alone.optimizer.state_dict()
    assert header_of(saved) == header_of(expected), where
    averages, expected = averages_in(saved), averages_in(expected)
    assert averages.keys() == expected.keys(), where
    for key in expected:
        assert_close(averages[key], expected[key], tolerance, f"{where}, {key}")


def snapshot(run):
    """Copies of everything a step may change on this rank."""
    state = run.optimizer.state_dict()
    entries = {key: {name: here(value) for name, value in entry.items()} for key, entry in state["state"].items()}
    return copy.deepcopy(
        {
            "parameters": [parameter.detach() for parameter in run.net.parameters()],
            "gradients": [parameter.grad for parameter in run.net.parameters()],
            "state": entries,
            "header": header_of(state),
        }
    )


def digest(run):
    """The bytes of all parameters and gradients in short."""
    found = hashlib.sha256()
    for parameter in run.net.parameters():
        for tensor in (parameter.detach(), parameter.grad):
            if tensor is not None:
                found.update(tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ------------------------------------------------- the step of one process


def follow(rank, size, *groups):
    """For each (case, ways to share it): train on all ranks and alone; after every step both are the same."""
    for case, ways in groups:
        try:
            follow_one(rank, size, ways, **case)
        except BaseException as failure:
            failure.add_note(f"in the case {case}")
            raise


def follow_one(rank, size, ways, layout=even, steps=STEPS, tolerance=EXACT, **case):
    runs = [Run(layout, size, rank, **way, **case) for way in ways]
    alone = Run(layout, size, **case)
    for step in range(steps):
        alone.step(step)
        for run, way in zip(runs, ways, strict=True):
            run.step(step)
            assert_equal(run, alone, tolerance, f"{way}, step {step}")
    for run, way in zip(runs, ways, strict=True):
        assert_equal_states(run, alone, tolerance, f"{way}")


OPTIONS = {
    "defaults": {},
    "constant beta": {"beta": 0.7, "beta_decay": 0.0},
    "beta 0": {"beta": 0.0},
    "beta 0, no rescale": {"beta": 0.0, "norm_target": None},
    "capped weights": {"max_weight": 1.5},
    "capped weights at beta 0": {"max_weight": 1.5, "beta": 0.0},
    "no log": {"log_transform": False},
    "large eps": {"eps": 0.5},
    "solved tasks fade": {"eps": 0.5, "fade_solved": True},
    "solved tasks fade at beta 0": {"eps": 0.5, "fade_solved": True, "beta": 0.0},
    "root mean square of norms": {"norm_target": "rms"},
    "a number": {"norm_target": 0.5},
    "a power of norms": {"norm_power": 0.5},
    "a power of norms at beta 0": {"norm_power": 0.5, "beta": 0.0},
    "a warm-up": {"warmup_steps": 4},
    "logs of some tasks": {"log_transform": [True, False, True]},
    "mean of norms": {"norm_target": "mean"},
    "median of norms": {"norm_target": "median"},
    "least norm": {"norm_target": "min"},
    "no rescale": {"norm_target": None},
    "priorities": {"task_weights": [1.0, 0.5, 2.0]},
    "priorities at beta 0": {"task_weights": [1.0, 0.0, 2.0], "beta": 0.0},
    "bad tasks left out": {"nonfinite": "ignore"},
    "bad batches left out": {"nonfinite": "skip"},
    "norms of the last layer": {"norm_params": "last"},
    "norms of the last layer at beta 0": {"norm_params": "last", "beta": 0.0},
    "norms of the last layer, capped": {"norm_params": "last", "max_weight": 1.5, "nonfinite": "ignore"},
    "norms of the whole trunk": {"norm_params": "all"},
    "norms every third step": {"norm_params": "all", "refresh_every": 3},
    "norms of the last layer every third step": {"norm_params": "last", "refresh_every": 3},
}
FORMS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "one backward": {"norm_params": "last"},
    "old norms": {"norm_params": "last", "refresh_every": 3},
}
WHOLE = {}
WRAPPERS = {
    "none": None,
    "defaults": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "no_sync": {"no_sync": True},
    "no_sync, find_unused_parameters": {"no_sync": True, "find_unused_parameters": True},
    "no_sync, gradient_as_bucket_view": {"no_sync": True, "gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_two_ranks_take_the_step_of_one_process(processes, option):
    processes(2).run(follow, ({"options": OPTIONS[option], "layout": uneven}, [WHOLE]))


@pytest.mark.parametrize("form", FORMS)
def test_distributed_data_parallel_works_with_all_its_options(processes, form):
    ways = [{"wrapper": wrapper} for wrapper in WRAPPERS.values()]
    processes(2).run(follow, ({"options": FORMS[form], "steps": 4}, ways))


@pytest.mark.parametrize("layout", [uneven, labelled, gaps, even_gaps, micro], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_may_have_other_rows_and_tasks(processes, layout, size):
    forms = FORMS.values() if size == 2 else [{}]
    processes(size).run(follow, *[({"layout": layout, "options": form}, [WHOLE]) for form in forms])


@pytest.mark.parametrize("form", FORMS)
def test_three_ranks_of_a_larger_world_take_the_step_of_one_process(processes, form):
    processes(4).run(follow_in_part, {"options": FORMS[form], "layout": labelled})


def follow_in_part(rank, size, case):
    """The first three ranks are a group of their own; the fourth does something else."""
    group = dist.new_group([0, 1, 2])
    if rank < 3:
        follow_one(rank, 3, [{"group": group}], **case)


def test_ranks_take_the_step_of_the_textbook(processes):
    averaged = {"beta": 0.5, "norm_target": "mean", "task_weights": [1.0, 2.0, 0.5]}
    processes(2).run(follow_the_textbook, [{}, averaged, {"beta": 0.0, "max_weight": 3.0}])


def follow_the_textbook(rank, size, rules):
    """Against the oracle, which shares no code with the library."""
    for options in rules:
        follow_one_textbook(rank, size, options)


def follow_one_textbook(rank, size, options):
    runs = [Run(gaps, size, rank, options, **way) for way in ({"wrapper": {}}, WHOLE)]
    alone = Run(gaps, size)
    shared = [*alone.net.trunk.parameters()]
    oracle = Oracle(BASES["adam"](alone.net.parameters()), shared, rule=options)
    for step in range(STEPS):
        [rows] = alone.rows(step)
        oracle.base.zero_grad()
        oracle.step(dict(enumerate(alone.losses(step, rows))))
        for run in runs:
            run.step(step)
            for (name, parameter), expected in zip(run.net.named_parameters(), alone.net.parameters(), strict=True):
                assert_close(parameter, expected, EXACT, f"step {step}, {name}")
                assert_close(parameter.grad, expected.grad, EXACT, f"step {step}, gradient of {name}")
            for task, norm in oracle.norms.items():
                assert run.optimizer.last_balance.norms[task].item() == pytest.approx(norm, rel=EXACT)
                assert run.optimizer.last_balance.weights[task].item() == pytest.approx(oracle.weights[task], rel=EXACT)


def narrow_odd():
    return Odd(narrow=True)


def exact_odd():
    return Odd(narrow=False)


@pytest.mark.parametrize("size", [2, 4])
def test_parameters_of_every_kind_are_shared(processes, size):
    cases = [{"options": options, "steps": 4} for options in ({}, {"beta": 0.0})]
    groups = [(case | {"net": exact_odd}, [WHOLE, {"wrapper": {}}]) for case in cases]
    # Each rank's own gradient of a bfloat16 parameter is rounded before they are added up.
    groups += [(case | {"net": narrow_odd, "base": "sgd", "tolerance": 0.01}, [WHOLE]) for case in cases]
    processes(size).run(follow, *groups)


@pytest.mark.parametrize("form", ["exact", "one backward"])
def test_large_parameters_are_shared(processes, form):
    """Of more elements than small parameters lie side by side with."""
    processes(2).run(follow, ({"options": FORMS[form], "layout": gaps, "net": wide, "steps": 4}, [WHOLE]))


def wide():
    return networks.Net(TASKS, (FEATURES, 2**14, 6), side=True, dtype=torch.float64)


def many_tasks():
    return Net(tasks=66)


def partly_frozen():
    net = Net()
    net.trunk[0].requires_grad_(False)
    return net


def test_more_tasks_than_a_message_has_room_for(processes):
    processes(2).run(follow, ({"net": many_tasks, "layout": gaps, "steps": 2}, [WHOLE]))


def test_frozen_parameters_get_no_gradient(processes):
    cases = [{"options": options, "net": partly_frozen, "steps": 3} for options in FORMS.values()]
    processes(2).run(follow, *[(case, [WHOLE]) for case in cases])


def test_named_tasks_may_be_left_out(processes):
    cases = [{"form": named, "layout": layout} for layout in (labelled, gaps, micro)]
    cases.append({"form": named, "layout": gaps, "options": {"task_weights": {"b": 0.5, "a": 1.0, "c": 2.0}}})
    processes(2).run(follow, *[(case, [WHOLE]) for case in cases])


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["float32", "bfloat16"]
)
def test_averages_of_less_precision_agree_to_their_rounding(processes, dtype, tolerance):
    case = {"options": {"ema_dtype": dtype}, "tolerance": tolerance, "base": "sgd"}
    processes(2).run(follow, (case, [WHOLE]))


def single_precision():
    return Net(dtype=torch.float32)


def test_single_precision_agrees_to_its_rounding(processes):
    case = {"net": single_precision, "dtype": torch.float32, "layout": gaps, "tolerance": 1e-4, "base": "sgd"}
    processes(2).run(follow, (case, [WHOLE]))


def test_step_without_losses_completes_what_all_ranks_have_accumulated(processes):
    processes(2).run(complete_without_losses)


def complete_without_losses(rank, size):
    for options in FORMS.values():
        ours, alone = Run(uneven, size, rank, options), Run(uneven, size, options=options)
        [mine], [rows] = ours.rows(0), alone.rows(0)
        ours.optimizer.accumulate(ours.losses(0, mine), **ours.samples(mine))
        ours.optimizer.step()
        alone.optimizer.step(alone.losses(0, rows))
        assert_equal(ours, alone, EXACT, f"{options}")


def test_a_group_of_one_rank_is_like_none_bit_for_bit(processes):
    processes(2).run(follow_in_a_group_of_one)


def follow_in_a_group_of_one(rank, size):
    groups = [dist.new_group([member]) for member in range(size)]
    for options in FORMS.values():
        for way in (WHOLE, {"wrapper": {}}):
            ours = Run(uneven, 1, 0, options, group=groups[rank], **way)
            alone = Run(uneven, 1, options=options)
            for step in range(3):
                ours.step(step)
                alone.step(step)
                assert_same(snapshot(ours), snapshot(alone), f"{options}, step {step}")


@pytest.mark.parametrize("form", FORMS)
def test_parameters_stay_bit_identical_between_ranks(processes, form):
    first, *others = processes(4).run(bytes_by_step, FORMS[form])
    assert len(set(first)) == len(first) > 10
    assert others == [first] * 3


def bytes_by_step(rank, size, options):
    """In single precision, which rounds more."""
    run = Run(gaps, size, rank, options, net=single_precision, dtype=torch.float32, wrapper={})
    digests = []
    for step in range(12):
        run.step(step)
        digests.append(digest(run))
    return digests


def test_buffers_are_broadcast_as_ever(processes):
    first, second = processes(2).run(buffers_by_step)
    assert first == second
    assert len({str(buffers) for buffers in first}) == len(first)


def buffers_by_step(rank, size):
    """What each forward pass of a plain `ddp(x)` found in the buffers."""
    run = Run(uneven, size, rank, net=Normalised, wrapper={})
    for step in range(5):
        run.step(step)
    return run.net.seen


def test_cosines_are_those_of_one_process(processes):
    processes(2).run(compare_cosines)


def compare_cosines(rank, size):
    for options in ({}, {"norm_params": "last"}, {"beta": 0.0, "max_weight": 2.0}):
        alone, run = Run(uneven, size, options=options), Run(uneven, size, rank, options)
        for step in range(3):
            alone.step(step)
            run.step(step)
        assert_close(run.optimizer.gradient_cosines(), alone.optimizer.gradient_cosines(), EXACT, f"{options}")


# ------------------------------------------------- what goes wrong on one rank


def with_hook(task, change):
    """A gradient that goes through `change` on its way from one task's loss."""

    def outputs(values, run):
        values[task].register_hook(change)
        return values

    return Spoil(outputs=outputs)


def with_loss(task, change):
    """One task's loss is another."""

    def losses(values, run):
        return [change(loss, run) if number == task else loss for number, loss in enumerate(values)]

    return Spoil(losses=losses)


def refuse(gradient):
    raise ZeroDivisionError("from a hook of the user's")


def interrupt(gradient):
    raise KeyboardInterrupt


def used(loss, run):
    torch.autograd.grad(loss, [run.net.heads[1].weight])
    return loss


NOT_USABLE = {
    "NaN": with_loss(1, lambda loss, run: loss * torch.nan),
    "negative": with_loss(1, lambda loss, run: loss - 1e6 * run.share),
    "gradient of the first task": with_hook(0, lambda gradient: gradient * torch.nan),
    "gradient of the last task": with_hook(2, lambda gradient: gradient * torch.inf),
}
FAILURES = {
    "hook of the first task": with_hook(0, refuse),
    "hook of the last task": with_hook(2, refuse),
    "interrupted": with_hook(1, interrupt),
    "used graph": with_loss(1, used),
    "number": with_loss(0, lambda loss, run: loss.item()),
    "no scalar": with_loss(2, lambda loss, run: loss * torch.ones(2)),
    "no graph": with_loss(0, lambda loss, run: loss.detach()),
    "sum": Spoil(losses=lambda losses, run: sum(losses)),
    "too few": Spoil(losses=lambda losses, run: losses[:2]),
}
# Tasks before the one that fails may have taken the batch into their averages.
MAY_CHANGE_AVERAGES = {"gradient of the last task", "hook of the last task", "interrupted", "used graph"}
SHARINGS = {
    "whole averages": {},
    "beta 0": {"options": {"beta": 0.0}},
    "one backward": {"options": {"norm_params": "last"}},
    "old norms": {"options": {"norm_params": "last", "refresh_every": 5}},
    "micro-batches": {"layout": halves},
}


def attempt(run):
    """The type and text of what `run` raises, None if nothing."""
    try:
        run()
    except BaseException as error:
        return type(error).__name__, str(error)
    return None


def without_averages(taken):
    entries = {
        key: {name: value for name, value in entry.items() if not name.startswith("task_ema")}
        for key, entry in taken["state"].items()
    }
    return taken | {"state": entries}


def spoil_one_step(rank, size, names, mode):
    """A good step, one that goes wrong on rank 1, a good one; for each case the error, and the bytes at the end."""
    found = {}
    for name in names:
        for sharing, way in SHARINGS.items():
            try:
                found[name, sharing] = spoil_one(rank, size, name, mode, **way)
            except BaseException as failure:
                failure.add_note(f"in the case {name}, {sharing}")
                raise
    return found


def spoil_one(rank, size, name, mode, options=None, layout=even):
    options = (options or {}) | {"nonfinite": mode}
    ours, alone = Run(layout, size, rank, options), Run(layout, size, options=options)
    spoil = NOT_USABLE.get(name) or FAILURES[name]
    ours.step(0)
    alone.step(0)
    before = snapshot(ours)
    error = attempt(lambda: ours.take(1, late=spoil if rank == 1 else NOTHING))
    if name in NOT_USABLE:
        attempt(lambda: alone.take(1, late=spoil))
    if mode != "ignore":
        kept = without_averages if name in MAY_CHANGE_AVERAGES else dict
        assert_same(kept(snapshot(ours)), kept(before), "after the step that went wrong")
        assert ours.optimizer.last_balance.skipped == (mode == "skip")
    if name in FAILURES and name in MAY_CHANGE_AVERAGES:
        ours.step(2)
    else:
        assert_equal(ours, alone, EXACT, "after the step that went wrong")
        ours.step(2)
        alone.step(2)
        assert_equal(ours, alone, EXACT, "at the end")
        assert_equal_states(ours, alone, EXACT, "at the end")
    assert all(parameter.isfinite().all() for parameter in ours.net.parameters())
    return error, digest(ours)


@pytest.mark.parametrize("name", NOT_USABLE)
def test_a_batch_that_is_bad_on_one_rank_is_refused_on_all(processes, name):
    first, second = processes(2).run(spoil_one_step, [name], "raise")
    assert first == second
    for (_, sharing), ((kind, message), _) in first.items():
        if "gradient" not in name:
            assert kind == "ValueError" and message.startswith("loss of task '1' must be ")
            assert name != "NaN" or "got nan on rank 1; nothing was changed" in message
        else:
            assert kind == "RuntimeError" and "no parameter was changed" in message
            task = "0" if "first" in name else "2"
            whose = "the tasks ['0', '1', '2'] together" if sharing == "old norms" else f"task '{task}'"
            assert message.startswith(f"gradient of {whose} must be finite")


@pytest.mark.parametrize("mode", ["skip", "ignore"])
def test_a_batch_that_is_bad_on_one_rank_is_left_out_on_all(processes, mode):
    first, second = processes(2).run(spoil_one_step, list(NOT_USABLE), mode)
    assert first == second
    assert {error for error, _ in first.values()} == {None}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_one_rank_is_one_on_all_and_the_next_step_works(processes, name):
    kinds = {
        "interrupted": "KeyboardInterrupt",
        "used graph": "RuntimeError",
        "number": "TypeError",
        "sum": "TypeError",
    }
    kind = kinds.get(name, "ZeroDivisionError" if "hook" in name else "ValueError")
    first, second = processes(2).run(spoil_one_step, [name], "raise")
    for case, (error, end) in first.items():
        own, other_end = second[case]
        assert own[0] == kind, own
        assert error[0] == "RuntimeError" and "rank 1" in error[1]
        assert kind in error[1] and own[1] in error[1]
        assert end == other_end


@pytest.mark.parametrize("name", ["NaN", "gradient of the first task", "hook of the last task", "used graph", "sum"])
def test_a_micro_batch_that_fails_on_one_rank_fails_on_all(processes, name):
    first, second = processes(2).run(spoil_an_early_micro_batch, name)
    assert (first is None) == (second is None) == (name == "gradient of the first task")
    if first is not None:
        assert "rank 1" in first[1]


def spoil_an_early_micro_batch(rank, size, name):
    ours, alone = Run(micro, size, rank), Run(micro, size)
    ours.step(0)
    alone.step(0)
    before = snapshot(ours)
    spoil = (NOT_USABLE | FAILURES)[name]
    [early, *_] = ours.rows(1)
    ours.optimizer.zero_grad()
    before["gradients"] = [None] * len(before["gradients"])
    losses = ours.losses(1, [early[0] or early[1]] * 3, spoil if rank == 1 else NOTHING)
    error = attempt(lambda: ours.optimizer.accumulate(losses))
    assert_same(snapshot(ours), before)
    for step in (1, 2):
        ours.step(step)
        alone.step(step)
        assert_equal(ours, alone, EXACT, f"step {step}")
    return error


@pytest.mark.parametrize("form", ["exact", "beta 0", "one backward"])
def test_a_task_that_reaches_nothing_on_one_rank_is_an_error_on_all(processes, form):
    first, second = processes(2).run(reach_nothing, FORMS[form])
    assert second[0] == "ValueError" and second[1].startswith("task '0' reaches no")
    assert first[0] == "RuntimeError" and "rank 1" in first[1] and second[1] in first[1]


def reach_nothing(rank, size, options):
    astray = with_loss(0, lambda loss, run: run.net.heads[0].weight.square().sum())
    ours, alone = Run(even, size, rank, options), Run(even, size, options=options)
    error = attempt(lambda: ours.take(0, late=astray if rank == 1 else NOTHING))
    for step in (1, 2):
        ours.step(step)
        alone.step(step)
        assert_equal(ours, alone, EXACT, f"step {step}")
    return error


@pytest.mark.parametrize("form", FORMS)
def test_an_overflow_on_one_rank_is_skipped_by_the_scaler_on_all(processes, form):
    processes(2).run(overflow_once, FORMS[form])


def overflow_once(rank, size, options):
    for layout in (uneven, halves):
        overflow_one(rank, size, options, layout)


def overflow_one(rank, size, options, layout):
    infinite = with_hook(2, lambda gradient: gradient * torch.inf)
    ours = Run(layout, size, rank, options, scaled=True, base="sgd")
    alone = Run(layout, size, options=options, scaled=True, base="sgd")
    for step in range(1, 8):
        bad = step in (3, 4)
        before = snapshot(ours)
        for run in (ours, alone):
            run.optimizer.zero_grad()
            spoil = infinite if bad and run.rank != 0 else NOTHING
            run.take(step, late=spoil)
        assert_equal(ours, alone, EXACT, f"step {step}, {layout.__name__}")
        assert ours.scaler.get_scale() == alone.scaler.get_scale()
        if ours.optimizer.last_balance.skipped:
            before.pop("gradients")
            after = snapshot(ours)
            after.pop("gradients")
            assert_same(after, before)
    assert_equal_states(ours, alone, EXACT, "at the end")


# ------------------------------------------------- ranks that disagree

# What the options of the two ranks are, what the message calls it, and what it says of each rank.
OTHER_OPTIONS = {
    "beta": ({}, {"beta": 0.5}, "the schedule", "(0.9, 0.5)", "(0.5, 0.5)"),
    "beta_decay": ({"beta_decay": 0.0}, {}, "the schedule", "(0.9, 0.0)", "(0.9, 0.5)"),
    "eps": ({}, {"eps": 0.25}, "the settings", "eps=1e-08", "eps=0.25"),
    "log_transform": ({}, {"log_transform": False}, "the settings", "log_transform=True", "log_transform=False"),
    "norm_target": ({}, {"norm_target": "min"}, "the settings", "norm_target='max'", "norm_target='min'"),
    "max_weight": ({"max_weight": 2.0}, {"max_weight": 3.0}, "the settings", "max_weight=2.0", "max_weight=3.0"),
    "nonfinite": ({}, {"nonfinite": "skip"}, "the settings", "nonfinite='raise'", "nonfinite='skip'"),
    "ema_dtype": ({}, {"ema_dtype": torch.float32}, "the settings", "ema_dtype=None", "ema_dtype=torch.float32"),
    "task_weights": (
        {"task_weights": [1, 1, 1]},
        {"task_weights": [1, 2, 1]},
        "the settings",
        "1.0, 1.0, 1.0",
        "2.0",
    ),
    "norm_params": ({"norm_params": "all"}, {"norm_params": "last"}, "the settings", "[0, 1, 2, 3, 4])", "[3, 4])"),
    "refresh_every": (
        {"norm_params": "all"},
        {"norm_params": "all", "refresh_every": 4},
        "the settings",
        "refresh_every=1",
        "refresh_every=4",
    ),
}
OTHER_CALLS = {
    "fewer tasks": ("the tasks", "('0', '1', '2')", "('0', '1')"),
    "names": ("the tasks", "('0', '1', '2')", "('a', 'b', 'c')"),
    "other names": ("the tasks", "('a', 'b', 'c')", "('c', 'b', 'a')"),
    "scale": ("the scaler's scale", "4096.0", "1024.0"),
    "no scaler": ("the scaler's scale", "4096.0", "0.0"),
    "accumulate()": ("the call", "'backward()'", "'accumulate()'"),
}


def both_are_told(answers, fact, first, second):
    """Every rank has the same error, with the values of both."""
    kind, message = answers[0]
    assert answers == [(kind, message)] * len(answers)
    assert kind == "RuntimeError" and message.startswith(f"all ranks must agree on {fact}: rank 0 has ")
    zero, one = message.split(", rank 1 has ")
    assert first in zero and second in one
    assert "nothing was changed" in message


def test_ranks_with_other_options_are_told_at_the_first_step(processes):
    first, second = processes(2).run(step_with_other_options)
    for name, (_, _, *expected) in OTHER_OPTIONS.items():
        both_are_told([first[name], second[name]], *expected)


def step_with_other_options(rank, size):
    return {
        name: attempt(lambda options=options: Run(even, size, rank, options[rank]).step(0))
        for name, options in OTHER_OPTIONS.items()
    }


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_ranks_with_other_calls_are_told_and_may_go_on(processes, name):
    answers = processes(2).run(step_with_another_call, name)
    both_are_told([error for error, _ in answers], *OTHER_CALLS[name])
    assert answers[0][1] == answers[1][1]


def step_with_another_call(rank, size, name):
    run = Run(even, size, rank, scaled="scale" in name)
    before = snapshot(run)
    [rows] = run.rows(0)
    losses, scaler, call = run.losses(0, rows), run.scaler, run.optimizer.backward
    if name == "other names":
        losses = named(losses)
    if rank == 1:
        losses = losses[:2] if name == "fewer tasks" else losses
        losses = named(losses) if name == "names" else losses
        losses = dict(reversed(losses.items())) if name == "other names" else losses
        call = run.optimizer.accumulate if name == "accumulate()" else call
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if name == "scale" else scaler
        scaler = None if name == "no scaler" else scaler
    error = attempt(lambda: call(losses, scaler))
    assert_same(snapshot(run), before)
    run.step(1)
    return error, digest(run)


# What is different on rank 1; a collective call that ranks take for different ones may hang, or end a process.
OTHER_SETUPS = {
    "shape": lambda: {"net": narrower},
    "dtype": lambda: {"net": single_precision, "dtype": torch.float32},
    "frozen": lambda: {"net": partly_frozen},
}


def narrower():
    net = Net()
    net.heads[0] = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    return net


@pytest.mark.parametrize("name", OTHER_SETUPS)
def test_ranks_with_another_setup_are_told(processes, name):
    answers = processes(2).run(step_with_another_setup, name, timeout=30, errors=True)
    for kind, message in [answer if len(answer) == 2 else answer[1:] for answer in answers]:
        assert kind == "RuntimeError" and message.startswith("all ranks must agree on "), message


def step_with_another_setup(rank, size, name):
    group = dist.new_group(timeout=timedelta(seconds=5))
    run = Run(even, size, rank, group=group, **(OTHER_SETUPS[name]() if rank == 1 else {}))
    return attempt(lambda: run.step(0)) or ("nothing", "is told")


def test_ranks_that_loaded_other_checkpoints_are_told(processes):
    answers = processes(2).run(load_other_counts)
    both_are_told(answers, "the counts of batches", "[1, 1, 1]", "[2, 2, 2]")


def load_other_counts(rank, size):
    run = Run(even, size, rank)
    states = []
    for step in range(2):
        run.step(step)
        state = run.optimizer.state_dict()
        # Each rank's averages are its own, whatever step they are of.
        states.append(
            {**state, "state": copy.copy(state["state"]), "param_groups": copy.deepcopy(state["param_groups"])}
        )
    run.optimizer.load_state_dict(states[rank])
    return attempt(lambda: run.step(2))


def test_a_rank_that_does_not_come_is_an_error_in_time(processes):
    errors = processes(2).run(step_without_the_other)
    assert errors[1] is None
    assert errors[0] is not None and "imed out" in errors[0][1]


def step_without_the_other(rank, size):
    group = dist.new_group(timeout=timedelta(seconds=2))
    run = Run(even, size, rank, group=group)
    return attempt(lambda: run.step(0)) if rank == 0 else None


# ------------------------------------------------- arguments and wrappers


WRONG_ARGUMENTS = {
    "no group": ({"process_group": "world"}, "process_group must be a .*ProcessGroup .*, got 'world'; pass "),
}


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_arguments_are_checked(wrong):
    net = Net()
    arguments, message = WRONG_ARGUMENTS[wrong]
    with pytest.raises((TypeError, ValueError), match=message):
        DualBalancedOptimizer(torch.optim.Adam(net.parameters()), net.trunk, **arguments)


def test_parameters_of_deepspeed_are_refused():
    net = Net()
    optimizer = DualBalancedOptimizer(torch.optim.Adam(net.parameters()), net.trunk)
    net.heads[0].weight.ds_id = 3
    with pytest.raises(ValueError, match=r"parameters must not be partitioned by DeepSpeed's ZeRO.*use FSDP2"):
        optimizer.step(Run(even, 2).losses(0, [[0]] * TASKS))


def test_wrappers_that_need_more_are_refused(processes):
    answers = processes(2).run(step_with_wrappers)
    for found in answers:
        for name in ("without a group", "alone in its group"):
            # One process among several is told of the argument; then DistributedDataParallel stops the second pass.
            (kind, message), told = found.pop(name)
            assert kind in ("ValueError", "RuntimeError"), message
            assert_told_of_the_group([message, *told])
        error, told = found.pop("another net")
        assert error is None
        assert_told_of_the_group(told)
        kind, message = found.pop("FSDP1")
        assert kind == "ValueError" and "FullyShardedDataParallel (FSDP1)" in message and "fully_shard" in message
        kind, message = found.pop("not a member")
        assert kind == "TypeError" and "that this rank is in" in message
        assert not found


def assert_told_of_the_group(messages):
    assert len([text for text in messages if "pass process_group=torch.distributed.group.WORLD" in text]) == 1


def step_with_wrappers(rank, size):
    def plain(net):
        return DualBalancedOptimizer(torch.optim.Adam(net.parameters()), net.trunk)

    def step(net, call):
        optimizer = plain(net)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                error = attempt(lambda: optimizer.step([loss_of(t, o) for t, o in enumerate(call(data(0)))]))
        return error, [str(warning.message) for warning in caught]

    found, net = {}, Net()
    wrapped = DistributedDataParallel(net)
    found["without a group"] = step(net, wrapped)
    found["another net"] = step(other := Net(), other)
    groups = [dist.new_group([member]) for member in range(size)]
    net = Net()
    wrapped = DistributedDataParallel(net, process_group=groups[rank])
    found["alone in its group"] = step(net, wrapped)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    found["not a member"] = attempt(lambda: DualBalancedOptimizer(optimizer, net.trunk, process_group=groups[1 - rank]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = Net()
        whole = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
        optimizer = DualBalancedOptimizer(torch.optim.Adam(net.parameters()), net.trunk, process_group=dist.group.WORLD)
        losses = [loss_of(task, outputs) for task, outputs in enumerate(whole(data(0)))]
        found["FSDP1"] = attempt(lambda: optimizer.step(losses))
    return found


def test_parameters_outside_the_optimizer_are_warned_of_once(processes):
    for messages in processes(2).run(train_with_parameters_outside):
        [message] = messages
        assert message.startswith("2 parameters outside base_optim take part in the losses")


def train_with_parameters_outside(rank, size):
    net = Net()
    inside = [parameter for name, parameter in net.named_parameters() if not name.startswith("heads.1")]
    optimizer = DualBalancedOptimizer(torch.optim.Adam(inside), net.trunk, process_group=dist.group.WORLD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.step([loss_of(task, outputs) for task, outputs in enumerate(net(data(step)))])
    assert all(parameter.grad is None for parameter in net.heads[1].parameters())
    return [str(warning.message) for warning in caught if "base_optim" in str(warning.message)]


def test_copies_share_the_group_and_cannot_be_pickled(processes):
    for kind, message in processes(2).run(copy_and_pickle):
        assert kind == "TypeError" and "process_group cannot be pickled; save its state_dict()" in message


def copy_and_pickle(rank, size):
    run = Run(even, size, rank)
    run.step(0)
    twin = copy.copy(run)
    twin.net, twin.optimizer = copy.deepcopy((run.net, run.optimizer))
    twin.call = twin.net
    for step in (1, 2):
        run.step(step)
        twin.step(step)
    assert_same(snapshot(twin), snapshot(run))
    return attempt(lambda: pickle.dumps(run.optimizer))


# ------------------------------------------------- checkpoints


NAMED_TASKS = {"task_weights": [1.0] * TASKS}
SAVED, RESUMED = 4, 3


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_one_rank_resumes_all_bit_for_bit(processes, tmp_path, form):
    saved = processes(2).run(save_on_rank_0, FORMS[form], str(tmp_path / "state.pt"))
    assert processes(2).run(load_on_all, FORMS[form], str(tmp_path / "state.pt")) == saved


def save_on_rank_0(rank, size, options, path):
    run = Run(gaps, size, rank, options)
    for step in range(SAVED):
        run.step(step)
    if rank == 0:
        torch.save({"net": run.net.state_dict(), "optimizer": run.optimizer.state_dict()}, path)
    dist.barrier()
    for step in range(SAVED, SAVED + RESUMED):
        run.step(step)
    return digest(run)


def load_on_all(rank, size, options, path):
    run = Run(gaps, size, rank, options)
    saved = torch.load(path, weights_only=True)
    run.net.load_state_dict(saved["net"])
    run.optimizer.load_state_dict(saved["optimizer"])
    for step in range(SAVED, SAVED + RESUMED):
        run.step(step)
    return digest(run)


def numbers(run):
    """All parameters in one list."""
    return [number for parameter in run.net.parameters() for number in parameter.detach().flatten().tolist()]


@contextmanager
def alone_without_warnings(rank):
    """torch.distributed.checkpoint says in so many words that there is one process only."""
    with warnings.catch_warnings():
        if rank is None:
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def save_together(rank, size, path, options=None, full=None):
    """Train and save, through torch.distributed.checkpoint or as a full state dict; then train on."""
    run = Run(even, size, rank, (options or {}) | NAMED_TASKS)
    for step in range(SAVED):
        run.step(step)
    if full is None:
        state = {"net": run.net.state_dict(), "optimizer": get_optimizer_state_dict(run.net, run.optimizer)}
        with alone_without_warnings(rank):
            dcp.save(state, checkpoint_id=path)
    else:
        whole_state = get_optimizer_state_dict(run.net, run.optimizer, options=StateDictOptions(**full))
        if rank == 0:
            torch.save({"net": run.net.state_dict(), "optimizer": whole_state}, path)
        dist.barrier()
    return go_on(run)


def load_together(rank, size, path, options=None, full=None):
    """Load into a fresh network and optimizer, and train on."""
    run = Run(even, size, rank, (options or {}) | NAMED_TASKS)
    if full is None:
        state = {"net": run.net.state_dict(), "optimizer": get_optimizer_state_dict(run.net, run.optimizer)}
        with alone_without_warnings(rank):
            dcp.load(state, checkpoint_id=path)
        set_optimizer_state_dict(run.net, run.optimizer, state["optimizer"])
    else:
        state = torch.load(path, weights_only=True)
        broadcast = full.get("broadcast_from_rank0")
        loaded = state["optimizer"] if rank == 0 or not broadcast else {}
        set_optimizer_state_dict(run.net, run.optimizer, loaded, options=StateDictOptions(**full))
    run.net.load_state_dict(state["net"])
    return go_on(run)


def go_on(run):
    for step in range(SAVED, SAVED + RESUMED):
        run.step(step)
    return digest(run), numbers(run)


def assert_resumed(found, expected):
    for _, values in found:
        assert values == pytest.approx(expected, rel=EXACT, abs=EXACT)


@pytest.mark.parametrize("form", ["exact", "one backward"])
def test_averages_are_saved_on_some_ranks_and_loaded_on_others(processes, tmp_path, form):
    options = FORMS[form]
    alone = Run(even, 2, options=options | NAMED_TASKS)
    for step in range(SAVED + RESUMED):
        alone.step(step)
    expected = numbers(alone)
    on_two = processes(2).run(save_together, str(tmp_path / "two"), options)
    assert_resumed(on_two, expected)
    assert processes(2).run(load_together, str(tmp_path / "two"), options) == on_two
    assert_resumed(processes(4).run(load_together, str(tmp_path / "two"), options), expected)
    assert_resumed([load_together(None, 1, str(tmp_path / "two"), options)], expected)
    on_four = processes(4).run(save_together, str(tmp_path / "four"), options)
    assert_resumed(processes(2).run(load_together, str(tmp_path / "four"), options), expected)
    assert processes(4).run(load_together, str(tmp_path / "four"), options) == on_four
    save_together(None, 1, str(tmp_path / "one"), options)
    assert_resumed(processes(2).run(load_together, str(tmp_path / "one"), options), expected)


@pytest.mark.parametrize(
    "full",
    [{"full_state_dict": True}, {"full_state_dict": True, "broadcast_from_rank0": True}],
    ids=["all", "broadcast"],
)
def test_a_full_state_dict_loads_on_any_number_of_ranks(processes, tmp_path, full):
    path = str(tmp_path / "state.pt")
    saved = processes(2).run(save_together, path, {}, {"full_state_dict": True})
    assert processes(2).run(load_together, path, {}, full) == saved
    expected = saved[0][1]
    assert_resumed(processes(4).run(load_together, path, {}, full), expected)
    assert_resumed([load_together(None, 1, path, {}, {"full_state_dict": True})], expected)


# ------------------------------------------------- messages


def test_a_step_sends_a_message_a_task_one_before_and_one_after(processes):
    for counts in processes(2).run(count_messages):
        assert counts == {form: [TASKS + 2] * 4 for form in ("exact", "beta 0", "capped", "warm-up")}


def count_messages(rank, size):
    """The collectives of each step, whatever way they are called: with gradients of one device and dtype."""
    forms = {"exact": {}, "beta 0": {"beta": 0.0}, "capped": {"max_weight": 2.0}, "warm-up": {"warmup_steps": 3}}
    return {name: [len(sent) for sent in messages_of(rank, size, options)] for name, options in forms.items()}


def messages_of(rank, size, options, steps=4):
    run = Run(uneven, size, rank, options)
    for step in range(steps):
        with journal() as operations:
            run.step(step)
        yield [operation.name for operation in operations if "c10d" in operation.name]


def test_a_norm_that_is_reused_needs_no_message_a_task(processes):
    for sent in processes(2).run(count_refreshed_messages):
        assert sent[1] == sent[2] < sent[0]


def count_refreshed_messages(rank, size):
    return [len(sent) for sent in messages_of(rank, size, FORMS["old norms"], 3)]


# ------------------------------------------------- several GPUs' worth of version 0.1


def test_parts_of_averages_that_version_0_1_kept_load_as_a_whole(processes):
    processes(2).run(load_old_parts)


def load_old_parts(rank, size):
    """There each rank held its rows of every average, as a DTensor."""
    ours, whole = Run(even, size, rank), Run(even, size, rank)
    for step in range(2):
        ours.step(step)
    saved = copy.deepcopy(ours.optimizer.state_dict())
    header = header_of(saved)
    old = {name: header[name] for name in ("tasks", "named", "counts", "beta", "beta_decay", "ages")}
    saved["param_groups"][0]["balanced_optim"] = json.dumps({"version": 2, **old, "aggregator": {}})
    mesh = init_device_mesh("cpu", (size,))
    for entry in saved["state"].values():
        for name, row in entry.items():
            if name.startswith("task_ema") and row.dim():
                entry[name] = distribute_tensor(row, mesh, [Shard(0)])
    whole.net.load_state_dict(ours.net.state_dict())
    whole.optimizer.load_state_dict(saved)
    for step in range(2, 4):
        ours.step(step)
        whole.step(step)
    assert_equal(whole, ours, EXACT, "at the end")
    assert_equal_states(whole, ours, EXACT, "at the end")


# ------------------------------------------------- a reset


def test_all_ranks_reset_together(processes):
    processes(2).run(reset_averages)


def reset_averages(rank, size):
    ours, alone = Run(uneven, size, rank), Run(uneven, size)
    for step in range(5):
        for run in (ours, alone):
            if step == 3:
                run.optimizer.reset_averages()
            run.step(step)
        assert_equal(ours, alone, EXACT, f"step {step}")
    assert header_of(ours.optimizer)["counts"] == [2] * TASKS


def test_priorities_change_on_all_ranks_or_all_are_told(processes):
    first, second = processes(2).run(change_priorities)
    both_are_told([first, second], "the settings", "1.0, 1.0, 1.0", "2.0")


def change_priorities(rank, size):
    ours, alone = Run(uneven, size, rank), Run(uneven, size)
    for step in range(3):
        for run in (ours, alone):
            run.optimizer.task_weights = [1.0, 0.5 * step, 2.0]
            run.step(step)
        assert_equal(ours, alone, EXACT, f"step {step}")
    ours.optimizer.task_weights = [1.0, 1.0, 1.0 + rank]
    return attempt(lambda: ours.step(3))
