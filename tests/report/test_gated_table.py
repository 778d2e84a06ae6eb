"""The table of gated retrieval: numbers against their definitions, paired intervals, notes on what is missing."""

import dataclasses
import re

import numpy as np
import pytest

from hrs.errors import HRSError
from hrs.report.gated_table import GatedReading, Use, gated_table
from hrs.report.statistics import Scores, bootstrap

N = 40
LEVEL = np.linspace(1.0, 3.0, N)


def use(share: float = 0.0, events: int = 0, used: int = 0, similarity: float | None = None) -> Use:
    return Use(n_tokens=4000, share_injected=share, n_events=events, n_used=used, similarity=similarity)


def reading(preset: str = "dense", mode: str = "text", seed: int = 0, **changes: object) -> GatedReading:
    """Documents of very different difficulty: the right memories take 0.02 bits off each byte, others add 0.01."""
    noise = 0.002 * (-1.0) ** np.arange(N)
    off = LEVEL + 0.1 * seed
    made = GatedReading(
        preset=preset,
        mode=mode,
        seed=seed,
        causal=True,
        threshold_bits=4.0 + seed,
        share_fired=0.02,
        n_bytes=np.full(N, 100),
        bits={"right": (off - 0.02 + noise) * 100, "shuffled": (off + 0.01 - noise) * 100, "off": off * 100},
        use={"right": use(0.2, 100, 50, 0.875), "shuffled": use(0.1 + 0.1 * seed, 80, 80, 0.5), "off": use()},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def rows(text: str) -> dict[str, list[list[str]]]:
    """Cells by group: three rows each."""
    lines = text.split("\n\n")[0].splitlines()[2:]
    cells = [re.split(r"  +", line.strip()) for line in lines]
    starts = [i for i, row in enumerate(cells) if len(row) == 1]
    return {cells[i][0]: cells[i + 1 : i + 4] for i in starts}


def test_each_condition_stands_against_off_and_shuffled() -> None:
    right, shuffled, off = rows(gated_table([reading()], "test"))["dense, text, causal yes"]
    assert [row[0] for row in (right, shuffled, off)] == ["right", "shuffled", "off"]
    assert right[1].startswith("1.98 [") and off[1].startswith("2.00 [")
    assert right[2].startswith("-0.0200* [") and shuffled[2].startswith("+0.0100* [")
    assert right[3].startswith("-0.0300* [") and shuffled[3] == "-"
    assert right[4:] == ["20.0%", "25.0", "50%", "0.875"]
    assert shuffled[4:] == ["10.0%", "20.0", "100%", "0.500"]
    assert off[2:] == ["-"] * 6


def test_seeds_of_one_preset_are_one_group_with_an_interval_over_both() -> None:
    pair = [reading(seed=0), reading(seed=1)]
    text = gated_table(pair, "test")
    right, shuffled, off = rows(text)["dense, text, causal yes"]
    scores = [
        Scores(seeds=(0, 1), numerators=np.stack([r.bits[name] for r in pair]), denominators=np.full(N, 100.0))
        for name in ("off", "right")
    ]
    plain, gap = bootstrap(scores)[0].score, bootstrap(scores)[1].difference
    assert gap is not None
    assert off[1] == f"{plain.value:.2f} [{plain.low:.2f},{plain.high:.2f}]"
    value, low, high = (float(x) for x in re.findall(r"[-+]\d\.\d+", right[2]))
    assert (value, low, high) == pytest.approx((gap.value, gap.low, gap.high), abs=6e-5)
    assert shuffled[4] == "15.0%", "the mean over seeds"
    assert "seeds 0, 1; the gate opens above 4.000, 5.000 bits" in text
    assert "covers documents and seeds" in text and "With one seed" not in text
    assert "With one seed" in gated_table([reading()], "test")


def test_a_difference_that_may_be_nothing_is_not_marked() -> None:
    noisy = 0.5 * (-1.0) ** np.arange(N)
    bits = reading().bits | {"right": (LEVEL + noisy) * 100}
    right, _, _ = rows(gated_table([reading(bits=bits)], "test"))["dense, text, causal yes"]
    assert "*" not in right[2] + right[3]


def test_modes_and_presets_have_groups_of_their_own_within_a_terminal() -> None:
    never = {"right": use(), "shuffled": use(), "off": use()}
    long = "dense_retrieved_shuffled"
    found = [reading(long), reading(long, "slots", causal=False), reading("odd", causal=None, use=never)]
    text = gated_table(found, "validation")
    groups = rows(text)
    assert list(groups) == [f"{long}, text, causal yes", f"{long}, slots, causal NO", "odd, text, causal unknown"]
    assert groups["odd, text, causal unknown"][0][4:] == ["0.0%", "0.0", "-", "-"], "a gate that never fired"
    assert "causal NO" in text and "40 documents of the validation split (4,000 bytes" in text
    assert "20.0 firings per 1,000 tokens" in text
    assert max(map(len, text.splitlines())) <= 120
    assert gated_table([], "test").startswith("no model")


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(HRSError, match="two models of dense have one seed"):
        gated_table([reading(), reading()], "test")
    with pytest.raises(HRSError, match="different documents"):
        gated_table([reading(), reading("other", n_bytes=np.full(N, 99))], "test")
