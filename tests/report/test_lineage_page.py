"""The page of presets is written from the presets, and the file holds what is written."""

import re
from pathlib import Path

import pytest

from hrs.presets import PRESETS, STUDIES
from hrs.report.lineage_page import lineage_page

FILE = Path(__file__).parents[2] / "docs" / "presets.md"


@pytest.fixture(scope="module")
def page() -> str:
    return lineage_page()


def test_the_file_is_the_page(page: str) -> None:
    assert FILE.read_text(encoding="utf-8") == page, "write it again: hrs presets --markdown > docs/presets.md"


def test_every_preset_and_study_has_its_entry(page: str) -> None:
    for name, preset in PRESETS.items():
        (entry,) = re.findall(rf"^- \*\*`{name}`\*\*: (.*?)(?=^- |^#|^\Z)", page, re.DOTALL | re.MULTILINE)
        assert preset.summary in entry
        assert all(f"`{field}` = " in entry for field in {**preset.changes, **preset.paper}), entry
        assert preset.repaired in entry
        if preset.legacy:
            (plain,) = re.findall(rf"As it was: `{name}`, which (.*)\.$", page, re.MULTILINE)
            assert plain == ("leaks" if preset.leaks else "does not leak")
    for study in STUDIES:
        assert f"- `{study}`: `dense_baseline`, " in page


def test_the_tree_hangs_every_preset_under_its_parent(page: str) -> None:
    (tree,) = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    path: list[str] = []
    parents: dict[str, str | None] = {}
    for line in tree.splitlines():
        found = re.match(r"([ │├└─]*)(\w+)", line)
        assert found
        depth = len(found[1]) // 3
        path = [*path[:depth], found[2]]
        parents[found[2]] = path[depth - 1] if depth else None
    assert parents == {name: preset.parent for name, preset in PRESETS.items() if not preset.legacy}


def test_the_tables_say_what_a_repair_took_away(page: str) -> None:
    assert "| `v17_peer_only` | `v16_peer_engram` | 499,244,038 | 499,256,326 (here 12,288 fewer) |" in page
    assert "| `v17_peer_only_legacy` | `v17_peer_only` | 499,256,326 | the same |" in page
    assert "| `dense_window` | `dense_baseline` | 40,949,760 |  |" in page
