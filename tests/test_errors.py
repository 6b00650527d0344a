"""Every refused input: the kind of error, the words of its message, and that nothing was changed."""

import copy
import math

import pytest
import torch
from conftest import assert_same, build, named, snapshot, train
from networks import Net
from torch import nn

from balanced_optim import DualBalancedOptimizer

# ------------------------------------------------- the constructor


def adam(net):
    return torch.optim.Adam(net.parameters())


def used_up(parameters):
    iterator = iter(list(parameters))
    list(iterator)
    return iterator


def base(make):
    return lambda net: ((make(net), net.trunk), {})


def shared(make):
    return lambda net: ((adam(net), make(net)), {})


def option(**options):
    return lambda net: ((adam(net), net.trunk), options)


NUMBERS = {
    "beta": (r"a number in \[0, 1\)", [1.0, 1.5, -0.1, math.nan, math.inf, True, "0.9", None]),
    "beta_decay": (r"a number >= 0", [-0.5, math.nan, math.inf, True, "1", None]),
    "eps": (r"a number > 0", [0, 0.0, -1e-8, math.nan, math.inf, True, "1e-8", None]),
    "max_weight": (r"None or a number > 0 \(1 keeps the log only", [0, -1.0, math.nan, math.inf, True, "10"]),
    "log_transform": (r"True or False", [1, 0.0, "yes", None]),
    "fade_solved": (r"True or False", [1, 0.0, "yes", None]),
    "norm_target": (r"one of \('max', 'rms', 'mean', 'median', 'min', None\)", ["MAX", "sum", 0, True]),
    "ema_dtype": (
        r"None, torch.float64, torch.float32, torch.bfloat16 or torch.float16",
        ["bfloat16", torch.int32, torch.complex64],
    ),
    "nonfinite": (r"one of \('raise', 'skip', 'ignore'\)", ["warn", None, True]),
}


def shown(value):
    return repr(value).replace("(", r"\(").replace(")", r"\)")


BAD_CONSTRUCTIONS = [
    pytest.param(
        option(**{name: value}), ValueError, rf"^{name} must be {rule}.*, got {shown(value)}", id=f"{name}={value!r}"
    )
    for name, (rule, values) in NUMBERS.items()
    for value in values
] + [
    pytest.param(
        base(lambda net: net),
        TypeError,
        r"base_optim must be a torch.optim.Optimizer, got Net; build it first",
        id="module-as-base",
    ),
    pytest.param(
        base(lambda net: torch.optim.Adam),
        TypeError,
        r"base_optim must be .*Optimizer, got type; build it first",
        id="class-as-base",
    ),
    pytest.param(
        base(lambda net: list(net.parameters())),
        TypeError,
        r"base_optim must be .*, got list; build it first",
        id="parameters-as-base",
    ),
    pytest.param(
        base(lambda net: None), TypeError, r"base_optim must be .*, got NoneType; build it first", id="none-as-base"
    ),
    pytest.param(
        base(lambda net: torch.optim.LBFGS(net.parameters())),
        TypeError,
        r"base_optim must step without a closure, got LBFGS.*; use a first-order",
        id="lbfgs",
    ),
    pytest.param(
        base(lambda net: torch.optim.SparseAdam(net.parameters())),
        TypeError,
        r"base_optim must accept dense .* got SparseAdam.*; use Adam",
        id="sparse-adam",
    ),
    pytest.param(
        base(lambda net: DualBalancedOptimizer(adam(net), net.trunk)),
        TypeError,
        r"base_optim must be the plain optimizer, got a DualBalancedOptimizer; wrap it once",
        id="wrapped-twice",
    ),
    pytest.param(
        lambda net: ((torch.optim.Adam(net.heads.parameters()), net.trunk), {}),
        ValueError,
        r"shared_params must all be in base_optim, but .*'0.weight' .*of shape \(6, 4\) is not",
        id="module-not-in-base",
    ),
    pytest.param(
        shared(lambda net: [net.trunk[0].weight, nn.Parameter(torch.ones(3))]),
        ValueError,
        r"shared_params must all be in base_optim, but entry 1 of shape \(3,\) is not",
        id="parameter-not-in-base",
    ),
    pytest.param(
        shared(lambda net: []), ValueError, r"shared_params must hold at least one parameter, got none", id="no-shared"
    ),
    pytest.param(
        shared(lambda net: nn.Tanh()),
        ValueError,
        r"shared_params must hold at least one parameter, got none",
        id="module-without-parameters",
    ),
    pytest.param(
        shared(lambda net: used_up(net.trunk.parameters())),
        ValueError,
        r"shared_params must hold at least one .* got none; was it an iterator that is used up",
        id="iterator-used-up",
    ),
    pytest.param(
        shared(lambda net: net.trunk[0].weight),
        TypeError,
        r"shared_params must be an iterable .* or a Module, got Parameter; put a single parameter into a list",
        id="single-parameter",
    ),
    pytest.param(
        shared(lambda net: None), TypeError, r"shared_params must be an iterable .*, got NoneType", id="none-as-shared"
    ),
    pytest.param(
        shared(lambda net: [{"params": list(net.trunk.parameters())}]),
        TypeError,
        r"shared_params must hold parameters, got dict at entry 0; pass trunk.parameters\(\)",
        id="param-groups-as-shared",
    ),
    pytest.param(
        shared(lambda net: net.trunk.named_parameters()),
        TypeError,
        r"shared_params must hold parameters, got tuple at entry 0; pass trunk.parameters\(\)",
        id="named-parameters-as-shared",
    ),
    pytest.param(
        shared(lambda net: [net.trunk]),
        TypeError,
        r"shared_params must hold parameters, got Sequential at entry 0; .* or the trunk module",
        id="list-of-modules-as-shared",
    ),
    pytest.param(
        option(task_weights="ab"),
        TypeError,
        r"task_weights must be a sequence or a mapping by task name, got str",
        id="weights-str",
    ),
    pytest.param(
        option(task_weights=2.0),
        TypeError,
        r"task_weights must be a sequence or a mapping by task name, got float",
        id="weights-number",
    ),
    pytest.param(
        option(task_weights={1.0, 2.0}),
        TypeError,
        r"task_weights must be a sequence or a mapping by task name, got set",
        id="weights-set",
    ),
    pytest.param(
        option(task_weights=torch.ones(2)),
        TypeError,
        r"task_weights must be a sequence or a mapping by task name, got Tensor",
        id="weights-tensor",
    ),
    pytest.param(
        option(task_weights=[]), ValueError, r"task_weights must hold one weight a task, got none", id="weights-empty"
    ),
    pytest.param(
        option(task_weights={}),
        ValueError,
        r"task_weights must hold one weight a task, got none",
        id="weights-empty-mapping",
    ),
    pytest.param(
        option(task_weights={1: 1.0}),
        TypeError,
        r"task_weights must have task names of type str, got 1",
        id="weights-int-key",
    ),
    *(
        pytest.param(
            option(task_weights=weights),
            ValueError,
            rf"task_weights\[{key}\] must be a finite number >= 0, got {value}",
            id=f"weights={weights}",
        )
        for weights, key, value in [
            ([1.0, -1.0], "1", "-1.0"),
            ([math.nan], "0", "nan"),
            ([1.0, math.inf], "1", "inf"),
            ([True], "0", "True"),
            (["1"], "0", "'1'"),
            ([None], "0", "None"),
            ({"a": 1.0, "b": -2}, "'b'", "-2"),
        ]
    ),
    pytest.param(option(process=1), TypeError, r"process", id="unknown-argument"),
    pytest.param(lambda net: ((adam(net), net.trunk, 0.9), {}), TypeError, r"positional", id="beta-by-position"),
]
BAD_CONSTRUCTIONS += [
    pytest.param(
        option(fade_solved=True, **other),
        ValueError,
        rf"^fade_solved needs a norm_target and log_transform=True, got .*{shown}.*leave it out",
        id=f"fade_solved, {other}",
    )
    for other, shown in (({"norm_target": None}, "norm_target=None"), ({"log_transform": False}, "log_transform=False"))
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CONSTRUCTIONS)
def test_constructor_refuses(arguments, error, message):
    args, options = arguments(Net())
    with pytest.raises(error, match=message):
        DualBalancedOptimizer(*args, **options)


# ------------------------------------------------- losses


def swap(task, change):
    """The good losses with one of them replaced."""

    def bad(net, optimizer):
        losses = net.losses(7)
        losses[task] = change(losses[task])
        return losses

    return bad


def from_losses(change):
    return lambda net, optimizer: change(net.losses(7))


def without_grad(net, optimizer):
    with torch.no_grad():
        return net.losses(7)


def with_used_graph(net, optimizer):
    losses = net.losses(7)
    torch.autograd.grad(sum(losses), list(net.parameters()))
    return losses


def with_used_last_graph(net, optimizer):
    losses = [net.losses(7)[0], net.losses(7)[1]]
    torch.autograd.grad(losses[1], list(net.heads[1].parameters()))
    return losses


def apart_from_the_trunk(loss):
    return nn.Linear(2, 1)(torch.ones(2)).square().sum()


def sum_of_head(net, optimizer):
    return [net.losses(7)[0], net.heads[1].weight.square().sum()]


def gradient_nan(loss):
    return loss + (loss.detach() - loss).sqrt()


UNGRADED = r"loss of task '1' must need a gradient, got one without a graph \(value .*\); was it detached"
NOT_FINITE = r"loss of task '{}' must be finite, got {}; nothing was changed; look for .* nonfinite='skip'"
KIND = r"losses must be a sequence, a mapping or a 1-D tensor of task losses, got {}"

ALWAYS, LATER = (0, 2), (2,)

# losses from (net, optimizer), error, message, at which steps, whether the good steps name the tasks
BAD_LOSSES = [
    (
        "sum",
        from_losses(sum),
        TypeError,
        r"losses must be one loss a task, got a single tensor of shape \(\); .* not their sum",
        ALWAYS,
        False,
    ),
    (
        "2-D",
        from_losses(lambda losses: torch.stack(losses)[:, None]),
        TypeError,
        r"losses must be one loss a task, got a single tensor of shape \(2, 1\)",
        ALWAYS,
        False,
    ),
    (
        "empty-tensor",
        lambda net, optimizer: torch.ones(0, requires_grad=True),
        ValueError,
        r"losses must (hold at least one task|have 2 entries)",
        ALWAYS,
        False,
    ),
    (
        "empty-list",
        lambda net, optimizer: [],
        ValueError,
        r"losses must hold at least one task, got none",
        ALWAYS,
        False,
    ),
    (
        "empty-dict",
        lambda net, optimizer: {},
        ValueError,
        r"losses must hold at least one task, got an empty mapping",
        (0,),
        True,
    ),
    ("float", lambda net, optimizer: 1.5, TypeError, KIND.format("float"), ALWAYS, False),
    ("str", lambda net, optimizer: "loss", TypeError, KIND.format("str"), ALWAYS, False),
    ("set", from_losses(set), TypeError, KIND.format("set"), ALWAYS, False),
    ("generator", from_losses(iter), TypeError, KIND.format("list_iterator"), ALWAYS, False),
    (
        "entry-float",
        swap(1, lambda loss: loss.item()),
        TypeError,
        r"loss of task '1' must be a tensor or None, got float [\d.]+; .* without .item\(\)",
        ALWAYS,
        False,
    ),
    (
        "entry-list",
        swap(1, lambda loss: [loss]),
        TypeError,
        r"loss of task '1' must be a tensor or None, got list",
        ALWAYS,
        False,
    ),
    (
        "not-scalar",
        swap(1, lambda loss: loss.repeat(3)),
        ValueError,
        r"loss of task '1' must be a scalar, got shape \(3,\); reduce it with .mean\(\)",
        ALWAYS,
        False,
    ),
    (
        "no-element",
        swap(0, lambda loss: loss.repeat(0)),
        ValueError,
        r"loss of task '0' must be a scalar, got shape \(0,\)",
        ALWAYS,
        False,
    ),
    (
        "integer",
        swap(1, lambda loss: torch.tensor(3)),
        ValueError,
        r"loss of task '1' must be of a real floating dtype, got torch.int64",
        ALWAYS,
        False,
    ),
    (
        "complex",
        swap(1, lambda loss: loss * 1j),
        ValueError,
        r"loss of task '1' must be of a real floating dtype, got torch.complex64",
        ALWAYS,
        False,
    ),
    ("detached", swap(1, torch.Tensor.detach), ValueError, UNGRADED, ALWAYS, False),
    ("no-grad", without_grad, ValueError, UNGRADED.replace("'1'", "'0'"), ALWAYS, False),
    (
        "too-few",
        from_losses(lambda losses: losses[:1]),
        ValueError,
        r"losses must have 2 entries, .* got 1; pass None for a task that this batch lacks",
        LATER,
        False,
    ),
    (
        "too-many",
        from_losses(lambda losses: losses * 2),
        ValueError,
        r"losses must have 2 entries, .* got 4",
        LATER,
        False,
    ),
    (
        "names-for-sequence",
        from_losses(named),
        TypeError,
        r"losses must be a sequence of 2, as in the first call, got a mapping with \['a', 'b'\]; keep to one form",
        LATER,
        False,
    ),
    (
        "sequence-for-names",
        from_losses(list),
        TypeError,
        r"losses must be a mapping, since the tasks have names \['a', 'b'\], got 2 losses .*; pass \{name: loss\}",
        LATER,
        True,
    ),
    (
        "unknown-name",
        from_losses(lambda losses: {"a": losses[0], "z": losses[1]}),
        ValueError,
        r"losses names the unknown task 'z'; the tasks are \['a', 'b'\], fixed by the first call",
        LATER,
        True,
    ),
    (
        "int-name",
        from_losses(lambda losses: dict(enumerate(losses))),
        TypeError,
        r"losses must have task names of type str, got 0",
        (0,),
        True,
    ),
    ("nan", swap(0, lambda loss: loss * math.nan), ValueError, NOT_FINITE.format(0, "nan"), ALWAYS, False),
    ("inf", swap(1, lambda loss: loss * math.inf), ValueError, NOT_FINITE.format(1, "inf"), ALWAYS, False),
    ("minus-inf", swap(1, lambda loss: loss * -math.inf), ValueError, NOT_FINITE.format(1, "-inf"), ALWAYS, False),
    (
        "named-nan",
        from_losses(lambda losses: named([losses[0], losses[1] * math.nan])),
        ValueError,
        NOT_FINITE.format("b", "nan"),
        ALWAYS,
        True,
    ),
    (
        "negative",
        swap(0, lambda loss: loss - 50),
        ValueError,
        r"loss of task '0' must be greater than -eps = -1e-08 under the log .*, got -4.*; .* pass log_transform=False",
        ALWAYS,
        False,
    ),
    (
        "last-negative",
        swap(1, lambda loss: -loss),
        ValueError,
        r"loss of task '1' must be greater than -eps .* got -",
        ALWAYS,
        False,
    ),
    (
        "gradient-nan",
        swap(0, gradient_nan),
        RuntimeError,
        r"gradient of task '0' must be finite, got NaN or inf behind a finite loss; .*; look for sqrt",
        ALWAYS,
        False,
    ),
    ("last-gradient-nan", swap(1, gradient_nan), RuntimeError, r"gradient of task '1' must be finite", ALWAYS, False),
    (
        "used-graph",
        with_used_graph,
        RuntimeError,
        r"the graph of task '0' is gone: .* drop any loss.backward\(\) before them",
        ALWAYS,
        False,
    ),
    ("used-last-graph", with_used_last_graph, RuntimeError, r"the graph of task '1' is gone: ", ALWAYS, False),
    (
        "no-trunk",
        swap(0, apart_from_the_trunk),
        ValueError,
        r"task '0' reaches no shared parameter: .* leave it out of the losses .*, (or )?correct shared_params",
        ALWAYS,
        False,
    ),
    ("last-no-trunk", sum_of_head, ValueError, r"task '1' reaches no shared parameter", ALWAYS, False),
]


# Seen only after the passes of earlier tasks, whose averages may have taken the batch in, as documented.
# Causes that only show in the last task's pass, when the tasks before it have been averaged.
AVERAGES_MAY_MOVE = {"last-gradient-nan", "used-last-graph", "last-no-trunk"}


def without_averages(seen):
    for entry in seen["state"]["state"].values():
        for name in [name for name in entry if name.startswith("task_ema_")]:
            del entry[name]
    return seen


def refused(net, optimizer, call, error, message, form, averages_may_move=False):
    """Call, see the error and an untouched state; then a good step does what it does without the bad call."""
    twin, other = copy.deepcopy((net, optimizer))
    for parameter, same in zip(net.parameters(), twin.parameters(), strict=True):
        same.grad = None if parameter.grad is None else parameter.grad.clone()
    before = snapshot(net, optimizer)
    assert_same(snapshot(twin, other), before)
    with pytest.raises(error, match=message):
        call()
    if averages_may_move:
        assert_same(without_averages(snapshot(net, optimizer)), without_averages(before))
        train(net, optimizer, 1, start=3, form=form)
        return
    assert_same(snapshot(net, optimizer), before)
    train(net, optimizer, 2, start=3, form=form)
    train(twin, other, 2, start=3, form=form)
    assert_same(snapshot(net, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("method", ["step", "backward"])
@pytest.mark.parametrize(
    ("make", "error", "message", "steps", "names", "averages_may_move"),
    [
        pytest.param(
            make, error, message, steps, names, name in AVERAGES_MAY_MOVE and steps > 0, id=f"{name}-after-{steps}"
        )
        for name, make, error, message, when, names in BAD_LOSSES
        for steps in when
    ],
)
def test_losses_are_refused_and_nothing_changes(make, error, message, steps, names, averages_may_move, method):
    net, optimizer = build()
    form = named if names else (lambda losses, seed: losses)
    train(net, optimizer, steps, form=form)
    losses = make(net, optimizer)
    refused(net, optimizer, lambda: getattr(optimizer, method)(losses), error, message, form, averages_may_move)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("max_weight", [None, 2.0])
@pytest.mark.parametrize("bad", ["nan", "inf", "negative", "used-last-graph", "last-no-trunk", "gradient-nan"])
def test_refusals_with_every_store(bad, beta, max_weight):
    make, error, message = next(row[1:4] for row in BAD_LOSSES if row[0] == bad)
    net, optimizer = build(beta=beta, max_weight=max_weight)
    train(net, optimizer, 2)
    losses = make(net, optimizer)
    may_move = bad in AVERAGES_MAY_MOVE
    refused(net, optimizer, lambda: optimizer.step(losses), error, message, lambda losses, seed: losses, may_move)


BAD_CALLS = [
    pytest.param(
        lambda o, net: o.step(lambda: None),
        TypeError,
        r"closure must return the task losses, got None",
        id="closure-none",
    ),
    pytest.param(lambda o, net: o.step(closure=lambda: 1.0), TypeError, KIND.format("float"), id="closure-float"),
    pytest.param(lambda o, net: o.step(lambda: sum(net.losses(7))), TypeError, r"not their sum", id="closure-sum"),
    pytest.param(
        lambda o, net: o.step(net.losses(7), closure=lambda: net.losses(7)),
        TypeError,
        r"step\(\) takes losses or a closure, got both",
        id="both",
    ),
    pytest.param(
        lambda o, net: o.step(net.losses, net.losses),
        TypeError,
        r"step\(\) takes losses or a closure, got both",
        id="two-closures",
    ),
    pytest.param(
        lambda o, net: o.step(closure=3), TypeError, r"closure must be .*, got int", id="closure-not-callable"
    ),
    pytest.param(lambda o, net: o.backward(None), TypeError, KIND.format("NoneType"), id="backward-none"),
    pytest.param(lambda o, net: o.backward(net.losses), TypeError, KIND.format("method"), id="backward-closure"),
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_calls_are_refused_and_nothing_changes(call, error, message, steps):
    net, optimizer = build()
    train(net, optimizer, steps)
    optimizer.zero_grad()
    refused(net, optimizer, lambda: call(optimizer, net), error, message, lambda losses, seed: losses)


@pytest.mark.parametrize(
    ("weights", "losses", "error", "message"),
    [
        ([1.0, 2.0, 3.0], list, ValueError, r"losses must have 3 entries, one for each of task_weights, got 2"),
        ([1.0, 2.0, 3.0], named, ValueError, r"losses must have 3 entries, one for each of task_weights, got 2"),
        ({"a": 1.0, "b": 2.0}, list, TypeError, r"losses must be a mapping, since the tasks have names \['a', 'b'\]"),
        ({"x": 1.0, "b": 2.0}, named, ValueError, r"unknown task 'a'; the tasks are \['x', 'b'\].*task_weights"),
    ],
)
def test_losses_that_contradict_the_task_weights(weights, losses, error, message):
    net, optimizer = build(task_weights=weights)
    before = snapshot(net, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(losses(net.losses()))
    assert_same(snapshot(net, optimizer), before)
    names = list(weights)
    given = net.losses() + net.losses() if len(weights) == 3 else net.losses()
    optimizer.step(dict(zip(names, given, strict=False)) if isinstance(weights, dict) else given[: len(weights)])
    assert len(optimizer.last_balance.tasks) == len(weights)
