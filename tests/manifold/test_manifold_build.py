"""Manifolds are built once and kept whole, and their controls control what they say."""

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hrs.config import DataConfig
from hrs.config.manifold import GeometryConfig
from hrs.data import TokenStore, open_tokens
from hrs.errors import HRSError
from hrs.manifold.blocks import nearest_by_cosine
from hrs.manifold.build import build_manifold, manifold_key, open_manifold
from hrs.manifold.controls import controlled
from hrs.manifold.manifold import Manifold, digest_of, on_grid
from hrs.manifold.statistics import Counts, count_store, merged
from hrs.models.geometry import TokenGeometry

CONFIG = GeometryConfig(partners=0, dimensions=12, steps=40, modes=10, directional=4, syntactic=4, neighbours=5)


@pytest.fixture(scope="module")
def built(small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifold]:
    root = tmp_path_factory.mktemp("manifolds")
    return root, open_manifold(CONFIG, small_store, root)


def equal(a: Manifold, b: Manifold) -> bool:
    names = ("coordinates", "neighbours", "mass", "asymmetry", "positions", "eigenvalues", "energies")
    return a.digest == b.digest and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def no_count(store: TokenStore, across_documents: bool) -> Counts:
    raise AssertionError("it was there already")


# ---- the product -----------------------------------------------------------------------------------------------------


def test_shapes_and_meanings(built: tuple[Path, Manifold], small_store: TokenStore) -> None:
    _, manifold = built
    v = small_store.vocab_size
    assert manifold.coordinates.shape == (v, 18) and manifold.coordinates.dtype == np.float32
    assert manifold.neighbours.shape == (v, 5) and manifold.neighbours.dtype == np.int32
    assert manifold.positions.shape == (v, 12) and manifold.eigenvalues.shape == (10,)
    assert 0 < len(manifold.energies) <= 40 and manifold.energies[-1] < manifold.energies[0]
    on_the_grid = np.rint(manifold.coordinates.astype(np.float64) * 10_000) / 10_000
    assert np.array_equal(manifold.coordinates, on_the_grid.astype(np.float32)), "what is hashed is what is used"
    assert np.array_equal(manifold.neighbours, nearest_by_cosine(manifold.coordinates, 5))
    unseen = np.bincount(small_store.train.tokens, minlength=v) == 0
    assert unseen.any() and not manifold.coordinates[unseen].any() and (manifold.neighbours[unseen] == -1).all()
    assert not np.isin(manifold.neighbours, np.flatnonzero(unseen)).any()


def test_words_of_one_topic_are_neighbours(built: tuple[Path, Manifold], small_store: TokenStore) -> None:
    """In the corpus a word keeps company with the words of its own topic only."""
    topics = {
        "sea": "wave tide ship harbour storm sail anchor deck",
        "sky": "cloud star moon wind plane comet orbit dawn",
        "farm": "wheat barn plough sheep orchard field hen mill",
    }
    topic_of = {}
    for topic, words in topics.items():
        for word in words.split():
            ids = small_store.tokenizer.encode(f" {word}").ids
            if len(ids) == 1:
                topic_of[ids[0]] = topic
    assert len(set(topic_of.values())) == 3
    hits = [
        topic_of[int(other)] == topic
        for token, topic in topic_of.items()
        for other in built[1].neighbours[token]
        if int(other) in topic_of
    ]
    assert len(hits) >= 10 and np.mean(hits) > 0.8, "chance is one in three"


def test_geometry_is_what_models_read(built: tuple[Path, Manifold]) -> None:
    geometry = built[1].geometry()
    assert geometry.coordinates.dtype == torch.float32 and geometry.neighbours.dtype == torch.int64
    assert np.array_equal(geometry.coordinates.numpy(), built[1].coordinates)
    assert np.array_equal(geometry.neighbours.numpy(), built[1].neighbours)


def test_the_as_built_definition_counts_across_documents(small_store: TokenStore, tmp_path: Path) -> None:
    asked = []

    def count(store: TokenStore, across_documents: bool) -> Counts:
        asked.append(across_documents)
        return merged([count_store(store, across_documents=across_documents, shard=(i, 3)) for i in range(3)])

    config = replace(CONFIG, definition="as_built", steps=3)
    manifold = open_manifold(config, small_store, tmp_path, count=count)
    assert asked == [True] and len(manifold.energies) == 3
    assert equal(manifold, build_manifold(config, count_store(small_store, across_documents=True)))


def test_every_stage_is_reported(small_store: TokenStore, tmp_path: Path) -> None:
    heard: dict[str, list[float]] = {}
    open_manifold(CONFIG, small_store, tmp_path, report=lambda stage, done, _: heard.setdefault(stage, []).append(done))
    assert list(heard) == ["counts", "forces", "physics", "spectrum", "neighbours"]
    assert all(0 <= done <= 1 for told in heard.values() for done in told)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(CONFIG, modes=299), "modes=299 is too many for 300 tokens: set it to 298 or less"),
        (replace(CONFIG, syntactic=300), "syntactic=300 is too many"),
    ],
)
def test_more_coordinates_than_tokens_are_refused(
    config: GeometryConfig, words: str, small_store: TokenStore, tmp_path: Path
) -> None:
    with pytest.raises(HRSError, match=words):
        open_manifold(config, small_store, tmp_path, count=no_count)


def test_all_pairs_of_a_large_vocabulary_are_refused_before_counting(small_store: TokenStore, tmp_path: Path) -> None:
    large = replace(small_store, vocab_size=50_257)
    with pytest.raises(HRSError, match=r"about 151 GiB: set model\.manifold\.geometry\.partners=32"):
        open_manifold(CONFIG, large, tmp_path, count=no_count)


# ---- kept ------------------------------------------------------------------------------------------------------------


def test_a_second_opening_reads_what_the_first_wrote(built: tuple[Path, Manifold], small_store: TokenStore) -> None:
    root, manifold = built
    folder = root / manifold_key(CONFIG, small_store.fingerprint)
    assert equal(open_manifold(CONFIG, small_store, root, count=no_count), manifold)
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in root.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_the_key_depends_on_config_and_data() -> None:
    key = manifold_key(CONFIG, "a")
    assert len(key) == 16 and key == manifold_key(replace(CONFIG), "a")
    assert len({key, manifold_key(CONFIG, "b"), manifold_key(replace(CONFIG, seed=1), "a")}) == 3


DAMAGE = {
    "cut": lambda folder: os.truncate(folder / "manifold.safetensors", 1000),
    "flipped": lambda folder: flip(folder / "manifold.safetensors"),
    "missing": lambda folder: (folder / "manifold.safetensors").unlink(),
    "no note": lambda folder: (folder / "manifold.json").unlink(),
    "no json": lambda folder: (folder / "manifold.json").write_text("{"),
    "no digest": lambda folder: (folder / "manifold.json").write_text('{"format": 1}'),
    "other digest": lambda folder: change(folder / "manifold.json", digest="0" * 64),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def change(path: Path, **fields: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_sentence(damage: str, built: tuple[Path, Manifold], tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    built[1].save(folder, {"anything": 1})
    assert equal(Manifold.load(folder), built[1])
    DAMAGE[damage](folder)
    with pytest.raises(HRSError, match=r"missing or damaged .* delete that folder to compute it again"):
        Manifold.load(folder)


def test_another_format_is_refused(built: tuple[Path, Manifold], tmp_path: Path) -> None:
    built[1].save(tmp_path / "kept")
    change(tmp_path / "kept" / "manifold.json", format="next")
    with pytest.raises(HRSError, match="format next and this version of hrs reads 1"):
        Manifold.load(tmp_path / "kept")


def test_a_damaged_folder_is_computed_again(
    built: tuple[Path, Manifold], small_store: TokenStore, tmp_path: Path
) -> None:
    folder = tmp_path / manifold_key(CONFIG, small_store.fingerprint)
    built[1].save(folder)
    flip(folder / "manifold.safetensors")
    assert equal(open_manifold(CONFIG, small_store, tmp_path), built[1])
    assert equal(Manifold.load(folder), built[1])


def test_a_manifold_that_cannot_be_written_leaves_nothing(built: tuple[Path, Manifold], tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(HRSError, match="could not be written"):
        built[1].save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def open_elsewhere(data: DataConfig, tokens: Path, root: Path, go: object, digests: object) -> None:
    store = open_tokens(data, tokens)

    def count(store: TokenStore, across_documents: bool) -> Counts:
        with (root / "counted").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return count_store(store, across_documents=across_documents)

    go.wait()  # type: ignore[attr-defined]
    digests.put(open_manifold(CONFIG, store, root, count=count).digest)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_processes_at_once_compute_it_once(
    small_corpus: Path, built: tuple[Path, Manifold], tmp_path: Path
) -> None:
    data, tokens = DataConfig(corpus=f"jsonl:{small_corpus}", tokenizer="bpe:300"), tmp_path / "tokens"
    open_tokens(data, tokens)
    spawn = multiprocessing.get_context("spawn")
    go, digests = spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=open_elsewhere, args=(data, tokens, tmp_path, go, digests)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [digests.get() for _ in both] == [built[1].digest] * 2
    assert len((tmp_path / "counted").read_text().split()) == 1


# ---- controls --------------------------------------------------------------------------------------------------------


def drawn_geometry() -> TokenGeometry:
    coordinates = on_grid(np.random.default_rng(0).standard_normal((50, 8)) * np.geomspace(1, 0.01, 8))
    coordinates[[3, 30]] = 0
    neighbours = nearest_by_cosine(coordinates, 4)
    return TokenGeometry(torch.from_numpy(coordinates), torch.from_numpy(neighbours.astype(np.int64)))


def nearest(coordinates: torch.Tensor) -> NDArray[np.int32]:
    return nearest_by_cosine(coordinates.numpy(), 4)


def test_the_corpus_is_left_as_it_is() -> None:
    geometry = drawn_geometry()
    assert controlled(geometry, "corpus", 0) is geometry


def test_permuted_tokens_have_the_neighbours_of_their_new_places() -> None:
    geometry, permuted = drawn_geometry(), controlled(drawn_geometry(), "permuted", 1)
    assert not torch.equal(geometry.coordinates, permuted.coordinates)
    assert sorted(map(tuple, geometry.coordinates.tolist())) == sorted(map(tuple, permuted.coordinates.tolist()))
    assert np.array_equal(permuted.neighbours.numpy(), nearest(permuted.coordinates))


def test_random_coordinates_have_the_corpuss_spectrum() -> None:
    geometry, drawn = drawn_geometry(), controlled(drawn_geometry(), "random", 1)
    mine, theirs = geometry.coordinates.double(), drawn.coordinates.double()
    torch.testing.assert_close(torch.linalg.svdvals(mine), torch.linalg.svdvals(theirs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.T @ mine, theirs.T @ theirs, rtol=1e-5, atol=1e-5)
    assert abs(torch.nn.functional.cosine_similarity(mine, theirs).mean()) < 0.2
    assert np.array_equal(drawn.neighbours.numpy(), nearest(drawn.coordinates))


def test_none_is_nothing() -> None:
    empty = controlled(drawn_geometry(), "none", 0)
    assert not empty.coordinates.any() and (empty.neighbours == -1).all()
    assert empty.coordinates.shape == (50, 8) and empty.neighbours.shape == (50, 4)


@pytest.mark.parametrize("source", ["permuted", "random"])
def test_controls_are_drawn_from_the_seed(source: str) -> None:
    first, again, other = (controlled(drawn_geometry(), source, seed) for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert torch.equal(first.coordinates, again.coordinates) and torch.equal(first.neighbours, again.neighbours)
    assert not torch.equal(first.coordinates, other.coordinates)
    assert first.coordinates.dtype == torch.float32 and first.neighbours.dtype == torch.int64


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(HRSError, match="unknown source 'shuffled': choose one of corpus, permuted, random, none"):
        controlled(drawn_geometry(), "shuffled", 0)  # type: ignore[arg-type]


def test_the_digest_sees_every_change() -> None:
    geometry = drawn_geometry()
    coordinates, neighbours = geometry.coordinates.numpy(), geometry.neighbours.numpy().astype(np.int32)
    moved, other = coordinates.copy(), neighbours.copy()
    moved[5, 5] += 1e-4
    other[0, 3] = -1
    digests = {digest_of(coordinates, neighbours), digest_of(moved, neighbours), digest_of(coordinates, other)}
    assert len(digests) == 3
