"""A corpus whose validation text is trained on: said when tokens are built, with the run, and below the table."""

import json
import sys
from pathlib import Path

import pytest

from hrs import cli
from hrs.storage import open_storage
from hrs.tracking import Tracker


def test_an_overlap_is_said_with_the_run_and_below_the_table(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in small_corpus.read_text(encoding="utf-8").splitlines()]
    held_out = [row for row in rows if row["split"] == "validation"]
    rows += [row | {"split": "train"} for row in held_out[:3]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path / "storage"))
    small = ("data.tokenizer=bpe:300", "model.n_layers=1", "model.max_seq_len=32", "training.steps=2")
    sets = [word for change in small for word in ("--set", change)]
    words = ["train", "dense_baseline", "--scale", "micro", "--corpus", f"jsonl:{tmp_path / 'a.jsonl'}", *sets]
    monkeypatch.setattr(sys, "argv", ["hrs", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code in (0, None)
    share = 3 / len(held_out)
    assert f"of {len(held_out)} validation documents 3 exactly and 0 nearly are in train too" in printed.err
    assert f"Warning: {share:.1%} of the validation documents are also" in " ".join(printed.out.split())
    tracker = Tracker(open_storage())
    (record,) = tracker.study_records(tracker.studies()[0])
    assert record.metrics["validation_overlap"] == pytest.approx(share)
    assert "3 exactly" in tracker._find(record.key).tags["duplicates"]
