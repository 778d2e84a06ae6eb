"""Manifolds built once per content and kept: counts -> forces -> physics -> spectrum -> neighbours."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hrs.config import canonical_json
from hrs.config.codec import to_dict
from hrs.config.manifold import GeometryConfig
from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.files import built_once
from hrs.identity import code_fingerprint
from hrs.manifold.blocks import nearest_by_cosine
from hrs.manifold.forces import compute_forces
from hrs.manifold.manifold import Manifold, digest_of, on_grid
from hrs.manifold.physics import Report, Simulation, silent, simulate
from hrs.manifold.picture import picture
from hrs.manifold.spectrum import spectral_coordinates
from hrs.manifold.statistics import Counts, count_store

_log = logging.getLogger(__name__)

PICTURE = "picture.png"
MAX_DENSE_VOCABULARY = 8192
"""Above, ``partners=0`` is refused: its time grows with V^3 and its memory with V^2."""
DENSE_MATRICES = 8
"""V x V matrices of float64 that exist at once with ``partners=0``, about."""


def manifold_key(config: GeometryConfig, data_fingerprint: str) -> str:
    """16 hex digits naming the manifold of that config and data with this code, on any machine."""
    code = code_fingerprint(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256("\n".join((canonical_json(config), data_fingerprint, code)).encode()).hexdigest()[:16]


def open_manifold(
    config: GeometryConfig,
    store: TokenStore,
    root: Path,
    *,
    count: Callable[[TokenStore, bool], Counts] | None = None,
    report: Report = silent,
) -> Manifold:
    """The manifold of ``store``'s training split below ``root``, computed first if it is missing or damaged.

    Safe in many processes at once: one computes, the others wait. ``<root>/<key>/`` also holds ``picture.png``.

    Args:
        count: (store, whether pairs cross documents) -> counts; None counts in this process.
        report: called with (stage, share of it that is done, note); stages are counts, forces, physics, spectrum and
            neighbours.

    Raises:
        HRSError: if the vocabulary is too small or too large for the config, or the disk refuses.
    """
    require_fit(config, store.vocab_size)
    folder = root / manifold_key(config, store.fingerprint)

    def build() -> Manifold:
        return _compute(config, store, folder, count or _count_here, report)

    return built_once(folder, _open, build, "manifold")


def build_manifold(config: GeometryConfig, counts: Counts, report: Report = silent) -> Manifold:
    """From counts to coordinates, in this process. V is the counts' vocabulary.

    Deterministic for any number of threads. On x86-64 processors of any kind, forces and positions have the same bits;
    eigenvectors differ in rounding, by 1e-13 or so, which the grid of the coordinates hides but for about one digest
    in 10^5 (1,024 tokens). That does not hold for directions whose eigenvalues coincide.

    Raises:
        HRSError: if V is too small or too large for the config.
    """
    require_fit(config, counts.vocab_size)
    report("forces", 0.0, "")
    forces = compute_forces(counts, config)
    report("forces", 1.0, f"{forces.springs.nnz // 2:,} springs, {forces.directed.nnz // 2:,} directed")
    simulation: Simulation = simulate(forces, config, report)
    report("spectrum", 0.0, "")
    spectrum = spectral_coordinates(forces, simulation.positions, config, report)
    coordinates = on_grid(spectrum.coordinates)
    neighbours = nearest_by_cosine(coordinates, config.neighbours, lambda done: report("neighbours", done, ""))
    return Manifold(
        coordinates=coordinates,
        neighbours=neighbours,
        mass=forces.mass,
        asymmetry=forces.asymmetry,
        positions=simulation.positions.astype(np.float32),
        eigenvalues=spectrum.eigenvalues,
        energies=np.asarray(simulation.energies, dtype=np.float64),
        converged=simulation.converged,
        digest=digest_of(coordinates, neighbours),
    )


def require_fit(config: GeometryConfig, vocab_size: int) -> None:
    """Raises HRSError if ``vocab_size`` tokens cannot have the coordinates that ``config`` asks for."""
    for name, limit in (("modes", vocab_size - 2), ("directional", vocab_size - 1), ("syntactic", vocab_size - 1)):
        if (asked := getattr(config, name)) > limit:
            raise HRSError(
                f"model.manifold.geometry.{name}={asked} is too many for {vocab_size} tokens: set it to {limit} or less"
            )
    if config.partners == 0 and vocab_size > MAX_DENSE_VOCABULARY:
        gib = DENSE_MATRICES * 8 * vocab_size**2 / 2**30
        raise HRSError(
            f"all pairs of {vocab_size:,} tokens would take about {gib:,.0f} GiB: "
            "set model.manifold.geometry.partners=32 to look at the strongest partners of each"
        )


def _count_here(store: TokenStore, across_documents: bool) -> Counts:
    return count_store(store, across_documents=across_documents)


def _compute(
    config: GeometryConfig,
    store: TokenStore,
    folder: Path,
    count: Callable[[TokenStore, bool], Counts],
    report: Report,
) -> Manifold:
    if folder.exists():
        _log.warning("manifold %s is damaged and is computed again", folder)
        shutil.rmtree(folder)
    report("counts", 0.0, f"{len(store.train):,} tokens")
    counts = count(store, config.definition == "as_built")
    report("counts", 1.0, f"{counts.n_tokens:,} tokens")
    manifold = build_manifold(config, counts, report)
    frequency = np.bincount(store.train.tokens, minlength=store.vocab_size)
    note = {"geometry": to_dict(config), "data": store.fingerprint, "vocab_size": store.vocab_size}
    manifold.save(folder, note, {PICTURE: picture(manifold, store.tokenizer, frequency)})
    return manifold


def _open(folder: Path) -> Manifold | None:
    if not folder.exists():
        return None
    try:
        return Manifold.load(folder)
    except HRSError as error:
        _log.warning("%s", error)
        return None
