"""The benchmarks run, measure what they say, and write what their readers expect."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import compare, step_cost
from benchmarks.digits import TASKS, load_images, overlay, two_digits
from benchmarks.metrics import Spread, delta_p
from benchmarks.trunks import TRUNKS, build


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_compare_writes_every_method_with_its_spread(tmp_path, capsys):
    compare.main(["--steps", "3", "--seeds", "2", "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["methods"]) == {"stl", "ew", "log_only", "max_norm_only", "db_mtl", "db_mtl_one_backward"}
    assert summary["environment"]["torch"] == torch.__version__
    for name, method in summary["methods"].items():
        assert set(method["tasks"]) == {"left", "right", "reconstruction"}
        if name != "stl":
            gain = method["delta_p"]
            assert gain["mean"] == pytest.approx(sum(gain["seeds"]) / 2)
            assert math.isfinite(gain["std"])
    for picture in ("delta_p.png", "training.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "db_mtl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nothing"], "invalid choice: 'nothing'"),
        (["--steps", "0"], "must be a whole number of at least 1, got '0'"),
        (["--seeds", "x"], "must be a whole number of at least 1, got 'x'"),
    ],
)
def test_compare_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_delta_p_counts_gains_of_both_directions():
    baseline = {"left": 0.5, "right": 0.8, "reconstruction": 4.0}
    scores = {"left": 0.6, "right": 0.8, "reconstruction": 3.0}
    assert delta_p(scores, baseline, TASKS) == pytest.approx((20 + 0 + 25) / 3)
    assert delta_p(baseline, baseline, TASKS) == 0
    assert Spread([1.0, 3.0]).std == pytest.approx(math.sqrt(2))


def test_digits_are_overlaid_and_split_before_they_are_paired():
    images, _ = load_images()
    both = overlay(images[:1], images[1:2])
    assert both.shape == (1, 1, 8, 12)
    assert torch.equal(both[0, 0, :, :4], images[0, :, :4])
    assert torch.equal(both[0, 0, :, 8:], images[1, :, 4:])
    problem = two_digits(seed=0)
    batch = next(problem.train_batches())
    assert torch.equal(next(problem.train_batches()).inputs, batch.inputs)
    assert batch.targets["reconstruction"].max() == 16
    # The left four columns of an image show the left digit alone: no test digit's are among the training ones.
    seen = {tuple(image[0, :, :4].flatten().tolist()) for image in batch.inputs}
    test = {tuple(image[0, :, :4].flatten().tolist()) for image in problem.test.inputs}
    assert len(seen & test) <= 1


@pytest.mark.parametrize("name", [*TRUNKS, "mlp16"])
def test_every_trunk_gives_its_losses_a_gradient(name):
    model, x, labels = build(name, 2, torch.device("cpu"))
    losses = model.losses(x[:2], labels[:, :2])
    assert len(losses) == 2
    reached = torch.autograd.grad(losses[0], list(model.trunk.parameters()))
    assert all(gradient.isfinite().all() for gradient in reached)
    assert any(gradient.abs().max() > 0 for gradient in reached)


def test_step_cost_measures_each_contestant_against_the_floor(tmp_path, capsys):
    pytest.importorskip("torchjd")
    arguments = ["--trunks", "mlp8", "--tasks", "2", "3", "--memory-tasks", "--seconds", "0.01", "--out", str(tmp_path)]
    step_cost.main(arguments)
    result = json.loads((tmp_path / "step_cost.json").read_text())
    cells = {(cell["tasks"], cell["contestant"]): cell for cell in result["time"]}
    assert set(cells) == {(tasks, name) for tasks in (2, 3) for name in step_cost.CONTESTANTS}
    assert cells[2, "floor"]["to_floor"] == cells[2, "plain_sum"]["to_plain"] == 1
    assert all(cell["turns"] >= 5 and cell["milliseconds"] is None for cell in cells.values())
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "T = 3" in printed
    assert "one_backward" in printed


def test_step_cost_peak_is_that_of_a_fresh_process():
    peaks = {peak.contestant: peak.above_plain for peak in step_cost.measure_memory("wide_mlp", 2, ["exact"], "cpu", 1)}
    assert 2 < peaks["exact"] < 4.5


@pytest.mark.parametrize("arguments", [["--trunks", "nothing"], ["--device", "cuda:99"], ["--tasks", "0"]])
def test_step_cost_refuses_bad_arguments(arguments, tmp_path):
    with pytest.raises(SystemExit):
        step_cost.parse_arguments([*arguments, "--out", str(tmp_path)])
