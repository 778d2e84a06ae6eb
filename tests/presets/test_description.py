"""What ``hrs show`` prints: differences from the parent before every field."""

from hrs.config import flatten
from hrs.presets import experiment
from hrs.presets.description import describe_preset


def test_differences_from_the_parent_come_first_and_overrides_apart() -> None:
    lines = describe_preset("full_hrs_refined", "tiny", {"model.d_ff": "256"}, 1234).splitlines()
    assert lines[0].endswith("full_hrs -> full_hrs_refined") and lines[1] == "1,234 parameters at scale tiny"
    assert lines[3:] == [
        "differences from its parent full_hrs:",
        "  training.phases: refinement rate of engram = 0.5  (there 0)",
        "  training.phases: refinement freezes = engram.encoder  (there none)",
        "  training.phases: refinement redraws = engram.type_embedding  (there none)",
        "",
        "overrides of full_hrs_refined:",
        "  model.d_ff = 256  (there 512)",
        "",
        "every field:",
        *(f"{n} = {v}" for n, v in flatten(experiment("full_hrs_refined", "tiny", 0, {"model.d_ff": "256"})).items()),
    ]


def test_a_preset_without_a_parent_has_no_differences() -> None:
    assert "differences" not in describe_preset("dense_baseline", "tiny", {}, 1)
