"""The comparison table for terminals and Markdown; the page takes the same columns and cells.

Digits follow the interval: one significant digit of its half-width, two if that digit is a 1.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from math import floor, inf, log10
from typing import NamedTuple

from hrs.report.notes import notes
from hrs.report.records import RunRecord
from hrs.report.rows import Comparison, Row, compare_presets
from hrs.report.statistics import Interval

WIDTH = 120
ABSENT = "-"
BELOW_THE_LINE = "not ranked: these models failed the causality audit, or had none"


class Column(NamedTuple):
    """A heading and how a row fills it."""

    heading: str
    is_number: bool
    """Aligned to the right."""
    cell: Callable[[Row], str]


def format_table(records: Sequence[RunRecord]) -> str:
    """The table as plain text for a terminal of 120 columns, notes below.

    Raises:
        HRSError: if the records cannot stand in one table (see :func:`hrs.report.rows.compare_presets`).
    """
    return text_table(compare_presets(records))


def text_table(comparison: Comparison) -> str:
    """Aligned plain text; remarks stand indented below their row."""
    body = {row.preset: [column.cell(row) for column in COLUMNS] for row in comparison.rows}
    heads = [column.heading for column in COLUMNS]
    widths = [max(map(len, texts)) for texts in zip(heads, *body.values(), strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) - 2 <= WIDTH else " "
    width = sum(widths) + len(gap) * (len(widths) - 1)

    def line(cells: Sequence[str]) -> str:
        padded = [t.rjust(w) if c.is_number else t.ljust(w) for t, w, c in zip(cells, widths, COLUMNS, strict=True)]
        return gap.join(padded).rstrip()

    def section(rows: Sequence[Row]) -> list[str]:
        return [text for row in rows for text in (line(body[row.preset]), *_wrap(row.remark, "      ", "      "))]

    lines = [line(heads), "-" * width, *section(comparison.above)]
    if comparison.below:
        lines += [f"--- {BELOW_THE_LINE} ".ljust(width, "-"), *section(comparison.below)]
    return "\n".join([*lines, "", *(text for note in notes(comparison) for text in _wrap(note, "", "  "))]) + "\n"


def markdown_table(comparison: Comparison) -> str:
    """The table as Markdown: ranked rows, then those below the line, then the notes."""

    def section(rows: Sequence[Row]) -> list[str]:
        remarks = [[row.remark] if any(r.remark for r in rows) else [] for row in rows]
        head = [c.heading for c in COLUMNS] + ["remark"] * any(remarks)
        rule = ["---:" if c.is_number else "---" for c in COLUMNS] + ["---"] * any(remarks)
        body = [[c.cell(row) for c in COLUMNS] + remark for row, remark in zip(rows, remarks, strict=True)]
        return ["| " + " | ".join(_escape(cell) for cell in cells) + " |" for cells in (head, rule, *body)]

    lines = section(comparison.above)
    if comparison.below:
        lines += ["", f"Below the line, {BELOW_THE_LINE}:", "", *section(comparison.below)]
    return "\n".join([*lines, "", *(f"- {_escape(note)}" for note in notes(comparison))]) + "\n"


def _escape(text: str) -> str:
    """Text as Markdown: no accidental cells, emphasis, tags or quotes."""
    return re.sub(r"([|*<>])", r"\\\1", text.strip())


def _wrap(text: str, indent: str, hanging: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=hanging)


# ---- digits ----------------------------------------------------------------------------------------------------------


def decimals(interval: Interval) -> int:
    """Decimal places worth printing; negative for tens, hundreds, and so on."""
    if not 0 < interval.half_width < inf:
        return 3
    magnitude = floor(log10(interval.half_width))
    return min(6, int(interval.half_width < 2 * 10.0**magnitude) - magnitude)


def fixed(value: float, places: int, sign: str = "") -> str:
    """``value`` to that many places, without a minus zero."""
    return f"{round(value, places) + 0.0:{sign},.{max(0, places)}f}"


def with_bounds(interval: Interval, sign: str = "", mark: str = "") -> str:
    """``1.52 [1.49, 1.56]``. A bound is never rounded onto a zero that the interval excludes."""
    places = decimals(interval)
    while interval.excludes_zero and places < 6 and not all(round(b, places) for b in (interval.low, interval.high)):
        places += 1
    value, low, high = (fixed(x, places, sign) for x in (interval.value, interval.low, interval.high))
    return f"{value}{mark} [{low},{high}]"


def with_sign(gap: Interval) -> str:
    """A difference with its bounds, and a star, or a space in its place, for an interval that excludes 0."""
    return with_bounds(gap, sign="+", mark="*" if gap.excludes_zero else " ")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of cells below each other, the first row the headings, with as much space between as fits.

    A row of fewer cells names a group: it may be longer than its column, for nothing stands to the right of it.
    """
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    space = "  " if sum(widths) + 2 * len(widths) - 2 <= WIDTH else " "
    return [space.join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows]


def plus_minus(interval: Interval) -> str:
    """``43.1 ±2.1``."""
    places = decimals(interval)
    return f"{fixed(interval.value, places)} ±{fixed(interval.half_width, places)}"


def significant(value: float, digits: int) -> str:
    """``12340`` to ``12k``: so many leading digits, and a letter for the thousands."""
    value = float(f"{value:.{digits}g}")
    unit, letter = next(((u, n) for u, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= u), (1.0, ""))
    return f"{value / unit:.6g}{letter}"


def _memory(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes < 1000 * 2**20 else f"{n_bytes / 2**30:.1f} GiB"


# ---- columns ---------------------------------------------------------------------------------------------------------


def _difference(row: Row) -> str:
    if row.difference is not None:
        return with_sign(row.difference)
    return "baseline" if row.is_baseline and row.is_ranked else ABSENT


COLUMNS = (
    Column("  configuration", False, lambda row: ("> " if row.is_best else "  ") + row.preset),
    Column("params", True, lambda row: significant(row.parameters, 3) if row.parameters else ABSENT),
    Column("seeds", True, lambda row: f"{row.seeds_done}/{row.seeds_asked}"),
    Column("bits/byte [95%]", False, lambda row: with_bounds(row.bits_per_byte) if row.bits_per_byte else ABSENT),
    Column("perplexity", False, lambda row: plus_minus(row.perplexity) if row.perplexity else ABSENT),
    Column("difference [95%]", False, _difference),
    Column("tok/s", True, lambda row: significant(row.tokens_per_second, 2) if row.tokens_per_second else ABSENT),
    Column("memory", True, lambda row: _memory(row.peak_memory_bytes) if row.peak_memory_bytes else ABSENT),
    Column("causal", False, lambda row: {True: "yes", False: "NO", None: ABSENT}[row.causal]),
)
