"""Runs on disk: a line of JSON each, appended as they finish, so that a study that was stopped goes on."""

import json
import os
from collections.abc import Container
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
"""What is kept of a run: `id`, the fields of its job under `job`, and what `jobs.run_job` adds."""

RUNS, CURVES = "runs.jsonl", "curves.jsonl"


def append(path: Path, record: Record) -> None:
    """Add a line; a line that a killed process left unfinished stays by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def read(path: Path) -> dict[str, Record]:
    """Return the records by id; the last line of an id counts, unfinished lines do not."""
    records: dict[str, Record] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            records[record["id"]] = record
    return records


def load_runs(folder: Path, *, curves: bool = False) -> list[Record]:
    """Return the records of all finished runs in a folder, failed ones among them.

    Args:
        folder: Where `RUNS` is.
        curves: Whether to add what `CURVES` knows of them, and to leave out runs that it does not know.
    """
    records = read(folder / RUNS)
    if not curves:
        return list(records.values())
    kept = read(folder / CURVES)
    return [record | kept.get(name, {}) for name, record in records.items() if name in kept or "failed" in record]


def finished(folder: Path, *, curves: bool = False, retry_failed: bool = False) -> Container[str]:
    """Return the ids of the runs that need not be made again."""
    return {record["id"] for record in load_runs(folder, curves=curves) if not (retry_failed and "failed" in record)}
