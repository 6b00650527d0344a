"""Tables that `benchmarks.step_cost` prints."""

from collections.abc import Sequence

from rich.table import Table

from benchmarks.cost.memory import Peak
from benchmarks.cost.timing import Cell


def time_table(trunk: str, cells: Sequence[Cell]) -> Table:
    """One trunk's times as multiples of the floor and, in brackets, of the plain sum; a column for each T."""
    unit = "ms, x floor" if any(cell.milliseconds for cell in cells) else "x floor"
    table = Table(title=f"{trunk}: a step's time, {unit} (x plain sum)")
    table.add_column("contestant", no_wrap=True)
    columns = sorted({cell.tasks for cell in cells})
    for tasks in columns:
        table.add_column(f"T = {tasks}", justify="right", no_wrap=True)
    for name in dict.fromkeys(cell.contestant for cell in cells):
        row = {cell.tasks: describe(cell) for cell in cells if cell.contestant == name}
        table.add_row(name, *[row.get(tasks, "-") for tasks in columns])
    return table


def describe(cell: Cell) -> str:
    """One cell's text."""
    ratios = f"{cell.to_floor:.2f} ({cell.to_plain:.2f})"
    return ratios if cell.milliseconds is None else f"{cell.milliseconds:.2f}, {ratios}"


def memory_table(peaks: Sequence[Peak]) -> Table:
    """Peaks above the plain sum."""
    table = Table(title="Peak memory above the plain sum, in multiples of the shared parameters")
    for column in ("trunk, T", "contestant", "x n"):
        table.add_column(column)
    for peak in peaks:
        table.add_row(f"{peak.trunk}, {peak.tasks}", peak.contestant, f"{peak.above_plain:.2f}")
    return table
