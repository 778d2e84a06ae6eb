"""Which fields are left out because a part is off; that the model does not read them is tested with the model."""

from hrs.config import flatten, override
from hrs.config.effective import fields_in_effect
from hrs.presets import experiment


def test_a_switch_stays_and_brings_back_the_fields_of_its_part() -> None:
    off = experiment("dense_baseline", "micro")
    assert fields_in_effect(off).items() < flatten(off).items()
    switches = {
        "model.engram.kind": "window",
        "model.locality.enabled": "true",
        "model.category.enabled": "true",
        "model.test_time_memory.enabled": "true",
        "training.averaging.decays": "0.9",
        "training.sharing.workers": "2",
        "training.schedule.shape": "cosine_hold_linear",
        "model.attention.kernel": "mlp",
        "model.feed_forward": "tiers",
    }
    brought = {
        name: set(fields_in_effect(override(off, {name: value}))) - set(fields_in_effect(off))
        for name, value in switches.items()
    }
    assert all(brought.values())
    assert brought["training.sharing.workers"] == {"training.sharing.unshared"}
    assert brought["training.schedule.shape"] == {"training.schedule.decay_frac", "training.schedule.hold_frac"}
    assert brought["model.attention.kernel"] == {"model.attention.features"}
    assert {"model.router.hidden", "model.tiers.n_experts"} <= brought["model.feed_forward"]


def test_a_wsd_schedule_reads_its_floor_and_its_decay() -> None:
    names = fields_in_effect(override(experiment("dense_baseline", "micro"), {"training.schedule.shape": "wsd"}))
    assert "training.schedule.floor_frac" in names and "training.schedule.decay_frac" in names
    assert "training.schedule.hold_frac" not in names
