"""A balanced step in a CUDA graph: what it refuses, what it may not do, and that replays are eager steps."""

import contextlib
import copy
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from cases import BadGradient, one_thread  # noqa: F401
from conftest import assert_same, header_of
from devices import grad_scaler
from modes import device_path, nothing_comes_from_the_host, nothing_is_read
from networks import Net
from torch.optim import SGD, Adam

from balanced_optim import DualBalancedOptimizer

FORMS = {
    "exact": {},
    "beta 0": {"beta": 0.0},
    "capped": {"max_weight": 1.5},
    "warm-up": {"warmup_steps": 10, "norm_target": "rms"},
    "half power at beta 0": {"norm_power": 0.5, "beta": 0.0, "fade_solved": True},
    "log by task": {"log_transform": [True, False, True], "norm_target": "median"},
    "priorities": {"task_weights": [1.0, 0.5, 2.0]},
    "half": {"ema_dtype": torch.bfloat16},
    "one backward": {"norm_params": True},
}
every_form = pytest.mark.parametrize("form", FORMS)


def build(form="exact", base=SGD, nonfinite="ignore", sizes=(3, 4), **options):
    options = (FORMS[form] | options) if isinstance(form, str) else form
    net = Net(3, sizes)
    if options.get("norm_params") is True:
        options["norm_params"] = net.trunk[0]
    return net, DualBalancedOptimizer(base(net.parameters(), lr=0.01), net.trunk, nonfinite=nonfinite, **options)


# ------------------------------------------------- what the host does; no GPU needed


@pytest.fixture
def capture(monkeypatch):
    """A context in which the stream says that it is capturing, on a CPU that stands for a device."""

    @contextlib.contextmanager
    def capturing():
        with monkeypatch.context() as patch:
            patch.setattr("balanced_optim._capture.CAPTURING", lambda: True)
            yield

    with device_path(monkeypatch):
        yield capturing


@pytest.mark.cpu
@every_form
def test_a_batch_in_a_graph_reads_nothing_and_takes_nothing_from_the_host(form, capture):
    net, optimizer = build(form)
    optimizer.step(net.losses(0))
    optimizer.zero_grad()
    for call in (optimizer.backward, optimizer.step):
        losses = net.losses(1)
        with capture(), nothing_is_read(), nothing_comes_from_the_host():
            call(losses)


@pytest.mark.cpu
def test_a_loaded_run_reads_nothing_either(capture):
    """A first batch is looked at for a scaler's scale."""
    (net, optimizer), (other, saved) = build(), build()
    saved.step(other.losses(0))
    optimizer.load_state_dict(saved.state_dict())
    losses = [loss * torch.tensor(2.0) for loss in net.losses(1)]
    with capture(), nothing_is_read():
        optimizer.backward(losses)


REFUSED = {
    "raise": ({"nonfinite": "raise"}, "nonfinite='ignore'"),
    "skip": ({"nonfinite": "skip"}, "nonfinite='ignore'"),
    "an aggregator": ({"aggregator": lambda matrix: matrix.sum(0)}, "no aggregator"),
    "refreshed norms": ({"norm_params": True, "refresh_every": 2}, "refresh_every=1"),
}


@pytest.mark.cpu
@pytest.mark.parametrize("what", REFUSED)
def test_what_the_host_would_have_to_decide_is_refused(what, capture):
    options, words = REFUSED[what]
    net, optimizer = build(**options)
    optimizer.step(net.losses(0))
    before = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    for call in (optimizer.backward, optimizer.step):
        with capture(), pytest.raises(RuntimeError, match=words):
            call(net.losses(1))
    assert_same([net.state_dict(), optimizer.state_dict()], before)


@pytest.mark.cpu
def test_scalers_and_micro_batches_are_refused(capture):
    net, optimizer = build()
    optimizer.step(net.losses(0))
    with capture(), pytest.raises(RuntimeError, match="no scaler"):
        optimizer.backward(net.losses(1), grad_scaler())
    with capture():
        optimizer.backward(net.losses(1), grad_scaler(enabled=False))
        with pytest.raises(RuntimeError, match="whole batches"):
            optimizer.accumulate(net.losses(1))
    optimizer.accumulate(net.losses(1))
    with capture(), pytest.raises(RuntimeError, match="whole batches"):
        optimizer.backward(net.losses(2))
    optimizer.backward(net.losses(2))


@pytest.mark.cpu
def test_a_group_of_processes_is_refused(capture, group):
    net, optimizer = build(process_group=group)
    optimizer.step(net.losses(0))
    with capture(), pytest.raises(RuntimeError, match="one process"):
        optimizer.backward(net.losses(1))


@pytest.mark.cpu
def test_a_first_batch_is_refused(capture):
    net, optimizer = build()
    with capture(), pytest.raises(RuntimeError, match="a batch outside of it before"):
        optimizer.backward(net.losses(0))
    optimizer.step(net.losses(0))
    net.trunk[0].bias.requires_grad_(False)
    optimizer.step(net.losses(1))
    net.trunk[0].bias.requires_grad_(True)
    optimizer.backward(net.losses(2))
    optimizer.reset_averages()
    with capture(), pytest.raises(RuntimeError, match="a batch outside of it before"):
        optimizer.backward(net.losses(3))


@pytest.mark.cpu
def test_an_operation_that_has_yet_to_be_tried_out_is_refused(capture):
    class Fresh(BadGradient):
        pass

    net, optimizer = build()
    optimizer.step(net.losses(0))
    losses = net.losses(1, lambda place, task, values: Fresh.apply(values, 1.0) if place == "trunk" else values)
    before = copy.deepcopy([net.state_dict(), optimizer.state_dict()])
    with capture(), nothing_is_read(), pytest.raises(RuntimeError, match="has yet to show"):
        optimizer.backward(losses)
    assert_same([net.state_dict(), optimizer.state_dict()], before)
    optimizer.backward(losses)


@pytest.mark.cpu
def test_an_error_in_the_middle_of_a_capture_is_the_one_that_is_raised(capture):
    def fail(gradient):
        raise ArithmeticError("a hook of one's own")

    net, optimizer = build()
    optimizer.step(net.losses(0))
    losses = net.losses(1)
    losses[2].register_hook(fail)
    with capture(), nothing_is_read(), pytest.raises(ArithmeticError):
        optimizer.backward(losses)


@pytest.mark.parametrize("form", ["exact", "capped", "one backward", "priorities"])
def test_what_is_loaded_or_set_goes_where_it_was(form):
    net, optimizer = build(form)
    for seed in range(3):
        optimizer.step(net.losses(seed))
    known = optimizer._parts.state.averages

    def places():
        vectors = known.counts, known.batches, known.task_weights, known.norms
        blocks = [part for s in known.store._segments for part in (getattr(s, "block", None), getattr(s, "rows", None))]
        return [t.data_ptr() for t in (*vectors, *blocks) if isinstance(t, torch.Tensor)]

    before, saved = places(), copy.deepcopy(optimizer.state_dict())
    optimizer.step(net.losses(4))
    optimizer.load_state_dict(saved)
    optimizer.task_weights = [3.0, 2.0, 1.0]
    assert optimizer._parts.state.averages is known
    assert places() == before
    assert known.task_weights.tolist() == [3.0, 2.0, 1.0]


@every_form
def test_a_graph_goes_on_from_zero_after_a_reset(form, monkeypatch):
    with device_path(monkeypatch):
        goes_on_from_zero(form)


def goes_on_from_zero(form):
    """What it writes to is used by the next batch, and what it has counted since is saved."""
    net, optimizer = build(form)
    for seed in range(3):
        optimizer.step(net.losses(seed))
    known = optimizer._parts.state.averages
    optimizer.reset_averages()
    assert header_of(optimizer)["counts"] == []
    assert not known.counts.any()
    if known.store.keeps_rows:
        assert not any(row.any() for rows in known.store.averages() for row in rows)
    # As a replay does it.
    known.counts.add_(1)
    known.batches.add_(1)
    assert header_of(optimizer)["counts"] == [1, 1, 1]
    optimizer.step(net.losses(3))
    assert optimizer._parts.state.averages.counts is known.counts
    assert header_of(optimizer)["counts"] == known.counts.tolist() == [2, 2, 2]
    assert header_of(optimizer)["batches"] == int(known.batches) == 2


def test_what_was_forgotten_does_not_hold_the_next_batch_back(monkeypatch):
    with device_path(monkeypatch):
        does_not_hold_the_next_batch_back()


def does_not_hold_the_next_batch_back():
    net, optimizer = build()
    optimizer.step(net.losses(0))
    known = optimizer._parts.state.averages
    optimizer.reset_averages()
    optimizer.task_weights = [3.0, 2.0, 1.0]
    assert known.task_weights.tolist() == [3.0, 2.0, 1.0]
    optimizer.task_weights = [2.0, 1.0]
    optimizer.step({"one": net.losses(1)[0], "two": net.losses(1)[1]})
    assert optimizer._parts.state.averages.task_weights.tolist() == [2.0, 1.0]
    optimizer.reset_averages()
    net.double()
    optimizer.step([loss.double() for loss in net.losses(2)[:2]])
    rows = optimizer._parts.state.averages.store.averages()
    assert all(row.dtype == torch.float64 for each in rows for row in each)


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("way", ["load", "reset"])
def test_a_schedule_that_is_loaded_gets_the_store_that_it_needs(betas, way, monkeypatch):
    """A checkpoint from before the first batch holds a schedule and no averages."""
    mine, theirs = betas
    with device_path(monkeypatch):
        ends = []
        for used in (True, False):
            saved = copy.deepcopy(build({"beta": theirs})[1].state_dict())
            net, optimizer = build({"beta": mine})
            if used:
                optimizer.backward(net.losses(0))
                optimizer.zero_grad()
                if way == "reset":
                    optimizer.reset_averages()
            optimizer.load_state_dict(saved)
            for seed in range(3):
                optimizer.zero_grad()
                optimizer.step(net.losses(seed))
            ends.append([net.state_dict(), optimizer.state_dict()])
        assert_same(*ends)


@pytest.mark.cpu
def test_a_reset_frees_the_averages_where_no_graph_can_write_to_them():
    net, optimizer = build()
    optimizer.step(net.losses(0))
    store = weakref.ref(optimizer._parts.state.averages.store)
    optimizer.reset_averages()
    gc.collect()
    assert store() is None


# ------------------------------------------------- graphs; on a GPU

needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WARM_UP = 3


@pytest.fixture
def on_cuda():
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


def recipe():
    """The lines of the README from `step` to the capture."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    return re.search(r"\n(def step\(\):\n.*?\nwith torch.cuda.graph\(graph\): step\(\)\n)", text, re.DOTALL).group(1)


def test_the_recipe_is_short():
    assert len(recipe().splitlines()) <= 10


def capturable(parameters, lr):
    return Adam(parameters, lr=lr, capturable=True)


def data(net, seed):
    """A batch, and a factor of each task's loss: now and then one that makes it NaN."""
    factors = torch.ones(3)
    if seed % 5 == 2:
        factors[seed % 3] = torch.nan
    return [net.data(seed), factors]


def losses_of(net):
    return lambda x, factors: [loss * factor for loss, factor in zip(net.losses(x=x), factors.unbind(), strict=True)]


class Captured:
    """A run by the recipe; `call` is what stands for `step` in it."""

    def __init__(self, form, base=capturable, call="step", **options):
        self.net, self.optimizer = build(form, base, sizes=(16, 32, 32), **options)
        self.inputs = data(self.net, 0)
        losses = losses_of(self.net)
        names = {"torch": torch, "optimizer": self.optimizer, "task_losses": lambda x, factors, _: losses(x, factors)}
        names |= {"x": self.inputs[0], "price": self.inputs[1], "kind": None}
        exec(recipe().replace("optimizer.step(", f"optimizer.{call}("), names)
        self.graph = names["graph"]

    def step(self, seed):
        for mine, new in zip(self.inputs, data(self.net, seed), strict=True):
            mine.copy_(new)
        self.graph.replay()


class Eager:
    def __init__(self, form, base=capturable, call="step", **options):
        self.net, self.optimizer = build(form, base, sizes=(16, 32, 32), **options)
        self.call = getattr(self.optimizer, call)
        for _ in range(WARM_UP):
            self.step(0)

    def step(self, seed):
        self.optimizer.zero_grad()
        self.call(losses_of(self.net)(*data(self.net, seed)))


def outcome(run):
    balance = run.optimizer.last_balance
    parameters = [p.detach() for p in run.net.parameters()]
    gradients = [p.grad for p in run.net.parameters()]
    found = [parameters, gradients, balance.losses, balance.norms, balance.weights]
    return copy.deepcopy([*found, run.optimizer.state_dict()])


class TestGraphs:
    pytestmark = needs_cuda

    @every_form
    def test_replays_are_the_steps_of_an_eager_run_bit_for_bit(self, form, on_cuda):
        captured, eager = Captured(form), Eager(form)
        for seed in range(20):
            captured.step(seed)
            eager.step(seed)
            assert_same(outcome(captured), outcome(eager))

    @pytest.mark.parametrize("form", ["exact", "beta 0", "one backward"])
    def test_priorities_change_between_replays(self, form, on_cuda):
        captured, eager = Captured(form), Eager(form)
        for seed in range(10):
            for run in (captured, eager):
                run.optimizer.task_weights = [1.0, seed + 1.0, 0.5]
                run.step(seed)
            assert_same(outcome(captured), outcome(eager))

    @pytest.mark.parametrize("form", ["exact", "beta 0", "warm-up", "one backward"])
    def test_a_captured_run_is_saved_and_resumed(self, form, on_cuda):
        captured, eager = Captured(form), Eager(form)
        for seed in range(5):
            captured.step(seed)
        eager.net.load_state_dict(captured.net.state_dict())
        eager.optimizer.load_state_dict(copy.deepcopy(captured.optimizer.state_dict()))
        for seed in range(5, 10):
            captured.step(seed)
            eager.step(seed)
            assert_same(outcome(captured), outcome(eager))

    @pytest.mark.parametrize("form", ["exact", "capped", "one backward"])
    def test_a_captured_backward_goes_on_from_a_checkpoint(self, form, on_cuda):
        """The averages are loaded in place, into whatever slots they have by now."""
        captured, eager = Captured(form, SGD, "backward"), Eager(form, SGD, "backward")
        for run in (captured, eager):
            for seed in range(3):
                run.step(seed)
                run.optimizer.step()
        saved = copy.deepcopy([captured.net.state_dict(), captured.optimizer.state_dict()])
        captured.step(7)
        for run in (captured, eager):
            run.net.load_state_dict(saved[0])
            run.optimizer.load_state_dict(copy.deepcopy(saved[1]))
            for seed in range(3, 9):
                run.step(seed)
                run.optimizer.step()
        final = [copy.deepcopy([run.net.state_dict(), run.optimizer.state_dict()]) for run in (captured, eager)]
        assert_same(*final)

    @pytest.mark.parametrize("form", ["exact", "beta 0", "warm-up", "one backward"])
    def test_a_captured_run_goes_on_from_zero_after_a_reset(self, form, on_cuda):
        captured, eager = Captured(form), Eager(form)
        for run in (captured, eager):
            for seed in range(4):
                run.step(seed)
            run.optimizer.reset_averages()
            for seed in range(4, 8):
                run.step(seed)
        final = [copy.deepcopy([run.net.state_dict(), run.optimizer.state_dict()]) for run in (captured, eager)]
        assert_same(*final)

    def test_refused_batches_leave_no_graph_behind(self, on_cuda):
        net, optimizer = build(base=capturable, sizes=(16, 32, 32))
        graph = torch.cuda.CUDAGraph()
        x = net.data(0)
        with pytest.raises(RuntimeError, match="a batch outside of it before"), torch.cuda.graph(graph):
            optimizer.step(net.losses(x=x))
        optimizer.step(net.losses(0))
