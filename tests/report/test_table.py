"""The rows of a comparison and how they are printed: digits, marks, the line, and holes that can be seen."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, inf, isclose, log, nan

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrs.errors import HRSError
from hrs.presets import PRESETS, get_study
from hrs.report import RunRecord, format_table
from hrs.report.notes import notes
from hrs.report.rows import compare_presets
from hrs.report.statistics import Interval
from hrs.report.table import COLUMNS, WIDTH, markdown_table, plus_minus, significant, text_table, with_bounds

Make = Callable[..., RunRecord]


def row_of(records: list[RunRecord], preset: str):
    return next(row for row in compare_presets(records).rows if row.preset == preset)


def test_bits_per_byte_and_perplexity_are_the_ratios_of_the_documents(make_record: Make) -> None:
    runs = [make_record(seed=s) for s in range(2)]
    row = row_of(runs, "dense_baseline")
    sums = [{n: sum(r.documents[n].to_pylist()) for n in ("nats", "text_nats", "tokens", "bytes")} for r in runs]
    assert isclose(row.bits_per_byte.value, sum(t["text_nats"] / t["bytes"] / log(2) for t in sums) / 2)
    assert isclose(row.perplexity.value, exp(sum(t["nats"] / t["tokens"] for t in sums) / 2))
    assert row.perplexity.low < row.perplexity.value < row.perplexity.high


def test_the_study_order_is_kept_and_the_best_causal_row_is_marked(study: list[RunRecord]) -> None:
    comparison = compare_presets(study)
    assert [row.preset for row in comparison.rows] == list(dict.fromkeys(r.preset for r in study))
    assert [row.preset for row in comparison.rows if row.is_best] == ["dual_head"]


def test_models_that_see_the_future_are_below_the_line_and_compared_with_nothing(study: list[RunRecord]) -> None:
    comparison = compare_presets(study)
    assert [row.preset for row in comparison.below] == [p for p in get_study("v1_with_legacy") if PRESETS[p].leaks]
    lowest = min(row.bits_per_byte.value for row in comparison.rows if row.bits_per_byte)
    for row in comparison.below:
        assert row.causal is False and row.difference is None and not row.is_best
        assert row.bits_per_byte is not None and "suffix_flip" in row.remark
    assert lowest in [row.bits_per_byte.value for row in comparison.below], "they would have won"


def test_a_row_that_was_never_audited_is_not_ranked(make_record: Make) -> None:
    runs = [make_record(), make_record("dual_head", causal=None), make_record("full_core", nats_per_byte=1.5)]
    row = row_of(runs, "dual_head")
    assert row.is_below_the_line and not row.is_best and row.difference is None
    assert row.remark == "not audited for causality"


def test_one_leaky_seed_takes_the_preset_below_the_line(make_record: Make) -> None:
    runs = [make_record(seed=0), make_record(seed=1, causal=False)]
    assert row_of(runs, "dense_baseline").is_below_the_line


def test_holes_are_shown_with_their_reason(study: list[RunRecord], make_record: Make) -> None:
    assert row_of(study, "dual_head_router_sink").remark == "failed: out of memory at micro-batch 1 of 16"
    assert row_of(study, "full_core").remark == "seed 2 killed: node lost"
    assert (row_of(study, "full_core").seeds_done, row_of(study, "full_core").seeds_asked) == (2, 3)
    missing = [make_record(), *(make_record(seed=s, status="missing", documents=None) for s in (1, 2))]
    assert row_of(missing, "dense_baseline").remark == "seeds 1, 2 missing"
    silent = [make_record(), make_record("dual_head", documents=None)]
    assert row_of(silent, "dual_head").remark == "finished, but never evaluated"


def test_a_loss_that_is_not_finite_is_a_hole_and_not_a_winner(make_record: Make) -> None:
    broken = make_record("dual_head")
    values = broken.documents["text_nats"].to_pylist()
    table = broken.documents.set_column(4, "text_nats", pa.array([nan, *values[1:]]))
    assert broken.documents.column_names[4] == "text_nats" != "nats"
    broken = replace(broken, documents=table.select(["document", "title", "nats", "text_nats", "tokens", "bytes"]))
    row = row_of([make_record(), broken], "dual_head")
    assert row.bits_per_byte is None and row.remark == "finished, but its loss is not finite"


def test_without_a_ranked_baseline_there_are_no_differences_and_the_notes_say_so(make_record: Make) -> None:
    failed = make_record(status="failed", documents=None, causal=None)
    comparison = compare_presets([failed, make_record("dual_head"), make_record("full_core")])
    assert all(row.difference is None for row in comparison.rows)
    assert any("the baseline dense_baseline has no ranked result" in note for note in notes(comparison))


def test_nothing_evaluated_is_said_plainly(make_record: Make) -> None:
    table = format_table([make_record(status="running", documents=None, causal=None)])
    assert "running" in table and "nothing to compare" in table


def test_what_the_content_of_engrams_is_worth_is_said_below(make_record: Make) -> None:
    """The mean over seeds of what another text's engrams cost, for rows that have engrams."""
    worth = (0.01, 0.02)
    records = [make_record("dense_baseline", seed) for seed in range(2)]
    for seed, bits in enumerate(worth):
        metrics = {"bits_per_byte": 2.0, "bits_per_byte_shuffled": 2.0 + bits}
        records.append(make_record("dense_window", seed, metrics=metrics))
    assert "what their content is worth: dense_window +0.0150." in " ".join(format_table(records).split())
    assert "engrams:" not in format_table(records[:2])


def test_one_seed_is_said_to_cover_documents_only(make_record: Make) -> None:
    single = [make_record(), make_record("dual_head")]
    assert "documents only" in " ".join(notes(compare_presets(single)))
    several = [make_record(p, s) for p in ("dense_baseline", "dual_head") for s in range(3)]
    text = " ".join(notes(compare_presets(several)))
    assert "documents only" not in text and "1 time in 4" in text and "1 comparisons" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 0}, "several runs with one seed"),
        ({"scale": "micro"}, "one table compares one scale"),
        ({"config": {"preset": "dense_baseline", "seed": 1, "model": {}}}, "differ in more than their seed"),
    ],
)
def test_runs_that_cannot_stand_in_one_table_are_refused(make_record: Make, change: dict, message: str) -> None:
    with pytest.raises(HRSError, match=message):
        format_table([make_record(seed=0), replace(make_record(seed=1), **change)])


def test_seeds_that_read_the_memories_of_their_own_baseline_are_one_setting(make_record: Make) -> None:
    def record(seed: int, **retrieval: object) -> RunRecord:
        named = {"base": f"run {seed}", "fingerprint": f"weights {seed}", "neighbours": 2} | retrieval
        return make_record(seed=seed, config={"seed": seed, "training": {"steps": 1, "retrieval": named}})

    assert format_table([record(0), record(1)])
    with pytest.raises(HRSError, match="differ in more than their seed"):
        format_table([record(0), record(1, neighbours=3)])


def test_other_documents_are_refused(make_record: Make) -> None:
    other = make_record("dual_head")
    titles = pa.array([f"another {i}" for i in range(other.documents.num_rows)])
    other = replace(other, documents=other.documents.set_column(1, "title", titles))
    with pytest.raises(HRSError, match="different documents"):
        format_table([make_record(), other])
    with pytest.raises(HRSError, match="no runs to report"):
        format_table([])


# ---- printing --------------------------------------------------------------------------------------------------------


def test_the_text_fits_a_terminal_and_its_columns_are_aligned(study: list[RunRecord]) -> None:
    table = format_table(study)
    lines = table.splitlines()
    assert max(map(len, lines)) <= WIDTH
    start = lines[0].index("bits/byte")
    rows = [line for line in lines if " [" in line and not line.startswith("[")][1:]
    assert len(rows) == 10
    assert all(line[start - 1] == " " and line[start] in "01" for line in rows)
    line = next(i for i, text in enumerate(lines) if text.startswith("--- not ranked"))
    assert all(("_legacy" in text) == (i > line) for i, text in enumerate(lines) if text[2:].startswith("full_hrs"))


def test_markdown_has_the_cells_of_the_text(study: list[RunRecord]) -> None:
    comparison = compare_presets(study)
    text, markdown = text_table(comparison), markdown_table(comparison).replace("\\", "")
    for row in comparison.rows:
        for cell in (column.cell(row).strip() for column in COLUMNS):
            assert cell in text and f"| {cell} " in markdown
    tables = [line for line in markdown_table(comparison).splitlines() if line.startswith("|")]
    assert len({line.count("|") - line.count(r"\|") for line in tables}) == 1


def test_markdown_survives_a_reason_with_bars_and_stars(make_record: Make) -> None:
    runs = [make_record(), make_record("dual_head", status="failed", reason="a|b *c*", documents=None)]
    assert r"failed: a\|b \*c\*" in markdown_table(compare_presets(runs))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1.5234, 1.4901, 1.5562), "1.52 [1.49,1.56]"),
        ((1.5234, 1.5105, 1.5361), "1.523 [1.510,1.536]"),
        ((-0.0124, -0.0161, -0.0079), "-0.012 [-0.016,-0.008]"),
        ((-0.0100, -0.0196, -0.0003), "-0.0100 [-0.0196,-0.0003]"),
        ((1.0, 1.0, 1.0), "1.000 [1.000,1.000]"),
        ((-0.00001, -0.05, 0.05), "0.00 [-0.05,0.05]"),
    ],
)
def test_the_interval_decides_the_digits(interval: tuple[float, float, float], expected: str) -> None:
    assert with_bounds(Interval(value=interval[0], low=interval[1], high=interval[2])) == expected


def test_large_and_broken_numbers_are_printed_as_far_as_they_go() -> None:
    assert plus_minus(Interval(value=1234.0, low=1150.0, high=1330.0)) == "1,230 ±90"
    assert plus_minus(Interval(value=43.14, low=41.0, high=45.3)) == "43 ±2"
    assert plus_minus(Interval(value=inf, low=inf, high=inf)) == "inf ±nan"


@given(
    center=st.floats(-10, 10),
    half=st.floats(1e-4, 5),
)
def test_a_printed_interval_never_contradicts_its_mark(center: float, half: float) -> None:
    """What excludes zero is printed without a zero among its bounds."""
    interval = Interval(value=center, low=center - half, high=center + half)
    low, high = (float(x.replace(",", "")) for x in with_bounds(interval).partition("[")[2].rstrip("]").split(",", 1))
    if interval.excludes_zero and min(abs(interval.low), abs(interval.high)) > 1e-5:
        assert low * high > 0
    # Half a unit of the last place: of 10^m for half in [2, 10) * 10^m, of a tenth of that below. Roundings of numbers
    # up to 15 count when the place is chosen (2e-11 of half) and when it is printed.
    most = 0.25 * half * (1 + 1e-10) + 1e-14
    assert abs(low - interval.low) <= most and abs(high - interval.high) <= most


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (12_340, 2, "12k"),
        (1_234_567, 3, "1.23M"),
        (999_600, 3, "1M"),
        (847, 2, "850"),
        (120_000, 2, "120k"),
        (0.5, 2, "0.5"),
    ],
)
def test_counts_get_a_letter_for_their_thousands(value: float, digits: int, expected: str) -> None:
    assert significant(value, digits) == expected


@pytest.mark.parametrize(
    ("overlaps", "said"), [((0.0, 0.25), "25.0% of the validation documents are also"), ((0.0,), None)]
)
def test_a_validation_text_that_was_trained_on_is_said_below_the_table(
    make_record: Callable[..., RunRecord], overlaps: tuple[float, ...], said: str | None
) -> None:
    records = [make_record(seed=i, metrics={"validation_overlap": share}) for i, share in enumerate(overlaps)]
    table = format_table(records)
    assert (said is None and "training text, exactly" not in " ".join(table.split())) or said in " ".join(table.split())
