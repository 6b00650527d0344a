"""The study runs each run once, every method trains as its paper says, and the report says what the runs say."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("torchjd")

import balanced_optim
from benchmarks.command_line import RESULTS
from benchmarks.data.all import DATA
from benchmarks.data.problem import Batch, DataSet, Metric, MultiTaskNet, Problem, Task, accuracy
from benchmarks.study import command, files, jobs, methods, overview, pictures, recommend, steps, training
from benchmarks.study.files import load_runs
from benchmarks.study.jobs import Workplace, run_all, run_job, unfinished
from benchmarks.study.methods import AGGREGATORS, METHODS, TUNED_WEIGHTS
from benchmarks.study.metrics import mean_gain
from benchmarks.study.probe import Probe, summarize_window, window_starts
from benchmarks.study.report import bootstrap_interval, compare_rows, rows_of
from benchmarks.study.schedules import SCHEDULES, Schedule, rate_factor
from benchmarks.study.steps import Plan
from benchmarks.study.studies import STUDIES, Choices, Job, is_single_task, jobs_of
from benchmarks.study.tables import failure_lines
from benchmarks.study.training import CANDIDATES, Check, Training, best_check, check_steps, evaluate, run_method, train

# ------------------------------------------------------------------ a data set of three lines

CPU = torch.device("cpu")
TINY_TASKS = (
    Task("sign", F.cross_entropy, (Metric("accuracy", True, accuracy), Metric("loss", False, F.cross_entropy)), True),
    Task("sum", F.mse_loss, (Metric("MSE", False, F.mse_loss),)),
)


def tiny_batch(rows, seed):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return Batch(x, {"sign": (x[:, 0] > 0).long(), "sum": 10 * x.sum(dim=1, keepdim=True)})


def tiny_model(architecture="hard", dtype=torch.float32):
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
    return MultiTaskNet(trunk, {"sign": nn.Linear(6, 2), "sum": nn.Linear(6, 1)}).to(dtype)


def tiny_problem(seed=0, batch_size=8):
    def train_batches():
        number = 100 * seed
        while True:
            number += 1
            yield tiny_batch(batch_size, number)

    return Problem(TINY_TASKS, tiny_model, train_batches, tiny_batch(32, 1001), tiny_batch(32, 1002))


TINY = DataSet("tiny lines", TINY_TASKS, lambda path: tiny_problem, ("hard", "mtan"), batch_size=8, steps=3)


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch):
    monkeypatch.setitem(DATA, "tiny", TINY)
    jobs.problem_of.cache_clear()
    jobs.make_problem.cache_clear()


def skip_unless_it_runs(method):
    if methods.unavailable(method):
        pytest.skip(methods.unavailable(method))


# ------------------------------------------------------------------ methods


def losses_of(model, batch):
    outputs = model(batch.inputs, [task.name for task in TINY_TASKS])
    return {task.name: task.loss(outputs[task.name], batch.targets[task.name]) for task in TINY_TASKS}


def take_steps(build_step, steps, model, optimizer):
    """Return the reports of the steps and the losses before each."""
    step, reports, seen = build_step(optimizer, model, Plan(TINY_TASKS, steps)), [], []
    for number in range(steps):
        batch = tiny_batch(8, number)
        batch = Batch(batch.inputs.to(next(model.parameters())), batch.targets)
        if model.heads["sum"].weight.dtype == torch.float64:
            batch.targets["sum"] = batch.targets["sum"].double()
        losses = losses_of(model, batch)
        seen.append(torch.stack(list(losses.values())).detach())
        reports.append(step(losses, torch.no_grad()(partial(losses_of, model, batch))))
    return reports, torch.stack(seen)


# Nash-MTL's solver says on every run that its problem is not of the fast kind, and at times that it is not sure.
quiet_solver = pytest.mark.filterwarnings("ignore:(You are solving|Solution may be inaccurate):UserWarning")


@quiet_solver
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_every_method_change_trunk_and_heads(method):
    skip_unless_it_runs(method)
    torch.manual_seed(0)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reports, _ = take_steps(METHODS[method], 2, model, torch.optim.Adam(model.parameters(), lr=0.01))
    for name, value in model.state_dict().items():
        assert value.isfinite().all()
        assert not torch.equal(value, before[name]), name
    for report in reports:
        assert report.weights is None or report.weights.shape == (2,)


@quiet_solver
@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_afresh_in_every_run(method):
    skip_unless_it_runs(method)
    runs = [run_method(method, tiny_problem(), Training(4, 0.01, seed=1)) for _ in range(2)]
    assert runs[0].scores == runs[1].scores
    assert torch.equal(runs[0].curves.losses, runs[1].curves.losses)


def test_gradnorm_is_the_papers_by_a_direct_computation():
    torch.manual_seed(0)
    model, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    reference.load_state_dict(model.state_dict())
    force, rate = 1.5, 0.025
    build = partial(steps.grad_norm, restoring_force=force, learning_rate=rate)
    reports, _ = take_steps(build, 6, model, torch.optim.SGD(model.parameters(), lr=0.001))

    weights, first = torch.ones(2, dtype=torch.float64), None
    mean, square = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    layer = [reference.trunk[2].weight, reference.trunk[2].bias]
    for number in range(6):
        batch = tiny_batch(8, number)
        batch = Batch(batch.inputs.double(), batch.targets | {"sum": batch.targets["sum"].double()})
        losses = list(losses_of(reference, batch).values())
        torch.testing.assert_close(reports[number].weights, weights)
        weights.requires_grad_()
        norms = []
        for weight, loss in zip(weights, losses, strict=True):
            gradients = torch.autograd.grad(weight * loss, layer, create_graph=True)
            norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        raw = torch.stack(losses).detach()
        first = raw if first is None else first
        speed = (raw / first) / (raw / first).mean()
        target = (torch.stack(norms).mean() * speed**force).detach()
        slope = torch.autograd.grad((torch.stack(norms) - target).abs().sum(), weights, retain_graph=True)[0]
        total = sum(weight * loss for weight, loss in zip(weights.detach(), losses, strict=True))
        for parameter, gradient in zip(
            reference.parameters(), torch.autograd.grad(total, list(reference.parameters())), strict=True
        ):
            parameter.data -= 0.001 * gradient
        # Adam, written out.
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        corrected = mean / (1 - 0.9 ** (number + 1)), square / (1 - 0.999 ** (number + 1))
        weights = (weights.detach() - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)).clamp(min=0)
        weights = 2 * weights / weights.sum()
    assert (reports[-1].weights - 1).abs().min() > 0.01
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize("method", ["uw", "imtl_l"])
def test_learned_loss_scales_move_with_the_base_optimizer(method):
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    reports, losses = take_steps(METHODS[method], 2, model, optimizer)
    (scales,) = optimizer.param_groups[1]["params"]
    assert (scales != 0).all()
    # The first step is at scale 0, whose gradient on the scale is (1 - L) / 2 for UW and L - 1 for IMTL-L.
    first = -1e-3 * ((1 - losses[0]) / 2 if method == "uw" else losses[0] - 1)
    weights = torch.exp(-first) / 2 if method == "uw" else torch.exp(first)
    torch.testing.assert_close(reports[1].weights, weights)


def test_famo_moves_its_weights_towards_the_loss_that_fell_less(monkeypatch):
    made = []

    def famo(tasks):
        made.append(methods_famo(tasks))
        return made[-1]

    methods_famo = steps.FAMO
    monkeypatch.setattr(steps, "FAMO", famo)
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step = steps.fast_adaptive(optimizer, model, Plan(TINY_TASKS, 1))
    batch = tiny_batch(8, 0)
    losses = losses_of(model, batch)
    step(losses, torch.no_grad()(partial(losses_of, model, batch)))
    fell = [math.log(losses[name].item() / after.item()) for name, after in losses_of(model, batch).items()]
    logits = made[0].state_dict()["_w"]
    assert logits.abs().min() > 0
    assert (logits[0] > logits[1]) == (fell[0] < fell[1])
    assert len(optimizer.param_groups) == 1


def test_geometric_mean_weighs_losses_by_their_inverse():
    torch.manual_seed(0)
    model = tiny_model()
    reports, losses = take_steps(METHODS["gls"], 1, model, torch.optim.SGD(model.parameters(), lr=1e-3))
    torch.testing.assert_close(reports[0].weights, losses[0].prod().sqrt() / (2 * losses[0]))


def test_dwa_weighs_by_the_speed_of_the_last_two_epochs():
    torch.manual_seed(0)
    model = tiny_model()
    build = partial(steps.dynamic_weight_average, epoch=2)
    reports, losses = take_steps(build, 5, model, torch.optim.SGD(model.parameters(), lr=1e-2))
    assert all(torch.equal(report.weights, torch.ones(2)) for report in reports[:4])
    speed = losses[2:4].mean(dim=0) / losses[:2].mean(dim=0)
    torch.testing.assert_close(reports[4].weights, 2 * (speed / 2).softmax(dim=0))


def test_stch_sums_logs_in_its_warm_up_and_then_leans_on_the_worst_loss():
    torch.manual_seed(0)
    model = tiny_model()
    build = partial(steps.smooth_tchebycheff, smoothing=0.5, warm_up=2)
    reports, losses = take_steps(build, 3, model, torch.optim.SGD(model.parameters(), lr=1e-2))
    torch.testing.assert_close(reports[1].weights, 1 / losses[1])
    relative = losses[2] / losses[:2].mean(dim=0)
    torch.testing.assert_close(reports[2].weights, 2 * (relative.log() / 0.5).softmax(dim=0) / losses[2])


def test_max_weight_of_one_is_the_averaged_log_and_its_cosines_are_kept():
    torch.manual_seed(0)
    model = tiny_model()
    reports, _ = take_steps(METHODS["max_weight_1"], 3, model, torch.optim.Adam(model.parameters(), lr=0.01))
    assert torch.equal(reports[-1].weights, torch.ones(2))
    cosines = reports[-1].cosines()
    assert cosines.diagonal().tolist() == pytest.approx([1, 1])
    without, _ = take_steps(METHODS["beta_0"], 1, model, torch.optim.Adam(model.parameters()))
    assert without[0].cosines is None


def test_a_method_that_cannot_run_says_why_as_what_to_install(monkeypatch):
    def make(*arguments):
        raise ImportError("Install it with: pip install somewhere")

    monkeypatch.setitem(METHODS, "cagrad", make)
    assert "cagrad is left out" in methods.unavailable("cagrad")
    assert "pip install somewhere" in methods.unavailable("cagrad")
    assert methods.unavailable("ew") == methods.unavailable("pcgrad") == methods.unavailable(TUNED_WEIGHTS) == ""


def test_fields_that_depend_on_the_training_are_taken_from_the_plan(monkeypatch):
    taken = {}

    class StandIn:
        gradient_cosines = None

        def __init__(self, base_optim, shared_params, **options):
            taken.update(options)

    monkeypatch.setattr(steps, "DualBalancedOptimizer", StandIn)
    METHODS["warmup_third"](None, tiny_model(), Plan(TINY_TASKS, 100))
    assert taken == {"warmup_steps": 33}
    taken.clear()
    METHODS["log_by_unit_norm_power_0.5"](None, tiny_model(), Plan(TINY_TASKS, 100))
    assert taken == {"log_transform": {"sign": False, "sum": True}, "norm_power": 0.5}


# ------------------------------------------------------------------ protocol


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_grows_at_first_and_then_follows_its_schedule(schedule):
    rates = [rate_factor(step, schedule=schedule, steps=200) for step in range(200)]
    assert rates[0] == pytest.approx(0.25, rel=1e-3)
    middle, end = {"cosine": (0.5, 6e-5), "steps": (0.1, 0.01)}.get(schedule, (1.0, 1.0))
    assert rates[100] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(end, rel=0.05)
    assert max(rates) <= 1


def test_a_plateau_halves_the_rate_and_the_others_set_it_by_step():
    def rate_after(name, gains):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = Schedule(name, optimizer, 10)
        for gain in gains:
            optimizer.step()
            schedule.after_step()
            schedule.after_check(gain)
        return optimizer.param_groups[0]["lr"]

    assert rate_after("plateau", [1, 2, 3, 4]) == 1
    assert rate_after("plateau", [1, 2, 2, 2, 2]) == 0.5
    assert rate_after("cosine", [1] * 5) == pytest.approx(0.5)
    assert rate_after("constant", [1] * 5) == 1


@pytest.mark.parametrize("steps", [1, 7, 60, 1000])
def test_the_last_look_at_validation_data_is_after_the_last_step(steps):
    looks = check_steps(steps)
    assert len(looks) == len({*looks}) == min(training.CHECKS, steps)
    assert looks[-1] == steps


def test_validation_data_choose_the_step_that_is_scored(monkeypatch):
    looked = [scores(0.5, 1.0, 9.0), scores(0.9, 0.5, 3.0), scores(0.8, 0.6, 3.5)]
    checks = [Check(step, validation, {}) for step, validation in enumerate(looked, start=1)]
    assert best_check(checks, TINY_TASKS).step == 2
    states = []
    real = training.evaluate

    def fake(model, batch, tasks, device):
        states.append(model.trunk[0].weight.clone())
        return looked[len(states) - 1] if len(states) <= 3 else real(model, batch, tasks, device)

    monkeypatch.setattr(training, "evaluate", fake)
    run = train(tiny_problem(), steps.summed_loss, TINY_TASKS, Training(3, 0.01, seed=0))
    assert run.scored_step == 2
    assert run.validation == looked[1]
    assert torch.equal(states[3], states[1])
    assert not torch.equal(states[3], states[2])


def test_a_metric_of_zero_has_no_say_in_the_choice():
    reference = scores(0.0, 1.0, 10.0)
    assert mean_gain(scores(0.5, 1.0, 5.0), reference, TINY_TASKS) == 50
    assert mean_gain(scores(0.5, 1.0, 5.0), scores(0.0, 0.0, 0.0), TINY_TASKS) == 0


# ------------------------------------------------------------------ tuned weights


def test_candidates_begin_with_equal_weights_and_sum_to_the_number_of_tasks():
    candidates = training.weight_candidates(3, seed=4)
    assert candidates.shape == (CANDIDATES, 3)
    assert torch.equal(candidates[0], torch.ones(3))
    torch.testing.assert_close(candidates.sum(dim=1), torch.full((CANDIDATES,), 3.0))
    assert (candidates > 0).all()
    assert len({tuple(row) for row in candidates.tolist()}) == CANDIDATES


def test_tuned_weights_are_those_with_the_best_validation_metrics_that_did_not_diverge(monkeypatch):
    calls = []
    real = train

    def fake(problem, build_step, tasks, settings):
        weights = build_step.keywords["weights"]
        calls.append((weights, settings.steps))
        run = real(problem, build_step, tasks, settings)
        if len(calls) == 3:
            raise RuntimeError("it diverged")
        # Candidate 6 is fair in both tasks; 7 is five times as good as equal weights in one, and bad in the other.
        accuracy, error = {6: (0.3, 1.1), 7: (0.5, 9.0), 8: (0.1, 1.0)}.get(len(calls), (0.1, 2.0))
        return training.replace(run, validation=scores(accuracy, 1.0, error))

    monkeypatch.setattr(training, "train", fake)
    run = run_method(TUNED_WEIGHTS, tiny_problem(), Training(8, 0.01, seed=0))
    assert [steps for _, steps in calls] == [2] * CANDIDATES + [8]
    assert torch.equal(calls[-1][0], calls[5][0])
    assert run.tuned == pytest.approx(dict(zip(("sign", "sum"), calls[5][0].tolist(), strict=True)))


# ------------------------------------------------------------------ gradients on the way


def test_a_window_knows_noise_from_a_steady_gradient():
    steady, noise = torch.tensor([[3.0, 4.0]] * 4), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    window = summarize_window(7, torch.stack([steady, noise, torch.zeros(4, 2)], dim=1))
    assert window.norms.tolist() == [5.0, 1.0, 0.0]
    assert window.coherence[:2].tolist() == pytest.approx([1.0, 0.0])
    assert window.coherence[2].isnan()
    assert window.cosines[0].tolist() == pytest.approx([1.0, 0.0, 0.0])


@pytest.mark.parametrize(("steps", "count", "length"), [(1, 1, 1), (7, 7, 1), (60, 10, 6), (1003, 10, 20)])
def test_windows_do_not_overlap_and_end_with_the_training(steps, count, length):
    starts = window_starts(steps)
    assert list(starts.values()) == [length] * count
    assert max(starts) + length - 1 == steps
    assert all(later - first >= length for first, later in zip(starts, list(starts)[1:], strict=False))


def test_measuring_gradients_changes_nothing_in_the_training():
    plain, probed = (
        run_method("db_mtl", tiny_problem(), Training(25, 0.01, seed=0, probe=probe)) for probe in (False, True)
    )
    assert plain.scores == probed.scores
    assert plain.windows == ()
    assert [window.step for window in probed.windows] == [2, 5, 7, 10, 12, 15, 17, 20, 22, 25]


def test_a_window_holds_the_gradients_of_the_raw_losses():
    torch.manual_seed(0)
    model, probe = tiny_model(), Probe(1)
    losses = list(losses_of(model, tiny_batch(8, 0)).values())
    probe.look(1, losses, model.norm_parameters())
    gradient = torch.autograd.grad(losses[1], model.norm_parameters())
    expected = math.hypot(*(part.norm().item() for part in gradient))
    assert probe.windows[0].norms[1].item() == pytest.approx(expected, rel=1e-6)


def test_a_set_is_scored_by_parts_as_in_one_piece(monkeypatch):
    torch.manual_seed(0)
    model, batch = tiny_model(), tiny_batch(10, 0)
    own = Batch(dict.fromkeys(("sign", "sum"), batch.inputs), batch.targets)
    whole = evaluate(model, batch, TINY_TASKS, CPU)
    monkeypatch.setattr(training, "ROWS_AT_ONCE", 3)
    for given in (batch, own):
        scores = evaluate(model, given, TINY_TASKS, CPU)
        assert {task: pytest.approx(metrics) for task, metrics in whole.items()} == scores


# ------------------------------------------------------------------ jobs


@pytest.mark.parametrize("name", STUDIES)
def test_jobs_of_a_study_are_its_methods_and_the_single_task_models_of_every_seed(name):
    study = STUDIES[name]
    planned = jobs_of(study, Choices("tiny", seeds=2, steps=5))
    assert len({job.id for job in planned}) == len({*planned}) == len(planned)
    architectures = ("hard", "mtan") if name == "fig4" else ("hard",)
    expected = {("hard", "stl-sign"), ("hard", "stl-sum")} | {(a, m) for a in architectures for m in study.methods}
    found = {}
    for job in planned:
        setting = (job.seed, job.optimizer, job.schedule, job.learning_rate)
        found.setdefault(setting, set()).add((job.architecture, job.method))
    rates = {"adam": (0.001,), "sgd": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)}
    settings = {(s, o, d, r) for s in (0, 1) for o in study.optimizers for d in study.schedules for r in rates[o]}
    assert found == dict.fromkeys(settings, expected)
    assert {*study.methods} <= {*METHODS, TUNED_WEIGHTS}
    assert "ew" in study.methods


def test_a_task_that_is_not_judged_has_no_single_task_model():
    singles = [job.method for job in jobs_of(STUDIES["fig2"], Choices("equation", 1, 5)) if is_single_task(job.method)]
    assert singles == ["stl-measurements"]


def test_any_study_runs_with_the_optimizers_that_are_asked_for(tmp_path, counted):
    setting = ["--optimizers", "sgd", "--schedules", "steps"]
    run_study(tmp_path, "fig2", *setting, "--learning-rates", "0.01", "--methods", "ew", "--seeds", "1")
    assert counted == [("stl-sign", 0), ("stl-sum", 0), ("ew", 0)]
    assert {(run["job"]["optimizer"], run["job"]["schedule"]) for run in load_runs(tmp_path)} == {("sgd", "steps")}
    command.main(["fig2", "--data", "tiny", "--out", str(tmp_path), "--report", *setting])
    assert "| ew | 1 |" in (tmp_path / "fig2_sgd_steps.md").read_text()


def test_choices_narrow_a_study():
    choices = Choices("tiny", 1, 5, architecture="mtan", learning_rates=(0.1, 0.2), methods=("ew", "db_mtl"))
    compared = [job for job in jobs_of(STUDIES["main"], choices) if not is_single_task(job.method)]
    expected = [("mtan", method, rate) for method in ("ew", "db_mtl") for rate in (0.1, 0.2)]
    assert [(job.architecture, job.method, job.learning_rate) for job in compared] == expected


# ------------------------------------------------------------------ runs and files


@pytest.fixture
def counted(monkeypatch):
    """The methods and seeds that were really run."""
    runs = []
    real = jobs.run_method

    def run(name, problem, settings):
        runs.append((name, settings.seed))
        return real(name, problem, settings)

    monkeypatch.setattr(jobs, "run_method", run)
    return runs


def run_study(out, name="fig2", *arguments):
    command.main([name, "--data", "tiny", "--out", str(out), "--processes", "1", "--seeds", "2", *arguments])


FIG2 = [(method, seed) for seed in (0, 1) for method in ("stl-sign", "stl-sum", "ew", "imtl_l", "log_only")]


def test_a_stopped_study_goes_on_where_it_stopped(tmp_path, counted, monkeypatch):
    real = jobs.append

    def interrupted(path, record):
        if len(counted) == 4:
            # What is left when a process ends in the middle of writing.
            with path.open("a") as file:
                file.write('{"id":"tiny__hard__ew')
            raise KeyboardInterrupt
        real(path, record)

    monkeypatch.setattr(jobs, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path)
    assert counted == FIG2[:4]
    assert len(load_runs(tmp_path)) == 3
    counted.clear()
    monkeypatch.setattr(jobs, "append", real)
    run_study(tmp_path)
    assert counted == FIG2[3:]
    assert len(load_runs(tmp_path)) == len(FIG2)
    counted.clear()
    run_study(tmp_path)
    assert counted == []


def test_studies_share_their_runs(tmp_path, counted):
    run_study(tmp_path)
    counted.clear()
    run_study(tmp_path, "ablation", "--methods", "ew", "log_only", "beta_0")
    assert counted == [("beta_0", 0), ("beta_0", 1)]


def test_a_study_of_the_course_of_training_makes_runs_again_that_kept_none(tmp_path, counted):
    run_study(tmp_path, "fig2", "--methods", "ew", "--seeds", "1")
    counted.clear()
    run_study(tmp_path, "variance", "--methods", "ew", "--seeds", "1")
    assert counted == [("stl-sign", 0), ("stl-sum", 0), ("ew", 0)]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 6
    assert len(load_runs(tmp_path)) == len(load_runs(tmp_path, curves=True)) == 3
    counted.clear()
    run_study(tmp_path, "variance", "--methods", "ew", "--seeds", "1")
    assert counted == []


def test_a_failed_run_is_recorded_and_does_not_stop_the_others(tmp_path, counted, monkeypatch, capsys):
    def diverge(*arguments):
        raise RuntimeError("it diverged [at once]")

    monkeypatch.setitem(METHODS, "imtl_l", lambda *arguments: diverge)
    run_study(tmp_path)
    assert counted == FIG2
    failed = {(run["job"]["method"], run["job"]["seed"]) for run in load_runs(tmp_path) if "failed" in run}
    assert failed == {("imtl_l", 0), ("imtl_l", 1)}
    assert "it diverged [at once]" in capsys.readouterr().out
    counted.clear()
    run_study(tmp_path)
    assert counted == []
    monkeypatch.undo()
    monkeypatch.setitem(DATA, "tiny", TINY)
    run_study(tmp_path, "fig2", "--retry-failed")
    assert not any("failed" in run for run in load_runs(tmp_path))


def test_a_diverged_training_is_a_failed_run_not_a_number(tmp_path):
    record, course = run_job(Job("tiny", "hard", "ew", "sgd", "cosine", 50, 1e6, 0), Workplace(None, CPU, tmp_path))
    assert "the training diverged" in record["failed"]
    assert "scores" not in record
    assert course is None
    json.dumps(record, allow_nan=False)


def test_methods_that_cannot_run_are_left_out_with_a_word(tmp_path, monkeypatch, counted, capsys):
    monkeypatch.setattr(command, "unavailable", lambda method: "get a[b]" if method == "imtl_l" else "")
    run_study(tmp_path)
    assert counted == [run for run in FIG2 if run[0] != "imtl_l"]
    assert "get a[b]" in capsys.readouterr().out


def test_the_lines_of_a_run_hold_all_that_reports_need(tmp_path):
    job = Job("tiny", "hard", "db_mtl", "sgd", "cosine", 450, 0.001, 3)
    assert list(run_all([job], Workplace(None, CPU, tmp_path, curves=True), processes=1)) == [(job, "")]
    (record,) = load_runs(tmp_path)
    assert record["id"] == job.id == "tiny__hard__db_mtl__sgd__cosine__450__0.001__3"
    assert record["job"] == vars(job)
    assert record["environment"]["torch"] == torch.__version__
    for part in ("scores", "validation"):
        assert {task: list(metrics) for task, metrics in record[part].items()} == {
            "sign": ["accuracy", "loss"],
            "sum": ["MSE"],
        }
    assert record["scores"] != record["validation"]
    assert record["step"] in check_steps(450)
    assert record["milliseconds"] > 0
    assert "curves" not in record
    (whole,) = load_runs(tmp_path, curves=True)
    curves = whole["curves"]
    assert len(curves["steps"]) == len(curves["losses"]) == len(curves["weights"]) == len(curves["norms"]) == 200
    assert curves["steps"][-1] == 450
    assert all(
        largest >= 0.99 * max(column)
        for largest, column in zip(record["largest_weights"], zip(*curves["weights"], strict=True), strict=True)
    )
    assert [window["step"] for window in whole["windows"]] == [45 * k for k in range(1, 11)]
    cosines = whole["cosines_of_averages"]
    assert cosines[0][0] == pytest.approx(1)
    assert cosines[0][1] == cosines[1][0]


def test_runs_in_worker_processes_are_those_of_this_process(tmp_path):
    job = Job("digits", "hard", "ew", "adam", "cosine", 2, 0.001, 0)
    for processes in (1, 2):
        place = Workplace(None, CPU, tmp_path / str(processes))
        assert list(run_all([job], place, processes)) == [(job, "")]
    one, other = (load_runs(tmp_path / str(processes))[0] for processes in (1, 2))
    assert one["scores"] == other["scores"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["fig2", "--methods", "ew", "gradnorm"], "fig2 has no gradnorm"),
        (["fig2", "--architecture", "cross_stitch"], "tiny has hard, mtan"),
        (["fig2", "--device", "cuda:99"], "'cuda:99' cannot be used"),
        (["fig2", "--seeds", "0"], "must be a whole number of at least 1"),
        (["fig2", "--data", "digit_domains"], "digit_domains needs a file"),
        (["fig2", "--schedules", "never"], "invalid choice: 'never'"),
        ([], "the following arguments are required: NAME, --report or --readme"),
    ],
)
def test_study_refuses_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments(["--data", "tiny", "--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_steps_seeds_and_folder_default_to_those_of_the_data_set():
    options = command.parse_arguments(["fig2", "--data", "tiny"])
    assert (options.steps, options.seeds, options.out.name) == (3, command.SEEDS, "tiny")
    quick = command.parse_arguments(["fig2", "--data", "tiny", "--quick"])
    assert (quick.steps, quick.seeds, quick.out.name) == (command.QUICK_STEPS, command.QUICK_SEEDS, "tiny_quick")


# ------------------------------------------------------------------ reports


def handwritten(method, seed, scores, *, validation=None, optimizer="adam", schedule="cosine", rate=0.001, **fields):
    job = Job("tiny", "hard", method, optimizer, schedule, 5, rate, seed)
    record = {"id": job.id, "job": vars(job), "environment": {"torch": "2", "device": "cpu"}, "milliseconds": 10.0}
    return record | {"step": 5, "scores": scores, "validation": validation or scores} | fields


def scores(accuracy, loss, error):
    return {"sign": {"accuracy": accuracy, "loss": loss}, "sum": {"MSE": error}}


def singles(seed, accuracy, loss, error, **options):
    return [
        handwritten("stl-sign", seed, {"sign": {"accuracy": accuracy, "loss": loss}}, **options),
        handwritten("stl-sum", seed, {"sum": {"MSE": error}}, **options),
    ]


HANDWRITTEN = [
    *singles(0, 0.5, 1.0, 10.0),
    *singles(1, 0.8, 2.0, 20.0),
    # Seed 0: ((-20 + 0) / 2 - 10) / 2 = -10. Seed 1: ((0 + 50) / 2 + 5) / 2 = 15.
    handwritten("ew", 0, scores(0.4, 1.0, 11.0)),
    handwritten("ew", 1, scores(0.8, 1.0, 19.0)),
    # Seed 0: ((20 + 0) / 2 + 20) / 2 = 15. Seed 1: ((25 + 25) / 2 + 10) / 2 = 17.5.
    handwritten("log_only", 0, scores(0.6, 1.0, 8.0), milliseconds=30.0),
    handwritten("log_only", 1, scores(1.0, 1.5, 18.0), milliseconds=30.0),
]
FAILED = {key: value for key, value in handwritten("imtl_l", 1, {}).items() if key not in ("scores", "validation")}
FAILED["failed"] = "RuntimeError: it diverged"
WITH_FAILURE = [*HANDWRITTEN, handwritten("imtl_l", 0, scores(0.5, 1.0, 10.0)), FAILED]


def test_delta_p_is_taken_from_the_single_task_models_of_the_same_seed():
    rows = rows_of(STUDIES["fig2"], ["hard"], HANDWRITTEN, TINY_TASKS)
    assert [row.method for row in rows] == ["ew", "log_only"]
    assert rows[0].delta_p == pytest.approx({0: -10.0, 1: 15.0})
    assert rows[1].delta_p == pytest.approx({0: 15.0, 1: 17.5})


def test_methods_are_set_beside_equal_weighting_seed_by_seed():
    ew, log_only = compare_rows(rows_of(STUDIES["fig2"], ["hard"], HANDWRITTEN, TINY_TASKS), TINY_TASKS)
    assert (ew.difference, ew.interval, ew.relative_time) == (None, None, 1.0)
    assert log_only.difference == pytest.approx((25 + 2.5) / 2)
    assert log_only.interval == pytest.approx((2.5, 25.0))
    assert log_only.relative_time == pytest.approx(3.0)
    # Losses of sign: a tie with seed 0, worse with seed 1; all else is better.
    assert log_only.rank == pytest.approx((((1 + 1.5) / 2 + 1) / 2 + ((1 + 2) / 2 + 1) / 2) / 2)
    assert log_only.rank + ew.rank == pytest.approx(3)


def test_bootstrap_interval_of_many_seeds_is_near_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = bootstrap_interval(values)
    mean = sum(values) / 400
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.1)
    assert low < mean < high


def test_a_failed_run_ranks_last_and_is_named():
    rows = rows_of(STUDIES["fig2"], ["hard"], WITH_FAILURE, TINY_TASKS)
    assert [row.method for row in rows] == ["ew", "imtl_l", "log_only"]
    assert rows[1].delta_p == pytest.approx({0: 0.0})
    ranks = {c.row.method: c.rank for c in compare_rows(rows, TINY_TASKS)}
    # Seed 0: accuracy 2, loss a tie of three, error 2. Seed 1: last of three in everything.
    assert ranks["imtl_l"] == pytest.approx(((2 + 2) / 2 + 2) / 4 + 3 / 2)
    lines = failure_lines(STUDIES["fig2"], ["hard"], WITH_FAILURE)
    assert lines == ["- imtl_l, hard, adam, cosine, learning rate 0.001, seed 1: RuntimeError: it diverged"]


def test_the_learning_rate_is_chosen_on_validation_data_and_judged_on_test_data():
    good, bad = scores(0.9, 0.5, 5.0), scores(0.2, 3.0, 30.0)
    records = [
        *singles(0, 0.5, 1.0, 10.0, optimizer="sgd", rate=0.1),
        # Worse on validation data, so never taken, though better on test data.
        *[
            record | {"validation": worse["scores"]}
            for record, worse in zip(
                singles(0, 0.6, 0.5, 5.0, optimizer="sgd", rate=0.2), singles(0, 0.4, 2.0, 20.0), strict=True
            )
        ],
        handwritten("ew", 0, bad, validation=good, optimizer="sgd", rate=0.1),
        handwritten("ew", 0, good, validation=bad, optimizer="sgd", rate=0.2),
    ]
    (row,) = rows_of(STUDIES["sgd"], ["hard"], records, TINY_TASKS)
    assert row.learning_rate == 0.1
    assert row.delta_p == pytest.approx({0: ((-60 - 200) / 2 - 200) / 2})


def test_a_learning_rate_with_failures_comes_after_one_without():
    diverged = handwritten("ew", 1, {}, optimizer="sgd", rate=0.2) | {"failed": "RuntimeError: it diverged"}
    records = [
        *singles(0, 0.5, 1.0, 10.0, optimizer="sgd", rate=0.1),
        handwritten("ew", 0, scores(0.3, 1.0, 10.0), optimizer="sgd", rate=0.1),
        handwritten("ew", 0, scores(0.9, 0.5, 5.0), optimizer="sgd", rate=0.2),
        diverged,
    ]
    (row,) = rows_of(STUDIES["sgd"], ["hard"], records, TINY_TASKS)
    assert row.learning_rate == 0.1


def test_a_row_without_single_task_models_has_no_delta_p():
    (row,) = rows_of(STUDIES["fig2"], ["hard"], HANDWRITTEN[4:5], TINY_TASKS)
    assert row.delta_p == {}
    assert row.mean_delta_p is None
    (zero,) = rows_of(STUDIES["fig2"], ["hard"], [*singles(0, 0.0, 1.0, 1.0), HANDWRITTEN[4]], TINY_TASKS)
    assert zero.delta_p == {}


def test_methods_are_compared_under_each_schedule_by_itself():
    constant = [
        record | {"job": record["job"] | {"schedule": "constant"}, "scores": record["scores"]} for record in HANDWRITTEN
    ]
    rows = rows_of(STUDIES["stress"], ["hard"], [*HANDWRITTEN[:3], *constant], TINY_TASKS)
    assert [(row.method, row.schedule, len(row.delta_p)) for row in rows] == [
        ("ew", "constant", 2),
        ("log_only", "constant", 2),
    ]
    rows = rows_of(STUDIES["schedules"], ["hard"], [*HANDWRITTEN, *constant[4:]], TINY_TASKS)
    assert [(row.method, row.schedule, len(row.delta_p)) for row in rows] == [
        ("ew", "cosine", 2),
        ("log_only", "cosine", 2),
        ("ew", "constant", 0),
        ("log_only", "constant", 0),
    ]


def write(folder, records):
    for record in records:
        files.append(folder / "runs.jsonl", record | {"id": Job(**record["job"]).id})


def test_the_report_shows_the_numbers_and_the_failures(tmp_path):
    write(tmp_path, WITH_FAILURE)
    command.main(["fig2", "--data", "tiny", "--out", str(tmp_path), "--report"])
    text = (tmp_path / "fig2.md").read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines() if " | " in line}
    assert rows["method"][6:] == ["time / ew", "sign accuracy ↑", "sign loss ↓", "sum MSE ↓ |"]
    assert rows["ew"][1:4] == ["2", "+2.50 ± 17.68", "–"]
    assert rows["log_only"][1:3] == ["2", "**+16.25 ± 1.77**"]
    assert rows["log_only"][3] == "+13.75 [+2.50, +25.00]"
    assert rows["log_only"][5:8] == ["30", "3.00", "0.8 ± 0.28"]
    assert rows["imtl_l"][1:3] == ["1 (1 failed)", "+0.00"]
    assert rows["stl"][7] == "0.65 ± 0.21"
    assert "seed 1: RuntimeError: it diverged" in text
    assert "(fig2.png)" in text
    assert (tmp_path / "fig2.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_takes_the_longest_runs_unless_told_otherwise(tmp_path):
    short = [record | {"job": record["job"] | {"steps": 2}} for record in HANDWRITTEN[:5]]
    write(tmp_path, [*HANDWRITTEN, *short])
    command.main(["fig2", "--data", "tiny", "--out", str(tmp_path), "--report"])
    assert "5 steps" in (tmp_path / "fig2.md").read_text()
    command.main(["fig2", "--data", "tiny", "--out", str(tmp_path), "--report", "--steps", "2"])
    text = (tmp_path / "fig2.md").read_text()
    assert "2 steps" in text
    assert "log_only" not in text


def test_a_report_without_runs_says_so(tmp_path, capsys):
    command.main(["fig2", "--data", "tiny", "--out", str(tmp_path), "--report"])
    assert "there are no runs" in capsys.readouterr().out
    assert not (tmp_path / "fig2.md").exists()


@pytest.fixture(scope="module")
def folder_of_all_runs(tmp_path_factory):
    """All studies on the tiny data set, with one of the gradient methods."""
    folder = tmp_path_factory.mktemp("all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA, "tiny", TINY)
        planned = [job for chosen in STUDIES.values() for job in jobs_of(chosen, Choices("tiny", seeds=1, steps=4))]
        slow = {prefix + name for name in AGGREGATORS if name != "pcgrad" for prefix in ("", "log_")}
        runs = [job for job in planned if job.method not in slow and not methods.unavailable(job.method)]
        place = Workplace(None, CPU, folder / "tiny", curves=True)
        results = list(run_all(unfinished(runs, place), place, processes=1))
    assert len(results) == len({*runs})
    return folder


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_report_and_a_picture(name, folder_of_all_runs):
    folder = folder_of_all_runs / "tiny"
    command.main([name, "--data", "tiny", "--out", str(folder), "--report"])
    text = (folder / f"{name}.md").read_text()
    assert text.startswith(f"# {STUDIES[name].title}\n")
    methods_shown = {line.split(" | ")[0] for line in text.splitlines()}
    assert {"| stl", "| ew"} <= methods_shown
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    quantity = command.WINDOWS_OF.get(name)
    assert (" → " in text) == (quantity is not None)
    assert name in pictures.PICTURES or "Cosine between" not in text


def test_one_command_reports_on_all_data_sets(folder_of_all_runs, capsys):
    command.main(["--report", "--out", str(folder_of_all_runs)])
    text = (folder_of_all_runs / "tiny" / "report.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("# ")]
    assert headings == [f"# {STUDIES[name].title}" for name in command.REPORTED]
    assert (folder_of_all_runs / "tiny" / "time.png").read_bytes().startswith(b"\x89PNG")
    assert "| db_mtl | `the defaults` |" in (folder_of_all_runs / "overview.md").read_text()


def test_the_overview_sets_data_sets_side_by_side(tmp_path, capsys):
    write(tmp_path / "tiny", WITH_FAILURE)
    command.main(["--report", "--out", str(tmp_path)])
    lines = [line for line in (tmp_path / "overview.md").read_text().splitlines() if line.startswith("| ")]
    assert lines[0] == "| data | seeds | equal weighting | log only |"
    assert lines[2] == "| Tiny lines | 2 | +2.5 ± 17.7 | **+16.2 ± 1.8** |"
    assert lines[-2:] == [
        "| tiny | hard | adam | cosine | 5 | 2 | ew, log_only |",
        "| tiny | hard | adam | cosine | 5 | 1 | imtl_l |",
    ]
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
    command.main(["--report", "--out", str(tmp_path / "nothing")])
    assert "there are no runs" in capsys.readouterr().out


# ------------------------------------------------------------------ what to try first

GAINS = {
    "digits": {"ew": {0: 0.0, 1: 2.0}, "log_only": {0: 4.0, 1: 4.0}, "db_mtl": {0: -1.0, 1: 1.0}, "beta_0": {0: 3.0}},
    "scenes": {"ew": {0: 1.0}, "log_only": {0: 0.0}, "db_mtl": {0: 5.0}, "beta_0": {0: 6.0}},
}


def test_the_distance_of_a_setting_is_to_the_best_end_over_common_seeds():
    assert recommend.distance(GAINS["digits"], "db_mtl") == 4
    assert recommend.distance(GAINS["digits"], "beta_0") == 1
    assert recommend.distance(GAINS["scenes"], "beta_0") == -1
    assert recommend.distance(GAINS["digits"], "norm_1") is None


def test_the_setting_with_the_least_worst_distance_is_recommended_and_held_out_data_only_test_it():
    held_out = {recommend.HELD_OUT[0]: GAINS["scenes"] | {"beta_0": {0: -90.0}}}
    assert recommend.ranked(GAINS | held_out | {recommend.STRESS[0]: GAINS["digits"]})[0].worst == 1
    best, *others = recommend.ranked(GAINS | held_out)
    assert (best.method, best.worst, best.distances["scenes"]) == ("beta_0", 1, -1)
    assert best.distances[recommend.HELD_OUT[0]] == 95
    assert [other.method for other in others] == ["db_mtl", "log_only"]
    assert recommend.ranked({}) == recommend.ranked(held_out) == []
    header, rows = recommend.table([best], [*GAINS, *held_out])
    assert header == ["setting", "arguments", "worst", "digits", "scenes", f"{recommend.HELD_OUT[0]}, held out"]
    assert rows == [["beta_0", "`beta=0`", "+1.0", "+1.0", "-1.0", "+95.0"]]


def test_a_method_that_is_another_one_on_these_tasks_counts_as_that_one():
    methods = ("log_by_unit", "log_by_unit_no_rescale", "log_by_unit_norm_power_0.5")
    for data, names in (
        ("digits", methods),
        ("digit_domains", ("max_norm_only", "ew", methods[2])),
        ("friedman", ("db_mtl", "log_only", "norm_power_0.5")),
    ):
        planned = jobs_of(STUDIES["main"], Choices(data, 1, 5, methods=methods))
        assert tuple(job.method for job in planned if not is_single_task(job.method)) == names
    best = recommend.ranked({"friedman": GAINS["scenes"]})
    assert [candidate.method for candidate in best if candidate.worst == 0] == ["db_mtl", "log_by_unit"]


def test_the_table_of_the_readme_has_the_recommended_setting_above_equal_weighting():
    gains = {"ew": {0: 0.0, 1: 2.0}, "log_only": {0: 0.0, 1: 0.0}, "db_mtl": {0: 3.0, 1: 6.0}}
    lines = [overview.Line("digits", "Two digits", gains), overview.Line("tiny", "Tiny lines", gains)]
    assert overview.readme_table(lines).splitlines() == [
        "| data | `the defaults`: Delta_p above equal weighting, points [95 %] |",
        "| --- | ---: |",
        f"| {overview.README_DATA['digits']} | +3.5 [+3.0, +4.0] |",
    ]
    assert overview.readme_table([]) == ""


def test_the_readme_shows_what_the_published_runs_say(capsys):
    command.main(["--readme"])
    printed = capsys.readouterr().out.strip()
    readme = (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- evidence -->", "<!-- /evidence -->"
    method = recommend.ranked({line.data: line.gains for line in overview.all_lines(command.PUBLISHED)})[0].method
    assert eval(f"dict({recommend.CANDIDATES[method]})") == balanced_optim.RECOMMENDED
    shown = readme[readme.index(begin) + len(begin) : readme.index(end)].strip() if begin in readme else printed
    assert shown == printed
