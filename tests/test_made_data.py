"""Tables that scikit-learn makes or ships, and the equation: what a problem holds, and that it can be learnt."""

from itertools import islice

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.data import equation, tabular
from benchmarks.data.all import DATA

TABLES = ("friedman", "friedman_raw", "diabetes", "diabetes_raw")


def column(batch, tasks):
    return torch.stack([batch.targets[task.name] for task in tasks], dim=1)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_split_by_the_seed_and_its_batches_start_anew(name):
    make = DATA[name].load(None)
    problem, other = make(0, 8), make(1, 8)
    batches = list(islice(problem.train_batches(), 3))
    assert torch.equal(batches[0].inputs, next(problem.train_batches()).inputs)
    assert not torch.equal(batches[0].inputs, batches[1].inputs)
    assert not torch.equal(batches[0].inputs, next(other.train_batches()).inputs)
    held_out = {tuple(row) for part in (problem.test, problem.validation) for row in part.inputs.tolist()}
    assert len(problem.test.inputs) == len(problem.validation.inputs)
    assert not held_out & {tuple(row) for batch in batches for row in batch.inputs.tolist()}


@pytest.mark.parametrize(
    ("name", "ratio"), [("friedman", 2), ("friedman_raw", 1e5), ("diabetes", 2), ("diabetes_raw", 1e3)]
)
def test_raw_targets_differ_in_their_units_and_z_scored_ones_do_not(name, ratio):
    problem = DATA[name].load(None)(0, 64)
    variances = column(problem.test, problem.tasks).var(dim=0)
    assert (variances.max() / variances.min() > ratio) == name.endswith("raw")


def test_raw_heads_start_at_the_centre_of_their_targets():
    problem = DATA["friedman_raw"].load(None)(0, 64)
    outputs = problem.build_model("hard")(problem.test.inputs, ["friedman2"])["friedman2"]
    assert outputs.mean().item() == pytest.approx(problem.test.targets["friedman2"].mean().item(), rel=0.1)


def test_the_second_and_third_function_share_their_inputs():
    table = tabular.friedman(0)
    resistance, frequency, inductance, capacitance = table.inputs[:, -4:].double().unbind(dim=1)
    reactance = frequency * inductance - 1 / (frequency * capacitance)
    clean = torch.stack([torch.hypot(resistance, reactance), torch.atan(reactance / resistance)], dim=1)
    noise = (table.targets[:, 1:] - clean).std(dim=0)
    assert noise.tolist() == pytest.approx(tabular.NOISE[1:], rel=0.05)


@pytest.mark.parametrize("name", [*TABLES, "equation"])
def test_made_and_shipped_data_take_no_file(name, tmp_path):
    with pytest.raises(ValueError, match="takes no file"):
        DATA[name].load(tmp_path)


def test_u_solves_the_equation():
    x = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    u = equation.solution(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(second + u, equation.right_hand_side(x))
    assert u[[0, -1]].tolist() == pytest.approx([0, 0], abs=1e-12)


def test_the_network_differentiates_itself_also_without_a_graph():
    torch.manual_seed(0)
    model, step = equation.EquationNet().double(), 1e-4
    x = torch.linspace(0.1, 0.9, 9, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        outputs = model({"residual": x, "measurements": x}, ["residual", "measurements"])
        u = outputs["measurements"]
        second = (model.u(x + step) - 2 * u + model.u(x - step)) / step**2
    torch.testing.assert_close(outputs["residual"].detach(), second + u, rtol=1e-5, atol=1e-6)


def test_every_task_of_the_equation_reaches_the_norm_parameters_and_only_one_is_judged():
    torch.manual_seed(0)
    problem = equation.equation(0)
    model, batch = problem.build_model("hard"), next(problem.train_batches())
    outputs = model(batch.inputs, [task.name for task in problem.tasks])
    for task in problem.tasks:
        loss = task.loss(outputs[task.name], batch.targets[task.name])
        gradients = torch.autograd.grad(loss, model.norm_parameters(), retain_graph=True)
        assert all(gradient.any() for gradient in gradients)
    assert [task.name for task in problem.tasks if task.metrics] == ["measurements"]
    (metric,) = problem.tasks[-1].metrics
    truth = problem.test.targets["measurements"]
    assert metric.score(truth, truth) == 1
    assert metric.score(truth.mean().expand_as(truth), truth).item() == pytest.approx(0, abs=1e-6)
