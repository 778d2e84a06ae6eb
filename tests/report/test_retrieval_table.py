"""The table of memories: differences are paired, and documents can be left out."""

from math import log

import numpy as np
import pyarrow as pa
import pytest

from hrs.errors import HRSError
from hrs.report.retrieval_table import Reading, retrieval_table

N = 40


def documents(bits_per_byte: np.ndarray) -> pa.Table:
    n_bytes = np.full(N, 100)
    return pa.table({"text_nats": bits_per_byte * n_bytes * log(2), "bytes": n_bytes})


def readings(n_seeds: int = 2) -> list[Reading]:
    """Documents of very different difficulty; the right memory takes 0.01 bits off each, most off the first ten."""
    level = np.linspace(1.0, 3.0, N)
    gain = np.where(np.arange(N) < 10, 0.04, 0.0) + 0.002 * (-1.0) ** np.arange(N)

    def reading(preset: str, shown: str, bits: np.ndarray) -> Reading:
        tables = {seed: documents(bits + 0.01 * seed) for seed in range(n_seeds)}
        return Reading(preset=preset, shown=shown, documents=tables, causal=preset != "odd")

    return [
        reading("base", "", level + 0.1),
        reading("control", "none", level),
        reading("with", "right", level - gain),
        reading("with", "shuffled", level),
        reading("odd", "right", level),
    ]


def cells(text: str) -> dict[tuple[str, str], list[str]]:
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[2:]]
    return {(row[0], row[2]): row for row in rows[:5]}


def test_every_row_stands_against_its_own_right_memory_and_the_control() -> None:
    rows = cells(retrieval_table(readings(), "control"))
    assert rows["base", "-"][3].startswith("2.1") and rows["base", "-"][4] == "-"
    assert rows["base", "-"][5].startswith("+0.1")
    assert rows["control", "none"][4:6] == ["-", "-"]
    assert rows["with", "right"][4] == "-" and rows["with", "right"][5].startswith("-0.010*")
    assert rows["with", "shuffled"][4].startswith("+0.010*")
    assert "*" not in rows["with", "shuffled"][5]
    assert [row[-1] for row in rows.values()] == ["yes"] * 4 + ["NO"]


def test_documents_that_are_left_out_take_their_gain_with_them() -> None:
    text = retrieval_table(readings(), "control", "test", np.arange(N) < 10)
    assert "*" not in cells(text)["with", "right"][5]
    assert "30 of 40 documents of the test split" in text and "40 of 40 documents" in retrieval_table(
        readings(), "control"
    )


def test_the_note_says_what_one_seed_cannot() -> None:
    assert "With one seed" in retrieval_table(readings(1), "control")
    assert "With one seed" not in retrieval_table(readings(2), "control")
    assert all(len(line) <= 120 for line in retrieval_table(readings(1), "control").splitlines())
    assert retrieval_table([], "control").startswith("no finished run")


def test_other_documents_are_refused() -> None:
    found = readings()
    shorter = Reading(preset="x", shown="right", documents={0: documents(np.ones(N)).slice(1)}, causal=True)
    with pytest.raises(HRSError, match="different documents"):
        retrieval_table([*found, shorter], "control")
