"""A finished manifold: what the precomputation hands to models, and its folder on disk.

    <folder>/manifold.safetensors     coordinates, neighbours, mass, asymmetry, positions, eigenvalues, energies
             manifold.json            format, digest, SHA-256 of the tensors, and whatever the builder noted

Written to a hidden folder, synced to disk, then renamed, so that a folder of that name is whole. No pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hrs import strict_json
from hrs.errors import HRSError
from hrs.files import sha256_of, sync
from hrs.models.geometry import TokenGeometry

FORMAT = 1
TENSORS, NOTE = "manifold.safetensors", "manifold.json"
GRID = 10_000
"""Coordinates are whole multiples of 1/10,000: what is hashed is what is used."""


@dataclass(frozen=True, slots=True, eq=False)
class Manifold:
    """Coordinates of every token and how they came about. V vocabulary, N coordinates, K neighbours, d dimensions."""

    coordinates: NDArray[np.float32]
    """[V, N], multiples of 1e-4."""
    neighbours: NDArray[np.int32]
    """[V, K] ids, nearest first by cosine of the coordinates; -1 for none."""
    mass: NDArray[np.float64]
    """[V], 1 for the most predictable token."""
    asymmetry: NDArray[np.float64]
    """[V], distance between a token's left and right neighbours' distributions."""
    positions: NDArray[np.float32]
    """[V, d], where the simulation ended."""
    eigenvalues: NDArray[np.float64]
    """[modes]."""
    energies: NDArray[np.float64]
    """[steps] of the simulation."""
    converged: bool
    """Whether the simulation ended because its energy rested."""
    digest: str
    """SHA-256 of coordinates and neighbours, in hexadecimal."""

    def geometry(self) -> TokenGeometry:
        """What a model reads, on the CPU."""
        return TokenGeometry(
            torch.from_numpy(self.coordinates.copy()), torch.from_numpy(self.neighbours.astype(np.int64))
        )

    def save(
        self, folder: Path, note: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        """Write ``folder``, which must not exist; ``note`` (JSON) is kept beside the digest, ``files`` in the folder.

        Raises:
            HRSError: if the disk refuses.
        """
        partial = folder.parent / f".{folder.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._write(partial, note or {})
            for name, content in (files or {}).items():
                (partial / name).write_bytes(content)
            for path in (*partial.iterdir(), partial):
                sync(path)
            os.rename(partial, folder)
            sync(folder.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise HRSError(f"manifold {folder} could not be written ({error}): make room, then run again") from error

    def _write(self, folder: Path, note: Mapping[str, Any]) -> None:
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        save_file(arrays, folder / TENSORS)
        document = {
            "format": FORMAT,
            "digest": self.digest,
            "converged": self.converged,
            "sha256": sha256_of(folder / TENSORS),
            "note": dict(note),
        }
        (folder / NOTE).write_text(strict_json.dumps(document, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Manifold":
        """Read and verify a folder.

        Raises:
            HRSError: if it is missing, incomplete, damaged, or of another format.
        """
        try:
            document = json.loads((folder / NOTE).read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise HRSError(
                    f"manifold {folder} has format {document['format']} and this version of hrs reads {FORMAT}: "
                    "delete that folder to compute it again"
                )
            if sha256_of(folder / TENSORS) != document["sha256"]:
                raise ValueError(f"{TENSORS} has another checksum")
            arrays = load_file(folder / TENSORS)
            manifold = cls(
                **{name: arrays[name] for name in _ARRAYS}, converged=document["converged"], digest=document["digest"]
            )
            if manifold.digest != digest_of(manifold.coordinates, manifold.neighbours):
                raise ValueError("digest")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise HRSError(
                f"manifold {folder} is missing or damaged ({error}): delete that folder to compute it again"
            ) from error
        return manifold


_ARRAYS = ("coordinates", "neighbours", "mass", "asymmetry", "positions", "eigenvalues", "energies")


def on_grid(coordinates: NDArray[np.float64]) -> NDArray[np.float32]:
    """[V, N] rounded to multiples of 1e-4."""
    return (np.rint(coordinates * GRID) / GRID).astype(np.float32)


def digest_of(coordinates: NDArray[np.float32], neighbours: NDArray[np.int32]) -> str:
    """SHA-256 of the coordinates in units of 1e-4 and of the neighbours, both as little-endian int32."""
    digest = hashlib.sha256(np.rint(coordinates.astype(np.float64) * GRID).astype("<i4").tobytes())
    digest.update(neighbours.astype("<i4").tobytes())
    return digest.hexdigest()
