"""torch.optim's contract over many base optimizers: what schedulers, scalers, hooks and wrappers rely on."""

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_same, build, build_plain, every_base, header_of, snapshot, train
from devices import generator, grad_scaler
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from balanced_optim import DualBalancedOptimizer


def parameters_of(net):
    return [parameter.detach().clone() for parameter in net.parameters()]


def reload(state):
    """Through a file, as users do."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------- the eleven checks


@every_base
def test_step_is_a_base_step_on_the_balanced_gradients(base):
    net, optimizer = build(base)
    twin, plain = build_plain(base)
    start = parameters_of(net)
    for seed in range(3):
        optimizer.zero_grad()
        assert optimizer.step(net.losses(seed)) is None
        for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        plain.step()
        assert_same(parameters_of(net), parameters_of(twin))
    assert not any(torch.equal(old, new) for old, new in zip(start, net.parameters(), strict=True))


@every_base
def test_isinstance(base):
    _, optimizer = build(base)
    assert isinstance(optimizer, Optimizer)
    assert issubclass(DualBalancedOptimizer, Optimizer)


@every_base
def test_step_lr_reaches_the_base_also_after_load(base):
    net, optimizer = build(base)
    lr = optimizer.base_optim.param_groups[0]["lr"]
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for k in range(1, 3):
        train(net, optimizer, 1, start=k)
        scheduler.step()
        assert optimizer.base_optim.param_groups[0]["lr"] == lr * 0.5**k
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 1)
    scheduler.step()
    assert optimizer.base_optim.param_groups[0]["lr"] == lr * 0.5**3


@every_base
def test_step_hooks(base):
    net, optimizer = build(base)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o))),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o))),
    ]
    train(net, optimizer, 2)
    assert [(name, o is optimizer) for name, o in calls] == [("pre", True), ("post", True)] * 2
    for handle in handles:
        handle.remove()
    train(net, optimizer, 1)
    assert len(calls) == 4


@every_base
def test_global_step_hooks_fire_once_for_wrapper_and_base(base):
    net, optimizer = build(base)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append(("post", o))),
    ]
    try:
        train(net, optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    wrapper, inner = optimizer, optimizer.base_optim
    expected = [("pre", wrapper), ("pre", inner), ("post", inner), ("post", wrapper)]
    assert [(name, id(o)) for name, o in calls] == [(name, id(o)) for name, o in expected]


@every_base
def test_save_load_then_identical_steps(base):
    net, optimizer = build(base)
    train(net, optimizer, 3)
    saved = reload({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    other, resumed = build(base, seed=1)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    train(net, optimizer, 4, start=3)
    train(other, resumed, 4, start=3)
    assert_same(snapshot(other, resumed), snapshot(net, optimizer))


@every_base
@pytest.mark.parametrize("scheduled", [False, True], ids=["bare", "scheduled"])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_trains_its_own_network(base, clone, scheduled):
    net, optimizer = build(base)
    if scheduled:
        lr_scheduler.StepLR(optimizer, step_size=1)
    train(net, optimizer, 2)
    other, copied = clone((net, optimizer))
    before = snapshot(net, optimizer)
    train(other, copied, 2, start=2)
    assert_same(snapshot(net, optimizer), before)
    train(net, optimizer, 2, start=2)
    assert_same(snapshot(other, copied), snapshot(net, optimizer))
    assert type(copied) is DualBalancedOptimizer
    assert type(copied.base_optim) is type(optimizer.base_optim)


@every_base
def test_a_copy_of_the_optimizer_alone_leaves_the_original_alone(base):
    net, optimizer = build(base)
    lr_scheduler.StepLR(optimizer, step_size=1)
    train(net, optimizer, 1)
    copied = copy.deepcopy(optimizer)
    before = snapshot(net, optimizer)
    copied.step()
    copied.zero_grad()
    copied.param_groups[0]["lr"] = 123.0
    assert_same(snapshot(net, optimizer), before)
    own = {id(parameter) for parameter in net.parameters()}
    assert not own & {id(parameter) for group in copied.param_groups for parameter in group["params"]}


@every_base
def test_a_scheduler_goes_along_with_a_copy(base):
    net, optimizer = build(base)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    other, copied, schedule = copy.deepcopy((net, optimizer, scheduler))
    lr = optimizer.param_groups[0]["lr"]
    train(other, copied, 1)
    with pytest.warns(UserWarning, match="has been overridden"):  # as for a copy of any torch optimizer
        schedule.step()
    assert copied.base_optim.param_groups[0]["lr"] == lr / 2
    assert optimizer.base_optim.param_groups[0]["lr"] == lr


@every_base
@pytest.mark.parametrize("steps", [0, 1])
def test_repr_shows_wrapper_and_base(base, steps):
    net, optimizer = build(base)
    train(net, optimizer, steps)
    text = repr(optimizer)
    assert text.startswith("DualBalancedOptimizer(")
    assert f"{type(optimizer.base_optim).__name__} (" in text
    assert f"lr: {optimizer.param_groups[0]['lr']}" in text
    assert "beta=0.9" in text


@every_base
def test_zero_grad(base):
    net, optimizer = build(base)
    train(net, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert [p.grad.count_nonzero().item() for p in net.parameters()] == [0] * len(list(net.parameters()))
    twin, other = copy.deepcopy((net, optimizer))
    other.zero_grad(set_to_none=True)
    assert [p.grad for p in twin.parameters()] == [None] * len(list(net.parameters()))
    optimizer.step(net.losses(1))
    other.step(twin.losses(1))
    assert_same(snapshot(twin, other), snapshot(net, optimizer))


@every_base
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_step_takes_a_closure(base, how):
    net, optimizer = build(base)
    twin, other = build(base)
    train(twin, other, 1)
    returned = []

    def closure():
        optimizer.zero_grad()
        returned.append(net.losses(0))
        return returned[-1]

    with torch.no_grad():
        result = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    assert len(returned) == 1
    assert result is returned[0]
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


@every_base
def test_grad_scaler_steps_and_skips(base):
    net, optimizer = build(base)
    twin, plain = build_plain(base)
    scaler = grad_scaler(1024.0, growth_interval=100)
    for seed, factor in enumerate([1.0, float("inf"), 1.0]):
        optimizer.zero_grad()
        before = parameters_of(net)
        scaler.scale(factor * sum(net.losses(seed))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            plain.zero_grad()
            sum(twin.losses(seed)).backward()
            plain.step()
            assert not torch.equal(before[0], next(net.parameters()))
        else:
            assert_same(parameters_of(net), before)
        # Scales are powers of two, so that unscaled gradients are the very same numbers.
        assert_same(parameters_of(net), parameters_of(twin))
    assert scaler.get_scale() == 512.0


@every_base
def test_add_param_group_reaches_the_base(base):
    net, optimizer = build(base)
    train(net, optimizer, 1)
    added = torch.nn.Linear(1, 1, bias=False)
    optimizer.add_param_group({"params": [added.weight], "lr": 0.5})
    assert [group["lr"] for group in optimizer.base_optim.param_groups][1:] == [0.5]
    assert optimizer.param_groups[1]["params"][0] is added.weight
    optimizer.zero_grad()
    before = added.weight.detach().clone()
    first, second = net.losses(1)
    optimizer.step([first + added.weight.square().sum(), second])
    assert not torch.equal(before, added.weight)
    assert len(optimizer.state_dict()["param_groups"]) == 2
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 1)


# ------------------------------------------------- param_groups, state, defaults


@every_base
def test_views_of_the_base_are_live(base):
    net, optimizer = build(base)
    inner = optimizer.base_optim

    def check():
        for name in ("param_groups", "state", "defaults"):
            assert getattr(optimizer, name) is getattr(inner, name)

    check()
    train(net, optimizer, 1)
    inner.load_state_dict(copy.deepcopy(inner.state_dict()))  # puts new objects in their places
    check()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check()
    inner.param_groups = list(inner.param_groups)
    optimizer.defaults = {**optimizer.defaults, "lr": 7.0}
    check()
    assert inner.defaults["lr"] == 7.0


# ------------------------------------------------- schedulers

SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=20),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.9)],
        milestones=[2],
    ),
}


def schedule_step(scheduler):
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def hyperparameters(optimizer):
    return [
        {name: group[name] for name in ("lr", "momentum", "betas") if name in group} for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("base", ["sgd", "adam", "nadam"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_treat_wrapper_and_base_alike(base, kind):
    net, optimizer = build(base)
    twin, plain = build_plain(base)
    ours, theirs = SCHEDULERS[kind](optimizer), SCHEDULERS[kind](plain)
    seen = []
    for seed in range(6):
        if seed == 3:  # go on in fresh objects
            saved = copy.deepcopy((optimizer.state_dict(), ours.state_dict()))
            net, optimizer = build(base)
            ours = SCHEDULERS[kind](optimizer)
            optimizer.load_state_dict(saved[0])
            ours.load_state_dict(saved[1])
        train(net, optimizer, 1, start=seed)
        schedule_step(ours)
        sum(twin.losses(seed)).backward()
        plain.step()
        schedule_step(theirs)
        assert hyperparameters(optimizer.base_optim) == hyperparameters(plain)
        seen.append(hyperparameters(optimizer.base_optim))
    assert any(one != seen[0] for one in seen)
    if kind == "one-cycle":
        name = "momentum" if base == "sgd" else "betas"
        assert len({str(one[0][name]) for one in seen}) == 6


@pytest.mark.parametrize("way", ["losses", "closure", "backward"])
def test_scheduler_sees_the_step(way):
    """Warnings are errors here: torch warns of scheduler.step() before optimizer.step()."""
    net, optimizer = build()
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1)
    if way == "losses":
        optimizer.step(net.losses())
    elif way == "closure":
        optimizer.step(net.losses)
    else:
        optimizer.backward(net.losses())
        optimizer.step()
    scheduler.step()
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        lr_scheduler.StepLR(build()[1], step_size=1).step()


# ------------------------------------------------- the user's loop


@every_base
@pytest.mark.parametrize("way", ["step()", "step(None)", "closure=None"])
def test_a_step_without_losses_is_a_plain_base_step(base, way):
    net, optimizer = build(base)
    twin, plain = build_plain(base)
    for seed in range(2):
        for model, one in ((net, optimizer), (twin, plain)):
            one.zero_grad()
            sum(model.losses(seed)).backward()
        {"step()": optimizer.step, "step(None)": lambda: optimizer.step(None)}.get(
            way, lambda: optimizer.step(closure=None)
        )()
        plain.step()
    assert_same(parameters_of(net), parameters_of(twin))
    assert optimizer.last_balance is None


@every_base
def test_backward_clip_step(base):
    net, optimizer = build(base)
    twin, plain = build_plain(base)
    for seed in range(3):
        optimizer.zero_grad()
        before = parameters_of(net)
        optimizer.backward(net.losses(seed))
        assert_same(parameters_of(net), before)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        assert norm > 0.01
        gradients = [parameter.grad.clone() for parameter in net.parameters()]
        optimizer.step()
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter.grad = gradient
        plain.step()
    assert_same(parameters_of(net), parameters_of(twin))


def test_backward_adds_to_the_gradients_that_are_there():
    net, optimizer = build(beta=0.0)
    optimizer.backward(net.losses())
    once = [parameter.grad.clone() for parameter in net.parameters()]
    optimizer.backward(net.losses())
    for parameter, gradient in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["step", "backward"])
def test_caller_under_no_grad(call):
    net, optimizer = build()
    twin, other = build()
    for seed in range(2):
        losses = net.losses(seed)
        with torch.no_grad():
            getattr(optimizer, call)(losses)
            assert not torch.is_grad_enabled()
        getattr(other, call)(twin.losses(seed))
        assert torch.is_grad_enabled()
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


def test_two_optimizers_in_one_loop():
    """Adversarial training: the generator's losses run through the critic, which has an optimizer of its own."""
    source, make = build("adam")
    critic, judge = build("sgd")
    for seed in range(3):
        noise = torch.randn(8, 4, generator=generator(seed))
        fake = torch.cat(source(noise) * 2, dim=1)
        before = snapshot(source, make)
        judge.zero_grad()
        judge.step([(output - 0.5).square().mean() for output in critic(fake.detach())])
        assert_same(snapshot(source, make), before)

        before = snapshot(critic, judge)["parameters"], judge.last_balance
        make.zero_grad()
        make.step([(output + 1).square().mean() for output in critic(fake)])
        assert_same(dict(critic.state_dict()), before[0])
        assert judge.last_balance is before[1]
        assert make.last_balance is not judge.last_balance
    assert header_of(make)["counts"] == [3, 3]
    assert header_of(judge)["counts"] == [3, 3]


# ------------------------------------------------- hooks on parameters and modules


def test_user_hooks_fire_once_a_pass():
    net, optimizer = build()
    fired = {"tensor": 0, "accumulated": 0, "module": 0}

    def count(name):
        fired[name] += 1

    weight = net.trunk[0].weight
    weight.register_hook(lambda gradient: count("tensor"))
    weight.register_post_accumulate_grad_hook(lambda parameter: count("accumulated"))
    net.trunk[1].register_full_backward_hook(lambda module, inputs, outputs: count("module"))
    train(net, optimizer, 2)
    assert fired == {"tensor": 4, "accumulated": 4, "module": 4}


def test_a_hook_that_changes_a_gradient_is_obeyed():
    net, optimizer = build(beta=0.0)
    net.trunk[0].bias.register_hook(torch.zeros_like)
    optimizer.step(net.losses())
    assert not net.trunk[0].bias.grad.any()
    assert net.trunk[0].weight.grad.any()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [0, 2], ids=["first-step", "later-step"])
@pytest.mark.parametrize("failing_pass", [0, 1], ids=["first-pass", "last-pass"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_an_exception_in_a_hook_changes_nothing(error, before, failing_pass, beta, where):
    net, optimizer = build(beta=beta)
    train(net, optimizer, before)
    optimizer.zero_grad(set_to_none=False)
    passes = []

    def fail(gradient):
        passes.append(len(passes))
        if where == "head" or passes[-1] == failing_pass:
            raise error("stopped by the user")

    watched = net.trunk[0].weight if where == "trunk" else net.heads[failing_pass].weight
    handle = watched.register_hook(fail)
    expected = snapshot(net, optimizer)
    with pytest.raises(error, match="stopped by the user"):
        optimizer.step(net.losses(9))
    handle.remove()
    actual = snapshot(net, optimizer)
    # Averages of tasks before the failing one may have taken the batch in, once there are any.
    if before and beta and failing_pass:
        for entry in [*actual["state"]["state"].values(), *expected["state"]["state"].values()]:
            for name in [name for name in entry if name.startswith("task_ema_")]:
                del entry[name]
    assert_same(actual, expected)
    train(net, optimizer, 1, start=10)
    header = header_of(optimizer)
    assert header["counts"] == [before + 1] * 2


def test_after_an_exception_the_first_step_is_as_if_nothing_had_been():
    (net, optimizer), (twin, other) = build(), build()
    handle = net.heads[1].weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(net.losses(9))
    handle.remove()
    train(net, optimizer, 3)
    train(twin, other, 3)
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


# ------------------------------------------------- wrappers around the wrapper


class Shell:
    """Takes on the optimizer's class at run time and reads through to the instance; writes stay here."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Shell" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self, closure=None, **kwargs):
        """Always hands on a closure, one that does nothing where the caller gave none."""
        return self._optimizer.step(closure=closure or (lambda: None), **kwargs)


def test_a_shell_of_the_optimizers_class_keeps_counts():
    (net, optimizer), (twin, other) = build("sgd"), build("sgd")
    shell = Shell(optimizer)
    assert isinstance(shell, DualBalancedOptimizer)
    for seed in range(3):
        shell.zero_grad()
        shell.backward(net.losses(seed))
        optimizer.step()
        train(twin, other, 1, start=seed)
        assert shell.last_balance is optimizer.last_balance
    assert_same(snapshot(net, shell), snapshot(twin, other))
    shell.load_state_dict(copy.deepcopy(shell.state_dict()))
    train(net, optimizer, 1)
    train(twin, other, 1)
    assert_same(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("way", ["losses", "backward", "closure"])
def test_a_shell_steps_with_a_closure_that_does_nothing(way):
    (net, optimizer), (twin, other) = build("sgd"), build("sgd")
    shell = Shell(optimizer)
    for seed in range(2):
        shell.zero_grad()
        if way == "losses":
            shell.step(losses=net.losses(seed))
        elif way == "closure":
            shell.step(lambda seed=seed: net.losses(seed))
        else:
            shell.backward(net.losses(seed))
            shell.step()
        train(twin, other, 1, start=seed)
    assert_same(snapshot(net, shell), snapshot(twin, other))


# ------------------------------------------------- state hooks


def test_state_dict_hooks():
    net, optimizer = build()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append("seen") or None)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": "mine"})
    state = optimizer.state_dict()
    assert calls == ["pre", "seen"]
    assert state["note"] == "mine"


def test_load_state_dict_hooks():
    net, optimizer = build()
    train(net, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    calls = []

    def double_lr(o, state):
        calls.append("pre")
        groups = [{**group, "lr": 2 * group["lr"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(double_lr)
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("seen"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(saved)
    assert calls == ["pre", "seen", 0.02]
    assert saved["param_groups"][0]["lr"] == 0.01


def refused_losses(net):
    losses = net.losses(3)
    return [losses[0] * float("nan"), *losses[1:]]


def test_a_skipped_batch_leaves_the_gradients_of_the_good_one_before_it_to_step():
    net, optimizer = build(nonfinite="skip")
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.backward(net.losses(1))
    optimizer.backward(refused_losses(net))
    optimizer.step()
    assert optimizer.last_balance.skipped
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_skipped_batch_does_not_swallow_a_later_plain_step():
    net, optimizer = build(nonfinite="skip")
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.backward(refused_losses(net))
    optimizer.zero_grad()
    sum(net.losses(1)).backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_warning_turned_into_an_error_finds_the_step_complete():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    for parameter in (used, unused):
        parameter.grad = torch.ones(3)
    optimizer = DualBalancedOptimizer(torch.optim.SGD([used, unused], lr=0.1), [used, unused])
    with pytest.raises(UserWarning, match="no task reaches 1 of the shared parameters"):
        optimizer.backward([used.square().sum(), used.exp().sum()])
    assert torch.equal(unused.grad, torch.ones(3))
    assert not torch.equal(used.grad, torch.ones(3))
    assert optimizer.last_balance is not None
