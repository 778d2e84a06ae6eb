"""The files of a report: complete, self-contained, and pictures that are pictures."""

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from hrs.identity import code_version
from hrs.presets import experiment
from hrs.report import ReportFiles, RunRecord, write_report
from hrs.report.forest import forest
from hrs.report.plots import plot_loss_by_position, plot_schedule
from hrs.report.rows import by_preset, compare_presets
from hrs.report.schedule_plots import schedules

UI = "http://127.0.0.1:5000/#/experiments/1/runs"
Make = Callable[..., RunRecord]


@pytest.fixture(scope="module")
def files(study: list[RunRecord], tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    folder = tmp_path_factory.mktemp("study") / "report"
    return write_report(
        "v1 <all>",
        study,
        folder,
        commands=["hrs sweep --study v1", "hrs sweep --seeds 3"],
        study_page=f"{UI}/study",
        run_pages={study[0].key: f"{UI}/first"},
    )


class Page(HTMLParser):
    """Tags that are open, sources that are fetched, links that a reader may follow, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = self.links if tag == "a" else self.sources
        found += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_escapes_names_and_fetches_nothing(files: ReportFiles) -> None:
    html = files.html.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert len(page.sources) == 4 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert page.links == [f"{UI}/study", f"{UI}/first"]
    assert "http" not in re.sub(r"base64,[^\"]*|<a href=\"[^\"]*", "", html) and "url(" not in html
    assert "v1 <all>" in page.text and "v1 &lt;all&gt;" in html


def test_the_page_says_what_was_compared_how_and_how_to_get_it_again(
    files: ReportFiles, study: list[RunRecord]
) -> None:
    text = Page(files.html.read_text(encoding="utf-8")).text
    config = experiment("dense_baseline", "tiny")
    tokens = f"{config.training.steps * config.tokens_per_step / 1000:.0f}k"
    compared = (config.data.corpus, config.data.tokenizer, tokens, "0, 1, 2", "29 of 33")
    origin = ("hrs sweep --study v1", "hrs sweep --seeds 3", "data-of-runs", "code-of-runs")
    for needed in (*compared, *origin, "4,000 bootstrap"):
        assert needed in text, needed
    assert all(record.key in text for record in study)
    assert code_version() not in text, "the code that writes a page says nothing of its runs"
    assert "model.engram.kind" in text and "freezes engram.encoder" in text
    assert text.index("full_hrs_trc") < text.index("not ranked") < text.index("full_hrs_legacy")


def test_a_forest_plot_of_the_differences_comes_first(files: ReportFiles, study: list[RunRecord]) -> None:
    text = Page(files.html.read_text(encoding="utf-8")).text
    assert text.index("Differences from dense_baseline") < text.index("Comparison")
    comparison = compare_presets(study)
    drawn = forest(comparison)
    assert drawn is not None
    differences = {row.preset: row.difference for row in comparison.above if row.difference}
    assert [bar.preset for bar in drawn.bars] == sorted(differences, key=lambda preset: differences[preset].value)
    assert drawn.n_omitted == 4
    scale = [(place - drawn.zero) / float(label) for place, label in drawn.ticks if label != "0"]
    assert min(scale) > 0
    for bar in drawn.bars:
        gap = differences[bar.preset]
        assert (bar.centre - drawn.zero) / gap.value == pytest.approx(scale[0], rel=0.02, abs=0.02)
        assert (bar.left, bar.left + bar.width) == pytest.approx(
            (drawn.zero + scale[0] * gap.low, drawn.zero + scale[0] * gap.high), abs=0.1
        )
        assert bar.left > 0 and bar.left + bar.width < 100
        assert (bar.verdict != "open") == gap.excludes_zero
        assert (bar.verdict == "better") == (gap.high < 0)


def test_markdown_and_text_stand_beside_the_page_with_links_that_work(files: ReportFiles) -> None:
    markdown = files.markdown.read_text(encoding="utf-8")
    linked = {files.markdown.parent / link for link in re.findall(r"\]\((plots/[^)]+)\)", markdown)}
    assert linked == set(files.plots) and all(path.exists() for path in linked)
    assert files.table_text.read_text(encoding="utf-8").startswith("  configuration")


def test_every_figure_is_a_readable_picture(files: ReportFiles) -> None:
    assert [path.stem for path in files.plots] == ["loss", "position", "tiers", "schedule"]
    for path in files.plots:
        height, width, _ = imread(path).shape
        assert width == 1650 and 300 < height < 3000


def test_runs_without_curves_give_a_page_without_figures(make_record: Make, tmp_path: Path) -> None:
    bare = replace(make_record(), history={}, loss_by_position=None, tier_share=None, config={})
    files = write_report("bare", [bare], tmp_path)
    assert files.plots == () and "Figures" not in files.html.read_text(encoding="utf-8")


def test_presets_with_one_schedule_share_one_panel(study: list[RunRecord]) -> None:
    figure = schedules(by_preset(study))
    assert figure is not None
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == [
        "dense_baseline, dual_head, dual_head_router",
        "full_core",
        "full_hrs, full_hrs_trc, full_hrs_legacy, full_hrs_trc_legacy",
        "full_hrs_refined, full_hrs_refined_legacy",
    ]


def test_single_pictures_of_a_run_and_of_a_schedule(tmp_path: Path) -> None:
    plot_loss_by_position({"validation": [3.0 / (1 + i) for i in range(64)]}, tmp_path / "position.png")
    plot_schedule(experiment("full_hrs", "micro"), tmp_path / "schedule.png")
    assert all(imread(tmp_path / f"{name}.png").ndim == 3 for name in ("position", "schedule"))
