"""Whatever is killed, stopped or locked, a queue comes to the same end."""

from pathlib import Path

import pytest

from benchmarks import chaos


@pytest.mark.slow
def test_a_disturbed_queue_comes_to_the_same_end(tmp_path: Path) -> None:
    found = chaos.run(tmp_path, faults=12, seed=3, chains=2, length=2, seconds=0.02)
    assert sum(found["faults"].values()) > 0
    assert {name: found[name] for name in ("lost", "doubled", "stuck", "different")} == {
        "lost": 0, "doubled": 0, "stuck": 0, "different": 0,
    }  # fmt: skip
