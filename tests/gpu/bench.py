"""Rows of the table that the checks make."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Row:
    """What one check found of one subject."""

    check: str
    subject: str
    result: Literal["ok", "FAILED", "skipped"]
    figures: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def rows_from_lines(lines: Iterable[str]) -> list[Row]:
    """Return the rows among the lines that a worker printed."""
    return [Row(**json.loads(line[4:])) for line in lines if line.startswith("ROW {")]


def format_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table; failures first, so that they are seen."""
    head = ("check", "subject", "result", "figures")
    order = {"FAILED": 0, "ok": 1, "skipped": 2}
    cells = [head] + [
        (row.check, row.subject, row.result, row.figures.replace("|", "/"))
        for row in sorted(rows, key=lambda row: order[row.result])
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
