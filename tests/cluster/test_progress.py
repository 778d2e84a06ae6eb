"""What a running trial says, and how often."""

import math

from hrs.cluster.progress import Pace, TrialProgress, format_seconds


def test_a_training_line_has_step_loss_speed_and_time_left() -> None:
    progress = TrialProgress(stage="train", step=30, steps=120, loss=4.5, tokens_per_second=7310.4, seconds_left=62.0)
    line = progress.line("full_hrs/0")
    for part in ("full_hrs/0", "30/120", "25%", "loss 4.500", "7,310 tokens/s", "1m02s left"):
        assert part in line


def test_durations_are_short_words() -> None:
    assert [format_seconds(s) for s in (7.9, 185, 3720, math.nan)] == ["7s", "3m05s", "1h02m", "?"]


def test_training_is_paced_and_stages_always_pass() -> None:
    pace = Pace(every_seconds=10.0)
    training = TrialProgress(stage="train", step=1, steps=2)
    assert pace.lets_through("a", training, now=0.0)
    assert not pace.lets_through("a", training, now=9.0)
    assert pace.lets_through("b", training, now=9.0)
    assert pace.lets_through("a", TrialProgress(stage="audit", step=2, steps=2), now=9.5)
    assert pace.lets_through("a", training, now=20.0)
