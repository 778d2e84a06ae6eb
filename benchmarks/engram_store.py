"""Exact search of the engram store against FAISS's flat index, and the time of inserts as the store grows.

    python -m benchmarks.engram_store [--keys 100000] [--widths 128,512,1024] [--threads 1,2] [--batches 1,32]
        [--repeats 15] [--k 10] [--inserts 12500,25000,50000,100000] [--insert-width 128] [--insert-batches 64,1024]
        [--folder FOLDER] [--lists]

Search: both answer the same queries by turns in one process with the same number of threads, from keys already in
memory (ours from mapped files). Ours is the whole call: it looks for what other processes wrote, decides in float64,
and gives texts and keys. Both must find the same keys as a float64 reference; the share they find is printed as recall.
``wall`` is the median in milliseconds, ``cpu`` the median processor time, which other load on the machine disturbs
less. ``ratio`` is FAISS's median over ours: above 1 ours is faster. ``--lists`` adds a row of the store with FAISS's
inverted lists (approximate).

Inserts: a new store for each row. ``per key`` must not grow with the number of keys. Each batch is synced to the disk.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from hrs.retrieval.store import EngramStore, NewMemory

Keys = NDArray[np.float32]


def random_keys(n: int, width: int, seed: int) -> Keys:
    """[n, width], normal and without a common part, so that nothing is near by accident."""
    return np.random.default_rng(seed).standard_normal((n, width), dtype=np.float32)


def unit(vectors: NDArray[Any]) -> NDArray[Any]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def memories(n: int) -> list[NewMemory]:
    return [NewMemory(f"text {i}", 4.0, f"source {i % 7}", f"topic {i % 50}") for i in range(n)]


def filled(folder: Path, keys: Keys, batch: int, **more: Any) -> EngramStore:
    """A store of keys added in batches."""
    store = EngramStore.open(folder, fingerprint="benchmark", width=keys.shape[1], **more)
    for start in range(0, len(keys), batch):
        some = keys[start : start + batch]
        store.add(memories(len(some)), some)
    return store


def by_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Medians of wall and processor milliseconds of each way."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if repeat:  # the first touches memory for the first time
                times[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return {
        name: (statistics.median(w for w, _ in taken), statistics.median(c for _, c in taken))
        for name, taken in times.items()
    }


def recall(found: list[list[int]], wanted: NDArray[np.int64]) -> float:
    shares = [len(set(a) & set(b.tolist())) / len(b) for a, b in zip(found, wanted, strict=True)]
    return statistics.mean(shares)


def compare_search(args: argparse.Namespace, width: int, folder: Path) -> None:
    keys = random_keys(args.keys, width, 0)
    store = filled(folder, keys, 1024)
    lists = EngramStore.open(folder, fingerprint="benchmark", width=width, faiss_above=0) if args.lists else None
    flat = faiss.IndexFlatIP(width)
    flat.add(unit(keys))
    for batch in args.batches:
        queries = random_keys(batch, width, 1)
        exact = unit(queries.astype(np.float64)) @ unit(keys.astype(np.float64)).T
        wanted = np.argsort(-exact, axis=1)[:, : args.k]
        unit_queries = unit(queries)

        def numbers(store: EngramStore, queries: Keys = queries) -> list[list[int]]:
            return [[int(h.memory.id.split("-")[1]) for h in hits] for hits in store.search(queries, args.k)]

        ways: dict[str, Callable[[], Any]] = {
            "faiss": lambda q=unit_queries: flat.search(q, args.k),  # type: ignore[misc]
            "exact": lambda q=queries: store.search(q, args.k),  # type: ignore[misc]
        }
        recalls = {"faiss": recall(flat.search(unit_queries, args.k)[1].tolist(), wanted)}
        recalls["exact"] = recall(numbers(store), wanted)
        if lists is not None:
            ways["lists"] = lambda q=queries: lists.search(q, args.k)  # type: ignore[misc]
            recalls["lists"] = recall(numbers(lists), wanted)
        for threads in args.threads:
            faiss.omp_set_num_threads(threads)
            with threadpool_limits(threads):
                taken = by_turns(ways, args.repeats)
            for name, (wall, cpu) in taken.items():
                ratio, cpu_ratio = taken["faiss"][0] / wall, taken["faiss"][1] / cpu
                print(
                    f"{width:>6}{batch:>7}{threads:>8}  {name:<6}{wall:>9.2f}{cpu:>9.2f}{ratio:>7.2f}{cpu_ratio:>7.2f}"
                    f"{recalls[name]:>8.3f}",
                    flush=True,
                )


def time_inserts(args: argparse.Namespace, batch: int, parent: Path) -> None:
    for n in args.inserts:
        keys = random_keys(n, args.insert_width, 0)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            start, cpu = time.perf_counter(), time.process_time()
            store = filled(Path(folder, "store"), keys, batch)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            assert len(store) == n
        print(f"{batch:>7}{n:>9}{wall:>10.2f}{cpu:>9.2f}{1e6 * wall / n:>13.1f}{1e6 * cpu / n:>13.1f}", flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--widths", type=numbers, default=[128, 512, 1024])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--batches", type=numbers, default=[1, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--inserts", type=numbers, default=[12_500, 25_000, 50_000, 100_000])
    parser.add_argument("--insert-width", type=int, default=128)
    parser.add_argument("--insert-batches", type=numbers, default=[64, 1024])
    parser.add_argument(
        "--folder", type=Path, help="where the stores are made (default: the system's temporary folder)"
    )
    parser.add_argument("--lists", action="store_true", help="also time FAISS's inverted lists inside the store")
    args = parser.parse_args()
    print(f"{args.keys:,} keys, k {args.k}; ratios are FAISS over ours")
    heads = ("width", "batch", "threads", "way", "wall ms", "cpu ms", "ratio", "cpu", "recall")
    print("{:>6}{:>7}{:>8}  {:<6}{:>9}{:>9}{:>7}{:>7}{:>8}".format(*heads))
    for width in args.widths:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            compare_search(args, width, Path(folder, "store"))
    heads = ("batch", "keys", "wall s", "cpu s", "us per key", "cpu us")
    print("{:>7}{:>9}{:>10}{:>9}{:>13}{:>13}".format(*heads) + f"   width {args.insert_width}")
    for batch in args.insert_batches:
        time_inserts(args, batch, args.folder)


if __name__ == "__main__":
    main()
