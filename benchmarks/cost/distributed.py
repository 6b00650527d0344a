"""What a step costs over several processes: equality with one process, bytes sent, and time against plain DDP.

Run from the root of the repository with `python -m benchmarks.distributed`, which starts 1, 2 and 4 processes in turn
(`--sizes`), or within processes that are there: `torchrun --nproc-per-node 2 -m benchmarks.distributed`. Every rank
takes batches of the same number of rows, so that what a rank computes does not depend on how many there are.

1. Equality: the main job's network in float64, each form against one process on the whole batches.
2. Bytes: what each rank sends in a step, counted on the loopback (Linux, gloo), beside a model of it. Other traffic
   on the loopback is counted too; `unshare --map-root-user --net sh -c 'ip link set lo up && python -m
   benchmarks.distributed'` has a loopback of its own.
3. Time: forms take turns; the lower quartile of the slowest rank, as a multiple of plain DistributedDataParallel's
   summed loss and of the floor: T backward passes, each reduced as one message while the next runs, and Adam.
   Processes on one machine share its cores and its memory: only forms at one number of processes compare.
4. What to expect for each speed of a link, from the same model.

It prints tables and writes `distributed.json` and `distributed.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from benchmarks.command_line import RESULTS, positive_int
from benchmarks.cost.arguments import trunk_name
from benchmarks.cost.distributed_costs import EXPECTED_FORMS, EXPECTED_RANKS, describe_expectations
from benchmarks.cost.distributed_ranks import Options, loopback_bytes, measure
from benchmarks.cost.distributed_steps import BALANCED, COUNTED, DIGITS, FORMS
from benchmarks.cost.hardware import describe_hardware


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    ranks = int(os.environ.get("WORLD_SIZE", "0")) if "RANK" in os.environ else 0
    chosen = parse_arguments(arguments, ranks)
    options = options_of(chosen)
    records: dict[str, list[dict[str, Any]]] = {"equality": [], "traffic": [], "time": []}
    if ranks:
        measured = measure(options)
        if measured is None:
            return
        runs = [asdict(measured)]
    else:
        runs = [launch(size, options) for size in chosen.sizes]
    for run in runs:
        for part, found in run.items():
            records[part] += found
    hardware = describe_hardware(torch.device("cuda" if options.backend == "nccl" else "cpu"))
    result = {
        "environment": hardware | {"threads": options.threads, "backend": options.backend},
        "settings": asdict(options),
        **records,
        "expected": describe_expectations(ratios(records["traffic"])),
    }
    report(Console(), result)
    write(chosen.out, result)
    print(f"Figures and pictures are in {chosen.out}")


def parse_arguments(arguments: Sequence[str] | None, ranks: int = 0) -> argparse.Namespace:
    """Read the command line and make the output directory; `ranks` where torchrun has started this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=positive_int, help="numbers of processes (default: 1 2 4)")
    parser.add_argument(
        "--trunks", nargs="+", type=partial(trunk_name, more=(DIGITS,)), help=f"(default: {DIGITS} mlp1000)"
    )
    parser.add_argument("--tasks", type=positive_int, default=3, help=f"T of trunks other than {DIGITS} (default: 3)")
    parser.add_argument("--equal-steps", type=positive_int, help="steps compared with one process (default: 100)")
    parser.add_argument("--seconds", type=float, help="of turns for each trunk and size (default: 20)")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads of each process (default: 1)")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="(default: nccl where CUDA is there)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a rank waits for another (default: 300)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: benchmarks/results/distributed)")
    parser.add_argument("--quick", action="store_true", help="a look at the whole in under a minute")
    options = parser.parse_args(arguments)
    quick = options.quick
    if ranks and options.sizes:
        parser.error("argument --sizes: not under torchrun, whose --nproc-per-node says how many processes there are")
    options.sizes = options.sizes or ([1, 2] if quick else [1, 2, 4])
    options.trunks = options.trunks or [DIGITS, "mlp300" if quick else "mlp1000"]
    options.equal_steps = options.equal_steps or (5 if quick else 100)
    options.seconds = options.seconds or (1.0 if quick else 20.0)
    options.backend = options.backend or ("nccl" if torch.cuda.is_available() else "gloo")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks else max(options.sizes)
    if options.backend == "nccl" and local > torch.cuda.device_count():
        parser.error(f"argument --backend: nccl needs a GPU for each process, got {torch.cuda.device_count()} GPUs")
    name = f"distributed_{ranks}_ranks" if ranks else "distributed"
    options.out = options.out or RESULTS / (f"{name}_quick" if quick else name)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def options_of(chosen: argparse.Namespace) -> Options:
    """What every rank has to know."""
    return Options(
        trunks=tuple(chosen.trunks),
        tasks=chosen.tasks,
        equal_steps=chosen.equal_steps,
        windows=2 if chosen.quick else 5,
        window_steps=2 if chosen.quick else 5,
        seconds=chosen.seconds,
        threads=chosen.threads,
        backend=chosen.backend,
        timeout=chosen.timeout,
    )


# --------------------------------------------------- processes


def launch(ranks: int, options: Options) -> dict[str, Any]:
    """Start the processes and return what they measured."""
    # Read by OpenMP when a process starts, and by gloo, which would else look up the machine's name.
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    if loopback_bytes() is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as directory:
        spawn(run_rank, (ranks, directory, options), nprocs=ranks)  # type: ignore[no-untyped-call]
        result: dict[str, Any] = json.loads(Path(directory, "result.json").read_text())
    return result


def run_rank(rank: int, ranks: int, directory: str, options: Options) -> None:
    """One process; rank 0 leaves the result in the directory."""
    os.environ["LOCAL_RANK"] = str(rank)
    measured = measure(options, init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    if measured is not None:
        Path(directory, "result.json").write_text(json.dumps(asdict(measured)))


# --------------------------------------------------- report


def ratios(traffic: Sequence[dict[str, Any]]) -> list[float]:
    """Measured by predicted bytes of this library's forms on the largest trunk."""
    largest = max(record["shared"] for record in traffic)
    return [
        round(record["measured"] / record["predicted"], 4)
        for record in traffic
        if record["shared"] == largest and record["form"] in BALANCED and record["predicted"] and record["measured"]
    ]


def report(console: Console, result: dict[str, Any]) -> None:
    """Print all tables."""
    console.print(equality_table(result["equality"]))
    for trunk in result["settings"]["trunks"]:
        console.print(traffic_table(trunk, [r for r in result["traffic"] if r["trunk"] == trunk]))
        console.print(time_table(trunk, [r for r in result["time"] if r["trunk"] == trunk]))
    console.print(expected_table(result["expected"]["seconds"]))


def by_ranks(title: str, records: Sequence[dict[str, Any]], forms: Sequence[str], cell: Any) -> Table:
    """A row for each form, a column for each number of processes."""
    table = Table(title=title)
    table.add_column("form", no_wrap=True)
    sizes = sorted({record["ranks"] for record in records})
    for ranks in sizes:
        table.add_column(f"R = {ranks}", justify="right", no_wrap=True)
    for form in forms:
        cells = {record["ranks"]: cell(record) for record in records if record["form"] == form}
        table.add_row(form, *[cells[ranks] for ranks in sizes])
    return table


def equality_table(records: Sequence[dict[str, Any]]) -> Table:
    """Differences from one process."""
    title = f"Largest relative difference from one process after {records[0]['steps']} steps, parameters / balance"
    return by_ranks(title, records, BALANCED, lambda r: f"{r['parameters']:.0e} / {r['balance']:.0e}")


def traffic_table(trunk: str, records: Sequence[dict[str, Any]]) -> Table:
    """Bytes of one trunk."""

    def cell(record: dict[str, Any]) -> str:
        measured = "-" if record["measured"] is None else f"{record['measured'] / 1000:,.0f}"
        return f"{measured} ({record['predicted'] / 1000:,.0f})"

    first = records[0]
    title = f"{trunk} (T = {first['tasks']}, n = {first['shared']:,}): kB a step and rank, measured (model)"
    return by_ranks(title, records, COUNTED, cell)


def time_table(trunk: str, records: Sequence[dict[str, Any]]) -> Table:
    """Times of one trunk."""
    title = f"{trunk} (T = {records[0]['tasks']}): a step's time, x plain DDP (x floor)"
    return by_ranks(title, records, list(FORMS), lambda r: f"{r['to_plain']:.2f} ({r['to_floor']:.2f})")


def expected_table(records: Sequence[dict[str, Any]]) -> Table:
    """Seconds for each link."""
    table = Table(title=f"A model: seconds of communication a step on {EXPECTED_RANKS} ranks, none of it hidden")
    for column in ("link", "n", "T"):
        table.add_column(column, justify="right", no_wrap=True)
    for form in EXPECTED_FORMS:
        table.add_column(form, justify="right", no_wrap=True)
    rows: dict[tuple[str, int, int], list[str]] = {}
    for record in records:
        rows.setdefault((record["link"], record["shared"], record["tasks"]), []).append(f"{record['seconds']:.3g}")
    for (link, shared, tasks), cells in rows.items():
        table.add_row(link, f"{shared:.0e}", str(tasks), *cells)
    return table


def write(out: Path, result: dict[str, Any]) -> None:
    """Save figures and the picture."""
    from benchmarks.cost.distributed_pictures import save_against_ranks

    (out / "distributed.json").write_text(json.dumps(result, indent=1) + "\n")
    save_against_ranks(out / "distributed.png", result["traffic"], result["time"])
