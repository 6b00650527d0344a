"""The benchmarks run, measure what they say, and write what their readers expect."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchjd")

from benchmarks import compare
from benchmarks.data import digit_domains
from benchmarks.data.digits import TASKS, load_images, overlay, two_digits
from benchmarks.data.problem import Metric, Task
from benchmarks.study.methods import DEFAULT_METHODS
from benchmarks.study.metrics import Spread, delta_p
from benchmarks.study.summary import make_table, summarize, write_summary
from benchmarks.study.training import Run


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_compare_writes_every_method_with_its_spread(tmp_path, capsys):
    compare.main(["--steps", "3", "--seeds", "2", "--processes", "1", "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {*summary["methods"]} == {"stl", *DEFAULT_METHODS}
    assert summary["environment"]["torch"] == torch.__version__
    assert summary["environment"]["device"] == "cpu"
    for name, method in summary["methods"].items():
        metrics = {task: list(metrics) for task, metrics in method["tasks"].items()}
        assert metrics == {"left": ["accuracy"], "right": ["accuracy"], "reconstruction": ["MSE"]}
        if name != "stl":
            gain = method["delta_p"]
            assert gain["mean"] == pytest.approx(sum(gain["seeds"]) / 2)
            assert math.isfinite(gain["std"])
    for picture in ("delta_p.png", "training.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    assert "db_mtl" in printed
    assert "the protocol of the study with 2 seeds of 3 steps; the study has 5 seeds of 1000 steps" in printed


@pytest.mark.parametrize("timed", [True, False])
def test_a_summary_has_times_where_they_were_taken(timed, tmp_path):
    scores = {task.name: dict.fromkeys((metric.name for metric in task.metrics), 0.5) for task in TASKS}
    runs = {"stl": [Run(scores, scores)] * 2, "ew": [Run(scores, scores, seconds=s) for s in (0.001, 0.003)]}
    summary = summarize(runs, TASKS, timed=timed)
    write_summary(tmp_path / "summary.json", summary, {})
    written = json.loads((tmp_path / "summary.json").read_text())["methods"]
    assert "milliseconds" not in written["stl"]
    assert written["ew"].get("milliseconds", {}).get("mean") == (pytest.approx(2.0) if timed else None)
    table = make_table(summary, TASKS, "")
    assert [list(column.cells) for column in table.columns if "ms" in str(column.header)] == (
        [["", "2.00±1.41"]] if timed else []
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compare_on_a_gpu_says_how_long_a_step_takes(tmp_path, capsys):
    arguments = ["--steps", "3", "--seeds", "2", "--methods", "ew", "db_mtl", "--device", "cuda"]
    compare.main([*arguments, "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["environment"]["device"] == torch.cuda.get_device_name()
    timed = [method["milliseconds"]["seeds"] for name, method in summary["methods"].items() if name != "stl"]
    assert all(len(seeds) == 2 and min(seeds) > 0 for seeds in timed)
    assert "ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nothing"], "invalid choice: 'nothing'"),
        (["--steps", "0"], "must be a whole number of at least 1, got '0'"),
        (["--seeds", "x"], "must be a whole number of at least 1, got 'x'"),
        (["--device", "cuda:99"], "'cuda:99' cannot be used"),
        (["--device", "nowhere"], "'nowhere' cannot be used"),
    ],
)
def test_compare_refuses_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_delta_p_counts_gains_of_both_directions():
    baseline = {"left": {"accuracy": 0.5}, "right": {"accuracy": 0.8}, "reconstruction": {"MSE": 4.0}}
    scores = {"left": {"accuracy": 0.6}, "right": {"accuracy": 0.8}, "reconstruction": {"MSE": 3.0}}
    assert delta_p(scores, baseline, TASKS) == pytest.approx((20 + 0 + 25) / 3)
    assert delta_p(baseline, baseline, TASKS) == 0
    assert Spread([1.0, 3.0]).std == pytest.approx(math.sqrt(2))


def test_delta_p_averages_the_metrics_of_a_task_before_the_tasks():
    def metric(name, higher):
        return Metric(name, higher, F.mse_loss)

    depth = Task("depth", F.l1_loss, (metric("abs", False), metric("rel", False)))
    segmentation = Task("segmentation", F.cross_entropy, (metric("mIoU", True),))
    scores = {"depth": {"abs": 0.5, "rel": 0.3}, "segmentation": {"mIoU": 0.6}}
    baseline = {"depth": {"abs": 1.0, "rel": 0.2}, "segmentation": {"mIoU": 0.5}}
    assert delta_p(scores, baseline, (depth, segmentation)) == pytest.approx(((50 - 50) / 2 + 20) / 2)


def test_delta_p_against_a_metric_of_zero_names_it():
    scores = {"left": {"accuracy": 0.5}}
    with pytest.raises(ValueError, match="left, accuracy"):
        delta_p(scores, {"left": {"accuracy": 0.0}}, TASKS[:1])


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
    for held_out in (problem.test, problem.validation):
        assert len(seen & {tuple(image[0, :, :4].flatten().tolist()) for image in held_out.inputs}) <= 1


DOMAIN_COUNTS = {"mnist": 20, "usps": 12, "optdigits": 9}
DOMAIN_TEST_ROWS = {"mnist": [4, 9, 14, 19], "usps": [8, 9, 10, 11], "optdigits": [5, 6, 7, 8]}
DOMAIN_VALIDATION_ROWS = {"mnist": [0, 12], "usps": [0], "optdigits": [0]}


def domain_arrays():
    """Image i of a domain has the one pixel value `first + i`, so that every image tells where it is from."""
    arrays = {"usps_ntrain": np.array(8), "optdigits_ntrain": np.array(5)}
    for first, (name, count) in zip((0, 100, 200), DOMAIN_COUNTS.items(), strict=True):
        values = np.arange(first, first + count, dtype=np.uint8)
        arrays[f"{name}_x"] = np.repeat(values, 256).reshape(count, 16, 16)
        arrays[f"{name}_y"] = values % 10
    return arrays


@pytest.fixture
def domain_file(tmp_path):
    path = tmp_path / "domains.npz"
    np.savez(path, **domain_arrays())
    return path


def test_compare_runs_on_digit_domains_with_methods_that_are_not_defaults(tmp_path, capsys):
    # One digit for all, so that the single-task models are right at least once and Delta_p is defined.
    sevens = {f"{name}_y": np.full(count, 7) for name, count in DOMAIN_COUNTS.items()}
    np.savez(tmp_path / "domains.npz", **domain_arrays() | sevens)
    arguments = ["--data", "digit_domains", "--data-path", str(tmp_path / "domains.npz"), "--methods", "db_mtl"]
    arguments += ["bfloat16_averages", "--steps", "40", "--seeds", "1", "--out", str(tmp_path)]
    compare.main(arguments)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["methods"]) == {"stl", "db_mtl", "bfloat16_averages"}
    for method in summary["methods"].values():
        assert list(method["tasks"]) == ["mnist", "usps", "optdigits"]
        assert all(task["accuracy"]["mean"] == 1 for task in method["tasks"].values())
    assert summary["environment"]["problem"] == "three digit domains"
    assert (tmp_path / "training.png").exists()
    assert "Three digit domains" in capsys.readouterr().out


@pytest.mark.parametrize("name", DOMAIN_COUNTS)
def test_digit_domains_keep_test_images_and_other_domains_out_of_a_tasks_training(name, domain_file):
    problem = digit_domains.load(domain_file)(0, 64)
    batch = next(problem.train_batches())
    assert torch.equal(next(problem.train_batches()).inputs[name], batch.inputs[name])
    first = {"mnist": 0, "usps": 100, "optdigits": 200}[name]
    rows = batch.inputs[name][:, 0, 0, 0] * 255 - first
    held_out = {*DOMAIN_TEST_ROWS[name], *DOMAIN_VALIDATION_ROWS[name]}
    assert set(rows.round().int().tolist()) == set(range(DOMAIN_COUNTS[name])) - held_out
    assert torch.equal(batch.targets[name], rows.round().long() % 10)
    for part, expected in ((problem.test, DOMAIN_TEST_ROWS), (problem.validation, DOMAIN_VALIDATION_ROWS)):
        part_rows = part.inputs[name][:, 0, 0, 0] * 255 - first
        assert part_rows.round().int().tolist() == expected[name]


def test_batches_of_digit_domains_depend_on_the_seed(domain_file):
    first, second = (next(digit_domains.load(domain_file)(seed, 64).train_batches()) for seed in (0, 1))
    assert not torch.equal(first.inputs["usps"], second.inputs["usps"])


def test_network_runs_its_trunk_on_each_named_tasks_own_inputs_alone(domain_file):
    problem = digit_domains.load(domain_file)(0, 4)
    batch, model = next(problem.train_batches()), problem.build_model("hard")
    runs = []
    model.trunk.register_forward_hook(lambda module, inputs, output: runs.append(inputs[0]))
    outputs = model(batch.inputs, ["usps"])
    assert [run is batch.inputs["usps"] for run in runs] == [True]
    outputs["usps"].sum().backward()
    assert model.heads["mnist"].weight.grad is None
    assert torch.equal(outputs["usps"], model.heads["usps"](model.trunk(batch.inputs["usps"])))


def without(key):
    return {name: array for name, array in domain_arrays().items() if name != key}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without("usps_ntrain"), "it lacks usps_ntrain"),
        (without("mnist_x"), "it lacks mnist_x"),
        (domain_arrays() | {"mnist_x": np.zeros((20, 8, 8), np.uint8)}, "mnist_x is uint8 of shape (20, 8, 8)"),
        (domain_arrays() | {"usps_x": np.zeros((12, 16, 16))}, "usps_x is float64"),
        (domain_arrays() | {"usps_y": np.zeros(11, np.uint8)}, "usps_y must be a digit for each of the 12 images"),
        (domain_arrays() | {"usps_y": np.full(12, 10)}, "usps_y must be a digit"),
        (domain_arrays() | {"optdigits_ntrain": np.array(9)}, "optdigits has 9 training and 0 test images"),
        (domain_arrays() | {"optdigits_ntrain": np.array(2.5)}, "optdigits_ntrain must be a whole number"),
    ],
)
def test_digit_domains_name_what_is_wrong_with_the_file(arrays, message, tmp_path):
    np.savez(tmp_path / "domains.npz", **arrays)
    with pytest.raises(ValueError) as error:
        digit_domains.load(tmp_path / "domains.npz")
    assert message in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_compare_says_which_file_digit_domains_need(content, tmp_path, capsys):
    path = tmp_path / "domains.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit):
        compare.parse_arguments(["--data", "digit_domains", "--data-path", str(path), "--out", str(tmp_path)])
    message = capsys.readouterr().err
    assert str(path) in message
    assert_names_the_data(message)


def test_compare_says_that_digit_domains_need_a_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.parse_arguments(["--data", "digit_domains", "--out", str(tmp_path)])
    assert_names_the_data(capsys.readouterr().err)


def assert_names_the_data(message):
    for word in (*digit_domains.KEYS, "MNIST", "USPS", "optdigits", "https://archive.ics.uci.edu"):
        assert word in message


def test_compare_refuses_a_file_for_digits(domain_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.parse_arguments(["--data-path", str(domain_file), "--out", str(tmp_path)])
    assert "takes no file" in capsys.readouterr().err
