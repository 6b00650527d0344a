"""What a step costs: the command measures what it says and writes what its readers expect."""

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.cost import step_cost
from benchmarks.cost.trunks import TRUNKS, build


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
