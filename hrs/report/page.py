"""A study as one self-contained HTML page, a Markdown file, a text table and its figures."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hrs.files import write_whole
from hrs.presets import PRESETS
from hrs.report.notes import notes
from hrs.report.records import RunRecord
from hrs.report.rows import (
    Comparison,
    Row,
    audit_failures,
    bits_per_byte,
    by_preset,
    compare_presets,
    describe_status,
    is_evaluated,
)  # fmt: skip
from hrs.report.table import BELOW_THE_LINE, COLUMNS, decimals, fixed, markdown_table, significant, text_table

if TYPE_CHECKING:
    from hrs.report.plots import Plot


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFiles:
    """Where the report was written."""

    html: Path
    """Self-contained: images are embedded and nothing is fetched."""
    markdown: Path
    table_text: Path
    plots: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Detail:
    """One preset's section of the page."""

    row: Row
    summary: str
    audit: str
    failures: list[str]
    differences: list[tuple[str, str, str]]
    """Config field, the baseline's value, this preset's value."""
    runs: list[tuple[int, str, str, str, str]]
    """Seed, bits per byte, how it ended, run key, address of its page in MLflow (empty if there is none)."""


def write_report(
    study: str,
    records: Sequence[RunRecord],
    directory: Path,
    *,
    commands: Sequence[str] = (),
    study_page: str = "",
    run_pages: Mapping[str, str] | None = None,
) -> ReportFiles:
    """Write ``report.html``, ``report.md``, ``table.txt`` and ``plots/*.png`` below ``directory``.

    The baseline is the preset of the first record. What a page says of its origin besides ``commands`` comes from the
    records.

    Args:
        commands: what a reader types to run the study again.
        study_page: address of the study in MLflow, which the page links to.
        run_pages: addresses of runs by key.

    Raises:
        HRSError: if the records cannot stand in one table (see :func:`hrs.report.rows.compare_presets`).
    """
    from hrs.report.forest import forest  # Matplotlib is slow to import, and a table needs none of it
    from hrs.report.plots import draw_plots

    comparison, groups = compare_presets(records), by_preset(records)
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    plots = draw_plots(groups, directory / "plots")
    facts, origin = _facts(groups), _origin(records, commands)
    environment = Environment(
        loader=PackageLoader("hrs", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        study=study,
        facts=facts,
        study_page=study_page,
        forest=forest(comparison),
        columns=COLUMNS,
        comparison=comparison,
        below_the_line=BELOW_THE_LINE,
        notes=notes(comparison),
        figures=[(plot.caption, base64.b64encode(plot.path.read_bytes()).decode()) for plot in plots],
        details=_details(comparison, groups, run_pages or {}),
        origin=origin,
    )
    files = ReportFiles(
        html=directory / "report.html",
        markdown=directory / "report.md",
        table_text=directory / "table.txt",
        plots=tuple(plot.path for plot in plots),
    )
    write_whole(files.html, html)
    write_whole(files.markdown, _markdown(study, comparison, facts, origin, plots))
    write_whole(files.table_text, text_table(comparison))
    return files


def _markdown(
    study: str,
    comparison: Comparison,
    facts: Mapping[str, str],
    origin: Sequence[tuple[str, str]],
    plots: "Sequence[Plot]",
) -> str:
    head = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    figures = [f"![{plot.caption}](plots/{plot.path.name})" for plot in plots]
    again = "\n".join(f"- {name}: `{value}`" for name, value in origin)
    table = markdown_table(comparison).rstrip()
    return "\n\n".join([f"# {study}", head, table, *figures, "## How to get this again", again]) + "\n"


def _facts(groups: Mapping[str, Sequence[RunRecord]]) -> dict[str, str]:
    """What was compared, for the head of the page."""
    runs = [run for group in groups.values() for run in group]
    configs = [run.config for run in runs if run.config]
    seeds = sorted({run.seed for run in runs})
    tokens = sorted({_training_tokens(config) for config in configs})
    facts = {"scale": runs[0].scale}
    if configs:
        facts |= {
            "corpus": ", ".join(dict.fromkeys(c["data"]["corpus"] for c in configs)),
            "tokenizer": ", ".join(dict.fromkeys(c["data"]["tokenizer"] for c in configs)),
            "training tokens per run": " to ".join(significant(n, 3) for n in dict.fromkeys((tokens[0], tokens[-1]))),
        }
    return facts | {
        "presets": str(len(groups)),
        "seeds": ", ".join(map(str, seeds)),
        "runs evaluated": f"{sum(map(is_evaluated, runs))} of {len(runs)}",
        "baseline": next(iter(groups)),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _training_tokens(config: Mapping[str, Any]) -> int:
    training: Mapping[str, int] = config["training"]
    return training["steps"] * training["batch_sequences"] * int(config["model"]["max_seq_len"])


def _origin(records: Sequence[RunRecord], commands: Sequence[str]) -> list[tuple[str, str]]:
    """What a reader needs to get the same numbers again, as the runs themselves have it."""
    origin = [("command", command) for command in commands]
    for name, values in (
        ("code version", [r.code_version for r in records]),
        ("data fingerprint", [r.data_fingerprint for r in records]),
    ):
        origin.append((name, ", ".join(dict.fromkeys(filter(None, values)))))
    if tables := [r.documents for r in records if r.documents is not None]:
        texts = repr((tables[0]["title"].to_pylist(), tables[0]["bytes"].to_pylist()))
        digest = hashlib.sha256(texts.encode()).hexdigest()[:16]
        origin.append(("validation documents", f"sha256 of titles and sizes {digest}"))
    return [(name, value) for name, value in origin if value]


def _details(
    comparison: Comparison, groups: Mapping[str, Sequence[RunRecord]], pages: Mapping[str, str]
) -> list[Detail]:
    settings = {p: _flatten(next((r.config for r in runs if r.config), {})) for p, runs in groups.items()}
    base = settings[comparison.baseline.preset]
    details = []
    for row in comparison.rows:
        own, runs = settings[row.preset], groups[row.preset]
        names = [n for n in {**base, **own} if base.get(n, "") != own.get(n, "")] if base and own else []
        # Seeds share their documents, so they differ by less than the interval over documents: one more digit.
        places = decimals(row.bits_per_byte) + 1 if row.bits_per_byte else 0
        bits = [fixed(bits_per_byte(r.documents), places) if is_evaluated(r) else "" for r in runs]
        ended = [(r.seed, b, describe_status(r), r.key, pages.get(r.key, "")) for r, b in zip(runs, bits, strict=True)]
        details.append(
            Detail(
                row=row,
                summary=PRESETS[row.preset].summary if row.preset in PRESETS else "",
                audit={True: "passed", False: "failed", None: "not taken"}[row.causal],
                failures=audit_failures(runs),
                differences=[(n, base.get(n, ""), own.get(n, "")) for n in names],
                runs=ended,
            )
        )
    return details


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted leaves as text, without the names that differ by definition."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif prefix + name == "training.phases":
            flat[prefix + name] = ", ".join(map(_phase, value)) or "one phase"
        elif prefix or name not in ("preset", "seed", "scale"):
            flat[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return flat


def _phase(phase: Mapping[str, Any]) -> str:
    """``refinement 24% (freezes engram.encoder)``; its multipliers are in the figure of the schedules."""
    verbs = {"freeze": "freezes", "reinitialise": "redraws"}
    extras = [f"{verb} {', '.join(phase[name])}" for name, verb in verbs.items() if phase.get(name)]
    return f"{phase['name']} {phase['frac']:.0%}" + (f" ({'; '.join(extras)})" if extras else "")
