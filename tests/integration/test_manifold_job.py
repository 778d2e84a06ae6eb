"""Manifolds on a real Ray: counted in shards, built once whoever asks at once, tracked once; what their jobs print."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from hrs.cluster.manifold import ATTEMPTS, STAGES, build_manifolds, count_sharded
from hrs.cluster.preflight import ROOT
from hrs.config import ExperimentConfig
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.manifold.build import PICTURE, manifold_key
from hrs.manifold.manifold import Manifold
from hrs.manifold.statistics import Counts, count_store
from hrs.presets import experiment
from hrs.report.records import RunRecord
from hrs.storage import Storage
from hrs.tracking import Tracker
from jobs import manifold_precompute, manifold_study

Configure = Callable[..., ExperimentConfig]


@pytest.fixture
def configure(small_corpus: Path) -> Configure:
    def make(**geometry: str) -> ExperimentConfig:
        overrides = {"data.corpus": f"jsonl:{small_corpus}", "data.tokenizer": "bpe:300"}
        overrides |= {f"model.manifold.geometry.{name}": value for name, value in geometry.items()}
        return experiment("manifold_v18", "micro", 0, overrides)

    return make


def key_of(config: ExperimentConfig, storage: Storage) -> str:
    return manifold_key(config.model.manifold.geometry, open_tokens(config.data, storage.tokens).fingerprint)


def silent(*_: object) -> None:
    """Nothing."""


# ---- builder ---------------------------------------------------------------------------------------------------------


def same(left: Counts, right: Counts) -> bool:
    matrices = ("after_10", "forward", "successors")
    return left.n_tokens == right.n_tokens and all(
        (getattr(left, name) != getattr(right, name)).nnz == 0 for name in matrices
    )


@pytest.mark.slow
@pytest.mark.parametrize("across_documents", [False, True])
def test_counts_of_shards_are_those_of_the_whole(
    ray_local: ModuleType, configure: Configure, tmp_path: Path, across_documents: bool
) -> None:
    data, storage = configure().data, Storage(tmp_path)
    whole = count_store(open_tokens(data, storage.tokens), across_documents=across_documents)
    noted: list[tuple[str, float, str]] = []
    parts = count_sharded(data, storage, across_documents, 3, lambda *report: noted.append(report))
    assert same(parts, whole) and parts.successors.sum() > 1000
    assert [done for _, done, _ in noted] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert not same(count_sharded(data, storage, not across_documents, 2, silent), whole)


@pytest.mark.slow
def test_two_jobs_of_one_cluster_share_one_build(ray_local: ModuleType, configure: Configure, tmp_path: Path) -> None:
    config, storage = configure(definition="as_built", steps="600"), Storage(tmp_path)
    key = key_of(config, storage)
    lines: dict[int, list[str]] = {0: [], 1: []}
    digests: dict[int, dict[str, str]] = {}

    def ask(who: int) -> None:
        digests[who] = build_manifolds([config, config], storage, lines[who].append)

    askers = [threading.Thread(target=ask, args=(who,)) for who in lines]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    manifold = Manifold.load(storage.manifolds / key)
    assert digests == {0: {key: manifold.digest}, 1: {key: manifold.digest}}
    for told in lines.values():  # of two actors, one would have waited for the other's lock and told nothing
        assert [line for line in told if "neighbours   100%" in line], told
    seconds = json.loads((storage.manifolds / key / STAGES).read_text())["seconds"]
    assert list(seconds) == ["counts", "forces", "physics", "spectrum", "neighbours"]
    assert all(value >= 0 for value in seconds.values()) and seconds["physics"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, ATTEMPTS])
def test_a_builder_that_dies_is_started_again_and_leaves_nothing_half_written(
    ray_local: ModuleType, configure: Configure, tmp_path: Path, deaths: int
) -> None:
    config, storage = (
        configure(definition="as_built", steps=str(800 + 30_000 * (deaths == ATTEMPTS))),
        Storage(tmp_path),
    )
    key, killed = key_of(config, storage), []

    def kill(line: str) -> None:
        if len(killed) < deaths and "physics" in line and "100%" not in line:
            ray_local.kill(ray_local.get_actor(f"manifold-{key}", namespace="hrs"))
            killed.append(line)

    if deaths < ATTEMPTS:
        (digest,) = build_manifolds([config], storage, kill).values()
        assert Manifold.load(storage.manifolds / key).digest == digest
    else:
        with pytest.raises(HRSError, match=f"builds manifold {key} died {ATTEMPTS} times") as failed:
            build_manifolds([config], storage, kill)
        assert "\n" not in str(failed.value)
        assert not (storage.manifolds / key).exists()
    assert len(killed) == deaths


@pytest.mark.slow
def test_two_processes_without_ray_build_once(configure: Configure, tmp_path: Path) -> None:
    config, storage = configure(definition="as_built", steps="300"), Storage(tmp_path)
    key_of(config, storage)  # the tokens are there: the race is for the manifold
    program = (
        "import json, pathlib, sys, time\n"
        "from hrs.config import ExperimentConfig, from_dict\n"
        "from hrs.data import open_tokens\n"
        "from hrs.manifold.build import open_manifold\n"
        "from hrs.storage import Storage\n"
        "root, me = pathlib.Path(sys.argv[2]), sys.argv[3]\n"
        "config, storage, stages = from_dict(ExperimentConfig, json.loads(sys.argv[1])), Storage(root), []\n"
        "store = open_tokens(config.data, storage.tokens)\n"
        "(root / f'ready-{me}').touch()\n"
        "while len(list(root.glob('ready-*'))) < 2: time.sleep(0.01)\n"
        "report = lambda stage, done, note: stages.append(stage)\n"
        "manifold = open_manifold(config.model.manifold.geometry, store, storage.manifolds, report=report)\n"
        "print(manifold.digest, len(stages) > 0)\n"
    )
    from hrs.config import canonical_json

    words = [sys.executable, "-c", program, canonical_json(config), str(tmp_path)]
    racers = [
        subprocess.Popen([*words, me], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for me in ("a", "b")
    ]
    outputs = [racer.communicate() for racer in racers]
    assert all(racer.returncode == 0 for racer in racers), outputs
    digests, built = zip(*(output.split() for output, _ in outputs), strict=True)
    assert len(set(digests)) == 1 and sorted(built) == ["False", "True"]


# ---- jobs/manifold_precompute.py -------------------------------------------------------------------------------------


def run_job(name: str, storage: Path, small_corpus: Path, *words: str) -> subprocess.CompletedProcess[str]:
    job = [sys.executable, str(ROOT / "jobs" / name), "--scale", "micro", "--corpus", f"jsonl:{small_corpus}"]
    job += ["--set", "data.tokenizer=bpe:300", *words]
    environment = os.environ | {"HRS_STORAGE": str(storage)}
    return subprocess.run(job, env=environment, cwd=storage, capture_output=True, text=True)


@pytest.mark.slow
def test_the_job_builds_tracks_and_prints_and_a_second_call_finds(small_corpus: Path, tmp_path: Path) -> None:
    ended = run_job("manifold_precompute.py", tmp_path, small_corpus)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    storage = Storage(tmp_path)
    (folder,) = (path for path in storage.manifolds.iterdir() if path.is_dir())
    manifold = Manifold.load(folder)
    assert "to be computed" in ended.stdout and "counts       100%" in ended.stdout
    for fact in (manifold.digest, "300, 32 coordinates each", str(folder / PICTURE), "springs", "physics"):
        assert fact in ended.stdout
    assert ("at rest" if manifold.converged else "still falling") in ended.stdout

    tracker = Tracker(storage)
    (record,) = tracker.records([folder.name])
    assert record.status == "finished" and tracker.studies() == [manifold_precompute.STUDY]
    assert [energy for _, energy in record.history["energy"]] == pytest.approx(manifold.energies.tolist())
    assert len(record.history["eigenvalue"]) == len(manifold.eigenvalues)
    assert record.metrics["seconds/physics"] > 0
    assert [path.name for path in storage.artifacts.rglob("*.png")] == [PICTURE]

    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = run_job("manifold_precompute.py", tmp_path, small_corpus)
    assert again.returncode == 0 and "to be computed" not in again.stdout and "100%" not in again.stdout
    assert again.stdout.partition("digest:")[2] == ended.stdout.partition("digest:")[2]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    assert len(list(storage.artifacts.rglob("*.png"))) == 1


def test_a_dry_run_says_what_would_be_built_and_builds_nothing(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    words = ["--scale", "micro", "--corpus", f"jsonl:{small_corpus}", "--set", "data.tokenizer=bpe:300", "--dry-run"]
    assert manifold_precompute.main([*words, "--set", "model.manifold.geometry.partners=8"]) == 0
    printed = capsys.readouterr().out
    assert "to be computed" in printed and "300 tokens, the 8 strongest partners of each token" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--preset", "manifold_none"], "manifold_none reads no geometry that is computed from a text: choose"),
        (["--preset", "dense_baseline"], "dense_baseline reads no geometry"),
        (["--set", "model.manifold.geometry.modes=5000"], "modes=5000 is too many for 2048 tokens"),
        (["--scale", "paper", "--set", "model.manifold.geometry.partners=0"], "geometry.partners=32"),
        (["--corpus", "text:/nowhere/at/all.txt"], "/nowhere/at/all.txt"),
        (["--set", "model.manifold.geometry.springs=3"], "unknown field model.manifold.geometry.springs"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path))
    with pytest.raises(HRSError, match=sentence):
        manifold_precompute.main(["--dry-run", *words])


# ---- jobs/manifold_study.py ------------------------------------------------------------------------------------------


def record(preset: str, seed: int, losses: list[float] | None, causal: bool = True) -> RunRecord:
    status = "failed" if losses is None else "finished"
    documents = pa.table({"bytes": [300, 100], "tokens": [150, 50]})  # two bytes a token
    return RunRecord(
        key=f"{preset}{seed}", preset=preset, scale="tiny", seed=seed, status=status, causal=causal,
        documents=documents, loss_by_position=losses,
    )  # fmt: skip


LN2 = 0.6931471805599453


def test_positions_are_averaged_over_seeds_and_stretches_and_the_last_stands_alone(tmp_path: Path) -> None:
    seeds = [[2 * LN2 * (bits + shift) for bits in (8, 6, 5, 3, 2, 2, 2, 9)] for shift in (-1, 1)]
    records = [record("manifold_v18", seed, losses) for seed, losses in enumerate(seeds)]
    records += [record("manifold_v18", 2, None), record("manifold_none", 0, None)]
    records += [record("manifold_v18_legacy", 0, [2 * LN2] * 3 + [8 * LN2], causal=False)]
    ours, leaky = manifold_study.position_lines(records)
    assert (ours.preset, ours.n_seeds, ours.causal, leaky.causal) == ("manifold_v18", 2, True, False)
    assert ours.bits == pytest.approx([8, 6, 5, 3, 2, 2, 2, 9])
    means = manifold_study.by_stretch(ours.bits)
    assert list(means) == ["0", "1", "2-3", "4-7", "last"]
    assert list(means.values()) == pytest.approx([8, 6, 4, 2, 9])
    head, _, first, second, *_ = manifold_study.position_table([ours, leaky]).splitlines()
    assert head.split() == ["configuration", "seeds", "0", "1", "2-3", "4-7", "last", "causal"]
    assert first.split() == ["manifold_v18", "2", "8.000", "6.000", "4.000", "2.000", "9.000", "yes"]
    assert second.split() == ["manifold_v18_legacy", "1", "1.000", "1.000", "1.000", "-", "4.000", "NO"]
    manifold_study.plot_positions([ours, leaky], tmp_path / "positions.png")
    assert (tmp_path / "positions.png").stat().st_size > 5000
    assert "no finished run" in manifold_study.position_table([])


@pytest.mark.parametrize("length", [2, 3, 64, 100, 512])
def test_stretches_count_every_position_once(length: int) -> None:
    means = manifold_study.by_stretch([1.0] * length)
    assert set(means.values()) == {1.0}
    firsts = [int(name.partition("-")[0]) for name in means if name != "last"]
    for position in range(length):
        marked = manifold_study.by_stretch([float(i == position) for i in range(length)])
        (hit,) = [name for name, value in marked.items() if value > 0]
        expected = "last" if position == length - 1 else max(first for first in firsts if first <= position)
        assert hit.partition("-")[0] == str(expected)


@pytest.mark.slow
def test_the_study_compares_geometries_and_shows_positions(small_corpus: Path, tmp_path: Path) -> None:
    ended = run_job("manifold_study.py", tmp_path, small_corpus, "--set", "training.steps=4")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    storage = Storage(tmp_path)
    (study,) = Tracker(storage).studies()
    records = Tracker(storage).study_records(study)
    assert [(r.preset, r.status, r.causal) for r in records] == [
        (preset, "finished", True) for preset in manifold_study.PRESETS
    ]
    table = (storage.report(study) / "positions.txt").read_text()
    assert table in ended.stdout and all(preset in table for preset in manifold_study.PRESETS)
    assert (storage.report(study) / "positions.png").exists()
    assert len(list(storage.artifacts.rglob("positions.txt"))) == 1
    assert len(list(storage.manifolds.glob("*/manifold.json"))) == 1, "all controls are of one geometry"
