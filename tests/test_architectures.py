"""Networks for dense prediction: what is shared, what every task reaches, and what does not run."""

import pytest
import torch
from torch import nn

from balanced_optim import DualBalancedOptimizer
from benchmarks.data.architectures import ARCHITECTURES, AttentionNet, CrossStitch, Encoder, build_dense

CHANNELS = {"labels": 5, "depth": 1, "normal": 3}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def build(architecture, tasks=3, seed=0, **options):
    channels = dict(list(CHANNELS.items())[:tasks])
    torch.manual_seed(seed)
    return build_dense(architecture, channels, **{"width": 4, "dilations": (2,)} | options)


def images(*size, seed=0):
    return torch.randn(2, 3, *(size or (8, 12)), generator=torch.Generator().manual_seed(seed))


def losses(model):
    return {name: output.square().mean() for name, output in model(images(), CHANNELS).items()}


def reached(loss, parameters):
    """Whether each parameter has a gradient that is not zero."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [gradient is not None and bool(gradient.any()) for gradient in gradients]


@every_architecture
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (20, 16)])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_outputs_have_the_size_of_the_images(architecture, size, tasks):
    outputs = build(architecture, tasks)(images(*size), list(CHANNELS)[:tasks])
    assert {name: output.shape for name, output in outputs.items()} == {
        name: (2, channels, *size) for name, channels in list(CHANNELS.items())[:tasks]
    }


@every_architecture
@pytest.mark.parametrize("dilations", [(), (2, 4), (2, 4, 8)])
def test_more_dilations_add_stages(architecture, dilations):
    model = build(architecture, dilations=dilations)
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    assert len(encoders) == (len(CHANNELS) if architecture == "cross_stitch" else 1)
    assert {len(encoder) for encoder in encoders} == {2 + len(dilations)}
    assert model(images(), ["depth"])["depth"].shape == (2, 1, 8, 12)


@every_architecture
def test_every_task_reaches_every_shared_parameter(architecture):
    model = build(architecture)
    for loss in losses(model).values():
        assert all(reached(loss, model.shared_parameters()))


@every_architecture
def test_other_parameters_belong_to_one_task_each(architecture):
    model = build(architecture)
    shared = set(model.shared_parameters())
    own = {name: parameter for name, parameter in model.named_parameters() if parameter not in shared}
    for task, loss in losses(model).items():
        of_task = [f".{task}." in name for name in own]
        assert reached(loss, list(own.values())) == of_task
        assert any(of_task)


@every_architecture
def test_norm_parameters_are_a_small_part_of_the_shared_ones(architecture):
    model = build(architecture)
    shared, subset = model.shared_parameters(), model.norm_parameters()
    assert {id(parameter) for parameter in subset} < {id(parameter) for parameter in shared}
    assert sum(map(torch.numel, subset)) < sum(map(torch.numel, shared)) / 2


def test_last_stitch_has_a_row_for_every_task():
    model = build("cross_stitch")
    for task, loss in enumerate(losses(model).values()):
        (gradient,) = torch.autograd.grad(loss, model.stitches[-1], retain_graph=True)
        assert gradient.flatten(1).any(dim=1).tolist() == [row == task for row in range(3)]


@every_architecture
def test_parts_of_tasks_that_are_not_named_do_not_run(architecture):
    model, ran = build(architecture), set()
    parts = [model.heads] + ([model.attentions] if architecture == "mtan" else [])
    for number, part in enumerate(parts):
        for name, module in part.items():
            module.register_forward_hook(lambda *_, key=(number, name): ran.add(key))
    outputs = model(images(), ["normal", "labels"])
    assert list(outputs) == ["normal", "labels"]
    assert ran == {(number, name) for number in range(len(parts)) for name in ("normal", "labels")}


@every_architecture
def test_output_does_not_depend_on_which_other_tasks_are_named(architecture):
    model = build(architecture)
    together = model(images(), CHANNELS)
    for name in CHANNELS:
        assert torch.equal(model(images(), [name])[name], together[name])


@every_architecture
@pytest.mark.parametrize("form", ["exact", "norm_params"])
def test_balanced_steps_lower_every_loss(architecture, form):
    model = build(architecture)
    options = {"norm_params": model.norm_parameters()} if form == "norm_params" else {}
    base = torch.optim.Adam(model.parameters(), lr=3e-3)
    optimizer = DualBalancedOptimizer(base, model.shared_parameters(), **options)
    before = losses(model)
    for _ in range(10):
        optimizer.zero_grad()
        optimizer.step(losses(model))
    after = losses(model)
    assert all(after[name] < before[name] for name in CHANNELS)
    assert optimizer.last_balance.weights.min() >= 1


@every_architecture
def test_weights_come_from_torchs_random_state(architecture):
    one, same, other = build(architecture), build(architecture), build(architecture, seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.norm_parameters()[0], other.norm_parameters()[0])


def test_hard_sharing_gives_every_head_the_features_of_one_encoder():
    model = build("hard")
    features = model.trunk(images())
    for name, output in model(images(), CHANNELS).items():
        assert torch.equal(output, model.heads[name](features))


@pytest.mark.parametrize(("tasks", "own", "other"), [(1, 1.0, None), (2, 0.9, 0.1), (3, 0.9, 0.05)])
def test_fresh_stitches_are_near_the_identity(tasks, own, other):
    model = build("cross_stitch", tasks)
    for stitch, channels in zip(model.stitches, (4, 8, 8), strict=True):
        assert stitch.shape == (tasks, tasks, channels)
        for task in range(tasks):
            for source in range(tasks):
                expected = torch.full((channels,), own if task == source else other)
                torch.testing.assert_close(stitch[task, source].detach(), expected)


@torch.no_grad()
def test_stitches_mix_the_features_of_the_encoders_by_channel():
    encoders = [Encoder(4, ()) for _ in range(2)]
    model = CrossStitch(encoders, {"one": nn.Identity(), "two": nn.Identity()})
    for stitch in model.stitches:
        stitch.copy_(torch.randn(stitch.shape))
    mixed = [images(), images()]
    for depth, stitch in enumerate(model.stitches):
        outputs = [encoder[depth](features) for encoder, features in zip(encoders, mixed, strict=True)]
        mixed = [
            sum(stitch[task, source].view(1, -1, 1, 1) * outputs[source] for source in range(2)) for task in range(2)
        ]
    for output, expected in zip(model(images(), ["one", "two"]).values(), mixed, strict=True):
        torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_stitches_of_the_identity_leave_every_task_its_own_encoder():
    model = build("cross_stitch")
    for stitch in model.stitches:
        stitch.copy_(torch.eye(3).unsqueeze(-1).expand_as(stitch))
    for (name, output), encoder in zip(model(images(), CHANNELS).items(), model.encoders, strict=True):
        torch.testing.assert_close(output, model.heads[name](encoder(images())))


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, features):
        return torch.tensor(self.value)


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_attention_masks_the_shared_features(value):
    encoder = Encoder(4, (2,))
    model = AttentionNet(encoder, {"task": nn.Identity()})
    model.attentions["task"].masks[-1] = Constant(value)
    torch.testing.assert_close(model(images(), ["task"])["task"], value * encoder(images()))


@torch.no_grad()
def test_attention_is_from_0_to_1_and_sees_what_the_task_attended_to_before():
    encoder = Encoder(4, (2,))
    model = AttentionNet(encoder, {"task": nn.Identity()})
    features, attended = encoder(images()), model(images(), ["task"])["task"]
    assert (attended >= 0).all()
    assert (attended <= features).all()
    assert (attended < features).any()
    model.attentions["task"].masks[0] = Constant(0.0)
    assert not torch.equal(model(images(), ["task"])["task"], attended)


@pytest.mark.parametrize("architecture", ["cross_stitch", "mtan"])
def test_inputs_of_every_tasks_own_are_refused(architecture):
    with pytest.raises(TypeError, match="inputs must be one tensor for all tasks, got those of depth, normal"):
        build(architecture)({"depth": images(), "normal": images()}, ["depth"])


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="architecture must be one of hard, cross_stitch, mtan, got 'soft'"):
        build("soft")
