"""Counts of token pairs: sorted keys in sparse matrices against dense V x V histograms, in time and memory.

    python -m benchmarks.cooccurrence [--vocab-size 8192] [--tokens 524288] [--store FOLDER]

All ways count the same stream for offsets 1..10 in alternation, in one process and one thread, and must agree in every
cell. ``histogram`` is what the original did: one ``numpy.bincount`` of V^2 cells for each offset, times its weight, and
the sum; for only one matrix of the three. ``scatter`` adds into one dense matrix in place, also for one of the three.
``sorted`` is ours, and makes all three. The streams: tokens drawn independently by Zipf's law, which has more distinct
pairs than text, and with ``--store`` the training tokens of a token store. Prints medians of CPU seconds, which
other load on the machine disturbs least, and ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hrs.manifold.statistics import CHUNK_TOKENS, WEIGHT_UNIT, WIDE, count_shard

Stream = NDArray[Any]


def zipf(n_tokens: int, vocab_size: int) -> Stream:
    """Independent tokens; the r-th most frequent has a frequency of 1/r."""
    cumulative = np.cumsum(1 / np.arange(1, vocab_size + 1))
    return np.searchsorted(cumulative, np.random.default_rng(0).random(n_tokens) * cumulative[-1]).astype(np.uint16)


def text(folder: Path, n_tokens: int) -> Stream:
    """The first training tokens of a store."""
    batch = pa.ipc.open_file(pa.memory_map(str(folder / "train.tokens.arrow"))).get_batch(0)
    tokens: Stream = batch["tokens"].to_numpy(zero_copy_only=True)[:n_tokens]
    return tokens


def histogram(tokens: Stream, vocab_size: int) -> Any:
    """[V, V] weights by one histogram an offset."""
    total = np.zeros(vocab_size**2, dtype=np.int64)
    for offset in range(1, WIDE + 1):
        pairs = tokens[:-offset].astype(np.int64) * vocab_size + tokens[offset:]
        total += np.bincount(pairs, minlength=vocab_size**2) * (WEIGHT_UNIT // offset)
    return total.reshape(vocab_size, vocab_size)


def scatter(tokens: Stream, vocab_size: int) -> Any:
    """[V, V] weights by adding every pair where it belongs."""
    total = np.zeros(vocab_size**2, dtype=np.int64)
    for offset in range(1, WIDE + 1):
        pairs = tokens[:-offset].astype(np.int64) * vocab_size + tokens[offset:]
        np.add.at(total, pairs, WEIGHT_UNIT // offset)
    return total.reshape(vocab_size, vocab_size)


def compare(name: str, tokens: Stream, vocab_size: int, repeats: int) -> None:
    """Print one block of results."""
    ways: dict[str, Callable[[], Any]] = {
        "histogram": lambda: histogram(tokens, vocab_size),
        "scatter": lambda: scatter(tokens, vocab_size),
        "sorted": lambda: count_shard(tokens, vocab_size).after_10,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    n_bytes: dict[str, int] = {}
    for _ in range(repeats):
        results = {}
        for way, run in ways.items():
            start = time.process_time()
            results[way] = run()
            seconds[way].append(time.process_time() - start)
        ours = results["sorted"]
        for way in ("histogram", "scatter"):
            n_bytes[way] = results[way].nbytes
            assert np.count_nonzero(results[way]) == ours.nnz
            rows = np.repeat(np.arange(vocab_size), np.diff(ours.indptr))
            assert np.array_equal(results[way][rows, ours.indices], ours.data)
        n_bytes["sorted"] = ours.data.nbytes + ours.indices.nbytes + ours.indptr.nbytes
        del results, ours
    median = {way: statistics.median(taken) for way, taken in seconds.items()}
    print(f"{name}: {len(tokens):,} tokens, V = {vocab_size:,}, chunks of {CHUNK_TOKENS:,}, medians of {repeats}")
    for way in ways:
        print(
            f"  {way:10}{median[way]:8.2f} s {1e9 * median[way] / len(tokens):8.0f} ns/token "
            f"{n_bytes[way] / 2**20:7.1f} MiB of result   time / sorted {median[way] / median['sorted']:6.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=8192, help="V, at most 65,536 for the Zipf stream")
    parser.add_argument("--tokens", type=int, default=CHUNK_TOKENS, help="length of a stream")
    parser.add_argument("--store", type=Path, help="folder of a token store, whose ids are below --vocab-size")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes of each way")
    args = parser.parse_args()
    compare("Zipf", zipf(args.tokens, args.vocab_size), args.vocab_size, args.repeats)
    if args.store is not None:
        compare("text", text(args.store, args.tokens), args.vocab_size, args.repeats)


if __name__ == "__main__":
    main()
