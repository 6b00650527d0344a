"""What a step costs: the command measures what it says and writes what its readers expect."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.cost import gpu_checks, gpu_report, memory, step_cost, timing
from benchmarks.cost.contestants import CONTESTANTS, Contestant, able, plain_sum
from benchmarks.cost.trunks import TINY, build, mlp, named

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ON_CPU = [name for name, contestant in CONTESTANTS.items() if contestant.needs != "cuda"]


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*step_cost.CPU_TRUNKS, *(f"tiny_{name}" for name in TINY), "mlp16"])
def test_every_trunk_gives_its_losses_a_gradient(name):
    model, x, labels = build(name, 2, CPU)
    losses = model.losses(x[:2], labels[:, :2])
    assert len(losses) == 2
    reached = torch.autograd.grad(losses[0], list(model.trunk.parameters()))
    assert all(gradient.isfinite().all() for gradient in reached)
    assert any(gradient.abs().max() > 0 for gradient in reached)
    assert all(parameter.requires_grad for parameter in model.last_shared_layer())


@pytest.mark.parametrize(
    ("name", "scalars"), [("resnet50", 23_508_032), ("transformer_85m", 85_252_608), ("wide_mlp_67m", 67_125_248)]
)
def test_trunks_for_a_gpu_have_the_size_that_they_are_named_for(name, scalars):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in named(name).make().parameters()) == scalars


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trunk_runs_in_the_precision_that_it_is_to_run_in(bf16):
    model, x, labels = build("tiny_resnet50", 2, CPU)
    model.bf16 = bf16
    assert model.features(x).dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert {loss.dtype for loss in model.losses(x, labels)} == {torch.float32}


def test_step_cost_measures_each_contestant_against_the_floor(tmp_path, capsys):
    for package in ("torchjd", "rich", "matplotlib"):
        pytest.importorskip(package)
    arguments = ["--trunks", "mlp8", "--tasks", "2", "3", "--memory-tasks", "--seconds", "0.01", "--out", str(tmp_path)]
    step_cost.main(arguments)
    result = json.loads((tmp_path / "step_cost.json").read_text())
    cells = {(cell["tasks"], cell["contestant"]): cell for cell in result["time"]}
    assert set(cells) == {(tasks, name) for tasks in (2, 3) for name in ON_CPU}
    assert cells[2, "floor"]["to_floor"] == cells[2, "plain_sum"]["to_plain"] == 1
    assert all(cell["turns"] >= 5 and cell["milliseconds"] is None for cell in cells.values())
    assert result["failed"] == []
    assert set(result["left_out"]) == {*CONTESTANTS} - {*ON_CPU}
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("T = 3", "one_backward", "exact_captured is left out: needs a CUDA device"):
        assert text in printed


def test_a_contestant_that_cannot_run_leaves_the_others_their_figures(monkeypatch):
    def broken(model, x, labels):
        raise RuntimeError("out of memory\nand much more")

    monkeypatch.setitem(CONTESTANTS, "by_hand", Contestant(broken))
    cells, failed = timing.race("mlp8", 2, ["floor", "plain_sum", "by_hand"], 0.0, CPU)
    assert [cell.contestant for cell in cells] == ["floor", "plain_sum"]
    assert failed == {"by_hand": "RuntimeError: out of memory"}
    monkeypatch.setitem(CONTESTANTS, "floor", Contestant(broken))
    with pytest.raises(RuntimeError, match="out of memory"):
        timing.race("mlp8", 2, ["floor", "plain_sum"], 0.0, CPU)


def test_an_error_is_told_with_the_one_that_it_hides():
    try:
        try:
            raise ValueError("nonfinite must be 'ignore'\nunder capture")
        finally:
            raise RuntimeError("capture failed")
    except RuntimeError as error:
        assert timing.first_line(error) == "RuntimeError: capture failed (after ValueError: nonfinite must be 'ignore')"


def test_a_turn_with_dearer_steps_is_a_whole_cycle():
    taken = []
    assert timing.seconds_of(lambda: taken.append(1), CPU, cycle=8) >= 0
    assert len(taken) == CONTESTANTS["refreshed"].cycle == 8


def test_peaks_count_from_the_plain_sum_in_shared_parameters():
    n = sum(parameter.numel() for parameter in mlp(8, 8, 2).parameters())
    peaks = memory.above_plain("mlp8", 3, {"plain_sum": 1000, "exact": 1000 + 4 * 4 * n})
    assert peaks == [memory.Peak("mlp8", 3, "exact", 4.0)]
    assert memory.compared(["floor", "by_hand", "exact"]) == ["plain_sum", "exact", "by_hand"]


def test_step_cost_peak_is_that_of_a_fresh_process():
    peaks = {peak.contestant: peak.above_plain for peak in memory.measure_memory("wide_mlp", 2, ["exact"], "cpu", 1)}
    assert 2 < peaks["exact"] < 4.5


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trunks", "nothing"],
        ["--device", "cuda:99"],
        ["--tasks", "0"],
        ["--gpu-report", "report", "--device", "cuda:99"],
    ],
)
def test_step_cost_refuses_bad_arguments(arguments, tmp_path):
    with pytest.raises(SystemExit):
        step_cost.parse_arguments([*arguments, "--out", str(tmp_path)])


# --------------------------------------------------- the report on a GPU, on a CPU


def test_a_report_measures_what_a_cpu_can_and_says_what_is_left_out(tmp_path, capsys):
    step_cost.main(["--gpu-report", str(tmp_path / "new"), "--device", "cpu", "--threads", "1"])
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    names, _ = able(gpu_report.CONTESTANTS, CPU)
    kinds = [f"tiny_{trunk}" for trunk, _ in gpu_report.RACES[: gpu_report.TRIAL_RACES]]
    assert [(cell["trunk"], cell["contestant"]) for cell in report["time"]] == [(k, n) for k in kinds for n in names]
    assert len(set(kinds)) == len(kinds)
    assert report["failed"] == []
    assert {"exact_captured", "plain_sum_captured", "equality", "memory"} <= set(report["left_out"])
    assert report["environment"]["torch"] == torch.__version__
    assert report["seconds"] > 0
    printed = capsys.readouterr().out
    for what, reason in report["left_out"].items():
        assert f"{what} is left out: {reason}" in printed


def test_a_report_needs_nothing_but_torch(tmp_path):
    """A machine with a GPU has torch, and often nothing else."""
    absent = "dict.fromkeys(['rich', 'matplotlib', 'torchjd', 'numpy', 'sklearn', 'triton'])"
    program = f"import sys; sys.modules.update({absent}); from benchmarks.step_cost import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, "--gpu-report", str(tmp_path), "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["left_out"]["torchjd_loop"] == "torchjd is not installed"
    assert {cell["contestant"] for cell in report["time"]} >= {"floor", "plain_sum", "exact", "by_hand"}
    assert report["failed"] == []


def test_a_part_of_a_report_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def broken(report, records):
        records.append("what it had")
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu_report, "PARTS", {"bandwidth": broken, "equality": gpu_report.measure_equality})
    gpu_report.run_report(tmp_path, CPU)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bandwidth"] == ["what it had"]
    assert report["failed"] == [{"what": "bandwidth", "error": "ValueError: no such kernel"}]
    assert "equality" in report["left_out"]


def test_a_report_begins_no_race_that_it_cannot_end_in_time(monkeypatch):
    report, records = gpu_report.Report(CPU), []
    monkeypatch.setattr(gpu_report, "LATEST", -1.0)
    gpu_report.measure_times(report, records)
    assert records == []
    assert report.result["left_out"]["small_mlp, T = 3"] == "no time left"


def test_runs_are_compared_bit_for_bit():
    same = gpu_checks.compare("plain", plain_sum, partial(plain_sum, capturable=False), (3, 3), ("mlp8", 2, CPU))
    assert (same.equal, same.largest_difference, same.steps) == (True, 0.0, 3)
    other = gpu_checks.compare("plain", plain_sum, plain_sum, (3, 2), ("mlp8", 2, CPU))
    assert not other.equal
    assert other.largest_difference > 0


def test_bandwidth_goes_through_the_calls_that_a_step_makes():
    pytest.importorskip("balanced_optim._store", reason="a store of this form is not there")
    found = gpu_checks.measure_bandwidth(CPU, scalars=1000, tasks=3)
    assert [entry.kernel for entry in found] == ["copy", "average", "sum"]
    assert found[0].to_copy == 1
    assert all(entry.gigabytes > 0 for entry in found)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_report_of_a_gpu_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "RACES", [("small_mlp", 3)])
    monkeypatch.setattr(gpu_report, "PEAKS", [("small_mlp", 3)])
    monkeypatch.setattr(gpu_report, "EQUALITIES", [("small_mlp", 3)])
    monkeypatch.setattr(gpu_report, "SECONDS", 0.5)
    monkeypatch.setattr(gpu_report, "SCALARS", 10**6)
    gpu_report.run_report(tmp_path, torch.device("cuda"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failed"] == []
    assert all(report[part] for part in ("time", "memory", "equality"))
    assert all(entry["equal"] for entry in report["equality"])
    assert report["environment"]["device_name"] == torch.cuda.get_device_name()
