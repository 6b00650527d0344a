"""One vectorized pass through the shared part: the same steps as with a pass for each task."""

import copy
import math
import warnings

import cases
import pytest
import torch
from cases import one_thread  # noqa: F401
from conftest import assert_same
from torch import nn
from torch.optim import SGD, Adam

from balanced_optim import DualBalancedOptimizer

FORMS = {
    "averaged": {},
    "no average": {"beta": 0.0},
    "faded": {"fade_solved": True, "eps": 0.1},
    "priorities": {"task_weights": {"t0": 1.0, "t1": 2.0, "t2": 0.0}},
    "group of one": {"process_group": True},
}


def two(options, name="mlp"):
    """A network and its twin, with and without vectorized passes."""
    for vectorize in (True, False):
        model = cases.build(name)
        yield model, DualBalancedOptimizer(model.optimizer(Adam, lr=0.01), model.trunk, vectorize=vectorize, **options)


def follow(runs, step):
    for model, optimizer in runs:
        optimizer.zero_grad()
        step(model, optimizer)
    (one, mine), (other, theirs) = runs
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    for field in ("losses", "norms", "weights"):
        torch.testing.assert_close(
            getattr(mine.last_balance, field), getattr(theirs.last_balance, field), rtol=1e-9, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_single_passes(form, request):
    options = dict(FORMS[form])
    if "process_group" in options:
        options["process_group"] = request.getfixturevalue("group")
    runs = list(two(options, "partly shared"))
    for number in range(6):
        absent = [(), ("t1",), ("t0", "t2"), ("t0", "t1", "t2"), (), ()][number]
        follow(runs, lambda model, optimizer: optimizer.step(model.losses(number, absent)))  # noqa: B023
    assert runs[0][1]._progress.vectorizes


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_micro_batches_and_a_scaler(beta):
    runs = list(two({"beta": beta}))
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in runs]

    def step(model, optimizer):
        scaler = scalers[[run[1] for run in runs].index(optimizer)]
        optimizer.accumulate(model.losses(1), scaler, samples=2)
        optimizer.backward(model.losses(2), scaler, samples=3)
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        follow(runs, step)


def test_the_shared_part_runs_once_and_each_head_once():
    model = cases.build("mlp")
    optimizer = DualBalancedOptimizer(model.optimizer(SGD, lr=0.01), model.trunk, vectorize=True)
    optimizer.step(model.losses(0))  # the first batch is checked by another pass
    for vectorized, passes in ((True, 1), (False, 3)):
        optimizer._progress.vectorizes = vectorized
        seen = {"trunk": 0, "head": 0}

        def count(where, seen=seen):
            return lambda gradient: seen.update({where: seen[where] + 1})

        model.trunk[0].weight.register_hook(count("trunk"))
        model.heads[1].weight.register_hook(count("head"))
        optimizer.step(model.losses(0))
        assert seen == {"trunk": passes, "head": 1}
        for parameter in (model.trunk[0].weight, model.heads[1].weight):
            parameter._backward_hooks.clear()


def test_parameters_outside_accumulate_as_with_single_passes():
    ends = []
    for vectorize in (True, False):
        model = cases.build("mlp")
        outside = [*model.heads[1].parameters(), model.trunk[0].bias]
        inside = [p for p in model.parameters() if not any(p is other for other in outside)]
        shared = [p for p in model.trunk.parameters() if p is not model.trunk[0].bias]
        optimizer = DualBalancedOptimizer(SGD(inside, lr=0.01), shared, vectorize=vectorize)
        for step in range(2):
            optimizer.step(model.losses(step))
        ends.append([p.grad for p in outside])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs)


def tensor_of_losses(x, head):
    return (x @ head).square().mean(0)


def test_losses_that_come_from_one_tensor():
    """All tasks enter at the same node, by edges of their own."""
    ends = []
    for vectorize in (True, False):
        torch.manual_seed(0)
        trunk, head = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 3))
        optimizer = DualBalancedOptimizer(SGD([*trunk.parameters(), head], lr=0.1), trunk, vectorize=vectorize)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(tensor_of_losses(torch.tanh(trunk(torch.randn(6, 4))), head))
        ends.append([*trunk.parameters(), head])
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs)


KINDS = [
    "the same",
    "side by side",
    "one behind the other",
    "through what is another's own",
    "past another",
    "one in another",
    "parameters themselves",
    "nothing in common",
]


def entries(kind, trunk, x):
    """Losses that enter the shared layers in ways of their own."""
    low = torch.tanh(x @ trunk[0])
    high = torch.tanh(low @ trunk[1])
    return {
        "the same": [high.square().mean(), (high - 1).square().mean()],
        "side by side": [high.square().mean(), (x @ trunk[2]).square().mean(), (high + x @ trunk[2]).square().mean()],
        "one behind the other": [high.square().mean(), low.square().mean(), (high - 1).square().mean()],
        "through what is another's own": [high.square().mean(), low.square().mean()],
        "past another": [(high.square() + low).mean() + 9, high.mean() + 9, (high - 1).square().mean()],
        "one in another": [low.square().mean() + 1, (low.square().mean() + 1) * high.square().mean()],
        "parameters themselves": [trunk[0].square().mean() + trunk[1].square().mean(), trunk[0].sin().sum() + 9],
        "nothing in common": [(x @ trunk[0]).square().mean(), (x @ trunk[2]).square().mean()],
    }[kind]


NESTED = {"one behind the other", "past another"}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_into_the_shared_part(kind, swapped):
    ends = []
    for vectorize in (True, False):
        torch.manual_seed(0)
        trunk = [nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(3)]
        optimizer = DualBalancedOptimizer(SGD(trunk, lr=0.1), trunk, vectorize=vectorize)
        losses = entries(kind, trunk, torch.randn(6, 4, dtype=torch.float64))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(losses[::-1] if swapped else losses)
        ours = [str(w.message) for w in caught if "vectorize" in str(w.message)]
        assert len(ours) == (vectorize and kind in NESTED)
        assert all("several depths" in message for message in ours)
        ends.append(([p.grad for p in trunk], trunk))
    for mine, theirs in zip(*map(lambda end: [*end[0], *end[1]], ends), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


class Opaque(torch.autograd.Function):
    """Has no vectorized form."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        return x * 2

    @staticmethod
    def backward(ctx, gradient):  # noqa: ARG004
        return gradient * (2 if gradient.sum().item() > -math.inf else 1)


def test_what_cannot_be_vectorized_is_said_once_and_made_one_by_one():
    runs = list(two({}))
    for model, _ in runs:
        model.trunk.register_forward_hook(lambda module, args, output: Opaque.apply(output))
        model.trunk[0].register_forward_hook(lambda module, args, output: Opaque.apply(output))
    with pytest.warns(UserWarning, match=r"made one by one: .*vmap"):
        follow(runs, lambda model, optimizer: optimizer.step(model.losses(0)))
    for step in range(1, 4):
        follow(runs, lambda model, optimizer: optimizer.step(model.losses(step)))  # noqa: B023
    assert not runs[0][1]._progress.vectorizes


def ends_of(build, steps=2, **options):
    """Gradients and parameters, vectorized and not; `build` returns the parameters, the shared ones, the losses."""
    for vectorize in (True, False):
        torch.manual_seed(0)
        parameters, shared, losses = build()
        optimizer = DualBalancedOptimizer(torch.optim.AdamW(parameters, lr=0.1), shared, vectorize=vectorize, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.step(losses())
        yield optimizer, [p.grad for p in parameters], parameters


def assert_equal_ends(build, **options):
    (optimizer, grads, parameters), (_, expected, others) = ends_of(build, **options)
    for mine, theirs in zip([*grads, *parameters], [*expected, *others], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)
    return optimizer


def trunk_and_heads(tasks=2):
    trunk, heads = nn.Linear(4, 5), nn.ModuleList([nn.Linear(5, 1) for _ in range(tasks)])
    return trunk, heads, [*trunk.parameters(), *heads.parameters()]


@pytest.mark.parametrize("where", ["features", "a leaf that tasks enter"])
def test_a_hook_where_tasks_enter_counts_once(where):
    """As with gradient reversal by a hook."""

    def build():
        trunk, heads, parameters = trunk_and_heads()
        weight = nn.Parameter(torch.randn(5))
        if where != "features":
            weight.register_hook(lambda gradient: 0.5 * gradient)

        def losses():
            features = torch.tanh(trunk(torch.randn(6, 4)))
            if where == "features":
                features.register_hook(lambda gradient: -0.1 * gradient)
                return [(head(features) - 1).square().mean() + weight.square().sum() for head in heads]
            return [(weight - 1).square().sum(), (weight + 2).square().mean()]

        return [*parameters, weight], [weight] if where != "features" else list(trunk.parameters()), losses

    assert assert_equal_ends(build)._progress.vectorizes


def test_an_operation_whose_vectorized_form_is_wrong_is_found():
    def build():
        trunk = nn.Linear(4, 4)

        def losses():
            distances = torch.cdist(trunk(torch.randn(6, 4)), torch.randn(6, 4))
            return [(distances - k).square().mean() for k in (1, 2, 4)]

        return list(trunk.parameters()), trunk, losses

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = assert_equal_ends(build)
    said = [str(w.message) for w in caught if "made one by one" in str(w.message)]
    assert len(said) == (not optimizer._progress.vectorizes)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["constant", "sum"])
def test_rows_that_are_one_memory_are_taken_apart(kind, scaled):
    """Gradients that do not depend on the task, or on the element, come expanded from torch.vmap."""
    ends = []
    for vectorize in (True, False):
        torch.manual_seed(0)
        trunk, heads, parameters = trunk_and_heads(3)
        common = nn.Parameter(torch.randn(5))
        if kind == "constant":
            common.register_hook(lambda gradient: torch.ones(5))
        base = SGD([*parameters, common], lr=0.1)
        optimizer = DualBalancedOptimizer(base, trunk, vectorize=vectorize)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        features = torch.tanh(trunk(torch.randn(6, 4)))
        part = 0.1 * common.sum() if kind == "sum" else (0.1 * common).square().mean()
        optimizer.backward([head(features).square().mean() + part + 9 for head in heads], scaler)
        ends.append([p.grad for p in [*parameters, common]])
        assert not vectorize or optimizer._progress.vectorized
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, code):  # noqa: ARG004
        return x + code

    @staticmethod
    def backward(ctx, gradient):
        ctx.variable = "a name like that of a leaf"
        return gradient, None


def test_a_gradient_that_a_function_leaves_out_is_none():
    def build():
        trunk, heads, parameters = trunk_and_heads()
        code = nn.Parameter(torch.ones(5))

        def losses():
            features = StraightThrough.apply(torch.tanh(trunk(torch.randn(6, 4))), code)
            return [(head(features) - 1).square().mean() for head in heads]

        return [*parameters, code], [*trunk.parameters(), code], losses

    with pytest.warns(UserWarning, match="no task reaches 1 of the shared parameters"):
        assert assert_equal_ends(build)._progress.vectorizes


def test_a_bad_branch_spoils_only_the_tasks_that_use_it():
    def build():
        trunk = nn.Linear(4, 5)

        def losses():
            z = trunk(torch.randn(6, 4))
            good, bad = torch.tanh(z), (z * 0).sqrt()
            return [(good + bad - 1).square().mean(), (good - 2).square().mean(), (bad - 1).square().mean()]

        return list(trunk.parameters()), trunk, losses

    optimizer = assert_equal_ends(build, nonfinite="ignore", steps=1)
    assert optimizer.last_balance.weights.tolist() == [0, 1, 0]


def test_what_a_hook_on_a_head_keeps_is_not_written_to():
    trunk, heads, parameters = trunk_and_heads()
    kept = []
    heads[0].weight.register_hook(kept.append)
    optimizer = DualBalancedOptimizer(SGD(parameters, lr=0.1), trunk, vectorize=True)
    for _ in range(2):
        kept.clear()
        features = torch.tanh(trunk(torch.randn(6, 4)))
        optimizer.backward([(head(features) - 1).square().mean() for head in heads])
    before = [gradient.clone() for gradient in kept]
    nn.utils.clip_grad_norm_(parameters, 1e-3)
    assert all(torch.equal(old, new) for old, new in zip(before, kept, strict=True))


def test_a_used_graph_is_the_callers_mistake_and_not_the_networks():
    model, optimizer = next(two({}))
    losses = model.losses(0)
    sum(losses.values()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="the graph of task 't0' is gone"):
            optimizer.step(losses)
        optimizer.zero_grad()
        optimizer.step(model.losses(0))
    assert optimizer._progress.vectorizes


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "ignore"])
@pytest.mark.parametrize("where", ["head", "trunk"])
def test_a_gradient_that_is_not_finite(where, nonfinite):
    """It is found task by task by single passes, and the next batch is vectorized again."""
    ends = []
    for vectorize in (True, False):
        model = cases.build("mlp")
        optimizer = DualBalancedOptimizer(
            model.optimizer(SGD, lr=0.01), model.trunk, vectorize=vectorize, nonfinite=nonfinite
        )
        optimizer.step(model.losses(0))
        optimizer.zero_grad()
        before = copy.deepcopy(model.state_dict())
        losses = model.losses(1)
        # sqrt at 0 has an infinite slope behind a finite value.
        if where == "head":
            losses["t1"] = losses["t1"] + (model.heads[1].weight * 0).sqrt().sum()
        else:
            handle = model.trunk.register_forward_hook(lambda module, args, output: output + (output * 0).sqrt())
            losses = model.losses(1)
            handle.remove()
        if nonfinite == "raise":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bad = "t1" if where == "head" else "t0"
                with pytest.raises(RuntimeError, match=f"gradient of task '{bad}' must be finite"):
                    optimizer.step(losses)
            assert_same(before, model.state_dict())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step(losses)
            assert optimizer.last_balance.skipped == (nonfinite == "skip")
        assert optimizer._progress.vectorizes
        ends.append(list(model.parameters()))
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_task_that_reaches_no_shared_parameter_is_an_error():
    model, optimizer = next(two({}))
    losses = model.losses(0)
    losses["alone"] = model.heads[0](torch.ones(2, 6, dtype=torch.float64)).square().mean()
    with pytest.raises(ValueError, match="task 'alone' reaches no shared parameter"):
        optimizer.step(losses)


def test_a_checkpoint_goes_from_one_form_to_the_other():
    (model, optimizer), (twin, other) = two({})
    for step in range(3):
        optimizer.step(model.losses(step))
        optimizer.zero_grad()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    follow([(model, optimizer), (twin, other)], lambda model, optimizer: optimizer.step(model.losses(3)))


@pytest.mark.parametrize("kind", ["norm_params", "not a bool"])
def test_wrong_arguments(kind):
    model = cases.build("mlp")
    options, match = {
        "norm_params": (
            {"vectorize": True, "norm_params": model.trunk[-1].parameters()},
            "vectorize cannot be used with norm_params, got vectorize=True.*leave one of them out",
        ),
        "not a bool": ({"vectorize": 1}, "vectorize must be True or False, got 1"),
    }[kind]
    with pytest.raises(ValueError, match=match):
        DualBalancedOptimizer(model.optimizer(SGD, lr=0.01), model.trunk, **options)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_on_a_device(name):
    ends = []
    for vectorize in (True, False):
        model = cases.build(name).cuda()
        optimizer = DualBalancedOptimizer(model.optimizer(SGD, lr=0.01), model.trunk, vectorize=vectorize)
        for step in range(3):
            optimizer.zero_grad()
            optimizer.step(model.losses(step))
        ends.append(list(model.parameters()))
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs)
