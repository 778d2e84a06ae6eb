"""A study: named presets times seeds at one scale, each run known by its content."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hrs import strict_json
from hrs.config import DataConfig, ExperimentConfig
from hrs.data import absolute_corpus, data_fingerprint
from hrs.errors import HRSError
from hrs.identity import run_key
from hrs.presets import experiment
from hrs.tracking.names import require_study_name
from hrs.training.requirements import require_consistent


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One experiment and the key of its content."""

    key: str
    config: ExperimentConfig
    data_fingerprint: str

    @property
    def label(self) -> str:
        return f"{self.config.preset}/{self.config.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Presets (the baseline first) times seeds, with the same overrides for all."""

    title: str
    presets: tuple[str, ...]
    scale: str
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    title_names_presets: bool = True
    """False if the title is the same whatever the presets are: the name then tells them apart."""

    def __post_init__(self) -> None:
        if not self.presets or not self.seeds:
            raise HRSError(
                "a study needs at least one preset and one seed: give --presets or --study, and --seeds N above 0"
            )
        if twice := [preset for preset in self.presets if self.presets.count(preset) > 1]:
            raise HRSError(f"preset '{twice[0]}' is named twice: a table has one row per preset")
        if "seed" in self.overrides:
            raise HRSError("seed cannot be overridden, all rows would have one: give --seed, or --seeds N for 0 to N-1")
        require_study_name(self.name)
        if corpus := self.overrides.get("data.corpus"):  # workers have other working directories
            object.__setattr__(self, "overrides", {**self.overrides, "data.corpus": absolute_corpus(corpus)})

    @property
    def name(self) -> str:
        """Title and scale, and a mark of what else selects the runs: no table mixes two settings.

        That is the overrides, and the presets unless the title stands for them. Seeds are no setting: a study of the
        same name with more of them has more runs (:meth:`hrs.tracking.Tracker.open_study`).
        """
        selection: dict[str, Any] = dict(self.overrides)
        if not self.title_names_presets:
            selection["presets"] = self.presets
        if not selection:
            return f"{self.title}-{self.scale}"
        mark = hashlib.sha256(strict_json.dumps(selection, sort_keys=True, default=str).encode()).hexdigest()[:6]
        return f"{self.title}-{self.scale}-{mark}"

    def runs(self) -> list[Run]:
        """Every run, preset by preset. Needs the corpus at hand to name its content, but builds nothing.

        Raises:
            HRSError: for what cannot be trained, whatever the text says.
        """
        configs = [
            experiment(preset, self.scale, seed, self.overrides) for preset in self.presets for seed in self.seeds
        ]
        for config in configs[:: len(self.seeds)]:
            require_consistent(config)
        fingerprints: dict[DataConfig, str] = {}
        for config in configs:
            if config.data not in fingerprints:
                fingerprints[config.data] = data_fingerprint(config.data)
        return [
            Run(key=run_key(c, fingerprints[c.data]), config=c, data_fingerprint=fingerprints[c.data]) for c in configs
        ]
