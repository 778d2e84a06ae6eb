"""The model registry: the best causal run of a study under a name, and the file that a name stands for.

A version is one artifact of one run: the exported file if the run has one, else its last checkpoint. An alias such as
``champion`` points at one version and is moved in one transaction, so a reader finds the old one or the new one.
``mlflow:NAME@ALIAS`` and ``mlflow:NAME/VERSION`` name a model wherever a path would.
"""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from hrs.errors import HRSError
from hrs.files import sha256_of
from hrs.storage import Storage
from hrs.tracking.candidates import Candidate, format_candidates, judge
from hrs.tracking.store import connect, store_lock
from hrs.tracking.tracker import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from hrs.report.records import RunRecord

PREFIX = "mlflow:"
_EXPORTS, _SUFFIX = "export", ".hrs"  # where jobs/export.py puts its file
_CHECKPOINT = re.compile(r"step_\d{8}")
_STATE = "state.json"
_BESIDE = ("audit.json", "tokenizer.json")
"""Files of a run that belong to its checkpoints, if it has them."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_ALIAS = re.compile(r"[\w-]{1,100}")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)  # MLflow's own


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """What :func:`promote` did."""

    name: str
    alias: str
    version: int
    created: bool
    """False if this file of this run was a version already."""
    previous: int | None
    """The version that the alias pointed at before; None if there was none."""
    artifact: str
    """Path of the file or checkpoint among the run's artifacts."""
    candidates: tuple[Candidate, ...]

    @property
    def taken(self) -> "RunRecord":
        return next(c.record for c in self.candidates if c.verdict == "taken")


# ---- promoting -------------------------------------------------------------------------------------------------------


def promote(storage: Storage, study: str, *, name: str = "hrs", alias: str = "champion") -> Promotion:
    """Register the best causal run of a study under ``name`` and point ``alias`` at it.

    Nothing is exported: the version is the file that jobs/export.py put among the run's artifacts or, without one, its
    last checkpoint. The same file of the same run is one version however often it is promoted.

    Raises:
        HRSError: for an unknown study, one without a finished run that passed the audit, a run without artifacts, or a
            name or alias that cannot be one.
    """
    _require_name(name)
    if not _ALIAS.fullmatch(alias) or _RESERVED_ALIAS.fullmatch(alias):
        raise HRSError(
            f"alias {alias!r} must be letters, digits, '_' or '-', and neither 'latest' nor a version such as 'v2'"
        )
    tracker = Tracker(storage)
    candidates = judge(tracker.study_records(study, with_history=False))
    if not candidates or candidates[0].verdict != "taken":
        table = format_candidates(candidates)
        raise HRSError(
            f"study '{study}' has no finished run that passed the causality audit, so there is nothing to promote: "
            f"finish or audit one\n{table}"
        )
    run = candidates[0].record
    client, _ = connect(storage)
    run_id = tracker.run_id(run.key)
    artifact = _artifact_of(client, run_id, run.key)
    digest = _digest_of(client, run_id, artifact)
    with store_lock(storage):
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        previous = _aliases(client, name).get(alias)
        version = _find_version(client, name, run.key, digest)
        created = version is None
        if version is None:
            tags = _tags(client, run_id, run, study) | {"hrs.artifact": artifact, "hrs.sha256": digest}
            version = client.create_model_version(name, f"runs:/{run_id}/{artifact}", run_id=run_id, tags=tags)
        client.set_registered_model_alias(name, alias, version.version)  # one row, one transaction
    return Promotion(
        name=name,
        alias=alias,
        version=int(version.version),
        created=created,
        previous=previous,
        artifact=artifact,
        candidates=candidates,
    )


def format_promotion(promotion: Promotion) -> str:
    """The candidates, which run was taken and why, and what the name stands for now."""
    taken, p = promotion.taken, promotion
    ranked = sum(c.verdict in ("taken", "more bits per byte") for c in p.candidates)
    excluded = sum(c.record.causal is False for c in p.candidates)
    why = f"the fewest bits per byte of {ranked} finished causal run{'s' * (ranked != 1)}"
    if excluded:
        why += f"; {excluded} that see what they predict are out, whatever their score"
    state = "registered" if p.created else "registered before"
    moved = "" if p.previous in (None, p.version) else f", before version {p.previous}"
    return (
        f"{format_candidates(p.candidates)}\n\n"
        f"taken: {taken.preset}/{taken.seed}, {taken.metrics['bits_per_byte']:.4f} bits per byte ({why})\n"
        f"{p.name} version {p.version}: {p.artifact} of run {taken.key}, {state}\n"
        f"{PREFIX}{p.name}@{p.alias} is version {p.version}{moved}"
    )


def _artifact_of(client: "MlflowClient", run_id: str, key: str) -> str:
    files = [f.path for f in client.list_artifacts(run_id, _EXPORTS) if f.path.endswith(_SUFFIX)]
    if len(files) > 1 and f"{_EXPORTS}/model.hrs" not in files:
        raise HRSError(
            f"run {key} has {len(files)} exported files ({', '.join(files)}) and none is model.hrs: "
            "export the one to promote under that name"
        )
    if files:
        return f"{_EXPORTS}/model.hrs" if len(files) > 1 else files[0]
    checkpoints = [f.path for f in client.list_artifacts(run_id) if f.is_dir and _CHECKPOINT.fullmatch(f.path)]
    if not checkpoints:
        raise HRSError(f"run {key} has neither an exported file nor a checkpoint among its artifacts: export it again")
    return max(checkpoints)


def _digest_of(client: "MlflowClient", run_id: str, artifact: str) -> str:
    """SHA-256 of the file; of a checkpoint that of its state.json, which lists the checksums of all its files."""
    path = f"{artifact}/{_STATE}" if _CHECKPOINT.fullmatch(artifact) else artifact
    with tempfile.TemporaryDirectory() as folder:
        return sha256_of(Path(client.download_artifacts(run_id, path, folder)))


def _tags(client: "MlflowClient", run_id: str, run: "RunRecord", study: str) -> dict[str, Any]:
    of_run = client.get_run(run_id).data.tags
    return {
        "hrs.run_key": run.key,
        "study": study,
        "preset": run.preset,
        "scale": run.scale,
        "seed": str(run.seed),
        "bits_per_byte": f"{run.metrics['bits_per_byte']:.6f}",
        "causal": str(run.causal).lower(),
        "code_version": of_run.get("hrs.code_version", ""),
    }


def _find_version(client: "MlflowClient", name: str, key: str, digest: str) -> "ModelVersion | None":
    found = client.search_model_versions(f"name = '{name}' and tags.`hrs.run_key` = '{key}'")
    same = [v for v in found if v.tags.get("hrs.sha256") == digest]
    return min(same, key=lambda v: int(v.version)) if same else None


# ---- finding ---------------------------------------------------------------------------------------------------------


def resolve_model(storage: Storage, source: str | Path) -> Path:
    """The path of a model: of ``mlflow:NAME@ALIAS`` or ``mlflow:NAME/VERSION``, or ``source`` itself if it is a path.

    A registered model is read where its run left it below this storage, if the file is still the registered one.
    Otherwise it is fetched into ``<storage>/models``, once: a file, or a checkpoint with its audit and its tokenizer in
    the layout of a run's directory.

    Raises:
        HRSError: for a name, alias or version that does not exist, or a file that is no longer the registered one.
    """
    text = str(source)
    if not text.startswith(PREFIX):
        return Path(source)
    client, _ = connect(storage)
    version = _version_of(client, text)
    digest, artifact, key = (version.tags.get(f"hrs.{name}", "") for name in ("sha256", "artifact", "run_key"))
    if not digest or not artifact:
        raise HRSError(f"{text} was not registered by `hrs promote`: promote a study under another name")
    # A checkpoint keeps the layout of a run's directory, so that whoever reads it finds the audit.
    place = f"checkpoints/{artifact}" if _CHECKPOINT.fullmatch(artifact) else Path(artifact).name
    for folder in (storage.run(key), storage.root / "models" / digest[:16]):
        if _is_same(folder / place, digest):
            return folder / place
    _fetch(client, version, folder, place, text)
    return folder / place


def registered_runs(storage: Storage) -> set[str]:
    """Return the keys of the runs that the registry names."""
    client, _ = connect(storage)
    return {version.tags["hrs.run_key"] for version in client.search_model_versions() if "hrs.run_key" in version.tags}


def _version_of(client: "MlflowClient", text: str) -> "ModelVersion":
    matched = re.fullmatch(r"([^@/]+)(?:@(.+)|/(\d+))", text.removeprefix(PREFIX))
    if matched is None:
        raise HRSError(f"model '{text}' is not of the form {PREFIX}NAME@ALIAS or {PREFIX}NAME/VERSION")
    name, alias, number = matched.groups()
    _require_name(name)
    if not client.search_registered_models(f"name = '{name}'"):
        names = ", ".join(model.name for model in client.search_registered_models()) or "none yet"
        raise HRSError(f"there is no registered model '{name}' (there are: {names}): register one with `hrs promote`")
    if alias is not None:
        aliases = _aliases(client, name)
        if alias not in aliases:
            there = ", ".join(sorted(aliases)) or "none"
            raise HRSError(f"registered model '{name}' has no alias '{alias}' (it has: {there}): name one of those")
        number = str(aliases[alias])
    versions = {int(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    if int(number) not in versions:
        there = ", ".join(map(str, sorted(versions))) or "none"
        raise HRSError(f"registered model '{name}' has no version {number} (it has: {there}): name one of those")
    return versions[int(number)]


def _fetch(client: "MlflowClient", version: "ModelVersion", folder: Path, place: str, text: str) -> None:
    """Copy the version's artifact to its place in a folder; what stands there with the right checksum is whole."""
    artifact, digest, target = version.tags["hrs.artifact"], version.tags["hrs.sha256"], folder / place
    run_id = version.run_id or ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(folder.with_name(f"{folder.name}.lock")),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch,
    ):
        if _is_same(target, digest):
            return
        fetched = _download(client, run_id, artifact, scratch, text)
        if not _is_same(fetched, digest):
            raise HRSError(
                f"{text} is no longer what was registered, because the run's {artifact} was written again: "
                "promote its study for a new version"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        for name in {f.path for f in client.list_artifacts(run_id)}.intersection(_BESIDE):
            os.replace(_download(client, run_id, name, scratch, text), folder / name)
        if target.is_dir():  # damaged: it is not the registered one
            shutil.rmtree(target)
        os.replace(fetched, target)


def _download(client: "MlflowClient", run_id: str, path: str, folder: str, text: str) -> Path:
    try:
        return Path(client.download_artifacts(run_id, path, folder))
    except Exception as error:  # each artifact store raises its own
        cause = " ".join(str(error).split())[:200]
        raise HRSError(f"{path} of {text} cannot be fetched ({cause}): promote its study again") from error


def _is_same(path: Path, digest: str) -> bool:
    file = path / _STATE if path.is_dir() else path
    return file.is_file() and sha256_of(file) == digest


def _aliases(client: "MlflowClient", name: str) -> dict[str, int]:
    return {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise HRSError(f"model name {name!r} must be at most 100 letters, digits, '_', '.' or '-'")
