"""Training under a torch.amp.GradScaler: the same steps as without one, and nothing changed by an overflow."""

import copy
from dataclasses import dataclass
from functools import partial

import cases
import pytest
import torch
from conftest import BASES, assert_same, build, every_base, header_of, named, snapshot
from networks import Net
from torch import nn

from balanced_optim import DualBalancedOptimizer

TASKS = 3
# Scales are powers of two where runs are compared bit for bit: dividing by them brings back the very same number.
# This one is far too high for float16, and low enough after one overflow.
HIGH = {"scale": 2.0**30, "backoff_factor": 2.0**-20, "growth_interval": 1000}
FORMS = {
    "exact": {},
    "large": {"sizes": (4, 2**15, 6)},
    "bfloat16-averages": {"beta": 0.5, "beta_decay": 0.0, "ema_dtype": torch.bfloat16},
    "beta-0": {"beta": 0.0},
    "cap": {"max_weight": 1.5, "task_weights": [1.0, 0.5, 2.0]},
    "cap-beta-0": {"max_weight": 1.5, "beta": 0.0},
    "no-log": {"log_transform": False},
    "norm-params": {"norm_params": lambda net: net.trunk[2].parameters()},
    "refresh": {"norm_params": lambda net: net.trunk[2].parameters(), "refresh_every": 3},
}
some_forms = pytest.mark.parametrize("form", ["exact", "beta-0", "norm-params", "refresh"], indirect=True)


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def halved(values):
    """The same values; their gradient passes through float16, where 65,520 is infinite."""
    values = values.clone()
    values.register_hook(lambda gradient: gradient.half().to(gradient.dtype))
    return values


def through_half(place, task):
    """Of one task the gradients at one place pass through float16."""
    return lambda here, number, values: halved(values) if (here, number) == (place, task) else values


def absent(losses, seed):
    """Each task misses every third batch, one of them the first."""
    return [loss if (seed + task) % TASKS else None for task, loss in enumerate(losses)]


def empty(losses, seed):
    """Every second batch, the first too, has no task at all."""
    return losses if seed % 2 else [None] * TASKS


def spoiled(losses, seed, value=torch.nan, tasks=(1,)):
    """In batches 0 and 3 losses that are not finite."""
    return [cases.with_value(loss, value) if seed % 3 == 0 and t in tasks else loss for t, loss in enumerate(losses)]


@dataclass
class Run:
    net: nn.Module
    optimizer: DualBalancedOptimizer
    scaler: object = None

    def train(self, seeds, change=None):
        for seed in seeds:
            losses = self.net.losses(seed)
            self.backward(change(losses, seed) if change else losses)
            self.finish()

    def backward(self, losses):
        self.optimizer.backward(losses, scaler=self.scaler)

    def finish(self):
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def seen(self):
        return snapshot(self.net, self.optimizer), self.scaler and self.scaler.state_dict()


def begin(options, device=None, scaler=None, *, dtype=torch.float32, base="sgd", **more):
    options = {**options, **more}
    net = Net(TASKS, options.pop("sizes", (4, 5, 6)), lowest=-1).to(device, dtype)
    options = {name: value(net) if callable(value) else value for name, value in options.items()}
    return Run(net, DualBalancedOptimizer(BASES[base](net.parameters()), net.trunk, **options), scaler)


def pair(options, device, scaler, **more):
    return begin(options, device, scaler, **more), begin(options, device, **more)


def assert_alike(run, plain, seeds=(), change=None):
    for each in (run, plain):
        each.train(seeds, change)
    assert_same(run.seen()[0], plain.seen()[0])


def growing(device=None, scale=1024.0, **options):
    """A scaler whose scale doubles after every second step."""
    device = device or torch.get_default_device().type
    return torch.amp.GradScaler(device, init_scale=scale, **{"growth_interval": 2, **options})


# ------------------------------------------------- the same steps as without a scaler


@pytest.mark.parametrize(
    ("dtype", "power", "change"),
    [("float32", 40, absent), ("float32", 0, empty), ("float64", -10, absent), ("bfloat16", 16, None)],
)
def test_training_equals_training_without_a_scaler(form, device, dtype, power, change):
    run, plain = pair(form, device, growing(device, 2.0**power), dtype=getattr(torch, dtype))
    assert_alike(run, plain, range(6), change)
    assert run.scaler.get_scale() == 2.0 ** (power + 3)


@every_base
def test_every_base_trains_the_same_under_a_scaler(base):
    assert_alike(Run(*build(base), growing()), Run(*build(base)), range(4))


# torch's scaler itself takes neither float16 parameters nor complex ones.
@pytest.mark.parametrize("model", [name for name in cases.MODELS if name not in ("mixed dtypes", "complex")])
def test_every_kind_of_model_trains_the_same_under_a_scaler(model):
    nets = [cases.build(model) for _ in range(2)]
    optimizers = [DualBalancedOptimizer(net.optimizer(lr=0.01), net.trunk) for net in nets]
    assert_alike(Run(nets[0], optimizers[0], growing()), Run(nets[1], optimizers[1]), range(3))


def test_a_scale_that_is_no_power_of_two(form, device):
    base = "sgd" if "sizes" in form else "adam"
    run, plain = pair(form, device, growing(device, 1000.0, growth_factor=3.0), base=base)
    for each in (run, plain):
        each.train(range(5))
    # Half precision averages may be rounded to the other side, and long sums add up more roundings.
    atol = 1e-3 if "ema_dtype" in form else 1e-5 if "sizes" in form else 1e-6
    torch.testing.assert_close(list(run.net.parameters()), list(plain.net.parameters()), rtol=1e-6, atol=atol)


def test_gradients_are_scaled_until_unscale_and_can_then_be_clipped(form, device):
    run, plain = pair(form, device, growing(device))
    for seed in range(3):
        for each in (run, plain):
            each.backward(each.net.losses(seed))
            each.backward(each.net.losses(seed + 10))  # adds to `.grad`
        scaled, gradients = (each.seen()[0]["gradients"] for each in (run, plain))
        assert_same(scaled, [run.scaler.get_scale() * gradient for gradient in gradients])
        run.scaler.unscale_(run.optimizer)
        assert_same(run.seen()[0]["gradients"], gradients)
        for each in (run, plain):
            assert nn.utils.clip_grad_norm_(each.net.parameters(), 0.1) > 0.1
            each.finish()
    assert_alike(run, plain)


@pytest.mark.parametrize("last", [None, empty])
def test_micro_batches(form, device, last):
    run, plain = pair(form, device, growing(device))
    for each in (run, plain):
        for seed in range(4):
            each.optimizer.accumulate(absent(each.net.losses(seed), seed), scaler=each.scaler, samples=2)
            each.optimizer.accumulate(each.net.losses(seed + 10), scaler=each.scaler, samples=[1, 3, 2])
            each.train([seed + 20], last)
    assert_alike(run, plain)


@some_forms
def test_a_disabled_scaler_is_none(form, device):
    run, plain = pair(form, device, torch.amp.GradScaler(device, enabled=False))
    assert_alike(run, plain, range(3))
    with pytest.raises(RuntimeError, match="must be finite"):
        run.backward([cases.BadGradient.apply(loss, torch.nan) for loss in run.net.losses(3)])


def test_a_resumed_run_goes_on_bit_for_bit(form, device):
    run, resumed = begin(form, device, growing(device)), begin(form, device, growing(device, 1.0))
    run.train(range(3))
    saved = copy.deepcopy([part.state_dict() for part in (run.net, run.optimizer, run.scaler)])
    for part, state in zip((resumed.net, resumed.optimizer, resumed.scaler), saved, strict=True):
        part.load_state_dict(state)
    assert_alike(resumed, run, range(3, 6))
    assert resumed.scaler.state_dict() == run.scaler.state_dict()


@some_forms
def test_training_under_autocast_is_close_to_float32(form, device):
    run, plain = pair(form, device, growing(device))
    for each in (run, plain):
        each.optimizer.param_groups[0]["lr"] = 0.01
        for seed in range(4):
            with torch.autocast(device, torch.bfloat16 if device == "cpu" else torch.float16, enabled=each is run):
                losses = each.net.losses(seed)
            each.backward([loss.float() for loss in losses])
            each.finish()
    nets = begin(form, device).net, run.net, plain.net
    start, here, there = (nn.utils.parameters_to_vector(net.parameters()) for net in nets)
    assert 0 < (here - there).norm() < 0.1 * (there - start).norm()


def test_averages_of_bfloat16_parameters_are_float32(device):
    run = begin({}, device, growing(device), dtype=torch.bfloat16)
    run.train(range(2))
    assert run.optimizer.state_dict()["state"][0]["task_ema_0"].dtype == torch.float32


# ------------------------------------------------- gradients and losses that are not finite


def assert_left_out(run, before, scale):
    assert run.optimizer.last_balance.skipped is True
    assert run.scaler.get_scale() == scale
    assert_same(*({**seen[0], "balance": None} for seen in (run.seen(), before)))


@pytest.mark.parametrize(
    ("nonfinite", "step", "task", "early"), [("raise", 0, 0, False), ("skip", 2, 1, False), ("ignore", 1, 2, True)]
)
@pytest.mark.parametrize("where", ["trunk", "below", "head"])
def test_an_overflow_lowers_the_scale_and_changes_nothing_else(form, device, where, nonfinite, step, task, early):
    """It may also come early in the batch, before the last of its micro-batches."""
    run, plain = pair(form, device, growing(device, **HIGH), nonfinite=nonfinite)
    run.train(range(step))
    before = run.seen()
    losses = run.net.losses(20, through_half(where, task))
    if early:
        run.optimizer.accumulate(losses, scaler=run.scaler)
        losses = run.net.losses(21)
    run.backward(losses)
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
    run.finish()
    assert_left_out(run, before, 2.0**10)
    plain.train(range(step))
    assert_alike(run, plain, range(step, step + 3))


def test_gradients_that_overflow_only_together(form, device):
    """Each scaled task gradient is finite in float32, their scaled sum is not.

    Averages have taken the batch in, since every gradient was finite, but the parameters have not. A joint pass is the
    sum: there nothing was finite.
    """
    run = begin({"beta": 0.1, **form}, device, growing(device, 2.0**127, backoff_factor=2.0**-60))
    before = run.seen()
    features = run.net.trunk(torch.ones(1, 4, device=device)).sum()
    run.backward([1 + 1.9 * (features - features.detach()) for _ in range(TASKS)])
    assert not all(p.grad is None or p.grad.isfinite().all() for p in run.net.parameters())
    run.finish()
    if "norm_params" in form:
        assert_left_out(run, before, 2.0**67)
        return
    assert run.scaler.get_scale() == 2.0**67
    assert_same(run.seen()[0]["parameters"], before[0]["parameters"])
    assert header_of(run.optimizer)["counts"] == [1] * TASKS
    run.train([1])
    assert all(parameter.isfinite().all() for parameter in run.net.parameters())


@some_forms
@pytest.mark.parametrize(("step", "bad"), [(0, torch.nan), (3, torch.nan), (3, torch.inf)])
def test_a_bad_loss_raises_and_changes_nothing(form, device, step, bad):
    run = begin(form, device, growing(device))
    run.train(range(step))
    before = run.seen()
    with pytest.raises(ValueError, match=r"loss of task '1' must be finite"):
        run.backward(spoiled(run.net.losses(step), step, bad))
    assert_same(run.seen(), before)


@some_forms
@pytest.mark.parametrize("tasks", [(0,), (2,), (0, 1, 2)], ids=["first", "last", "all"])
@pytest.mark.parametrize(("nonfinite", "seeds"), [("skip", [1, 2, 4, 5]), ("ignore", range(6))], ids=["skip", "ignore"])
def test_a_bad_loss_is_left_out_without_lowering_the_scale(form, device, nonfinite, seeds, tasks):
    run, plain = pair(form, device, growing(device, growth_interval=100), nonfinite=nonfinite)
    run.train(range(6), partial(spoiled, tasks=tasks))
    plain.train(seeds, partial(spoiled, tasks=tasks))
    assert_alike(run, plain)
    assert run.scaler.get_scale() == 1024


# ------------------------------------------------- wrong calls

SCALED = {
    "list": lambda scaler, losses: [scaler.scale(loss) for loss in losses],
    "mapping": lambda scaler, losses: named([scaler.scale(loss) for loss in losses]),
    "last": lambda scaler, losses: [*losses[:2], scaler.scale(losses[2].bfloat16())],
    "at-once": lambda scaler, losses: scaler.scale(losses),
    "tensor": lambda scaler, losses: scaler.scale(torch.stack(losses)),
}
CALLS = [("backward", False, 0), ("step", False, 0), ("accumulate", False, 0), ("backward", True, 2)]


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize(("call", "beside", "steps"), [*CALLS, ("accumulate", True, 0)])
def test_scaled_losses_are_refused_at_the_first_batch_or_beside_their_scaler(call, beside, steps, how, device):
    run = begin({}, device, growing(device))
    run.train(range(steps), lambda losses, seed: named(losses) if how == "mapping" else losses)
    before = run.seen()
    losses = SCALED[how](run.scaler, run.net.losses(9))
    task = {"mapping": "a", "last": "2"}.get(how, "0")
    with pytest.raises(ValueError, match=rf"'{task}' must be unscaled.* optimizer\.backward\(losses, scaler=scaler\)"):
        getattr(run.optimizer, call)(losses, **({"scaler": run.scaler} if beside else {}))
    assert_same(run.seen(), before)


@pytest.mark.parametrize("scaled", [True, False])
def test_ordinary_products_are_not_refused(scaled, device):
    run = begin({}, device, growing(device) if scaled else None)
    mine, parameter = ({"_scale": torch.tensor(0.5, device=device, requires_grad=needs)} for needs in (False, True))
    first, second, third = run.net.losses(0)
    run.backward([first * 0.5, second * mine["_scale"], third * parameter["_scale"]])
    assert_same(run.optimizer.last_balance.losses, 0.5 * torch.stack([first, second, third]).detach())


@pytest.mark.parametrize("call", ["backward", "accumulate"])
@pytest.mark.parametrize("wrong", [1024.0, torch.tensor(1024.0), "scaler", torch.amp.GradScaler])
def test_anything_but_a_scaler_is_refused(call, wrong):
    run = begin({})
    before = run.seen()
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler or None, got "):
        getattr(run.optimizer, call)(run.net.losses(0), scaler=wrong)
    assert_same(run.seen(), before)
