"""The manifold of a corpus, stage by stage: wall time and peak memory.

    python -m benchmarks.manifold --tokenizer bpe:1024 --threads 2
    python -m benchmarks.manifold --tokenizer bpe:8192 --partners 32 --threads 2
    python -m benchmarks.manifold --tokenizer gpt2 --partners 32 --threads 2

Tokenizes into ``--root`` first, which is not timed, then counts, computes forces, simulates, takes the spectrum and
searches neighbours. Prints a Markdown table: seconds of each stage by the clock and of all processors together, which
other load on the machine changes less, and how far its peak resident memory lay above that before the first stage.
The bar for 50,257 tokens on two cores: 30 minutes and 12 GiB.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from hrs.config import DataConfig
from hrs.config.manifold import GeometryConfig
from hrs.data import open_tokens
from hrs.manifold.blocks import nearest_by_cosine
from hrs.manifold.forces import compute_forces
from hrs.manifold.manifold import digest_of, on_grid
from hrs.manifold.physics import simulate
from hrs.manifold.spectrum import spectral_coordinates
from hrs.manifold.statistics import count_store

GIB = 2**30
_process = psutil.Process()


class Stages:
    """Times stages and samples the resident memory every 20 ms."""

    def __init__(self) -> None:
        self.base = _process.memory_info().rss
        self.rows: list[tuple[str, float, float, float]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        peak, done = _process.memory_info().rss, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, _process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        began, used = time.perf_counter(), time.process_time()
        yield
        seconds, used = time.perf_counter() - began, time.process_time() - used
        done.set()
        watcher.join()
        self.rows.append((name, seconds, used, (peak - self.base) / GIB))
        print(f"{name}: {seconds:.1f} s, {used:.1f} s of processors, {self.rows[-1][3]:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="wiki-mini")
    parser.add_argument("--tokenizer", default="bpe:1024")
    parser.add_argument("--definition", default="clean", choices=("clean", "as_built"))
    parser.add_argument("--partners", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir(), "hrs-benchmark-tokens"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    store = open_tokens(DataConfig(corpus=args.corpus, tokenizer=args.tokenizer), args.root)
    config = GeometryConfig(definition=args.definition, partners=args.partners, steps=args.steps)

    stages = Stages()
    with stages.stage("counts"):
        counts = count_store(store, across_documents=args.definition == "as_built")
    with stages.stage("forces"):
        forces = compute_forces(counts, config)
    with stages.stage("physics"):
        simulation = simulate(forces, config)
    with stages.stage("spectrum"):
        spectrum = spectral_coordinates(forces, simulation.positions, config)
    with stages.stage("neighbours"):
        coordinates = on_grid(spectrum.coordinates)
        neighbours = nearest_by_cosine(coordinates, config.neighbours)

    print(f"\nV {store.vocab_size:,}, {len(store.train):,} tokens of text, {args.threads} threads")
    print(f"springs {forces.springs.nnz // 2:,}, directed springs {forces.directed.nnz // 2:,}")
    print(f"steps {len(simulation.energies)}, energy {simulation.energies[0]:.6g} to {simulation.energies[-1]:.6g}")
    print(f"converged {simulation.converged}, tokens without coordinates {int((neighbours[:, 0] < 0).sum()):,}")
    print(f"eigenvalues {spectrum.eigenvalues[0]:.4f} to {spectrum.eigenvalues[-1]:.4f}")
    print(f"digest {digest_of(coordinates, neighbours)}\n")
    print("| stage | seconds | of processors | peak above start, GiB |\n|---|---|---|---|")
    for name, seconds, used, peak in stages.rows:
        print(f"| {name} | {seconds:.1f} | {used:.1f} | {peak:.2f} |")
    clock, processors = sum(row[1] for row in stages.rows), sum(row[2] for row in stages.rows)
    print(f"| all | {clock:.1f} | {processors:.1f} | {max(row[3] for row in stages.rows):.2f} |")


if __name__ == "__main__":
    main()
