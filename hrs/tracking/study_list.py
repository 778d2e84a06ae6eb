"""What a study says of its runs: the list that is an artifact of it, and the commands that are a tag."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hrs import strict_json
from hrs.config import ExperimentConfig
from hrs.errors import HRSError
from hrs.tracking.history import Tracked

COMMANDS_TAG = "hrs.commands"
_TAG_CHARACTERS = 4000
"""MLflow's limit is 8000 today and was 5000."""


def entry_of_config(config: ExperimentConfig, sample: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Return what a study's list says of a run, by the names that :class:`hrs.report.RunRecord` has for it."""
    facts = {"preset": config.preset, "scale": config.scale, "seed": config.seed, "code_version": version}
    return facts | ({"sample": dict(sample)} if sample else {})


def entry_of_tags(tags: Mapping[str, str]) -> dict[str, Any]:
    """The same from the tags of a run, without its sample."""
    code = {"code_version": tags["hrs.code_version"]} if "hrs.code_version" in tags else {}
    return {"preset": tags["preset"], "scale": tags["scale"], "seed": int(tags["seed"])} | code


def keys_of_version(
    study: str, planned: Mapping[str, Mapping[str, Any]], versions: Sequence[str], wanted: str | None
) -> list[str]:
    """Return the keys of one code version's runs, of the last one if none is named."""
    if wanted is not None and wanted not in versions:
        there = ", ".join(filter(None, versions)) or "none"
        raise HRSError(f"study '{study}' has no runs of code version {wanted} (it has: {there}): name one of those")
    wanted = versions[-1] if versions and wanted is None else wanted
    return [key for key, entry in planned.items() if entry.get("code_version", "") == wanted]


def commands_of(study: Tracked) -> list[str]:
    """Return the commands that made the study's runs, the oldest first."""
    return list(json.loads(study.tags.get(COMMANDS_TAG, "[]")))


def commands_tag(commands: list[str]) -> str:
    """Return the list as JSON that fits into a tag: without the oldest, if they are too many."""
    while len(text := strict_json.dumps(commands)) > _TAG_CHARACTERS and len(commands) > 1:
        commands = commands[1:]
    return text
