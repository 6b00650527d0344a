"""The benchmark over several processes: what it predicts on paper, and what a small run of it finds and writes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

from benchmarks.cost import distributed, distributed_ranks
from benchmarks.cost.distributed_costs import SENT, Sent, Size, describe_expectations, expectations, seconds, sent
from benchmarks.cost.distributed_steps import BALANCED, COUNTED, FORMS

pytestmark = pytest.mark.cpu  # processes talk over gloo

ROOT = Path(__file__).parents[1]
SIZE = Size(tasks=3, shared=1000, heads=100, measured=10, tensors=9)
# On 4 ranks, in bytes: a gathering of 196 float64, two flags with each task, and a bit a parameter and T norms with
# the heads.
MEETING, FLAGS, CLOSE = 3 * 196 * 8, 2 * 4 * 2 * 3 / 4, 2 * 4 * (9 + 3) * 3 / 4

# By how much the loopback's count may differ from the model: headers and acknowledgements are a percent or two.
TOLERANCE = 0.25


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("plain_ddp", 2 * 4 * 1100 * 3 / 4),
        ("floor", 2 * 4 * (3 * 1000 + 100) * 3 / 4),
        ("exact", 18_600 + MEETING + 3 * FLAGS + CLOSE),
        ("beta0", 18_600 + MEETING + 3 * FLAGS + CLOSE),
        ("one_backward", 2 * 4 * (3 * 10 + 1000 + 100) * 3 / 4 + MEETING + 4 * FLAGS + CLOSE),
        ("fsdp2_plain", 4 * (2 * 1000 + 100 + 1000 + 100) * 3 / 4),
        ("fsdp2", 4 * (2 * 1000 + 3 * 100 + 3 * 1000 + 100) * 3 / 4 + MEETING + 3 * 2 * 16 * 3 / 4 + CLOSE),
    ],
)
def test_model_sends_the_bytes_counted_by_hand(form, expected):
    assert sent(form, SIZE, 4).bytes == pytest.approx(expected, rel=1e-12)


def test_model_counts_a_reduce_scatter_of_gloo_as_an_all_reduce():
    gloo = Size(tasks=3, shared=1000, heads=100, measured=10, tensors=9, gloo=True)
    more = sent("fsdp2", gloo, 4).bytes - sent("fsdp2", SIZE, 4).bytes
    assert more == pytest.approx(4 * (3 * 1000 + 100) * 3 / 4)
    assert sent("exact", gloo, 4) == sent("exact", SIZE, 4)


@pytest.mark.parametrize(
    ("form", "messages"),
    [("plain_ddp", 6), ("floor", 24), ("exact", 3 + 3 * 6 + 6), ("one_backward", 3 + 3 * 6 + 6 + 6)],
)
def test_model_counts_messages_that_wait_for_each_other(form, messages):
    assert sent(form, SIZE, 4).messages == messages


@pytest.mark.parametrize("form", SENT)
def test_model_of_one_rank_sends_nothing(form):
    assert sent(form, SIZE, 1) == Sent(0, 0)


def test_control_messages_do_not_grow_with_the_trunk():
    larger = Size(tasks=3, shared=10**9, heads=100, measured=10, tensors=9)
    for size in (larger, SIZE):
        control = sent("exact", size, 4).bytes - sent("floor", size, 4).bytes
        assert control == pytest.approx(MEETING + 3 * FLAGS + CLOSE)


def test_link_is_busy_for_its_bytes_and_its_messages():
    assert seconds(2.5e8, bandwidth=1.25e8, latency=1e-3, messages=14) == pytest.approx(2.014)


def test_expected_seconds_are_those_counted_by_hand():
    found = {(e.link, e.shared, e.tasks, e.form): e.seconds for e in expectations()}
    assert len(found) == 4 * 2 * 2 * 3
    # 8 ranks: plain DDP sends 2 * 4e8 * 7 / 8 bytes in 14 messages.
    assert found["1 Gbit/s", 10**8, 3, "plain_ddp"] == pytest.approx(7e8 / 1.25e8 + 14 * 5e-5, rel=1e-3)
    exact, plain = found["10 Gbit/s", 10**8, 11, "exact"], found["10 Gbit/s", 10**8, 11, "plain_ddp"]
    assert exact / plain == pytest.approx(11, rel=0.01)
    assert describe_expectations([0.98, 1.01])["measured_to_predicted_bytes"] == {"lowest": 0.98, "highest": 1.01}
    assert describe_expectations([])["measured_to_predicted_bytes"] is None


LOOPBACK = """Inter-|   Receive                 |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
  eth0: 11 1 0 0 0 0 0 0 12 1 0 0 0 0 0 0
    lo:{received} 2 0 0 0 0 0 0 {sent} 2 0 0 0 0 0 0
"""


@pytest.mark.parametrize(("text", "expected"), [(LOOPBACK.format(received=9876543210, sent=5), 5), ("no table", None)])
def test_bytes_are_those_that_the_loopback_sent(text, expected, tmp_path, monkeypatch):
    (tmp_path / "dev").write_text(text)
    monkeypatch.setattr(distributed_ranks, "INTERFACES", tmp_path / "dev")
    assert distributed_ranks.loopback_bytes() == expected
    monkeypatch.setattr(distributed_ranks, "INTERFACES", tmp_path / "none")
    assert distributed_ranks.loopback_bytes() is None


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        (["--sizes", "0"], 0, "must be a whole number of at least 1, got '0'"),
        (["--trunks", "nothing"], 0, "must be one of two_digits, small_mlp"),
        (["--sizes", "2"], 2, "not under torchrun"),
        (["--sizes", "99", "--backend", "nccl"], 0, "nccl needs a GPU for each process"),
    ],
)
def test_bad_arguments_are_refused(arguments, ranks, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        distributed.parse_arguments([*arguments, "--out", str(tmp_path)], ranks)
    assert message in capsys.readouterr().err


def own_loopback():
    """What to put before a command so that nothing else is on its loopback; nothing where that cannot be had."""
    prefix = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not shutil.which("unshare"):
        return []
    tried = subprocess.run([*prefix, "true"], capture_output=True, timeout=20, check=False)
    return prefix if tried.returncode == 0 else []


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What a small run on two processes has written."""
    out = tmp_path_factory.mktemp("distributed")
    command = [*own_loopback(), sys.executable, "-m", "benchmarks.distributed", "--quick", "--sizes", "2"]
    command += ["--trunks", "mlp300", "--seconds", "0.1", "--backend", "gloo", "--timeout", "100"]
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (out / "distributed.png").read_bytes().startswith(b"\x89PNG")
    assert "exact_waiting" in done.stdout
    return json.loads((out / "distributed.json").read_text())


def test_two_processes_train_as_one_in_every_form(result):
    assert [record["form"] for record in result["equality"]] == BALANCED
    for record in result["equality"]:
        assert record["ranks"] == 2
        assert record["steps"] == 5
        assert 0 < record["parameters"] < 1e-10, record
        assert 0 <= record["balance"] < 1e-10, record


def test_run_tells_where_and_how_it_was_made(result):
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"]["backend"] == "gloo"
    assert result["settings"]["trunks"] == ["mlp300"]
    assert "not a measurement" in result["expected"]["what"]
    assert len(result["expected"]["seconds"]) == 48


def test_every_form_has_bytes_and_times(result):
    counted = {record["form"]: record for record in result["traffic"]}
    timed = {record["form"]: record for record in result["time"]}
    assert list(counted) == COUNTED
    assert list(timed) == list(FORMS)
    assert timed["plain_ddp"]["to_plain"] == timed["floor"]["to_floor"] == 1
    assert counted["one_backward"]["predicted"] < counted["exact"]["predicted"]
    assert counted["exact"]["shared"] == 2 * (300 * 300 + 300)
    for record in timed.values():
        assert record["to_plain"] > 0
        assert record["turns"] >= 5
        assert record["milliseconds"] is None


@pytest.mark.parametrize("form", COUNTED)
def test_loopback_carries_what_the_model_says(form, result):
    record = next(record for record in result["traffic"] if record["form"] == form)
    if record["measured"] is None:
        pytest.skip("nothing here counts what the loopback sends")
    if record["disturbance"] > TOLERANCE / 5:
        pytest.skip("something else is on the loopback")
    assert record["measured"] == pytest.approx(record["predicted"], rel=TOLERANCE)


def test_processes_that_torchrun_started_measure_among_themselves(tmp_path, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    arguments = ["--quick", "--trunks", "mlp30", "--seconds", "0.01", "--equal-steps", "2", "--backend", "gloo"]
    try:
        distributed.main([*arguments, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert not dist.is_initialized()
    written = json.loads((tmp_path / "distributed.json").read_text())
    assert {record["ranks"] for record in written["equality"] + written["traffic"] + written["time"]} == {1}
    assert all(record["parameters"] < 1e-10 for record in written["equality"])
    assert all(record["predicted"] == 0 for record in written["traffic"])
    assert "R = 1" in capsys.readouterr().out
