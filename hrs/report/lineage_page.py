"""The page docs/presets.md, written from the presets themselves."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hrs.config import PhaseConfig
from hrs.models import count_parameters
from hrs.presets import FAMILIES, PRESETS, STUDIES, Preset, experiment
from hrs.presets.repairs import EXPLAINED

_HEAD = """\
# The presets

Written by `hrs presets --markdown`; a test compares the two.

A preset is a small difference from its parent; a scale says how big. `hrs show PRESET` prints every field,
`hrs diff A B` what two presets differ in, `hrs audit --all` audits them all.

A plain name is causal and repaired. Where the original leaked or was broken, `NAME_legacy` rebuilds it with its defects
and the confounds of its protocol: every parameter decayed (here matrices only), validation on ten batches (here the
whole split), label smoothing 0.1 for routed rows alone (here none), no engram dropout (here 0.1). At scale `paper` a
legacy row also takes the original's batch and number of steps; the others all read 24,576 tokens in each of 50,000
steps, so that their numbers compare.

What is relative to the scale (context, depth) holds at every scale. The width of version 15 and later, 1024 for 512, is
taken at `paper` only: elsewhere all rows have the scale's width.

Parameters are those at scale `paper`, against the count of the original's code. Where a plain row has fewer, the
repair says why; its legacy copy has the original's count to the unit.

What was wrong with more than one original, after the words for its repair:

"""


def lineage_page() -> str:
    """The whole page as Markdown."""
    wrong = "\n".join(f"- *{repair}*: {reason}" for repair, reason in EXPLAINED.items())
    parts = [f"{_HEAD}{wrong}\n", "## Lineage\n\n```text\n" + "\n".join(_tree("dense_baseline")) + "\n```\n"]
    for family, presets in FAMILIES.items():
        parts.append(f"## {family}\n\n{_table(presets)}\n")
        parts.append("\n".join(_details(preset) for preset in presets) + "\n")
    studies = "\n".join(f"- `{name}`: {', '.join(f'`{p}`' for p in presets)}" for name, presets in STUDIES.items())
    parts.append(f"## Studies\n\nThe first preset of each is its baseline.\n\n{studies}\n")
    return "\n".join(parts)


def _tree(root: str) -> Iterator[str]:
    """The preset and its descendants, one line each; legacy copies are marks of their parents."""
    copies = [p.leaks for p in PRESETS.values() if p.parent == root and p.legacy]
    yield root + (f"  (legacy copy {'leaks' if copies[0] else 'does not leak'})" if copies else "")
    children = [p.name for p in PRESETS.values() if p.parent == root and not p.legacy]
    for child in children:
        first, rest = ("└─ ", "   ") if child == children[-1] else ("├─ ", "│  ")
        for i, line in enumerate(_tree(child)):
            yield (rest if i else first) + line


def _table(presets: tuple[Preset, ...]) -> str:
    rows = ["| preset | parent | parameters | original |", "|---|---|---:|---:|"]
    for preset in presets:
        parent = f"`{preset.parent}`" if preset.parent else ""
        rows.append(f"| `{preset.name}` | {parent} | {_parameters(preset):,} | {_against_original(preset)} |")
    return "\n".join(rows)


def _parameters(preset: Preset) -> int:
    return count_parameters(experiment(preset.name, "paper").model)


def _against_original(preset: Preset) -> str:
    if preset.original_params is None:
        return ""
    difference = _parameters(preset) - preset.original_params
    if not difference:
        return "the same"
    return f"{preset.original_params:,} (here {abs(difference):,} {'fewer' if difference < 0 else 'more'})"


def _details(preset: Preset) -> str:
    """A list entry: the summary, what changes, what was repaired, and the legacy copy."""
    lines = [f"- **`{preset.name}`**: {preset.summary}{'' if preset.summary.endswith('?') else '.'}"]
    if preset.changes:
        lines.append(f"  Changes {_changes(preset.changes)}.")
    if preset.paper:
        lines.append(f"  At `paper` also {_changes(preset.paper)}.")
    if preset.repaired:
        lines.append(f"  *Repaired:* {preset.repaired}.")
    lines += [
        f"  As it was: `{copy.name}`, which {'leaks' if copy.leaks else 'does not leak'}."
        for copy in PRESETS.values()
        if copy.legacy and copy.parent == preset.name
    ]
    return "\n".join(lines)


def _changes(changes: Any) -> str:
    return ", ".join(f"`{name}` = {_value(value)}" for name, value in changes.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple) and any(isinstance(item, PhaseConfig) for item in value):
        return f"{len(value)} phases of {_shares(value)} % of the steps"
    if isinstance(value, tuple):
        return " + ".join(map(str, value)) or "none"
    return str(value)


def _shares(phases: tuple[PhaseConfig, ...]) -> str:
    """Whole percents that sum to 100: differences of rounded sums."""
    ends = [0, *(round(100 * sum(p.frac for p in phases[: i + 1])) for i in range(len(phases)))]
    return ", ".join(str(b - a) for a, b in pairwise(ends))
