"""Faults in the middle of training: values that are not finite, exceptions in hooks, a kill while saving.

After each: parameters, base state and counts unchanged, `.grad` whole, averages finite, and the next steps are those of
a fresh optimizer that loads the state which the fault left behind.
"""

import ast
import copy
import io
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BadGradient, one_thread, with_value  # noqa: F401
from conftest import assert_same, named, snapshot
from devices import generator, grad_scaler
from networks import Net

import balanced_optim
from balanced_optim import DualBalancedOptimizer

TASKS = 3
FORMS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "cap": {"beta": 0.0, "max_weight": 1.5},
    "half": {"ema_dtype": torch.bfloat16},
    "large": {},
    "one backward": {},
    "refresh": {"refresh_every": 3},
}
PACKAGE = Path(balanced_optim.__file__).parent


def make(form, seed=0, **options):
    """A network and its optimizer; with one backward, norms are measured on the trunk's weight only."""
    net = Net(TASKS, (4, 2**15) if form == "large" else (4, 6), seed=seed)
    if form in ("one backward", "refresh"):
        options["norm_params"] = [net.trunk[0].weight]
    base = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return net, DualBalancedOptimizer(base, net.trunk, **FORMS[form], **options)


def losses_of(net, seed, task=None, place=None, value=math.nan):
    """Task losses of a seeded batch; `value` is the loss of `task`, or its gradient at `place`."""

    def at(where, number, tensor):
        return BadGradient.apply(tensor, value) if (where, number) == (place, task) else tensor

    losses = [loss + 10.0**number * 0.1 for number, loss in enumerate(net.losses(seed, at))]
    return [
        with_value(loss, value) if (number, place) == (task, "loss") else loss for number, loss in enumerate(losses)
    ]


def train(net, optimizer, seeds, form=list):
    for seed in seeds:
        optimizer.zero_grad()
        optimizer.step(form(losses_of(net, seed)))


def fill(net):
    """Something in `.grad` that a fault must leave alone: on some parameters a tensor, on others None."""
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, 0.25) if number % 3 else None


def reload(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def averages_in(seen):
    """Take the averages out of a snapshot: by parameter and name of the entry."""
    entries = seen["state"]["state"].items()
    names = [(key, name) for key, entry in entries for name in entry if name.startswith("task_ema_")]
    return {(key, name): seen["state"]["state"][key].pop(name) for key, name in names}


def assert_survived(form, options, net, optimizer, before, moved=()):
    """Nothing has changed since the snapshot `before` but averages of the tasks `moved`; training goes on."""
    after = snapshot(net, optimizer)
    before["balance"] = after["balance"] = None
    old, new = averages_in(before), averages_in(after)
    assert_same(after, before)
    assert old.keys() == new.keys()
    assert all(row.isfinite().all() for row in new.values())
    still = [key for key in old if int(key[1].removeprefix("task_ema_")) not in moved]
    assert_same([new[key] for key in still], [old[key] for key in still])
    other, resumed = make(form, seed=1, **options)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        same.grad = None if one.grad is None else one.grad.clone()
    for pair in ((net, optimizer), (other, resumed)):
        pair[1].step(losses_of(pair[0], 70))
        train(*pair, [71])
    assert_same(snapshot(net, optimizer), snapshot(other, resumed))
    assert optimizer.last_balance.weights.isfinite().all()


# ------------------------------------------------- values that are not finite

PLACES = [(form, place) for form in FORMS for place in ("loss", "head", "trunk")]
BELOW = [("one backward", "below"), ("refresh", "below")]  # where no norm is measured
# The mode, the good steps before, whose loss or gradient it is, and what it is.
RAISED = [("raise", 0, 0, math.nan), ("raise", 1, 1, math.nan), ("raise", 1, 2, math.inf)]
SKIPPED = [("skip", 1, 0, math.inf), ("skip", 0, 1, math.inf), ("skip", 1, 2, math.nan)]


@pytest.mark.parametrize(("mode", "done", "task", "value"), RAISED + SKIPPED)
@pytest.mark.parametrize(("form", "place"), PLACES + BELOW)
def test_a_refused_batch_leaves_everything_whole(form, mode, place, done, task, value):
    options = {"nonfinite": mode}
    net, optimizer = make(form, **options)
    train(net, optimizer, range(done))
    fill(net)
    before = snapshot(net, optimizer)
    losses = losses_of(net, 50, task, place, value)
    if mode == "raise":
        with pytest.raises(ValueError if place == "loss" else RuntimeError, match="must be finite"):
            optimizer.step(losses)
    else:
        optimizer.step(losses)
        assert optimizer.last_balance.skipped
    # A bad gradient shows after the passes of the tasks before it; below `norm_params` after those of all tasks.
    joint = form == "one backward" and place == "below"
    moved = [] if place == "loss" or not done or form == "refresh" else range(TASKS if joint else task)
    assert_survived(form, options, net, optimizer, before, moved)


IGNORED = [(0, 0, math.nan), (3, 1, math.inf), (3, 2, math.nan)]
CASES = [(*place, *case, True) for place in PLACES for case in IGNORED]
CASES += [(form, "loss", 1, 2, math.nan, False) for form in FORMS]


@pytest.mark.parametrize(("form", "place", "done", "task", "value", "known"), CASES)
def test_an_ignored_task_is_as_if_it_were_absent(form, place, done, task, value, known):
    """Also where no batch before had it."""
    pairs = [make(form, nonfinite="ignore") for _ in range(2)]
    for net, optimizer in pairs:
        train(net, optimizer, range(done), list if known else lambda losses: without(losses, task))
        fill(net)
    (net, optimizer), (twin, other) = pairs
    optimizer.step(losses_of(net, 50, task, place, value))
    other.step(without(losses_of(twin, 50), task))
    assert optimizer.last_balance.weights[task] == 0
    for pair in pairs:
        train(*pair, range(60, 62))
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


def without(losses, task):
    return [None if number == task else loss for number, loss in enumerate(losses)]


# ------------------------------------------------- exceptions in hooks

HOOKS = {
    "tensor": lambda net, hook: net.trunk[0].weight.register_hook(hook),
    "accumulated": lambda net, hook: net.trunk[0].weight.register_post_accumulate_grad_hook(hook),
    "module": lambda net, hook: net.trunk[1].register_full_backward_hook(hook),
}
# Steps before, and the pass that fails: the fourth with one backward, the first where norms are reused, is joint.
WHEN = {form: [(0, 2), (2, 0), (2, 2)] for form in FORMS} | {"one backward": [(2, 2), (0, 3), (2, 3)]}
WHEN["refresh"] = [(1, 0), (3, 1), (3, 3)]


def fail_in_hook(net, hook, failing, error, call):
    """Call with the losses of a batch; the pass number `failing` through the trunk raises."""
    passes = []

    def fail(*_):
        passes.append(hook)
        if len(passes) == failing + 1:
            raise error("from a hook")

    handle = HOOKS[hook](net, fail)
    features = net.trunk(torch.randn(8, 4, generator=generator(50)))
    losses = [10.0**task * (head(features) - 1).square().mean() for task, head in enumerate(net.heads)]
    with pytest.raises(error, match="from a hook"):
        call(losses)
    handle.remove()


@pytest.mark.parametrize(
    ("hook", "scaled", "error"),
    [("accumulated", False, KeyboardInterrupt), ("module", False, RuntimeError), ("tensor", True, KeyboardInterrupt)],
)
@pytest.mark.parametrize(("form", "done", "failing"), [(form, *when) for form in FORMS for when in WHEN[form]])
def test_an_exception_between_two_passes_leaves_everything_whole(form, done, failing, hook, scaled, error):
    """Under a scaler no average moves; without one those of tasks before the exception may have."""
    net, optimizer = make(form)
    train(net, optimizer, range(done))
    fill(net)
    before = snapshot(net, optimizer)
    scaler = grad_scaler(1024.0) if scaled else None
    fail_in_hook(net, hook, failing, error, lambda losses: optimizer.backward(losses, scaler))
    measured = form != "refresh" or done == 3
    moved = range(min(failing, TASKS)) if done and measured and not scaled else []
    assert_survived(form, {}, net, optimizer, before, moved)


@pytest.mark.parametrize(("hook", "failing"), [("accumulated", 0), ("module", 2), ("tensor", 1)])
@pytest.mark.parametrize("form", FORMS)
def test_an_exception_in_accumulate_drops_the_batch_and_nothing_else(form, hook, failing):
    net, optimizer = make(form)
    train(net, optimizer, range(2))
    optimizer.accumulate(losses_of(net, 40))
    fill(net)
    before = snapshot(net, optimizer)
    fail_in_hook(net, hook, failing, KeyboardInterrupt, optimizer.accumulate)
    assert_survived(form, {}, net, optimizer, before)


# ------------------------------------------------- files


@pytest.mark.parametrize("kind", ["new", "trained", "by name", "skipped", "accumulating"])
@pytest.mark.parametrize("form", FORMS)
def test_every_state_loads_as_plain_data(form, kind):
    net, optimizer = make(form, nonfinite="skip")
    if kind != "new":
        train(net, optimizer, range(2), named if kind == "by name" else list)
    if kind in ("skipped", "accumulating"):
        call = optimizer.step if kind == "skipped" else optimizer.accumulate
        call(losses_of(net, 3, 1, "head"))
    assert_same(reload(optimizer.state_dict()), optimizer.state_dict())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_no_module_of_the_package_runs_what_a_file_says(path):
    """No unpickling, no `torch.load`, no `eval` or `exec`."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute | ast.Name)}
    assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "torch.load", "eval", "exec"}


class Deadly(io.FileIO):
    """A file that kills its process once `room` bytes are written."""

    room = math.inf

    def write(self, data):
        data = bytes(data)
        if len(data) > self.room:
            super().write(data[: self.room])
            os.kill(os.getpid(), signal.SIGKILL)
        self.room -= len(data)
        return super().write(data)


def begin(folder):
    """The number of steps done, the network and the optimizer of the checkpoint in `folder`, or new ones."""
    net, optimizer = make("exact")
    if not (folder / "checkpoint.pt").exists():
        return 0, net, optimizer
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], net, optimizer


def train_until_killed(folder, share):
    """Two steps, each saved, and a third that dies when this share of its checkpoint is written."""
    step, net, optimizer = begin(folder)
    for last in (False, False, True):
        train(net, optimizer, [step])
        step += 1
        with Deadly(folder / "unfinished.pt", "wb") as file:
            if last:
                file.room = int(share * (folder / "checkpoint.pt").stat().st_size)
            torch.save({"step": step, "net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        (folder / "unfinished.pt").replace(folder / "checkpoint.pt")


SHARES = [0.0, 0.999, *(random.Random(0).random() for _ in range(8))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_kill_while_saving_leaves_a_checkpoint_that_resumes_bit_for_bit(tmp_path):
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run([sys.executable, __file__, str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    assert (child.returncode, (tmp_path / "unfinished.pt").exists()) == (0, True)
    step, net, optimizer = begin(tmp_path)
    assert step == 2 * len(SHARES)
    train(net, optimizer, range(step, step + 3))
    twin, other = make("exact")
    train(twin, other, range(step + 3))
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


def kill_again_and_again(folder):
    net, optimizer = make("exact")
    fill(net)
    optimizer.step()
    reload(optimizer.state_dict())  # what torch imports late is now there for every process
    for share in SHARES:
        process = os.fork()
        if process == 0:
            train_until_killed(folder, share)
            os._exit(1)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, share


if __name__ == "__main__":
    kill_again_and_again(Path(sys.argv[1]))
