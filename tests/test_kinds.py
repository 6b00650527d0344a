"""Situations of kinds that many users meet, each kind with several members. What is not right must be refused."""

import copy
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from modes import no_double
from torch import nn
from torch.utils.checkpoint import checkpoint

from balanced_optim import DualBalancedOptimizer
from balanced_optim._remedies import REMEDY

FORMS = {
    "exact": lambda trunk: {},
    "no average": lambda trunk: {"beta": 0.0},
    "one backward": lambda trunk: {"norm_params": trunk[-1]},
    "refreshed": lambda trunk: {"norm_params": trunk, "refresh_every": 3},
}
every_form = pytest.mark.parametrize("form", FORMS)


def build(form="exact", base=torch.optim.SGD, **options):
    """A trunk of two layers, two heads, their balanced optimizer."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    plain = base([*trunk.parameters(), *heads.parameters()], lr=0.01)
    return trunk, heads, DualBalancedOptimizer(plain, trunk, **FORMS[form](trunk), **options)


def data(seed=0):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def losses_of(trunk, heads, x, between=lambda z: z):
    z = between(trunk(x))
    return [10.0**task * (head(z) - 1).square().mean() for task, head in enumerate(heads)]


def gradients(*modules):
    return [parameter.grad for module in modules for parameter in module.parameters()]


def are_close(some, others):
    torch.testing.assert_close(some, others, rtol=1e-4, atol=1e-6)


# ------------------------------------------------- graphs that are right only once


def function(name, forward, backward, **members):
    """A new class of custom Functions."""
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), parts | members)


def keep(ctx, x):
    ctx.kept, ctx.calls = x.detach().clone(), 0
    return x * x


def overwrite(ctx, g):
    ctx.kept.mul_(2).mul_(g)
    return ctx.kept.clone()


def overwrite_late(ctx, g):
    ctx.calls += 1
    found = 2 * ctx.kept * g
    if ctx.calls == 2:
        ctx.kept.zero_()
    return found


def turn_around(ctx, g):
    found = 2 * ctx.kept * g
    ctx.kept.neg_()
    return found


def give_away(ctx, g):
    kept, ctx.kept = ctx.kept, None
    return 2 * kept * g


def right(ctx, g):
    return 2 * ctx.kept * g


WRONG = {"Overwrites": overwrite, "OverwritesLate": overwrite_late, "TurnsAround": turn_around, "GivesAway": give_away}


@every_form
@pytest.mark.parametrize("kind", WRONG)
def test_a_function_whose_backward_spoils_what_it_saved_is_named_and_nothing_changes(kind, form):
    spoils = function(kind, keep, WRONG[kind])
    for between in (spoils.apply, lambda z: checkpoint(spoils.apply, z, use_reentrant=False)):
        trunk, heads, optimizer = build(form)
        with pytest.raises(RuntimeError, match=kind):
            optimizer.backward(losses_of(trunk, heads, data(), between))
        with pytest.raises(RuntimeError, match=kind):
            optimizer.accumulate(losses_of(trunk, heads, data(), between))
        assert optimizer.last_balance is None
        assert gradients(trunk, heads) == [None] * 8


@every_form
def test_a_function_with_noise_says_so_and_a_right_one_is_checked_once(form):
    calls = []

    def counted(ctx, g):
        calls.append(1)
        return right(ctx, g)

    kind = function("Right", keep, counted)
    trunk, heads, optimizer = build(form)
    for seed in range(2):
        optimizer.step(losses_of(trunk, heads, data(seed), kind.apply))
    ordinary = {"exact": 2, "no average": 2, "one backward": 3, "refreshed": 3}[form]
    assert len(calls) == 4 + 2 * ordinary - (2 if form == "refreshed" else 0)
    noise = function("Noise", keep, lambda ctx, g: torch.randn_like(g) * g, backward_has_noise=True)
    optimizer.step(losses_of(trunk, heads, data(), noise.apply))


@pytest.mark.parametrize("loss", [1.0, 2.0, 3.0, 6.0**0.5, 18.0**0.25])
def test_a_stored_gradient_that_is_scaled_in_place_is_noticed_whatever_the_loss(loss):
    """The cotangent is a multiple of 1 / loss: the multiple must not hide it where the two make 1."""

    def store(ctx, x):
        ctx.gradient = torch.full_like(x, 1 / x.numel())
        return x.mean()

    def scale(ctx, g):
        return ctx.gradient.mul_(g).clone()

    trunk, heads, optimizer = build()
    outputs = [head(trunk(data())) for head in heads]
    mean = function("Fused", store, scale).apply
    with pytest.raises(RuntimeError, match="Fused"):
        optimizer.backward([mean(output) + (loss - output.mean().detach()) for output in outputs])


def test_a_batch_that_overflows_proves_nothing_about_a_function():
    """As the first batches under a scaler do."""
    spoils = function("Spoils", keep, overwrite)
    trunk, heads, optimizer = build(nonfinite="skip")
    optimizer.step(losses_of(trunk, heads, data(), lambda z: spoils.apply(z) / torch.zeros(3)))
    assert optimizer.last_balance.skipped
    losses = losses_of(trunk, heads, data(), spoils.apply)
    losses[0].register_hook(lambda g: g * torch.inf)
    optimizer.step(losses)
    with pytest.raises(RuntimeError, match="Spoils"):
        optimizer.step(losses_of(trunk, heads, data(), spoils.apply))


def test_what_vmap_makes_of_a_function_is_checked_once_by_that_function():
    calls, spoils = [], []

    def double(ctx, g):
        calls.append(1)
        (x,) = ctx.saved_tensors
        return 2 * x * g * (1 + len(calls) * len(spoils))

    members = {
        "setup_context": staticmethod(lambda ctx, inputs, output: ctx.save_for_backward(*inputs)),
        "generate_vmap_rule": True,
    }
    kind = function("Vectorized", lambda x: x * x, double, **members)
    trunk, heads, optimizer = build()
    spoils.append(1)
    with pytest.raises(RuntimeError, match="Vectorized"):
        optimizer.step(losses_of(trunk, heads, data(), torch.vmap(kind.apply)))
    spoils.clear()
    calls.clear()
    for _ in range(3):
        optimizer.step(losses_of(trunk, heads, data(), torch.vmap(kind.apply)))
    assert len(calls) == 4 + 3 * 2


# ------------------------------------------------- losses that hide what they reach


def cached(trunk, x, *, through=1):
    """Mean square of the features, whose backward pass into the trunk runs in a hook; the graph shows nothing of it."""
    z = trunk(x).detach().requires_grad_()
    loss = z.square().mean()
    (g,) = torch.autograd.grad(loss, z)
    leaf = loss.detach().requires_grad_()

    def hook(cotangent):
        with torch.enable_grad():
            ((trunk(x) * g).sum() * cotangent).backward()

    out = leaf * 1
    (leaf if through == 1 else out).register_hook(hook)
    return out


@every_form
@pytest.mark.parametrize("visible", [False, True])
@pytest.mark.parametrize("through", [1, 2])
def test_a_loss_that_hides_a_part_of_its_graph_is_right_or_refused(form, visible, through):
    def train(hides):
        trunk, heads, optimizer = build(form)
        found = []
        for seed in range(3):
            x = data(seed)
            seen = trunk(x).square().mean() if visible else 0.0
            hidden = cached(trunk, x, through=through) if hides else trunk(x).square().mean()
            optimizer.zero_grad()
            optimizer.backward([hidden + seen, losses_of(trunk, heads, x)[0]])
            found.append(gradients(trunk))
            optimizer.step()
        return found

    expected = train(hides=False)
    if form != "one backward":
        are_close(train(hides=True), expected)
        return
    with pytest.raises(RuntimeError, match="hook"):
        train(hides=True)


@pytest.mark.parametrize("seen_by", [0, 1])
def test_a_hidden_part_that_reaches_a_head_is_refused(seen_by):
    """Where norms are reused it could not be told from what another task brings."""
    trunk, heads, optimizer = build("refreshed")
    both = nn.Sequential(trunk, heads[0])
    x = data(0)
    losses = [cached(both, x), losses_of(trunk, heads, x)[1]]
    losses[seen_by] = losses[seen_by] + both(x).square().mean()
    with pytest.raises(RuntimeError, match="hook"):
        optimizer.backward(losses)


@every_form
def test_a_harmless_hook_on_a_leaf_outside_the_optimizer_stays_allowed(form):
    trunk, heads, optimizer = build(form)
    outside, seen = torch.ones(3, requires_grad=True), []
    outside.register_hook(seen.append)
    for seed in range(3):
        optimizer.step(losses_of(trunk, heads, data(seed), lambda z: z * outside))
    assert seen
    assert outside.grad is not None


def test_with_ranks_a_part_that_is_hidden_beside_a_visible_one_is_refused(group):
    for through in (1, 2):
        trunk, heads, optimizer = build(process_group=group)
        visible, other = losses_of(trunk, heads, data())
        with pytest.raises(RuntimeError, match="hook"):
            optimizer.backward([visible + cached(trunk, data(), through=through), other])


@every_form
def test_a_custom_operator_of_torch_library_is_checked_like_a_function(form):
    name = f"balanced_optim_tests::spoils_{form.replace(' ', '_')}"
    spoils = torch.library.custom_op(name, lambda x: x * x, mutates_args=(), schema="(Tensor x) -> Tensor")

    def spoil(ctx, g):
        (x,) = ctx.saved_tensors
        x.data.mul_(2).mul_(g)
        return x.clone()

    spoils.register_autograd(spoil, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    trunk, heads, optimizer = build(form)
    with pytest.raises(RuntimeError, match="spoils"):
        optimizer.step(losses_of(trunk, heads, data(), lambda z: spoils(z * 1)))


def one_rank_has_it(rank, size, form):
    """What each rank is told where only the last one has a Function that overwrites, or a hidden part."""

    def told(call, between):
        trunk, heads, optimizer = build(form, process_group=torch.distributed.group.WORLD)
        losses = losses_of(trunk, heads, data(rank), between)
        if between is hidden and rank == size - 1:
            losses[0] = losses[0] + cached(trunk, data(rank))
        with pytest.raises(RuntimeError) as caught:
            getattr(optimizer, call)(losses)
        return str(caught.value)

    def hidden(z):
        return z

    overwrites = function("Overwrites", keep, overwrite).apply if rank == size - 1 else lambda z: z * z
    return [told(call, between) for call in ("step", "accumulate") for between in (overwrites, hidden)]


@every_form
def test_with_ranks_all_refuse_what_one_of_them_has(form, processes):
    answers = processes(2).run(one_rank_has_it, form)
    for number, reason in enumerate(["Overwrites", "hook"] * 2):
        assert reason in answers[1][number]
        assert answers[0][number].startswith("no rank goes on, since rank 1 cannot")


# ------------------------------------------------- torch.compile around the whole step


def test_the_lines_that_the_message_about_donated_buffers_gives_run_in_a_fresh_process():
    """The module that they set an option of is not there after `import torch`."""
    lines = [line.strip() for line in REMEDY.splitlines() if line.startswith("    ")]
    code = "\n".join(["import torch", *lines, "assert not torch._functorch.config.donated_buffer"])
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_library_does_not_import_the_compiler():
    code = "import sys, balanced_optim; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_private_name_that_keeps_methods_out_of_the_trace_exists():
    assert callable(torch._compile._disable_dynamo)


@pytest.mark.parametrize("calls", ["step", "backward", "closure", "accumulate", "state"])
@pytest.mark.parametrize("form", ["exact", "one backward"])
def test_a_compiled_step_equals_the_eager_one_and_traces_the_forward_pass_only(form, calls):
    def train(around):
        trunk, heads, optimizer = build(form)

        def step(x):
            optimizer.zero_grad()
            if calls == "closure":
                optimizer.step(lambda: losses_of(trunk, heads, x))
                return
            if calls == "accumulate":
                optimizer.accumulate(losses_of(trunk, heads, 2 * x))
            if calls == "state":
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.task_weights = [1.0, 2.0]
            optimizer.backward(losses_of(trunk, heads, x))
            optimizer.step()

        one_step = around(step)
        for seed in range(3):
            one_step(data(seed))
        return [*trunk.parameters(), *heads.parameters()]

    torch._dynamo.reset()
    expected = train(lambda step: step)
    torch._dynamo.utils.counters.clear()
    found = train(lambda step: torch.compile(step, backend="eager"))
    are_close(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


# ------------------------------------------------- devices, dtypes, frozen parameters

RULES = {
    "exact": {},
    "no average": {"beta": 0.0},
    "cap": {"max_weight": 2.0},
    "root mean square": {"norm_target": "rms"},
    "median": {"norm_target": "median"},
    "length": {"norm_target": 2.0},
    "fade": {"fade_solved": True},
    "log of one": {"log_transform": [True, False]},
    "warm-up": {"warmup_steps": 3, "beta": 0.0},
    "priorities": {"task_weights": [1.0, 0.1]},
    "half rows": {"ema_dtype": torch.bfloat16},
    "ignore": {"nonfinite": "ignore"},
    "aggregator": {"aggregator": lambda matrix: matrix.sum(0)},
}
every_rule = pytest.mark.parametrize(
    ("form", "rule"), [("exact", rule) for rule in RULES] + [("one backward", "cap"), ("refreshed", "priorities")]
)


def everything(trunk, heads, optimizer, around=lambda call, *arguments: call(*arguments)):
    """All that an optimizer can do, each call through `around`."""
    around(optimizer.accumulate, losses_of(trunk, heads, data(0)))
    around(optimizer.step, losses_of(trunk, heads, data(1)))
    around(optimizer.step, losses_of(trunk, heads, data(2)))
    around(optimizer.load_state_dict, around(optimizer.state_dict))
    around(setattr, optimizer, "task_weights", [1.0, 3.0])
    around(optimizer.step, losses_of(trunk, heads, data(3)))
    if optimizer._parts.state.beta > 0:
        around(optimizer.gradient_cosines)
    around(optimizer.reset_averages)
    around(optimizer.step, losses_of(trunk, heads, data(4)))


@every_rule
def test_a_float32_model_makes_no_tensor_of_double_precision(form, rule):
    def watched(call, *arguments):
        with no_double():
            return call(*arguments)

    everything(*build(form, **RULES[rule]), watched)


@every_rule
@pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16])
def test_another_default_device_or_dtype_changes_nothing(form, rule, default):
    device = isinstance(default, str)

    def elsewhere(call, *arguments):
        before = torch.get_default_device(), torch.get_default_dtype()
        torch.set_default_device(default) if device else torch.set_default_dtype(default)
        try:
            return call(*arguments)
        finally:
            torch.set_default_device(before[0]) if device else torch.set_default_dtype(before[1])

    expected, found = build(form, **RULES[rule]), build(form, **RULES[rule])
    everything(*expected)
    everything(*found, elsewhere)
    are_close(list(found[0].parameters()), list(expected[0].parameters()))


@every_rule
def test_with_ranks_another_default_device_changes_nothing_either(form, rule, group):
    def elsewhere(call, *arguments):
        torch.set_default_device("meta")
        try:
            return call(*arguments)
        finally:
            torch.set_default_device("cpu")

    everything(*build(form, process_group=group, **RULES[rule]), elsewhere)


@pytest.mark.parametrize("rule", ["exact", "no average", "aggregator", "cap"])
def test_a_trunk_that_is_all_frozen_from_the_start_lets_heads_train_and_thaws(rule):
    trunk, heads, optimizer = build(**RULES[rule])
    trunk.requires_grad_(False)
    trunk[0].weight.requires_grad_(True)
    trunk[0].weight.requires_grad_(False)
    before = [parameter.clone() for parameter in [*heads.parameters(), *trunk.parameters()]]
    optimizer.step(losses_of(trunk, heads, data()))
    optimizer.load_state_dict(optimizer.state_dict())
    after = [*heads.parameters(), *trunk.parameters()]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False] * 4 + [True] * 4
    trunk.requires_grad_(True)
    optimizer.step(losses_of(trunk, heads, data(1)))
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Keyed(Mapping):
    """As tensordict's: a length and an iteration of its batch, `get` that raises, no truth value."""

    def __init__(self, **entries):
        self.entries = entries

    def __getitem__(self, name):
        return self.entries[name]

    def get(self, name, *default):
        return self.entries.get(name, *default) if default else self.entries[name]

    def keys(self):
        return self.entries.keys()

    def __iter__(self):
        raise RuntimeError("iterating over an object without a batch")

    def __len__(self):
        return 0

    def __bool__(self):
        raise RuntimeError("no truth value")

    __eq__ = None
    __hash__ = None


def test_a_mapping_is_read_by_its_keys_alone():
    trunk, heads, optimizer = build()
    for _ in range(2):
        first, second = losses_of(trunk, heads, data())
        optimizer.accumulate(Keyed(a=first, b=second), samples=Keyed(a=2, b=3))
        optimizer.step(Keyed(b=losses_of(trunk, heads, data())[1]))
    assert optimizer.last_balance.tasks == ("a", "b")
    with pytest.raises(ValueError, match="unknown task 'c'"):
        optimizer.step(Keyed(c=losses_of(trunk, heads, data())[1]))


# ------------------------------------------------- who is shared


def insert(trunk, optimizer):
    optimizer.param_groups[0]["params"].insert(0, nn.Parameter(torch.ones(3, 4)))


def move(trunk, optimizer):
    first = optimizer.param_groups[0]["params"].pop(0)
    optimizer.add_param_group({"params": [first]})


def rebuild(trunk, optimizer):
    group = optimizer.param_groups[0]
    backwards = group["params"][::-1]
    optimizer.param_groups[:] = [{**group, "params": backwards[:3]}, {**group, "params": backwards[3:]}]


def exchange(trunk, optimizer):
    parameters = optimizer.param_groups[0]["params"]
    parameters[0], parameters[4] = parameters[4], parameters[0]


def swap(trunk, optimizer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        trunk.load_state_dict(copy.deepcopy(trunk.state_dict()))
        trunk.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def reparametrize(trunk, optimizer):
    nn.utils.parametrize.register_parametrization(trunk[-1], "weight", nn.Identity())


def train(trunk, heads, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        optimizer.step(losses_of(trunk, heads, data(seed)))


def values(*modules):
    return sorted(value for module in modules for p in module.parameters() for value in p.flatten().tolist())


@every_form
@pytest.mark.parametrize("change", [insert, move, rebuild, exchange, swap, reparametrize])
def test_shared_parameters_are_followed_wherever_they_go(change, form):
    trunk, heads, optimizer = build(form)
    train(trunk, heads, optimizer, range(2))
    change(trunk, optimizer)
    train(trunk, heads, optimizer, range(2, 5))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(trunk, heads, optimizer, range(5, 6))
    expected = build(form)
    train(*expected, range(6))
    assert values(trunk, heads) == pytest.approx(values(*expected[:2]), rel=1e-4, abs=1e-6)


def resize(trunk, heads, optimizer):
    trunk[-1].weight.data, trunk[-1].bias.data = torch.randn(5, 3), torch.zeros(5)


def replace(trunk, heads, optimizer):
    for name, new in (("weight", torch.randn(5, 3)), ("bias", torch.zeros(5))):
        old, new = getattr(trunk[-1], name), nn.Parameter(new)
        setattr(trunk[-1], name, new)
        parameters = optimizer.param_groups[0]["params"]
        parameters[[one is old for one in parameters].index(True)] = new
        optimizer.state.pop(old, None)


def remove(trunk, heads, optimizer):
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


@every_form
@pytest.mark.parametrize("change", [resize, replace, remove])
def test_parameters_of_another_shape_or_gone_are_named_until_the_averages_are_reset(change, form):
    trunk, heads, optimizer = build(form)
    train(trunk, heads, optimizer, range(2))
    change(trunk, heads, optimizer)
    if change is not remove:
        for head in heads:
            head.weight.data = torch.ones(1, 5)
    name = "0.weight" if change is remove else "2.weight"
    with pytest.raises(ValueError, match=f"{name}.*reset_averages" if form in ("exact", "no average") else "reset_av"):
        train(trunk, heads, optimizer, range(2, 3))
    optimizer.reset_averages()
    train(trunk, heads, optimizer, range(2, 5))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@every_form
def test_parameters_that_thaw_in_a_batch_that_is_refused_take_part_in_the_next(form):
    runs = build(form), build(form)
    for refused, (trunk, heads, optimizer) in zip((True, False), runs, strict=True):
        trunk[0].requires_grad_(False)
        train(trunk, heads, optimizer, range(2))
        trunk[0].requires_grad_(True)
        if refused:
            bias = trunk[-1].bias.data
            trunk[-1].bias.data = torch.zeros(1)
            with pytest.raises(ValueError, match="reset_averages"):
                train(trunk, heads, optimizer, range(2, 3))
            trunk[-1].bias.data = bias
        train(trunk, heads, optimizer, range(2, 5))
    assert values(*runs[0][:2]) == values(*runs[1][:2])


@pytest.mark.parametrize("form", ["exact", "no average", "one backward"])
@pytest.mark.parametrize("held", [True, False])
def test_frozen_thawed_frozen_and_thawed_again_with_a_resume_between(form, held):
    def start(thawed):
        trunk, heads, optimizer = build(form)
        trunk[0].requires_grad_(False)
        late = list(trunk[0].parameters())
        if not held:
            base = torch.optim.SGD([*trunk[-1].parameters(), *heads.parameters()], lr=0.01)
            optimizer = DualBalancedOptimizer(base, trunk, **FORMS[form](trunk))
            if thawed:
                optimizer.add_param_group({"params": late})
        return trunk, heads, optimizer

    here = trunk, heads, optimizer = start(False)
    train(*here, range(2))
    start(False)[2].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trunk[0].requires_grad_(True)
    if not held:
        optimizer.add_param_group({"params": list(trunk[0].parameters())})
    train(*here, range(2, 4))
    trunk[0].requires_grad_(False)
    before = trunk[0].weight.clone()
    train(*here, range(4, 6))
    assert torch.equal(before, trunk[0].weight)
    resumed = start(True)
    for part, saved in zip(resumed, copy.deepcopy([part.state_dict() for part in here]), strict=True):
        part.load_state_dict(saved)
    for one in (here, resumed):
        one[0][0].requires_grad_(True)
        train(*one, range(6, 8))
    assert values(*here[:2]) == values(*resumed[:2])
    assert not torch.equal(before, trunk[0].weight)


# ------------------------------------------------- norms of zero, heads with an optimizer of their own


class Branch(nn.Module):
    """A residual branch that begins at zero: by its gain, or as LoRA does by its second matrix."""

    def __init__(self, kind):
        super().__init__()
        self.stem = nn.Linear(4, 3)
        self.first, self.second = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.gain = nn.Parameter(torch.ones(3))
        nn.init.zeros_(self.gain if kind == "gain" else self.second.weight)

    def forward(self, x):
        x = self.stem(x)
        return x + self.gain * self.second(self.first(x).tanh())


OPTIONS = [{}, {"max_weight": 2.0}, {"nonfinite": "ignore"}, {"norm_target": 1.0}, {"norm_target": "median"}]
OPTIONS += [{"task_weights": [1.0, 2.0]}, {"fade_solved": True, "eps": 1e-3}, {"norm_power": 0.5, "warmup_steps": 3}]


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["gain", "matrix"])
def test_behind_a_layer_of_zeros_the_log_alone_acts_until_there_is_a_norm(kind, options, refresh_every):
    torch.manual_seed(0)
    trunk, heads = Branch(kind), nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    base = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=1e-2)
    optimizer = DualBalancedOptimizer(base, trunk, norm_params=trunk.first, refresh_every=refresh_every, **options)
    before = copy.deepcopy(trunk.state_dict())
    optimizer.backward(losses_of(trunk, heads, data()))
    assert optimizer.last_balance.norms.tolist() == [0.0, 0.0]
    assert (optimizer.last_balance.weights > 0).all()
    optimizer.step()
    train(trunk, heads, optimizer, range(10))
    assert not any(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    assert (optimizer.last_balance.norms > 0).all()


@every_form
@pytest.mark.parametrize("scaled", [False, True])
def test_heads_with_an_optimizer_of_their_own_get_the_gradient_of_the_whole_batch(form, scaled):
    def run(parts):
        trunk, heads, _ = build(form)
        optimizer = DualBalancedOptimizer(torch.optim.SGD(trunk.parameters(), lr=0.01), trunk, **FORMS[form](trunk))
        own, found = torch.optim.SGD(heads.parameters(), lr=0.01), []
        for seed in range(3):
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
            optimizer.zero_grad()
            own.zero_grad()
            *early, last = data(seed).split(parts)
            for rows in early:
                optimizer.accumulate(losses_of(trunk, heads, rows), scaler, samples=len(rows))
            optimizer.backward(losses_of(trunk, heads, last), scaler, samples=len(last))
            for each in (optimizer, own) if scaler else ():
                scaler.unscale_(each)
            found += gradients(trunk, heads)
            optimizer.step()
            own.step()
        return [gradient.clone() for gradient in found]

    are_close(run([4, 2, 2]), run([8]))


# ------------------------------------------------- what messages say


def gone(store, how):
    def give_back(index):
        if how == "pop":
            return store.pop(index)
        found, store[index] = store[index], None
        return found

    return give_back


@every_form
@pytest.mark.parametrize("call", ["step", "accumulate"])
@pytest.mark.parametrize("how", ["pop", "None"])
def test_saved_tensors_that_are_given_back_once_are_explained(form, call, how):
    store = {}

    def keep_one(tensor):
        store[len(store)] = tensor
        return len(store) - 1

    trunk, heads, optimizer = build(form)
    with torch.autograd.graph.saved_tensors_hooks(keep_one, gone(store, how)):
        losses = losses_of(trunk, heads, data())
    with pytest.raises(RuntimeError, match="give a tensor back as often as they are asked"):
        getattr(optimizer, call)(losses)


@every_form
@pytest.mark.parametrize("call", ["step", "accumulate"])
@pytest.mark.parametrize("number", [1, 4])
def test_an_optimizer_in_the_backward_pass_is_named_as_a_hook_that_has_stepped_once(form, call, number):
    trunk, heads, optimizer = build(form)
    for parameter in list(trunk.parameters())[-number:]:
        own = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda p, own=own: own.step() or own.zero_grad())
    before = trunk[-1].bias.clone()
    with pytest.raises(RuntimeError, match="a hook changed shared parameters.*once already"):
        getattr(optimizer, call)(losses_of(trunk, heads, data()))
    assert not torch.equal(before, trunk[-1].bias)


def test_warnings_point_to_the_line_that_called():
    trunk, heads, optimizer = build(nonfinite="skip")
    for call in (optimizer.step, optimizer.backward):
        optimizer._parts.pending.said.clear()
        with pytest.warns(UserWarning, match="'nll'.*log_transform") as seen:
            call({"nll": trunk(data()).mean() - 100, "other": losses_of(trunk, heads, data())[0]})
        assert [one.filename for one in seen] == [__file__]


def test_a_hook_that_takes_gradients_is_a_possible_reason_for_parameters_that_no_task_reaches():
    trunk, heads, optimizer = build()
    trunk[0].bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.warns(UserWarning, match="no task reaches 1 of the shared.*a hook takes their .grad"):
        optimizer.step(losses_of(trunk, heads, data()))


def call_it(self, closure=None):
    closure()


def demand(self, closure=None):
    assert closure is not None, "a closure is required"


def differentiate(self, closure=None):
    for group in self.param_groups:
        torch.autograd.grad([p.grad.sum() for p in group["params"]], group["params"])


def want_hessian(self, closure=None, hessian=None):
    raise ValueError("pass the Hessian")


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda self, closure: None, "without a closure"),
        (lambda self, *, closure: None, "without a closure"),
        (lambda self, loss, closure=None: None, "without a closure"),
        (call_it, "without a closure"),
        (demand, "without a closure"),
        (differentiate, "plain gradients"),
        (want_hessian, "plain gradients"),
    ],
)
def test_a_base_that_needs_more_than_gradients_is_refused_with_the_reason(step, reason):
    base = type("Demanding", (torch.optim.SGD,), {"step": step})
    with pytest.raises(TypeError, match=f"{reason}.*Demanding"):
        trunk, heads, optimizer = build(base=base)
        optimizer.step(losses_of(trunk, heads, data()))


def test_any_other_error_of_a_base_stays_as_it_is():
    def fail(self, closure=None):
        raise OSError("no space left on device")

    trunk, heads, optimizer = build(base=type("Failing", (torch.optim.SGD,), {"step": fail}))
    with pytest.raises(OSError, match="no space left"):
        optimizer.step(losses_of(trunk, heads, data()))


def test_a_list_as_closure_is_told_how_fabric_wants_it():
    trunk, heads, optimizer = build()
    with pytest.raises(TypeError, match=r"step\(losses=\.\.\.\)"):
        optimizer.step(closure=losses_of(trunk, heads, data()))
